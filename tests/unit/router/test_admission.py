"""Who may grow on a server: single decisions, and what holds however clients interleave."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.admission import Decision, ServerAdmission, Verdict
from streamfill.stream.ids import StreamId

A, B, C, D = (StreamId(number) for number in (1, 2, 3, 4))
CAP_TOKENS = 10
MAX_WAITING = 2


@pytest.fixture
def server() -> ServerAdmission:
    return ServerAdmission(CAP_TOKENS, MAX_WAITING)


def admitted(*others: StreamId) -> Decision:
    return Decision(Verdict.ADMITTED, others)


def waits(*others: StreamId) -> Decision:
    return Decision(Verdict.WAITS, others)


def test_what_fits_is_admitted(server: ServerAdmission) -> None:
    """Up to the cap itself, and what an admitted operation brings counts at once."""
    assert server.ask(A, 6) == admitted()
    assert server.ask(B, 4) == admitted()
    assert server.held_tokens == CAP_TOKENS
    assert server.ask(A, 7) == waits()


def test_room_goes_to_the_oldest_and_nobody_overtakes(server: ServerAdmission) -> None:
    """A small operation waits behind a large one, also when it would fit."""
    server.hold(A, 8)
    assert server.ask(B, 5) == waits()
    assert server.ask(C, 1) == waits()
    assert server.admit_waiting() == ()
    server.leave(A)
    assert server.admit_waiting() == (B, C)


def test_shrinking_is_admitted_at_once_and_makes_room(server: ServerAdmission) -> None:
    """An update to a smaller context overtakes the queue and lets its head in."""
    server.hold(A, 10)
    server.hold(D, 1)
    assert server.ask(B, 6) == waits()
    assert server.ask(A, 10) == admitted()
    assert server.ask(A, 3) == admitted(B)


def test_a_context_larger_than_the_cap_is_admitted_when_it_is_alone(
    server: ServerAdmission,
) -> None:
    """Nobody else could make room for it. It is counted as above the cap."""
    assert server.ask(A, 25) == admitted()
    assert server.ask(A, 40) == admitted()
    assert server.counters().num_over_cap_segments == 2


def test_when_all_wait_the_oldest_goes_on_until_it_is_gone(server: ServerAdmission) -> None:
    """The last one to wait lets the first one in, which never waits again; then come the others."""
    server.hold(A, 5)
    server.hold(B, 5)
    assert server.ask(A, 8) == waits()
    assert server.ask(B, 9) == waits(A)
    assert server.ask(A, 30) == admitted()
    assert server.admit_waiting() == ()
    server.leave(A)
    assert server.admit_waiting() == (B,)
    assert server.counters().num_over_cap_segments == 2


def test_a_favourite_within_the_cap_is_one_of_many_again(server: ServerAdmission) -> None:
    """Otherwise it would overtake the queue for ever."""
    assert server.ask(A, 12) == admitted()
    assert server.ask(A, 6) == admitted()
    assert server.ask(B, 4) == admitted()
    assert server.ask(A, 7) == waits()


def test_a_favourite_that_went_elsewhere_comes_back_as_one_of_many(
    server: ServerAdmission,
) -> None:
    """Also to a server that streams from other servers keep above its cap."""
    server.hold(A, 10)
    assert server.ask(A, 11) == admitted()
    server.hold(B, 12)
    server.leave(A)
    server.hold(A, 1)
    assert server.ask(A, 2) == waits()


def test_more_than_may_wait_are_refused(server: ServerAdmission) -> None:
    """The newest one; those that wait keep their places."""
    server.hold(A, 10)
    assert server.ask(B, 1) == server.ask(C, 1) == waits()
    assert server.ask(D, 1) == Decision(Verdict.REFUSED, ())
    assert server.counters().num_refused_segments == 1
    server.leave(A)
    assert server.admit_waiting() == (B, C)


def test_a_full_queue_does_not_refuse_whom_the_others_wait_for() -> None:
    """The last holder that has to wait lets the oldest in, and takes its place in the queue."""
    server = ServerAdmission(CAP_TOKENS, max_waiting=1)
    server.hold(A, 5)
    server.hold(B, 5)
    assert server.ask(A, 6) == waits()
    assert server.ask(B, 6) == waits(A)


@pytest.mark.parametrize("refused", [True, False])
def test_clients_that_come_again_in_turns_do_not_keep_each_other_out(
    server: ServerAdmission, refused: bool
) -> None:
    """A stream whose operation was refused or given up makes no room either, so it counts as
    waiting; if not, A and B would never wait at the same moment."""
    server.hold(A, 5)
    server.hold(B, 5)
    assert server.ask(A, 6) == waits()
    server.withdraw(A, refused=refused)
    assert server.counters().num_refused_segments == refused
    assert server.ask(B, 6) == admitted()


def test_an_idle_holder_is_waited_for(server: ServerAdmission) -> None:
    """As long as one stream may commit, nobody goes above the cap."""
    server.hold(A, 5)
    server.hold(B, 5)
    server.hold(C, 0)
    assert server.ask(A, 6) == waits()
    assert server.ask(C, 1) == waits()
    assert server.counters().num_over_cap_segments == 0


class Interleavings(RuleBasedStateMachine):
    """Clients at random, beside a model that knows nothing but the rules.

    The model has each stream's tokens, the queue, who is held back, and who went above the cap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.server = ServerAdmission(CAP_TOKENS, MAX_WAITING)
        self.tokens: dict[StreamId, int] = {}
        self.queue: list[tuple[StreamId, int]] = []
        self.held_back: set[StreamId] = set()
        self.favourite: StreamId | None = None
        self.num_over = self.num_refused = 0
        self.others_may_exceed = False
        """Streams that came from another server took this one above its cap."""

    @property
    def total(self) -> int:
        return sum(self.tokens.values())

    def waiting(self) -> list[StreamId]:
        return [stream_id for stream_id, _ in self.queue]

    def takes(self, stream_id: StreamId, num_tokens: int, *, by_progress: bool) -> None:
        """An operation is admitted; going above the cap needs a reason."""
        grows = num_tokens > self.tokens.get(stream_id, 0)
        self.tokens[stream_id] = num_tokens
        self.held_back.discard(stream_id)
        if grows and self.total > CAP_TOKENS:
            self.num_over += 1
            assert by_progress or stream_id == self.favourite
            self.favourite = stream_id
        self.settle()

    def settle(self) -> None:
        if self.total <= CAP_TOKENS:
            self.favourite, self.others_may_exceed = None, False
        if self.favourite not in self.tokens:
            self.favourite = None

    def wakes(self, stream_ids: tuple[StreamId, ...]) -> None:
        """The oldest, in order; above the cap only when nobody is left to make room."""
        for stream_id in stream_ids:
            oldest, num_tokens = self.queue.pop(0)
            assert stream_id == oldest
            stuck = all(other in self.held_back for other, n in self.tokens.items() if n)
            self.takes(stream_id, num_tokens, by_progress=stuck)

    @rule(stream_id=st.sampled_from([A, B, C, D, StreamId(5)]), num_tokens=st.integers(0, 14))
    def ask(self, stream_id: StreamId, num_tokens: int) -> None:
        if stream_id in self.waiting():
            return  # one operation at a time
        before = self.tokens.get(stream_id, 0)
        decision = self.server.ask(stream_id, num_tokens)
        if num_tokens <= before:
            assert decision.verdict is Verdict.ADMITTED
            self.takes(stream_id, num_tokens, by_progress=False)
            self.wakes(decision.others)
            return
        fits = not self.queue and self.total + num_tokens - before <= CAP_TOKENS
        if fits or stream_id == self.favourite:
            assert decision == admitted()
            self.takes(stream_id, num_tokens, by_progress=False)
            return
        self.queue.append((stream_id, num_tokens))
        self.held_back.add(stream_id)
        if decision.verdict is Verdict.ADMITTED:
            self.wakes((*decision.others, stream_id))
        else:
            self.wakes(decision.others)
        if decision.verdict is Verdict.REFUSED:
            assert len(self.queue) == MAX_WAITING + 1
            assert self.queue.pop()[0] == stream_id
            self.num_refused += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        stream_id = data.draw(st.sampled_from(sorted(self.tokens)))
        self.server.leave(stream_id)
        del self.tokens[stream_id]
        self.queue = [one for one in self.queue if one[0] != stream_id]
        self.held_back.discard(stream_id)
        self.settle()
        self.wakes(self.server.admit_waiting())

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), refused=st.booleans())
    def withdraw(self, data: st.DataObject, refused: bool) -> None:
        stream_id = data.draw(st.sampled_from(self.waiting()))
        self.server.withdraw(stream_id, refused=refused)
        self.queue = [one for one in self.queue if one[0] != stream_id]
        self.num_refused += refused
        self.wakes(self.server.admit_waiting())

    @rule(number=st.integers(6, 8), num_tokens=st.integers(1, 8))
    def arrive(self, number: int, num_tokens: int) -> None:
        """From a server that died."""
        stream_id = StreamId(number)
        if stream_id in self.tokens:
            return
        self.server.hold(stream_id, num_tokens)
        self.tokens[stream_id] = num_tokens
        self.others_may_exceed |= self.total > CAP_TOKENS
        self.wakes(self.server.admit_waiting())

    @invariant()
    def it_agrees_with_the_model(self) -> None:
        counters = self.server.counters()
        assert counters.num_uncommitted_tokens == self.total
        assert counters.num_waiting_segments == len(self.queue) <= MAX_WAITING
        assert counters.num_refused_segments == self.num_refused
        assert counters.num_over_cap_segments == self.num_over

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        """Somebody who is not held back holds tokens, and the oldest really does not fit."""
        if self.queue:
            assert any(n and one not in self.held_back for one, n in self.tokens.items())
            oldest, num_tokens = self.queue[0]
            growth_tokens = num_tokens - self.tokens.get(oldest, 0)
            assert self.total + growth_tokens > CAP_TOKENS

    @invariant()
    def all_but_the_favourite_keep_to_the_cap(self) -> None:
        if not self.others_may_exceed:
            of_favourite = 0 if self.favourite is None else self.tokens[self.favourite]
            assert self.total - of_favourite <= CAP_TOKENS

    def teardown(self) -> None:
        for stream_id in {*self.tokens, *self.held_back}:
            self.server.leave(stream_id)
        counters = self.server.counters()
        assert (counters.num_uncommitted_tokens, counters.num_waiting_segments) == (0, 0)
        left = {
            key: value for key, value in vars(self.server).items() if isinstance(value, dict | set)
        }
        assert not any(left.values()), left


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@settings(max_examples=200, deadline=None)
@given(
    scripts=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=7),
    max_waiting=st.integers(1, 3),
    data=st.data(),
)
def test_all_streams_come_to_their_commit(
    scripts: list[list[int]], max_waiting: int, data: st.DataObject
) -> None:
    """In whatever order clients act, as long as those that were refused come again when nobody else
    can act: there is no deadlock, and nobody has to act in vain."""
    server = ServerAdmission(CAP_TOKENS, max_waiting)
    left = {StreamId(number): list(script) for number, script in enumerate(scripts)}
    held = dict.fromkeys(left, 0)
    waiting: set[StreamId] = set()
    refused: set[StreamId] = set()
    while left:
        free = sorted(left.keys() - waiting - refused)
        actor = data.draw(st.sampled_from(free or sorted(refused)))
        if left[actor]:
            decision = server.ask(actor, held[actor] + left[actor][0])
            assert free or decision.verdict is Verdict.ADMITTED or decision.others
            woken = decision.others
            refused.discard(actor)
            match decision.verdict:
                case Verdict.ADMITTED:
                    woken = (*woken, actor)
                case Verdict.WAITS:
                    waiting.add(actor)
                case Verdict.REFUSED:
                    refused.add(actor)
        else:
            del left[actor]
            server.leave(actor)
            woken = server.admit_waiting()
        for stream_id in woken:
            waiting.discard(stream_id)
            held[stream_id] += left[stream_id].pop(0)
    assert server.held_tokens == 0
