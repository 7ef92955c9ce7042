"""Policies by name, those of other packages included."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import ConfigError
from streamfill.scheduling import registry
from streamfill.scheduling.plan import StepPlan
from streamfill.scheduling.policy import Policy, PolicyContext
from streamfill.scheduling.published import FcfsPolicy
from streamfill.scheduling.registry import (
    check_policy_spec,
    describe_policies,
    format_policy_spec,
    make_policy,
    parse_policy_spec,
    policy_names,
)
from streamfill.scheduling.snapshot import Snapshot
from streamfill.scheduling.turn_policy import TurnPolicy

words = st.text("abcxyz_019.-", min_size=1, max_size=6)
HERE = "tests.unit.scheduling.test_registry"


class LazyPolicy:
    """Computes nothing at all.

    What is said here is not shown.
    """

    OPTIONS = {"depth": "how lazy; 3"}  # noqa: RUF012  # as a foreign package may write it

    def __init__(self, context: PolicyContext) -> None:
        self.depth = context.number("depth", 3.0, least=1.0)
        self.segment_tokens = context.segment_tokens

    def decide(self, snapshot: Snapshot) -> StepPlan:
        del snapshot
        return StepPlan((), ())


class HalfPolicy(TurnPolicy):
    """Lacks what every policy of its kind has to have."""


class MutePolicy:
    """Decides nothing, for it cannot."""

    def __init__(self, context: PolicyContext) -> None:
        del context


NOT_CALLABLE = 7


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages: one works, one cannot be imported, and one each brings no function, a policy that
    cannot be made, and one that cannot decide."""
    entries = {
        name: EntryPoint(name, value, registry.GROUP)
        for name, value in (
            ("lazy", f"{HERE}:LazyPolicy"),
            ("broken", "no_such_package_at_all:Policy"),
            ("number", f"{HERE}:NOT_CALLABLE"),
            ("half", f"{HERE}:HalfPolicy"),
            ("mute", f"{HERE}:MutePolicy"),
            ("fcfs", f"{HERE}:LazyPolicy"),
        )
    }
    monkeypatch.setattr(registry, "_plug_ins", lambda: entries)


@given(words, st.dictionaries(words, words, max_size=3))
def test_specs_round_trip(name: str, options: dict[str, str]) -> None:
    """What is written is read, whatever the order of the options."""
    text = format_policy_spec(name, options)
    assert parse_policy_spec(text) == (name, options)
    assert format_policy_spec(name, dict(reversed(options.items()))) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fcfs", ("fcfs", {})),
        (" lcas( order = newest ) ", ("lcas", {"order": "newest"})),
        ("laps()", ("laps", {})),
        ("laps(window_ms=1,,long_wait_ms=2)", ("laps", {"window_ms": "1", "long_wait_ms": "2"})),
    ],
)
def test_specs_are_read_generously(text: str, expected: object) -> None:
    """Blanks and empty places are no mistake."""
    assert parse_policy_spec(text) == expected


@pytest.mark.parametrize("text", ["", "(a=b)", "lcas(order=newest", "lcas(order)", "lcas(=x)"])
def test_specs_that_are_none(text: str) -> None:
    """The error has the text and says what the form is."""
    with pytest.raises(ConfigError, match=r"must be|must begin") as raised:
        parse_policy_spec(text)
    assert raised.value.value == text


def test_unknown_policies_are_named_with_what_there_is() -> None:
    """So that a typo can be mended without a manual."""
    with pytest.raises(ConfigError, match="no such policy") as raised:
        make_policy("adaptve")
    assert raised.value.value == "adaptve"
    assert ", ".join(policy_names()) in raised.value.remedy


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("laps(windows_ms=3)", ("laps", "windows_ms", "short_tokens, window_ms, long_wait_ms")),
        ("fcfs(order=newest)", ("fcfs", "order", "known options: preemption")),
        ("lcas(order=random)", ("order", "random", "oldest, newest")),
        ("laps(window_ms=-1)", ("window_ms", "-1", "at least 0")),
        ("laps(short_tokens=many)", ("short_tokens", "many", "must be a number")),
        ("edf(slo_ms=inf)", ("slo_ms", "inf", "must be a number, at least 1")),
        ("adaptive(ageing=nan)", ("ageing", "nan", "must be a number")),
    ],
)
def test_wrong_options_are_named_with_a_remedy(spec: str, parts: tuple[str, ...]) -> None:
    """Which option, what it was set to, what it may be."""
    with pytest.raises(ConfigError) as raised:
        check_policy_spec(spec)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_can_be_had(name: str) -> None:
    """By its name alone; each option takes the default that its explanation ends with."""
    assert check_policy_spec(name) == name
    facts = next(facts for facts in describe_policies() if facts.name == name)
    assert facts.summary
    defaults = {key: text.rpartition("; ")[2] for key, text in facts.options.items()}
    policy: Policy = make_policy(name, defaults, segment_tokens=64)
    assert vars(make_policy(name)).keys() == vars(policy).keys()


def test_default_is_among_them() -> None:
    """The one that servers use where nobody says otherwise."""
    assert registry.DEFAULT_POLICY == policy_names()[0] == "adaptive"


@pytest.mark.usefixtures("plug_ins")
def test_plug_ins_are_policies_too() -> None:
    """They get options and segment size; ours go before theirs of the same name."""
    assert policy_names()[-5:] == ("broken", "half", "lazy", "mute", "number")
    assert policy_names().count("fcfs") == 1
    lazy = make_policy("lazy", {"depth": "4"}, segment_tokens=64)
    assert isinstance(lazy, LazyPolicy)
    assert (lazy.depth, lazy.segment_tokens) == (4.0, 64)
    assert check_policy_spec("lazy(depth=2)") == "lazy(depth=2)"
    assert isinstance(make_policy("fcfs"), FcfsPolicy)


@pytest.mark.usefixtures("plug_ins")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lazy(height=2)", "known options: depth"),
        ("lazy(depth=0)", "at least 1"),
        ("broken", "cannot be loaded: No module named 'no_such_package_at_all'"),
        ("number", "NOT_CALLABLE is not callable"),
        ("half", "cannot be made: .*HalfPolicy.*commit_key"),
        ("mute", r"makes a MutePolicy, which has no decide\(\)"),
    ],
)
def test_what_is_wrong_with_a_plug_in_is_said(spec: str, message: str) -> None:
    """As with our own: a ConfigError, never a traceback of theirs."""
    with pytest.raises(ConfigError, match=message):
        check_policy_spec(spec)


@pytest.mark.usefixtures("plug_ins")
def test_plug_ins_are_described() -> None:
    """By the first line of their docstring; what is broken by its error, and the rest goes on."""
    facts = {facts.name: facts for facts in describe_policies()}
    assert facts["lazy"].summary == "Computes nothing at all."
    assert facts["lazy"].options == {"depth": "how lazy; 3"}
    assert facts["lazy"].source == f"{HERE}:LazyPolicy"
    assert facts["broken"].summary.startswith("BROKEN: ")
    assert "NOT_CALLABLE" in facts["number"].summary
    assert facts["fcfs"].source == "streamfill"
    assert next(iter(facts)) == "adaptive"


def test_plug_ins_are_found_by_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own entry points, asked anew each time."""
    asked: list[str] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("lazy", f"{HERE}:LazyPolicy", group)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert policy_names()[-1] == "lazy"
    assert asked == ["streamfill.policies"]
