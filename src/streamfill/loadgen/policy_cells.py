"""Which traces and loads `streamfill bench policies` measures: a cell is one trace at one load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.errors import ConfigError

LOADS: Final = ("light", "queueing", "saturated")
RATES: Final[Mapping[str, Mapping[str, float]]] = {
    "crawl-small": {"light": 0.4, "queueing": 1.15, "saturated": 1.3},
    "ann-small": {"light": 0.25, "queueing": 0.55, "saturated": 0.8},
}
"""Requests per second on two cores: hardly anybody waits; many do; more than can be served."""
_TRACES_OPTION: Final = "--traces"
_LOADS_OPTION: Final = "--loads"
_RATE_OPTION: Final = "--rate"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One trace at one load.

    Attributes:
        trace: the file's name without its endings.
        rate: requests per second.
    """

    trace: str
    path: Path
    load: str
    rate: float

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.trace} {self.load}"


def parse_cells(traces: str, loads: str, rates: Sequence[str]) -> list[Cell]:
    """All loads of the first trace, then those of the next one.

    Args:
        traces: files, with commas between them.
        loads: names, with commas between them.
        rates: each ``TRACE:LOAD=REQUESTS_PER_S``, before the rates of this module.

    Raises:
        ConfigError: two traces have the same name, a rate is wrong, or a cell has none.
    """
    paths = _paths(traces)
    names = _words(loads, _LOADS_OPTION)
    given = dict(_rate(text) for text in rates)
    for trace, load in given:
        if trace not in paths or load not in names:
            there = f"traces {', '.join(paths)} and loads {', '.join(names)}"
            remedy = f"is no cell of this measurement, which has {there}"
            raise ConfigError(_RATE_OPTION, f"{trace}:{load}", remedy)
    cells = []
    for trace, path in paths.items():
        known = {load: RATES.get(trace, {}).get(load) for load in names}
        known |= {load: rate for (each, load), rate in given.items() if each == trace}
        missing = " ".join(f"{_RATE_OPTION} {trace}:{load}=R" for load in names if not known[load])
        if missing:
            remedy = f"rates of this trace are missing; add, in requests per second: {missing}"
            raise ConfigError(_TRACES_OPTION, str(path), remedy)
        cells += [
            Cell(trace=trace, path=path, load=load, rate=rate)
            for load in names
            if (rate := known[load]) is not None
        ]
    return cells


def _paths(traces: str) -> dict[str, Path]:
    """Each file by its name."""
    paths: dict[str, Path] = {}
    for word in _words(traces, _TRACES_OPTION):
        name = Path(word).name.partition(".")[0]
        if name in paths:
            raise ConfigError(_TRACES_OPTION, word, f"there is another {name}; rename one of them")
        paths[name] = Path(word)
    return paths


def _rate(text: str) -> tuple[tuple[str, str], float]:
    cell, equals, number = text.rpartition("=")
    trace, colon, load = cell.rpartition(":")
    try:
        rate = float(number)
    except ValueError:
        rate = math.nan
    if not (equals and colon and math.isfinite(rate) and rate > 0):
        remedy = "write TRACE:LOAD=REQUESTS_PER_S, such as crawl-small:queueing=0.9"
        raise ConfigError(_RATE_OPTION, text, remedy)
    return (trace.strip(), load.strip()), rate


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(option, text, "has an empty name; write names with commas between them")
    return list(dict.fromkeys(words))
