"""The modes of a comparison, as people write them: ``oneshot,stream@lcas(order=newest),vllm``.

A mode of our cluster may name the policy that prefill servers schedule by, behind an ``@``; how a
policy is written is said in ``scheduling.registry``. Without one, ``stream`` has the policy of
``--policy``, and ``oneshot`` and ``warmup`` that of ``--baseline-policy``: arrival order, which is
what servers without streams do. Peers schedule by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from streamfill.errors import ConfigError
from streamfill.loadgen.compare import OWN_ENGINE, Variant
from streamfill.loadgen.records import ModeName
from streamfill.scheduling.registry import (
    DEFAULT_POLICY,
    PREEMPTION_MODES,
    PREEMPTION_OPTION,
    check_policy_spec,
    describe_policies,
    format_policy_spec,
    parse_policy_spec,
)

MODES_OPTION: Final = "--modes"
BASELINE_POLICY: Final = "default"
ALL_POLICIES: Final = "all"
_OWN_SOURCE: Final = "streamfill"
_READINGS: Final = {"lcas": ("lcas", "lcas(order=newest)")}
"""Policies that were published in two readings; both are compared."""
_OWN_MODES: Final = {
    mode.value: mode for mode in (ModeName.ONESHOT, ModeName.WARMUP, ModeName.STREAM)
}
_PEER_MODES: Final = {
    "sglang-pd": (ModeName.ONESHOT, ModeName.WARMUP),
    "vllm": (ModeName.ONESHOT, ModeName.WARMUP, ModeName.STREAM),
}
"""What each peer can do at all."""


def parse_modes(
    spec: str,
    *,
    policy: str = DEFAULT_POLICY,
    baseline_policy: str = BASELINE_POLICY,
    preemption: str | None = None,
) -> list[Variant]:
    """The variants of a list, each once: a mode is our cluster's, a peer stands for all that it can
    do, ``@all`` for all policies of this package.

    Args:
        policy: of a plain ``stream``.
        baseline_policy: of a plain ``oneshot`` or ``warmup``.
        preemption: every ``stream`` of ours in each of these preemption modes.

    Raises:
        ConfigError: a mode or a policy is not known, or a peer cannot do a mode.
    """
    policy = check_policy(policy, "--policy")
    baseline_policy = check_policy(baseline_policy, "--baseline-policy")
    plain = {ModeName.STREAM: policy}
    found = [
        replace(each, policy=plain.get(each.mode, baseline_policy)) if _is_plain(each) else each
        for word in split_words(spec)
        for each in _variants(word, spec)
    ]
    if preemption is not None:
        modes = _preemption_modes(preemption)
        found = [each for one in found for each in _in_preemption_modes(one, modes)]
    return list(dict.fromkeys(found))


def _preemption_modes(spec: str) -> list[str]:
    modes = split_words(spec)
    for mode in modes:
        if mode not in PREEMPTION_MODES:
            known = ", ".join(PREEMPTION_MODES)
            raise ConfigError("--preemption", mode, f"is no preemption mode; known: {known}")
    return modes


def _in_preemption_modes(variant: Variant, modes: Sequence[str]) -> list[Variant]:
    if variant.engine != OWN_ENGINE or variant.mode is not ModeName.STREAM:
        return [variant]
    name, options = parse_policy_spec(variant.policy)
    found: list[Variant] = []
    for mode in modes:
        policy = format_policy_spec(name, {**options, PREEMPTION_OPTION: mode})
        found.append(replace(variant, policy=policy, written=policy))
    return found


def parse_policies(spec: str, option: str) -> list[str]:
    """The policies of ``fcfs,lcas(order=newest)``, as written and each once; ``all``: see
    `shipped_policies`.

    Raises:
        ConfigError: one is not known; names the option.
    """
    found: list[str] = []
    for word in split_words(spec):
        found += shipped_policies() if word == ALL_POLICIES else [word]
    for word in found:
        check_policy(word, option)
    return list(dict.fromkeys(found))


def shipped_policies() -> list[str]:
    """Every policy of this package, in each reading of it."""
    own = [each.name for each in describe_policies() if each.source == _OWN_SOURCE]
    return [text for name in own for text in _READINGS.get(name, (name,))]


def check_policy(text: str, option: str) -> str:
    """The canonical form of a policy.

    Raises:
        ConfigError: there is no such policy, or not with these options; names the option.
    """
    try:
        return check_policy_spec(text)
    except ConfigError as error:
        raise ConfigError(option, text, str(error)) from error


def split_words(text: str) -> list[str]:
    """What stands between commas that are not inside brackets, without blanks around it."""
    words, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth <= 0:
            words.append("")
        else:
            words[-1] += character
    return [word.strip() for word in words]


def _is_plain(variant: Variant) -> bool:
    return variant.engine == OWN_ENGINE and not variant.written


def _variants(word: str, spec: str) -> list[Variant]:
    head, at, policy = word.partition("@")
    engine, colon, name = head.partition(":")
    if at and engine in _PEER_MODES:
        remedy = f"{engine} schedules by itself; write {head} without @{policy}"
        raise ConfigError(MODES_OPTION, spec, remedy)
    if not colon and head in _OWN_MODES:
        mode = _OWN_MODES[head]
        if not at:
            return [Variant(engine=OWN_ENGINE, mode=mode)]
        return [
            Variant(
                engine=OWN_ENGINE, mode=mode, policy=check_policy(text, MODES_OPTION), written=text
            )
            for text in (shipped_policies() if policy == ALL_POLICIES else [policy])
        ]
    if engine in _PEER_MODES:
        modes = _PEER_MODES[engine]
        if not colon:
            return [Variant(engine=engine, mode=mode) for mode in modes]
        for mode in modes:
            if mode.value == name:
                return [Variant(engine=engine, mode=mode)]
        can = ", ".join(f"{engine}:{mode.value}" for mode in modes)
        raise ConfigError(MODES_OPTION, spec, f"{word} does not exist; {engine} can do: {can}")
    known = ", ".join([*_OWN_MODES, *_PEER_MODES])
    remedy = f"there is no mode {head!r}; known: {known}; a policy goes behind it: stream@fcfs"
    raise ConfigError(MODES_OPTION, spec, remedy)
