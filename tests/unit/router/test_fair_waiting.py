"""Tenants that want more context on a server than it may hold: turns, shares, a bounded queue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.admission import Decision, ServerAdmission, Verdict
from router.fair_waiting import FairWaiting
from streamfill.errors import ResourceExhaustedError
from streamfill.messages.common import NO_SHARE, Share
from streamfill.stream.ids import StreamId
from tests.unit.router.cluster_for_tests import (
    PATIENCE_S,
    TestCluster,
    answer_of,
    commit_of,
    ids,
    until,
)

A, B = Share(tenant="a"), Share(tenant="b")


def held(admission: ServerAdmission, number: int, num_tokens: int, share: Share) -> None:
    admission.hold(StreamId(number), num_tokens, share)


def asked(admission: ServerAdmission, number: int, num_tokens: int, share: Share) -> Decision:
    """For a stream that is here, with nothing so far."""
    admission.hold(StreamId(number), admission.tokens_of(StreamId(number)), share)
    return admission.ask(StreamId(number), num_tokens)


def test_tenants_take_turns() -> None:
    """However many of the other one came before; of one tenant, in the order of their coming."""
    admission = ServerAdmission(cap_tokens=100, max_waiting=100)
    held(admission, 0, 100, A)
    for number in range(1, 7):
        assert asked(admission, number, 40, A).verdict is Verdict.WAITS
    for number in (10, 11):
        asked(admission, number, 60, Share(tenant="b"))
    admission.leave(StreamId(0))
    order = list(admission.admit_waiting())
    while admission.num_waiting:
        admission.leave(order[-1])
        order += admission.admit_waiting()
    assert order.index(StreamId(10)) <= 2
    assert order.index(StreamId(11)) <= 4
    assert [number for number in order if number < 10] == list(range(1, 7))


def test_one_tenant_waits_as_it_came() -> None:
    """Whoever it is: the queue is that of a router without keys."""
    for share in (NO_SHARE, Share(tenant="a", weight=0.1)):
        admission = ServerAdmission(cap_tokens=10, max_waiting=3)
        held(admission, 0, 10, share)
        verdicts = [asked(admission, number, 5, share).verdict for number in range(1, 5)]
        assert verdicts == [Verdict.WAITS] * 3 + [Verdict.REFUSED]
        admission.leave(StreamId(0))
        assert admission.admit_waiting() == (1, 2)


def test_a_full_queue_has_room_for_who_has_less_in_it() -> None:
    """The newest operation of the tenant that filled it goes, and is counted as refused; once both
    have as much, the next one is refused, whosever it is."""
    admission = ServerAdmission(cap_tokens=10, max_waiting=4)
    held(admission, 0, 10, A)
    for number in range(1, 5):
        asked(admission, number, 9, A)
    for number, displaced in ((11, 4), (12, 3)):
        decision = asked(admission, number, 9, B)
        assert (decision.verdict, decision.displaced) == (Verdict.WAITS, displaced)
    assert asked(admission, 13, 9, B).verdict is Verdict.REFUSED
    assert asked(admission, 5, 9, A).verdict is Verdict.REFUSED
    assert admission.counters().num_refused_segments == 4
    assert admission.num_waiting == 4


def test_nobody_is_shut_out_by_contexts_that_are_never_committed() -> None:
    """A tenant gets its share above the cap, and no more than that."""
    admission = ServerAdmission(cap_tokens=100, max_waiting=10)
    held(admission, 0, 100, A)
    assert asked(admission, 1, 1, A).verdict is Verdict.WAITS
    assert asked(admission, 10, 50, B).verdict is Verdict.ADMITTED
    assert asked(admission, 11, 1, B).verdict is Verdict.WAITS
    heavy = Share(tenant="c", weight=2.0)
    assert asked(admission, 20, 51, heavy).verdict is Verdict.WAITS
    assert asked(admission, 20, 50, heavy).verdict is Verdict.ADMITTED, "half of all weights"
    assert asked(admission, 30, 1, Share(tenant="d")).verdict is Verdict.WAITS, "twice the cap"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 11), st.sampled_from(["ask", "leave", "withdraw"]), st.integers(1, 60)
        ),
        max_size=60,
    )
)
def test_bounds_hold_whatever_tenants_do(steps: Sequence[tuple[int, str, int]]) -> None:
    """Twice the cap, but for a favourite; nobody waits while there is room; sums by tenant are
    right; whoever has least for its weight is first in turn."""
    admission = ServerAdmission(cap_tokens=100, max_waiting=5)
    shares = [
        Share(tenant="abc"[number % 3], weight=(1.0, 2.0, 0.5)[number % 3]) for number in range(12)
    ]
    waiting: set[int] = set()
    for number, action, num_tokens in steps:
        stream_id = StreamId(number)
        if action == "ask":
            if number in waiting:
                continue
            decision = asked(admission, number, num_tokens, shares[number])
            waiting.difference_update(decision.others)
            if decision.displaced is not None:
                assert decision.displaced in waiting
                waiting.discard(decision.displaced)
            if decision.verdict is Verdict.WAITS:
                waiting.add(number)
        else:
            if action == "leave":
                admission.leave(stream_id)
            else:
                admission.withdraw(stream_id, refused=False)
            waiting.discard(number)
            waiting.difference_update(admission.admit_waiting())
        assert admission.num_waiting == len(waiting) <= 5
        sums = dict.fromkeys("abc", 0)
        for each in range(12):
            sums[shares[each].tenant] += admission.tokens_of(StreamId(each))
        assert sum(sums.values()) == admission.held_tokens
        assert {each: admission._held_by[each] for each in "abc"} == sums
        assert admission.held_tokens <= 200 + 60 * 12 * (admission._favourite is not None)
        assert not waiting or admission.held_tokens > 40, "somebody waits beside much room"


def test_turns_follow_weights() -> None:
    """A tenant of three times the weight is given three times the tokens."""
    queue = FairWaiting()
    heavy = Share(tenant="b", weight=3.0)
    for number in range(400):
        queue.put(StreamId(number), 10, A if number % 2 else heavy)
    given_to = {"a": 0, "b": 0}
    for _ in range(200):
        stream_id = queue.heads()[0]
        share = A if stream_id % 2 else heavy
        queue.discard(stream_id)
        queue.give(stream_id, 10, share)
        given_to[share.tenant] += 10
    assert given_to["b"] == pytest.approx(3 * given_to["a"], rel=0.05)


async def test_through_the_whole_router(tiny_model: Path) -> None:
    """A tenant with many streams fills cap and queue of a server; another's single stream gets its
    context in at once and its answer, while those of the first wait on, and one is refused for
    it."""
    limits = {"max_uncommitted_tokens": 40, "max_waiting_segments": 4}
    async with TestCluster(tiny_model, **limits) as cluster:
        await cluster.prefill()
        crowd = [await cluster.open(share=A, tenant="a") for _ in range(7)]
        for handle in crowd[:2]:
            await handle.append(ids(*range(10, 30)))
        tasks = [asyncio.create_task(handle.append(ids(*range(10, 30)))) for handle in crowd[2:6]]

        def num_waiting() -> int:
            admission = cluster.manager.info().servers[0].admission
            return 0 if admission is None else admission.num_waiting_segments

        await until(lambda: num_waiting() == 4)
        with pytest.raises(ResourceExhaustedError):
            await crowd[6].append(ids(*range(10, 30)))
        alone = await cluster.open(share=B, tenant="b")
        await asyncio.wait_for(alone.append(ids(*range(10, 30))), PATIENCE_S)
        large = asyncio.create_task(alone.append(ids(*range(30, 50))))
        await until(lambda: sum(task.done() for task in tasks) == 1)
        assert not large.done()
        (refused,) = [task for task in tasks if task.done()]
        with pytest.raises(ResourceExhaustedError, match="max_waiting_segments"):
            refused.result()
        assert tasks.index(refused) == 3, "the newest"
        for handle in crowd:
            await handle.cancel("enough")
        await asyncio.wait_for(large, PATIENCE_S)
        await alone.commit(commit_of(3))
        assert len((await answer_of(alone))[0]) == 3
        await asyncio.gather(*tasks, return_exceptions=True)
