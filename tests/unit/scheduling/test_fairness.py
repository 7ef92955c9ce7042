"""Tenants get their shares, under every policy, and nothing else that a policy promises is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.scheduling.harness import (
    ContextChange,
    Harness,
    ServerModel,
    StreamStory,
)
from streamfill.scheduling.plan import StepPlan
from streamfill.scheduling.shares import NOTHING_SERVED, OUTPUT_COST, FairShares, Served
from streamfill.scheduling.snapshot import MemoryView, Snapshot, StepCosts, StreamTable
from streamfill.stream.ids import StreamId
from tests.unit.scheduling.builders import POLICIES, policy, snapshot, stream
from tests.unit.scheduling.strategies import made_view, seeds, servers, stories

MAX_STEPS = 2000
each_policy = pytest.mark.parametrize("spec", POLICIES)
few = settings(max_examples=20, deadline=None)

OnStep = Callable[[Harness, Snapshot, StepPlan], None]


def played(
    spec: str, told: list[StreamStory], model: ServerModel, on_step: OnStep | None = None
) -> Harness:
    """The harness behind the end of all stories."""

    def see(shot: Snapshot, plan: StepPlan) -> None:
        if on_step is not None:
            on_step(harness, shot, plan)

    chosen = policy(spec, segment_tokens=64, can_interrupt=model.num_layers > 0)
    harness = Harness(chosen, model, on_step=see)
    harness.run(told, max_steps=MAX_STEPS)
    return harness


@st.composite
def stories_of_tenants(draw: st.DrawFn) -> list[StreamStory]:
    """As ``stories``, of up to three tenants with weights of their own."""
    weights = draw(st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=3, max_size=3))
    tenants = [draw(st.integers(0, 2)) for _ in range(7)]
    return [
        replace(story, tenant=tenants[number], weight=weights[tenants[number]])
        for number, story in enumerate(draw(stories()))
    ]


@each_policy
@few
@given(st.data())
def test_nobody_starves(spec: str, data: st.DataObject) -> None:
    """Every stream that is committed and not cancelled is answered, however small the pool."""
    told = data.draw(stories_of_tenants())
    harness = played(spec, told, data.draw(servers(told)))
    for story in told:
        outcome = harness.outcomes[story.stream_id]
        if story.committed_s is not None and not outcome.is_cancelled:
            assert outcome.answered_s is not None


@each_policy
@few
@given(st.data())
def test_work_is_conserved(spec: str, data: st.DataObject) -> None:
    """The server idles only while nobody has anything new to compute, whosever it is."""
    told = data.draw(stories_of_tenants())
    model = data.draw(servers(told))

    def check(harness: Harness, shot: Snapshot, plan: StepPlan) -> None:
        assert 0 <= harness.num_used_tokens <= model.pool_tokens
        views = shot.streams.values()
        if shot.under_way is not None or plan.runs or any(view.in_flight for view in views):
            return
        page = model.page_size
        for view in views:
            assert view.committed_s is None
            num_pages = view.num_known_tokens // page
            assert view.awaits_commit or num_pages <= view.num_reached_tokens // page

    played(spec, told, model, check)


def committed(
    stream_id: int, num_tokens: int, *, tenant: int, weight: float = 1.0, at_s: float = 0.0
) -> StreamStory:
    """A prompt that is there as a whole, with its commit."""
    change = ContextChange(at_s=at_s, keep_tokens=0, num_new_tokens=num_tokens, with_commit=True)
    return StreamStory(
        stream_id=StreamId(stream_id),
        opened_s=at_s,
        changes=(change,),
        committed_s=at_s,
        tenant=tenant,
        weight=weight,
    )


def waiting_behind(shot: Snapshot, plan: StepPlan) -> set[int]:
    """Tenants who have something waiting that this step does not end."""
    ended = {run.stream_id for run in plan.runs if run.is_commit}
    views = shot.streams.values()
    return {view.tenant for view in views if not view.in_flight and view.stream_id not in ended}


@pytest.mark.parametrize("spec", [spec for spec in POLICIES if spec != "laps"])
@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([0, 5]))
def test_two_tenants_that_want_more_than_there_is(spec: str, seed: int, num_layers: int) -> None:
    """From any moment on at which both have something waiting, as long as both have, what they got
    differs by no more than two of their longest prompts each, and two steps. (``laps`` shares
    within each of its two kinds of steps.)"""
    random = Random(seed)
    weights = [random.choice((0.5, 1.0, 4.0)) for _ in range(2)]
    told: list[StreamStory] = []
    for tenant, weight in enumerate(weights):
        most = random.choice((20, 200, 900))
        for _ in range(random.randint(10, 40)):
            at_s = random.choice((0.0, 0.0, random.random() * 3.0))
            size = random.randint(1, most)
            told.append(committed(len(told), size, tenant=tenant, weight=weight, at_s=at_s))
    longest = [max(s.changes[0].num_new_tokens for s in told if s.tenant == t) for t in (0, 1)]
    step_tokens = random.choice((64, 256))
    bound = sum(2 * size / weight for size, weight in zip(longest, weights, strict=True))
    bound += 2 * step_tokens / min(weights)
    costs: list[float] = [0.0, 0.0]
    differences: list[float] = []

    def check(_: Harness, shot: Snapshot, plan: StepPlan) -> None:
        for run in plan.runs:
            view = shot.streams[run.stream_id]
            costs[view.tenant] += run.num_tokens / view.weight
        if waiting_behind(shot, plan) != {0, 1}:
            differences.clear()
            return
        differences.append(costs[0] - costs[1])
        assert max(differences) - min(differences) <= bound

    model = ServerModel(step_tokens=step_tokens, max_requests=8, num_layers=num_layers)
    played(spec, told, model, check)


@each_policy
def test_one_stream_among_hundreds_of_another_tenant(spec: str) -> None:
    """It waits for what is under way, not for the whole queue."""
    crowd = [committed(number, 100, tenant=1) for number in range(200)]
    alone = committed(999, 100, tenant=2, at_s=1.0)
    model = ServerModel(costs=StepCosts(fixed_s=0.05, per_token_s=0.0025), step_tokens=256)
    fair = played(spec, [*crowd, alone], model).outcomes[alone.stream_id]
    assert fair.ttft_s is not None
    assert fair.ttft_s <= 3 * model.costs.step_s(model.step_tokens)
    one_tenant = [replace(story, tenant=0) for story in (*crowd, alone)]
    unfair = played(spec, one_tenant, model).outcomes[alone.stream_id]
    assert unfair.ttft_s is not None
    assert unfair.ttft_s > 5 * fair.ttft_s or spec in ("lcas(order=newest)",)


def test_context_of_one_tenant_does_not_wait_for_that_of_another() -> None:
    """What nobody has committed yet is shared in the same way."""
    crowd = [
        StreamStory(
            stream_id=StreamId(number),
            opened_s=0.0,
            changes=(ContextChange(at_s=0.0, keep_tokens=0, num_new_tokens=300),),
            committed_s=None,
            tenant=1,
        )
        for number in range(50)
    ]
    alone = replace(crowd[0], stream_id=StreamId(99), tenant=2, opened_s=1.0)
    alone = replace(alone, changes=(replace(alone.changes[0], at_s=1.0),))
    ends: dict[int, int] = {}

    def check(harness: Harness, shot: Snapshot, _: StepPlan) -> None:
        for view in shot.streams.values():
            if view.num_computed_tokens == 300:
                ends.setdefault(view.stream_id, harness.num_steps)

    played("fcfs", [*crowd, alone], ServerModel(), check)
    assert sorted(ends, key=ends.__getitem__).index(99) < 20


@each_policy
def test_weights_are_shares(spec: str) -> None:
    """Three times the weight, three times the tokens, while both have something waiting."""
    told = [
        committed(number, 60, tenant=1 + number % 2, weight=1.0 if number % 2 else 3.0)
        for number in range(120)
    ]
    got: Counter[int] = Counter()

    def count(harness: Harness, shot: Snapshot, plan: StepPlan) -> None:
        if harness.num_steps < 18:
            for run in plan.runs:
                got[shot.streams[run.stream_id].tenant] += run.num_tokens

    played(spec, told, ServerModel(step_tokens=128), count)
    assert got[1] / got[2] == pytest.approx(3.0, rel=0.25)


@each_policy
def test_nothing_is_saved_up(spec: str) -> None:
    """Who comes late has not paid for the time before, and is owed nothing for it either."""
    early = [committed(number, 50, tenant=1) for number in range(150)]
    late = [committed(1000 + number, 50, tenant=2, at_s=5.0) for number in range(100)]
    got: Counter[int] = Counter()

    def count(_: Harness, shot: Snapshot, plan: StepPlan) -> None:
        if waiting_behind(shot, plan) == {1, 2}:
            for run in plan.runs:
                got[shot.streams[run.stream_id].tenant] += run.num_tokens
            assert abs(got[1] - got[2]) <= 2 * (50 + 50) + 2 * 128

    played(spec, [*early, *late], ServerModel(step_tokens=128), count)
    assert min(got.values()) > 1000


@each_policy
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), seeds)
def test_one_tenant_is_as_good_as_none(spec: str, num_streams: int, seed: int) -> None:
    """Decisions are the same, whatever it had, and whoever it is."""
    views = [made_view(number, Random(seed * 9 + number)) for number in range(num_streams)]
    owned = [msgspec.structs.replace(view, tenant=3, weight=0.5) for view in views]
    random = Random(seed)
    budget, free = random.randint(0, 400), random.randint(0, 500)
    served = Served(
        {3: random.random() * 100}, random.random() * 100, (StreamId(num_streams // 2),)
    )
    plain = shot_of(StreamTable(views), budget, free, NOTHING_SERVED)
    fair = shot_of(StreamTable(owned), budget, free, served)
    assert policy(spec, segment_tokens=32).decide(plain) == policy(spec, segment_tokens=32).decide(
        fair
    )


def shot_of(table: StreamTable, budget: int, free: int, served: Served) -> Snapshot:
    num_owned = sum(view.num_evictable_tokens for view in table.streams.values())
    memory = MemoryView(
        num_free_tokens=free,
        num_evictable_tokens=num_owned,
        num_total_tokens=10_000,
        page_size=4,
    )
    return table.snapshot(
        memory=memory, token_budget=budget, max_requests=5, now_s=9.0, served=served
    )


@each_policy
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), seeds)
def test_following_changes_is_as_good_as_starting_anew(
    spec: str, num_steps: int, seed: int
) -> None:
    """Streams of several tenants come, change hands and go; some snapshots are missed."""
    table = StreamTable()
    follower = policy(spec, segment_tokens=32)
    random = Random(seed)
    for _ in range(num_steps):
        num_tenants = random.choice((1, 3))
        for _ in range(random.randint(0, 5)):
            stream_id = random.randint(0, 8)
            if random.random() < 0.3:
                table.remove(StreamId(stream_id))
            else:
                view = made_view(stream_id, random)
                tenant = random.randrange(num_tenants)
                table.put(msgspec.structs.replace(view, tenant=tenant))
        served = Served(
            {tenant: random.random() * 100 for tenant in range(random.randint(0, 3))},
            random.random() * 100,
            random.choice(((), (StreamId(random.randint(0, 9)),))),
        )
        if random.random() < 0.8:
            shot = shot_of(table, random.randint(0, 400), random.randint(0, 500), served)
            fresh = policy(spec, segment_tokens=32).decide(shot)
            assert follower.decide(shot) == fresh


@each_policy
def test_two_tenants_whose_prompts_do_not_fit_together(spec: str) -> None:
    """They do not take each other's KV, turn by turn: no more is computed twice than the policy
    lets two prompts of one tenant do."""
    costs = StepCosts(fixed_s=0.05, per_token_s=0.01)
    model = ServerModel(step_tokens=50, pool_tokens=700, costs=costs)
    num_computed: list[int] = []
    for tenants in ((0, 0), (1, 2)):
        told = [committed(number, 600, tenant=tenant) for number, tenant in enumerate(tenants)]
        outcomes = played(spec, told, model).outcomes.values()
        assert all(outcome.answered_s is not None for outcome in outcomes)
        num_computed.append(sum(outcome.num_computed_tokens for outcome in outcomes))
    assert num_computed[1] <= num_computed[0]


def test_a_commit_of_a_tenant_that_had_less_interrupts_those_of_others() -> None:
    """And one of a tenant that had more does not, though it is short."""
    adaptive = policy("adaptive", can_interrupt=True)
    under_way = stream(1, 900, committed_s=90.0, in_flight=True)
    short = stream(2, 8, committed_s=99.9)
    for had, interrupts in ((0.0, True), (5000.0, False)):
        views = [
            msgspec.structs.replace(under_way, tenant=1),
            msgspec.structs.replace(short, tenant=2),
        ]
        shot = msgspec.structs.replace(
            snapshot(*views, under_way=[StreamId(1)], under_way_s=0.1),
            served=Served({1: 900.0, 2: had}, 0.0),
        )
        assert bool(adaptive.decide(shot).runs) is interrupts


def test_virtual_time_goes_with_what_is_started() -> None:
    """It never goes back; who is new starts at it; answers count twice."""
    shares = FairShares()
    one, two = StreamId(1), StreamId(2)
    shares.started(one, 1, 100.0, is_committed=True, is_last=False)
    assert shares.served().unfinished == (one,)
    shares.started(one, 1, 50.0, is_committed=True, is_last=True)
    served = shares.served()
    assert (served.now, served.start_of(1), served.start_of(2)) == (0.0, 150.0, 0.0)
    shares.started(StreamId(3), 1, 10.0, is_committed=True, is_last=True)
    served = shares.served()
    assert (served.now, served.start_of(1), served.start_of(2)) == (150.0, 160.0, 150.0)
    assert served.unfinished == ()
    shares.started(two, 2, 10.0, is_committed=False, is_last=False)
    assert shares.served().unfinished == (two,)
    assert (shares.served().now, shares.served().start_of(2)) == (150.0, 160.0)
    shares.generated(2, 5.0)
    assert shares.served().start_of(2) == 160.0 + 5.0 * OUTPUT_COST


def test_tenants_of_the_past_are_forgotten() -> None:
    """However many there were; those whose time is to come stay."""
    shares = FairShares()
    for tenant in range(1000):
        shares.started(StreamId(tenant), tenant, 1.0, is_committed=True, is_last=True)
        shares.started(StreamId(0), 0, 2.0, is_committed=True, is_last=True)
    served = shares.served()
    assert len(served.ends) < 200
    assert served.start_of(0) > served.now
