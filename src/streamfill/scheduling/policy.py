"""What every scheduling policy is.

A policy of your own is a function ``(PolicyContext) -> Policy`` in an entry point of the group
``streamfill.policies``; see ``registry``. Most are a ``turns.TurnPolicy`` with two keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from streamfill.errors import ConfigError
from streamfill.scheduling.plan import StepPlan
from streamfill.scheduling.snapshot import Snapshot

LONG_STEP: Final = 4
"""A step that can be interrupted may have as many tokens as so many others: it keeps nobody waiting
for longer than a layer, and its fixed costs are paid once."""


class Policy(Protocol):
    """Chooses what runs next."""

    def decide(self, snapshot: Snapshot) -> StepPlan:
        """The next step.

        Called by the server's loop whenever the engine can take work and something changed; takes
        microseconds. The same snapshot gives the same plan on every tensor-parallel rank, whatever
        was decided before: what a policy remembers is only there to make it faster.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PolicyContext:
    """What a policy is made with."""

    segment_tokens: int | None = None
    """Tokens of uncommitted streams in one step; a commit that comes meanwhile waits for them. At
    least a page runs in any case. None: the whole budget."""
    can_interrupt: bool = False
    """The server can run commits between two layers of a step (``StepPlan.interruptible``), so that
    they do not wait for its end."""
    options: Mapping[str, str] = field(default_factory=dict)
    """As given by the user, by name; the registry has checked the names."""

    def choice(self, name: str, default: str, *others: str) -> str:
        """The option ``name``, one of ``default`` and ``others``.

        Raises:
            ConfigError: it is neither.
        """
        value = self.options.get(name, default)
        if value not in (default, *others):
            known = ", ".join((default, *others))
            raise ConfigError(f"policy option {name}", value, f"must be one of: {known}")
        return value

    def number(self, name: str, default: float, *, least: float) -> float:
        """The option ``name`` as a finite number of at least ``least``.

        Raises:
            ConfigError: it is not.
        """
        text = self.options.get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise ConfigError(
                f"policy option {name}", text, f"must be a number, at least {least:g}"
            )
        return value
