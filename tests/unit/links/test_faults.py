"""Link faults: what is asked for happens, to both ends' frames, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from streamfill.errors import ConfigError
from streamfill.links.faults import (
    LONGEST_DELAY_S,
    SLOW_BY_S,
    SLOW_FOR_S,
    VARIABLE,
    DelayedFrames,
    LinkFault,
    LinkFaultPlan,
    LinkFaults,
)


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def faults_of(clock: Clock, *kinds: LinkFault, every: int = 1, seed: int = 1) -> LinkFaults:
    return LinkFaults(LinkFaultPlan(every=every, seed=seed, kinds=kinds), "prefill-0", clock)


def test_the_variable_is_read() -> None:
    """Blanks do not matter; kinds and file may be left out."""
    assert LinkFaultPlan.parse(" every=5, seed=7 ") == LinkFaultPlan(every=5, seed=7)
    plan = LinkFaultPlan.parse("every=1,seed=2,kinds=dropped+slow,while=/tmp/on")
    assert plan.kinds == (LinkFault.DROPPED, LinkFault.SLOW)
    assert plan.while_file == Path("/tmp/on")


@pytest.mark.parametrize(
    "text",
    ["", "every=5", "every=0,seed=1", "every=x,seed=1", "every=1,seed=1,kinds=eaten", "1", "a=1"],
)
def test_what_cannot_be_read_says_so(text: str) -> None:
    """With the name of the variable, the value and the remedy."""
    with pytest.raises(ConfigError, match=f"{VARIABLE} = .*write every=N,seed=N"):
        LinkFaultPlan.parse(text)


def test_without_the_variable_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with it there are."""
    monkeypatch.delenv(VARIABLE, raising=False)
    assert LinkFaults.from_environment("router") is None
    monkeypatch.setenv(VARIABLE, "every=1,seed=1,kinds=dropped")
    faults = LinkFaults.from_environment("router")
    assert faults is not None
    assert faults.delays_s("peer", object()) == ()


def test_each_kind_does_what_it_says() -> None:
    """A frame is sent never, twice, later, or later with all behind it."""
    clock = Clock()
    assert faults_of(clock, LinkFault.DROPPED).delays_s("a", 1) == ()
    once, again = faults_of(clock, LinkFault.DUPLICATED).delays_s("a", 1)
    assert once == 0.0
    assert 0.0 < again <= LONGEST_DELAY_S
    (late,) = faults_of(clock, LinkFault.DELAYED).delays_s("a", 1)
    assert 0.0 < late <= LONGEST_DELAY_S
    (slow,) = faults_of(clock, LinkFault.SLOW).delays_s("a", 1)
    assert slow == pytest.approx(SLOW_BY_S)


def test_one_of_so_many_is_spoiled_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """By the seed and the sender, and logged with its kind."""

    def play(seed: int, sender: str) -> list[tuple[float, ...]]:
        plan = LinkFaultPlan(every=10, seed=seed)
        faults = LinkFaults(plan, sender, Clock())
        delays = [faults.delays_s(number, number) for number in range(2_000)]
        assert faults.num_by_kind.total() == sum(each != (0.0,) for each in delays)
        assert 130 < faults.num_by_kind.total() < 270
        assert set(faults.num_by_kind) == set(LinkFault)
        return delays

    assert play(1, "a") == play(1, "a")
    assert play(1, "a") != play(2, "a")
    assert play(1, "a") != play(1, "b")
    kinds = Counter(
        kind.value
        for kind in LinkFault
        for record in caplog.records
        if f"link_fault_injected kind={kind.value} message=int" in record.getMessage()
    )
    assert len(kinds) == len(LinkFault)


def test_a_slow_link_keeps_its_order_and_the_others_are_quick() -> None:
    """Nothing overtakes what it delays, also not when it is over."""
    clock = Clock()
    faults = faults_of(clock, LinkFault.SLOW, every=10)
    while faults.delays_s("slow", 1) == (0.0,):
        pass
    faults._plan = LinkFaultPlan(every=1_000_000, seed=1)
    arrivals = []
    while clock.now_s < 100 + SLOW_FOR_S + 2 * SLOW_BY_S:
        (delay_s,) = faults.delays_s("slow", 1)
        assert faults.delays_s("another", 1) == (0.0,)
        arrivals.append(clock.now_s + delay_s)
        clock.now_s += 0.01
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == pytest.approx(100 + SLOW_BY_S)
    assert faults.delays_s("slow", 1) == (0.0,)


def test_faults_happen_only_while_the_file_is_there(tmp_path: Path) -> None:
    """It may come and go."""
    clock, file = Clock(), tmp_path / "on"
    plan = LinkFaultPlan(every=1, seed=1, kinds=(LinkFault.DROPPED,), while_file=file)
    faults = LinkFaults(plan, "router", clock)
    for is_on in (False, True, False):
        if is_on:
            file.touch()
        else:
            file.unlink(missing_ok=True)
        clock.now_s += 1.0
        assert faults.delays_s("a", 1) == (() if is_on else (0.0,))


def test_delayed_frames_come_when_they_are_due() -> None:
    """In the order of their times, those of one time in the order in which they were put."""
    frames = DelayedFrames()
    for due_s, frame in ((2.0, b"c"), (1.0, b"a"), (1.0, b"b"), (9.0, b"d")):
        frames.put(due_s, frame)
    assert frames.next_s == 1.0
    assert frames.take(0.9) == []
    assert frames.take(2.0) == [b"a", b"b", b"c"]
    frames.clear()
    assert frames.take(10.0) == []
    assert frames.next_s == float("inf")
