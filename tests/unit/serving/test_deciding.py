"""From a server's records to decisions, and back to what is learned and told."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import pytest

from streamfill.errors import ConfigError
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import StreamDecision, StreamMode
from streamfill.preemption.standing import StandingPlan
from streamfill.scheduling.plan import SENTENCES, DeferReason, RunReason, StepPlan
from streamfill.scheduling.snapshot import StepCosts
from streamfill.serving.deciding import Decider, PolicySetting, PreemptionSetting
from streamfill.serving.records import InFlight, Phase, StreamRecord
from tests.support.fake_engine import FakeEngine
from tests.unit.serving.builders import (
    STEP_TOKENS,
    PrefillUnderTest,
    commit,
    opened,
    splice,
    tokens,
)


class WatchedEngine(FakeEngine):
    """Remembers which victim orders it was told."""

    def __init__(self, pool_tokens: int = 4096) -> None:
        super().__init__(pool_tokens=pool_tokens)
        self.orders: list[list[int]] = []

    def set_victim_order(
        self, ranks: Mapping[int, int], to_save: frozenset[int] = frozenset()
    ) -> None:
        super().set_victim_order(ranks, to_save)
        self.orders.append(sorted(ranks, key=ranks.__getitem__))


class Streams:
    """A decider and the records of a core that is not there."""

    def __init__(self, policy: PolicySetting | None = None, pool_tokens: int = 4096) -> None:
        self.engine = WatchedEngine(pool_tokens)
        self.decider = Decider(
            self.engine,
            StandingPlan(),
            policy or PolicySetting(),
            PreemptionSetting(),
            step_tokens=STEP_TOKENS,
        )
        self.records: dict[int, StreamRecord] = {}
        self.by_key: dict[str, StreamRecord] = {}
        self.now_s = 100.0

    def add(self, stream_id: int, num_tokens: int, *, committed: bool = False) -> StreamRecord:
        record = StreamRecord(stream_id, 1, StreamMode.APPEND, 0, self.now_s)
        self.records[stream_id] = record
        record.splice(0, array("q", tokens(num_tokens, stream_id)), self.now_s)
        if committed:
            self.commit(record)
        self.decider.touch(record)
        return record

    def commit(self, record: StreamRecord) -> None:
        record.committed_s = self.now_s
        record.advance(Phase.COMMITTED)
        self.decider.touch(record)

    def start(self, record: StreamRecord, num_tokens: int) -> None:
        """As the core does with a run of the plan."""
        key = f"{record.stream_id}"
        record.in_flight = InFlight(key, num_tokens, num_tokens, num_tokens)
        self.by_key[key] = record
        self.engine.start_segment(key, record.stream_id, record.ids[:num_tokens], namespace="")
        self.decider.touch(record)

    def decide(self) -> StepPlan:
        return self.decider.decide(self.records, self.by_key, self.now_s)

    def order(self) -> list[int]:
        return [run.stream_id for run in self.decide().runs]

    def described(self) -> dict[int, StreamDecision]:
        answer = self.decider.describe(self.records, self.now_s)
        return {decision.stream_id: decision for decision in answer}


def test_touched_streams_are_decided_on() -> None:
    """What the core says has changed is looked at, and nothing else."""
    streams = Streams()
    record = streams.add(1, 40)
    assert streams.order() == [1]
    record.note_computed(40)
    assert streams.order() == [1], "nobody said that anything changed"
    streams.decider.touch(record)
    assert streams.order() == []


def test_streams_that_are_over_are_not() -> None:
    """Forgotten, or done and kept for their output; a successor of the same id is a new stream."""
    streams = Streams()
    forgotten, done = streams.add(1, 40), streams.add(2, 40, committed=True)
    streams.add(3, 20)
    assert streams.order() == [2]
    streams.decider.forget(forgotten)
    done.advance(Phase.DONE)
    streams.decider.touch(done)
    assert streams.order() == [3]
    streams.decider.touch(forgotten)
    streams.decider.forget(forgotten)
    successor = streams.add(1, 10, committed=True)
    assert streams.decide().runs[0][:4] == (successor.stream_id, 10, 10, True)


def test_a_stream_without_tokens_has_no_turn() -> None:
    """It is open, and that is all."""
    streams = Streams()
    streams.add(1, 0)
    assert streams.decide() == StepPlan((), ())


def test_what_the_engine_has_is_not_given_again() -> None:
    """Neither to the same stream nor from the step's budget, nor its slot."""
    streams = Streams()
    streams.start(streams.add(1, 40), 40)
    streams.add(2, 60)
    (run,) = streams.decide().runs
    assert (run.stream_id, run.num_tokens) == (2, STEP_TOKENS - 40)


def test_another_policy_from_the_next_decision_on() -> None:
    """And the old one where the new one cannot be had."""
    streams = Streams(PolicySetting(name="lcas", options={"order": "oldest"}, segment_tokens=32))
    streams.add(1, 10, committed=True)
    streams.now_s += 1.0
    streams.add(2, 10, committed=True)
    assert streams.order() == [1, 2]
    streams.decider.set_policy("lcas", {"order": "newest"})
    assert streams.order() == [2, 1]
    assert streams.decider.policy.spec == "lcas(order=newest)"
    assert streams.decider.policy.segment_tokens == 32
    for name, options in (("no-such", {}), ("lcas", {"order": "random"}), ("fcfs", {"order": "x"})):
        with pytest.raises(ConfigError):
            streams.decider.set_policy(name, options)
        assert streams.decider.policy.spec == "lcas(order=newest)"
        assert streams.order() == [2, 1]


def test_a_policy_that_cannot_be_had_stops_the_start() -> None:
    """With its name."""
    with pytest.raises(ConfigError, match="no-such"):
        Streams(PolicySetting(name="no-such"))


def test_every_stream_is_described() -> None:
    """Committed first, each by arrival, whether it runs, waits, is in the engine or not here."""
    streams = Streams(PolicySetting(name="fcfs"))
    in_engine = streams.add(1, 30)
    waiting_kv = streams.add(2, 10)
    waiting_kv.advance(Phase.WAITING_KV)
    streams.now_s += 1.0
    streams.add(3, 20)
    idle = streams.add(4, 20)
    idle.note_computed(20)
    streams.add(5, 40, committed=True)
    done = streams.add(6, 10)
    done.advance(Phase.DONE)
    for record in streams.records.values():
        streams.decider.touch(record)
    streams.start(in_engine, 30)
    in_engine.in_flight = InFlight("1", 30, 30, 30, reason=RunReason.SEGMENT)
    streams.decide()
    streams.now_s += 2.0
    described = streams.described()
    assert list(described) == [5, 1, 2, 3, 4]
    assert {stream_id: each.decision for stream_id, each in described.items()} == {
        5: RunReason.COMMIT_CHUNK.value if STEP_TOKENS - 30 < 40 else RunReason.COMMIT.value,
        1: RunReason.SEGMENT.value,
        2: "waiting_kv",
        3: DeferReason.YIELDS.value,
        4: DeferReason.IDLE.value,
    }
    assert described[3].reason == SENTENCES[DeferReason.YIELDS]
    assert described[1].state == "open"
    assert (described[4].num_known_tokens, described[4].num_computed_tokens) == (20, 20)
    assert described[1].idle_s == pytest.approx(3.0)
    assert described[4].idle_s == pytest.approx(2.0)
    assert all(each.victim_rank is None for each in described.values())


def test_an_expected_segment_is_described() -> None:
    """By the stream's own pauses, from now; None where too few were seen, or none will come."""
    streams = Streams()
    record = streams.add(1, 10)
    for _ in range(3):
        streams.now_s += 2.0
        record.splice(len(record.ids), array("q", [1, 2]), streams.now_s)
    streams.add(2, 10)
    streams.now_s += 0.5
    described = streams.described()
    assert described[1].expected_next_s == pytest.approx(1.5)
    assert described[2].expected_next_s is None
    streams.commit(record)
    assert streams.described()[1].expected_next_s is None


def test_others_are_named_as_victims_only_while_memory_is_short() -> None:
    """With plenty of memory the engine hears of nobody but those who run."""
    streams = Streams()
    for stream_id in (1, 2, 3):
        streams.add(stream_id, 20)
    plan = streams.decide()
    streams.decider.apply_victims(plan)
    running = {run.stream_id for run in plan.runs}
    assert not plan.victims
    assert all(set(order) <= running for order in streams.engine.orders)


def test_victims_reach_the_engine_when_memory_is_short() -> None:
    """The plan's victims first, then the rest of the standing order, those who run at the end."""
    server = PrefillUnderTest(engine := WatchedEngine(pool_tokens=300))
    for stream_id in (1, 2):
        server.run(opened(stream_id), splice(tokens(120, stream_id), seq=1, stream_id=stream_id))
    engine.orders.clear()
    server.turn(
        opened(3), splice(tokens(100, 3), seq=1, stream_id=3), commit(100, seq=2, stream_id=3)
    )
    assert [order[-1] for order in engine.orders] == [3]
    assert set(engine.orders[0]) == {1, 2, 3}
    server.turn(r.DescribeStreams(request_id=7))
    (answer,) = server.take(s.StreamsDescribed)
    ranks = {each.stream_id: each.victim_rank for each in answer.streams}
    assert sorted(rank for rank in ranks.values() if rank is not None) == [0, 1, 2]
    assert ranks[3] == 2
    server.run()
    assert engine.num_evicted_tokens > 0
    assert server.take(s.Output, 3), "the commit found its memory"


def test_the_same_order_is_told_once() -> None:
    """Every order that the engine hears costs it a walk over its tree."""
    streams = Streams(pool_tokens=128)
    streams.add(1, 20)
    for _ in range(3):
        streams.decider.apply_victims(streams.decide())
    assert len(streams.engine.orders) == 1


def test_step_costs_are_learned_across_turns() -> None:
    """From the start of a step to the turn that finds the engine empty, and only then."""
    seen: list[StepCosts] = []
    streams = Streams()
    for number in range(800):
        record = streams.add(number, (5, 20, 60)[number % 3])
        plan = streams.decide()
        streams.decider.note_step_start(streams.now_s, plan)
        streams.now_s += 0.2 + 0.01 * plan.num_tokens
        if number % 4 == 3:
            streams.now_s += 0.3
            streams.decider.note_step_end(streams.now_s, {"still there": record})
        else:
            streams.decider.note_step_end(streams.now_s, {})
        streams.now_s += 50.0
        streams.decider.note_step_end(streams.now_s, {})
        streams.decider.forget(record)
        del streams.records[number]
        seen.append(streams.decider._learner.experience().costs)
    assert seen[0] != seen[-1]
    assert seen[-1].step_s(60) == pytest.approx(0.8, rel=0.3)
    assert seen[-1].step_s(5) == pytest.approx(0.25, rel=0.3)


def test_a_commit_teaches_the_habits_of_its_mode() -> None:
    """How many segments it had, the one with the commit included."""
    streams = Streams()
    before = streams.decider._learner.experience().habits
    for stream_id in range(40):
        record = streams.add(stream_id, 10)
        record.splice(10, array("q", [1]), streams.now_s + 3.0)
        streams.decider.note_commit(record)
    after = streams.decider._learner.experience().habits
    assert after[0].expected_more[0] == pytest.approx(2.0, abs=0.3)
    assert after[0].gap_s == pytest.approx(3.0, abs=0.3)
    assert after[1] == before[1]
