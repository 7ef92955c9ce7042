"""Placement policies by name, with options, and of other packages."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from router.placement import ServerLoad, registry
from router.placement.interface import (
    Choice,
    PlacementContext,
    PlacementPolicy,
    PlacementReason,
    PlacementRequest,
)
from router.placement.placer import Placement, PlacementOutcome, Placer
from router.placement.registry import format_placement, make_placement, placement_names
from streamfill.config import ClusterConfig, RouterSection, check_cluster
from streamfill.errors import ConfigError
from streamfill.stream.ids import ServerId
from tests.unit.router.placement.test_policies import SHIPPED, load, request


class LastPolicy(PlacementPolicy):
    """A plug-in: the last server, or nonsense."""

    OPTIONS = {"answer": "what to say instead"}  # noqa: RUF012  as a newcomer writes it

    def __init__(self, context: PlacementContext) -> None:
        self.answer = context.options.get("answer")

    def choose(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> ServerId:
        if self.answer == "raise":
            raise RuntimeError("broken")
        return ServerId(self.answer or servers[-1].server_id)


class TellingPolicy(LastPolicy):
    """One that says why, and how much of the prompt it expects to find."""

    OPTIONS = {"found": "tokens", "reason": "why"}  # noqa: RUF012

    def __init__(self, context: PlacementContext) -> None:
        super().__init__(context)
        self.told: Any = (
            context.options.get("reason", PlacementReason.AFFINITY),
            int(context.options["found"]),
        )

    def decide(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> Choice:
        return Choice(self.choose(request, servers), *self.told)


def not_a_policy(context: PlacementContext) -> str:
    """Another plug-in."""
    return str(context)


class HalfPolicy(PlacementPolicy):
    """One more, without what every policy has to have."""


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package had these entry points."""
    here = __name__
    entries = [
        EntryPoint("last", f"{here}:LastPolicy", registry.GROUP),
        EntryPoint("telling", f"{here}:TellingPolicy", registry.GROUP),
        EntryPoint("wrong", f"{here}:not_a_policy", registry.GROUP),
        EntryPoint("half", f"{here}:HalfPolicy", registry.GROUP),
        EntryPoint("absent", "no_such_module:Policy", registry.GROUP),
    ]

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [entry for entry in entries if entry.group == group]

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_shipped_policies_are_known() -> None:
    """By the names that the documents use."""
    assert placement_names()[: len(SHIPPED)] == SHIPPED
    for name in SHIPPED:
        assert isinstance(make_placement(name, {}), PlacementPolicy)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nearest", {}, "there is no such policy; known: least-loaded, round-robin"),
        ("round-robin", {"seed": "1"}, "is no option of round-robin; it has none"),
        ("dualmap", {"slack": "1"}, "known options: prefix_tokens, slack_tokens"),
        ("power-of-two", {"seed": "x"}, "must be a whole number between 0 and"),
        ("cache-aware", {"block_tokens": "0"}, "must be a whole number between 1 and 4096"),
        ("last", {"answe": "a"}, "is no option of last; known options: answer"),
        ("wrong", {}, "makes a str, no PlacementPolicy"),
        ("half", {}, "its plug-in cannot be made: .*HalfPolicy"),
        ("absent", {}, "its plug-in cannot be loaded: No module named 'no_such_module'"),
    ],
)
@pytest.mark.usefixtures("plug_ins")
def test_what_cannot_be_had_is_refused(name: str, options: dict[str, str], message: str) -> None:
    """With the value and what would be right, also when a cluster file says it."""
    with pytest.raises(ConfigError, match=message):
        make_placement(name, options)
    section = RouterSection(placement=name, placement_options=options)
    with pytest.raises(ConfigError, match=r"router\.placement"):
        check_cluster(ClusterConfig(router=section))


@pytest.mark.usefixtures("plug_ins")
def test_a_plug_in_chooses() -> None:
    """By the name of its entry point."""
    seen: list[Placement] = []
    placer = Placer(make_placement("last", {}), "last", seen.append)
    loads = [load("a"), load("b", num_streams=9)]
    assert placer.choose(request(placer.policy, [7] * 9), loads, need_tokens=1, avoid=()) == "b"
    assert seen == [Placement(PlacementOutcome.CHOSEN, Choice(ServerId("b")), 9)]


@pytest.mark.usefixtures("plug_ins")
@pytest.mark.parametrize(("told", "counted"), [(-5, 0), (4, 4), (50, 9)])
def test_a_plug_in_may_say_why(told: int, counted: int) -> None:
    """No more of the prompt is found than there is, whatever it says."""
    seen: list[Placement] = []
    placer = Placer(make_placement("telling", {"found": str(told)}), "telling", seen.append)
    placer.choose(request(placer.policy, [7] * 9), [load("a")], need_tokens=1, avoid=())
    assert [each.choice for each in seen] == [
        Choice(ServerId("a"), PlacementReason.AFFINITY, counted)
    ]


@pytest.mark.usefixtures("plug_ins")
def test_a_reason_that_cannot_be_counted_is_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    """Of the plug-in, which costs no stream."""
    seen: list[Placement] = []
    policy = make_placement("telling", {"found": "1", "reason": "because"})
    placer = Placer(policy, "telling", seen.append)
    assert placer.choose(request(policy), [load("a")], need_tokens=1, avoid=()) == "a"
    assert "placement_failed" in caplog.text
    assert seen == [Placement(PlacementOutcome.REPLACED)]


def test_nobody_can_take_it() -> None:
    """Nobody is asked; it is told."""
    seen: list[Placement] = []
    placer = Placer(make_placement("pull", {}), "pull", seen.append)
    loads = [load("a", pool_tokens=10)]
    assert placer.choose(request(placer.policy), loads, need_tokens=11, avoid=()) is None
    assert seen == [Placement(PlacementOutcome.NOWHERE)]


@pytest.mark.usefixtures("plug_ins")
@pytest.mark.parametrize("answer", ["raise", "c", "dead"])
def test_a_bad_answer_is_not_taken(answer: str, caplog: pytest.LogCaptureFixture) -> None:
    """The least loaded server gets the stream, and the log says why."""
    seen: list[Placement] = []
    policy = make_placement("last", {"answer": answer})
    placer = Placer(policy, "last(answer=...)", seen.append)
    loads: list[Any] = [load("a", num_streams=1), load("b")]
    assert placer.choose(request(placer.policy), loads, need_tokens=1, avoid=()) == "b"
    assert "placement_failed" in caplog.text
    assert seen == [Placement(PlacementOutcome.REPLACED)]


def test_a_policy_is_shown_with_its_options() -> None:
    """In the order of their names."""
    assert format_placement("pull", {}) == "pull"
    assert format_placement("dualmap", {"b": "2", "a": "1"}) == "dualmap(a=1,b=2)"
