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
POLICIES: Final = ("fcfs",)
"""Orders of work that a prefill server of this version can follow; see ``scheduling.fcfs``."""
_OPTION: Final = "--modes"
_OWN_MODES: Final = (ModeName.ONESHOT, ModeName.WARMUP, ModeName.STREAM)
_PEER_MODES: Final = {
    "sglang-pd": (ModeName.ONESHOT, ModeName.WARMUP),
    "vllm": (ModeName.ONESHOT, ModeName.WARMUP, ModeName.STREAM),
}
"""What each peer can do at all."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a client does, and with whom."""

    engine: str
    mode: ModeName

    @property
    def label(self) -> str:
        """What it is called in tables and options: ``stream``, ``vllm:warmup``."""
        mode = self.mode.value
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


def parse_modes(spec: str) -> list[Variant]:
    """The variants of ``oneshot,warmup,stream,sglang-pd,vllm:stream``: a mode is our cluster's, a
    peer stands for all that it can do.

    Raises:
        ConfigError: a name is not known, or a peer cannot do a mode.
    """
    variants: list[Variant] = []
    for word in (word.strip() for word in spec.split(",")):
        variants.extend(v for v in _variants(word, spec) if v not in variants)
    return variants


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


def check_policy(name: str) -> str:
    """``name``, if this version has such a policy.

    Raises:
        ConfigError: it has not.
    """
    if name not in POLICIES:
        known = ", ".join(POLICIES)
        raise ConfigError("--policy", name, f"this version has no such policy; it has: {known}")
    return name


def _variants(word: str, spec: str) -> list[Variant]:
    engine, colon, name = word.partition(":")
    own = {mode.value: mode for mode in _OWN_MODES}
    if not colon and word in own:
        return [Variant(engine=OWN_ENGINE, mode=own[word])]
    if engine in _PEER_MODES:
        modes = _PEER_MODES[engine]
        if not colon:
            return [Variant(engine=engine, mode=mode) for mode in modes]
        for mode in modes:
            if mode.value == name:
                return [Variant(engine=engine, mode=mode)]
        can = ", ".join(f"{engine}:{mode.value}" for mode in modes)
        raise ConfigError(_OPTION, spec, f"{word} does not exist; {engine} can do: {can}")
    known = ", ".join([*own, *_PEER_MODES])
    raise ConfigError(_OPTION, spec, f"there is no mode {word!r}; known: {known}")


def _turned(variants: list[Variant], run: int) -> list[Variant]:
    """The order of one repetition: forwards, the same backwards, then each begins one later."""
    start = run // 2 % len(variants)
    order = variants[start:] + variants[:start]
    return order[::-1] if run % 2 else order
