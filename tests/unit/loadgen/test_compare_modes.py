"""Modes of a comparison as people write them."""

from __future__ import annotations

import pytest

from streamfill.errors import ConfigError
from streamfill.loadgen.compare_modes import (
    parse_modes,
    parse_policies,
    shipped_policies,
    split_words,
)
from streamfill.scheduling.registry import policy_names


def test_names_of_modes() -> None:
    """A mode is ours, a peer stands for all that it can do, each once."""
    found = [v.label for v in parse_modes("stream, vllm,vllm:stream,oneshot,sglang-pd")]
    assert found == [
        "stream",
        "vllm:oneshot",
        "vllm:warmup",
        "vllm:stream",
        "oneshot",
        "sglang-pd:oneshot",
        "sglang-pd:warmup",
    ]


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("oneshoot", "no mode 'oneshoot'; known: oneshot, warmup, stream, sglang-pd, vllm"),
        ("", "no mode ''"),
        ("oneshot,", "no mode ''"),
        ("sglang-pd:stream", "sglang-pd can do: sglang-pd:oneshot, sglang-pd:warmup"),
        ("vllm:fast", "vllm can do: vllm:oneshot"),
        ("ours:stream", "no mode 'ours:stream'"),
        ("vllm:stream@fcfs", "vllm schedules by itself; write vllm:stream without @fcfs"),
        ("stream@fastest", "--modes = 'fastest'"),
        ("stream@lcas(order=middle)", "order"),
        ("stream@", "--modes = ''"),
    ],
)
def test_unknown_modes(spec: str, part: str) -> None:
    """The error names the option, the word and what there is."""
    with pytest.raises(ConfigError, match="--modes") as caught:
        parse_modes(spec)
    assert part in str(caught.value)


def test_a_mode_names_its_policy() -> None:
    """The label is the text as written, the policy its canonical form."""
    found = parse_modes("stream@fcfs, stream@lcas( order = newest ),oneshot@adaptive,warmup@mcps")
    assert [(v.label, v.policy) for v in found] == [
        ("stream@fcfs", "fcfs"),
        ("stream@lcas( order = newest )", "lcas(order=newest)"),
        ("oneshot@adaptive", "adaptive"),
        ("warmup@mcps", "mcps"),
    ]


def test_plain_modes_have_the_policies_of_the_options() -> None:
    """Streams are scheduled adaptively, baselines in arrival order; peers have no policy."""
    plain = {v.label: v.policy for v in parse_modes("oneshot,warmup,stream,vllm:stream")}
    assert plain == {
        "oneshot": "default",
        "warmup": "default",
        "stream": "adaptive",
        "vllm:stream": "",
    }
    chosen = parse_modes("oneshot,warmup,stream,stream@mcps", policy="fcfs", baseline_policy="laps")
    assert [v.policy for v in chosen] == ["laps", "laps", "fcfs", "mcps"]


@pytest.mark.parametrize("option", ["policy", "baseline_policy"])
def test_unknown_policies_of_options(option: str) -> None:
    """The error names the option, the value and the policies that there are."""
    name = f"--{option.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"^{name} = 'fastest'.*known: .*fcfs"):
        parse_modes("stream", **{option: "fastest"})


def test_all_policies() -> None:
    """`@all` is each shipped policy once, in both readings where there are two; any mode has it."""
    policies = shipped_policies()
    assert {"adaptive", "default", "lcas", "lcas(order=newest)"} <= set(policies)
    assert len(set(policies)) == len(policies) == len(set(policy_names())) + 1
    labels = [v.label for v in parse_modes("stream@all,oneshot@all,stream@fcfs")]
    assert labels == [f"{mode}@{name}" for mode in ("stream", "oneshot") for name in policies]


def test_lists_of_policies() -> None:
    """Each once, as written; a wrong one is said to be the option's."""
    assert parse_policies("fcfs, lcas(order=newest),fcfs", "--policies") == [
        "fcfs",
        "lcas(order=newest)",
    ]
    assert parse_policies("all", "--policies") == shipped_policies()
    with pytest.raises(ConfigError, match="--policies = 'x'"):
        parse_policies("fcfs,x", "--policies")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a, b", ["a", "b"]),
        ("a(x=1,y=2),b", ["a(x=1,y=2)", "b"]),
        ("a((,),),b", ["a((,),)", "b"]),
        ("a(x,b", ["a(x,b"]),
        ("a),b", ["a)", "b"]),
        ("", [""]),
    ],
)
def test_commas_inside_brackets_do_not_split(text: str, words: list[str]) -> None:
    """Brackets that do not match cannot swallow more than what follows an open one."""
    assert split_words(text) == words
