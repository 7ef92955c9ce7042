"""What a request must achieve to count as good: ``--goodput ttft:500 tpot:50``, in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from streamfill.errors import ConfigError
from streamfill.loadgen.figures import Figure

_OPTION: Final = "--goodput"
_FIGURES: Final[dict[str, Figure]] = {
    "ttft": Figure.TTFT_LAST_SEGMENT,
    "ttft_query": Figure.TTFT_QUERY,
    "ttft_commit": Figure.TTFT_COMMIT,
    "tpot": Figure.TPOT,
    "e2e": Figure.E2E,
}
"""By the name in the option. Without a suffix, ``ttft`` runs from the last segment."""


class Goodput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Objectives of a request.

    Attributes:
        objectives_ms: the most that each figure may be, in ms, by its name in ``Figure``.
    """

    objectives_ms: dict[str, float]

    def is_met(self, figures_ms: Mapping[Figure, float | None]) -> bool:
        """Whether a request that completed meets all objectives.

        A figure that the request does not have is not missed: an answer of one token has no time
        per further token. Without a time to the first token nothing was answered.
        """
        for name, most_ms in self.objectives_ms.items():
            figure = Figure(name)
            value_ms = figures_ms.get(figure)
            if value_ms is None:
                if figure is not Figure.TPOT:
                    return False
            elif value_ms > most_ms:
                return False
        return True


def parse_goodput(words: Sequence[str] | None) -> Goodput | None:
    """The objectives of words such as ``ttft:500``; None where none are given.

    Raises:
        ConfigError: a word has another form, names no figure, or one twice, or its limit is no
            time.
    """
    if not words:
        return None
    objectives_ms: dict[str, float] = {}
    for word in words:
        name, colon, limit = word.partition(":")
        if not colon:
            raise ConfigError(_OPTION, word, "write NAME:MILLISECONDS, such as ttft:500")
        figure = _FIGURES.get(name)
        if figure is None:
            known = ", ".join(_FIGURES)
            raise ConfigError(_OPTION, word, f"there is no figure {name!r}; known: {known}")
        if figure.value in objectives_ms:
            raise ConfigError(_OPTION, word, f"{name} is given twice; give one limit")
        objectives_ms[figure.value] = _limit_ms(word, limit)
    return Goodput(objectives_ms=objectives_ms)


def _limit_ms(word: str, limit: str) -> float:
    try:
        value_ms = float(limit)
    except ValueError:
        value_ms = math.nan
    if not (math.isfinite(value_ms) and value_ms > 0):
        raise ConfigError(_OPTION, word, "the limit must be a number of milliseconds above 0")
    return value_ms
