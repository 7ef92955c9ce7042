"""Which runs a comparison makes, and in which order. Pure.

One engine runs after the other, so that none disturbs another, and each is started once. While it
runs, all repetitions of all its modes are made; the order of the modes turns round from repetition
to repetition, so that a machine that grows slower or faster favours none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from streamfill.errors import ConfigError
from streamfill.loadgen.records import ModeName

OWN_ENGINE: Final = "streamfill"
_OPTION: Final = "--modes"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a client does, with whom, and how the servers schedule it.

    Attributes:
        policy: the canonical form of the policy that is set before each run; empty for a peer.
        written: the policy as the user wrote it behind the mode; empty: it was left out.
    """

    engine: str
    mode: ModeName
    policy: str = ""
    written: str = ""

    @property
    def label(self) -> str:
        """What it is called in tables and options: ``stream``, ``stream@fcfs``,
        ``vllm:warmup``."""
        mode = f"{self.mode.value}@{self.written}" if self.written else self.mode.value
        return mode if self.engine == OWN_ENGINE else f"{self.engine}:{mode}"


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run: a variant and the number of its repetition, from 0."""

    variant: Variant
    run: int


@dataclass(frozen=True, kw_only=True)
class EngineSession:
    """All runs between one start of an engine and its end."""

    engine: str
    runs: tuple[PlannedRun, ...]


def plan_runs(variants: Sequence[Variant], num_runs: int) -> list[EngineSession]:
    """All runs, engine by engine in the order of their first variant.

    Raises:
        ConfigError: there is nothing to run.
    """
    if not variants:
        raise ConfigError(_OPTION, "", "name at least one mode")
    if num_runs < 1:
        raise ConfigError("--runs", num_runs, "must be at least 1")
    engines = list(dict.fromkeys(variant.engine for variant in variants))
    return [
        EngineSession(
            engine=engine,
            runs=tuple(
                PlannedRun(variant=variant, run=run)
                for run in range(num_runs)
                for variant in _turned([v for v in variants if v.engine == engine], run)
            ),
        )
        for engine in engines
    ]


def split_by_trace(
    variants: Sequence[Variant], *, has_updates: bool
) -> tuple[list[Variant], dict[str, str]]:
    """The variants that can replay a trace, and by label why the others cannot.

    Raises:
        ConfigError: none can.
    """
    skipped: dict[str, str] = {}
    if has_updates:
        for variant in variants:
            if variant.engine == "vllm" and variant.mode is ModeName.STREAM:
                skipped[variant.label] = "its streaming input cannot replace context; trace updates"
    kept = [variant for variant in variants if variant.label not in skipped]
    if not kept:
        label, reason = next(iter(skipped.items()))
        raise ConfigError(_OPTION, label, f"{reason}; name a mode that can")
    return kept, skipped


def _turned(variants: list[Variant], run: int) -> list[Variant]:
    """The order of one repetition: forwards, the same backwards, then each begins one later."""
    start = run // 2 % len(variants)
    order = variants[start:] + variants[:start]
    return order[::-1] if run % 2 else order
