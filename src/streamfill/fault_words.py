"""What an environment variable says of faults that a process is to inject, for tests.

::

    every=50,seed=1
    every=20,seed=1,kinds=dropped+slow,while=/tmp/faults
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from streamfill.errors import ConfigError

_KEYS = ("every", "seed", "kinds", "while")
_Kind = TypeVar("_Kind", bound=enum.Enum)


@dataclass(frozen=True)
class FaultWords(Generic[_Kind]):
    """How often, and what."""

    every: int
    """Of so many one is spoiled; at least 1."""
    seed: int
    kinds: tuple[_Kind, ...]
    while_file: Path | None
    """Only while it exists. None: always."""


def read_fault_words(variable: str, text: str, kinds: type[_Kind]) -> FaultWords[_Kind]:
    """Read what the environment says.

    Args:
        variable: its name.
        text: its value.
        kinds: that there are; all of them where the text names none.

    Raises:
        ConfigError: it cannot be read, or says nothing sensible.
    """
    remedy = (
        "write every=N,seed=N, and if you like kinds=A+B with kinds of "
        f"{', '.join(str(kind.value) for kind in kinds)}, and while=FILE; or unset it"
    )
    values: dict[str, str] = {}
    for word in text.split(","):
        key, equals, value = word.strip().partition("=")
        if key not in _KEYS or not equals or key in values:
            raise ConfigError(variable, text, f"{word!r} is not understood; {remedy}")
        values[key] = value
    try:
        every, seed = int(values["every"]), int(values["seed"])
        names = values.get("kinds")
        chosen = tuple(kinds) if names is None else tuple(map(kinds, names.split("+")))
    except (KeyError, ValueError) as error:
        raise ConfigError(variable, text, f"{error}; {remedy}") from error
    if every < 1:
        raise ConfigError(variable, text, f"every must be at least 1; {remedy}")
    file = Path(values["while"]) if "while" in values else None
    return FaultWords(every, seed, chosen, file)
