"""What is sent to a decode server ahead of the commit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_server.pushes import (
    ANSWER_S,
    MIN_PUSH_TOKENS,
    REFUSED_PAUSE_S,
    StreamPush,
    num_stable,
)
from streamfill.messages.common import KvPeer, StreamMode

PEER = KvPeer(server_id="d0", host="nowhere", control_ports=(1,))


def test_a_prompt_that_only_grows_is_stable() -> None:
    """However busy the server is."""
    assert num_stable(StreamMode.APPEND, [], 500, 9) == 500


@pytest.mark.parametrize(
    ("kept", "num_busy", "expected"),
    [
        ([], 0, 0),  # nothing is known: as likely wasted as not
        ([40], 0, 40),  # 1.5 of 2
        ([40], 1, 40),  # 0.75 > 2/3
        ([40], 2, 0),  # 0.75 is not above 3/4
        ([40, 100], 0, 40),  # 2.5 of 3 survive at 40, 1.5 of 3 at 100
        ([100, 40, 100], 0, 100),  # 2.5 of 4
        ([0, 0, 100], 0, 0),
    ],
)
def test_a_prompt_that_is_replaced_is_stable_as_far_as_it_probably_stays(
    kept: list[int], num_busy: int, expected: int
) -> None:
    """The more others wait, the surer it has to be."""
    assert num_stable(StreamMode.UPDATE, kept, 500, num_busy) == expected


@given(st.lists(st.integers(0, 1000), max_size=16), st.integers(0, 1000), st.integers(0, 20))
def test_more_waste_is_never_accepted_when_more_wait(
    kept: list[int], num_computed: int, num_busy: int
) -> None:
    """And nothing is sent that has no KV."""
    worth = num_stable(StreamMode.UPDATE, kept, num_computed, num_busy)
    assert 0 <= worth <= num_computed
    assert num_stable(StreamMode.UPDATE, kept, num_computed, num_busy + 1) <= worth
    if worth:
        num_surviving = sum(keep >= worth for keep in kept)
        probability = (num_surviving + 0.5) / (len(kept) + 1)
        assert probability > (1 - probability) * (1 + num_busy)


def test_an_update_takes_back_what_it_replaced() -> None:
    """Also of what is on its way. News about the old prompt count only if they are bad."""
    push = StreamPush(PEER)
    push.splice(0, 0)
    push.push(7, 100)
    push.ended(ok=True, now_s=0.0)
    push.push(8, 200)
    push.splice(150, 250)
    assert (push.num_held, push.num_expected, push.version) == (100, 150, 1)
    push.hear(0, 200)
    assert push.num_held == 100
    push.hear(0, 60)  # said before the first push arrived
    assert push.num_held == 100
    push.hear(0, 60, is_loss=True)
    assert (push.num_held, push.num_expected) == (60, 60)
    push.hear(1, 90)
    assert push.num_held == 90
    assert push.kept == [150]


def test_late_news_of_the_push_before_take_nothing_back() -> None:
    """A decode server says what it holds between two of its steps, when the next push may have
    arrived."""
    push = StreamPush(PEER)
    push.push(7, 100)
    push.ended(ok=True, now_s=0.0)
    push.push(8, 200)
    push.ended(ok=True, now_s=0.0)
    push.hear(0, 100)
    assert push.num_held == 200


def test_what_may_be_there_is_asked_first() -> None:
    """Nothing is sent before the answer, or before its time is over; it goes on asking as long as
    all was there."""
    push = StreamPush(PEER)
    assert not push.wants_to_ask(MIN_PUSH_TOKENS - 1)
    assert push.wants_to_ask(100)
    push.ask(100, 5.0)
    assert not push.wants_to_ask(200)
    assert not push.may_push(5.0)
    assert push.may_push(5.0 + ANSWER_S)
    push.hear(0, 100)
    assert push.may_push(5.0)
    assert push.wants_to_ask(200)
    push.ask(200, 6.0)
    push.hear(0, 120)
    assert not push.wants_to_ask(300)
    push.push(7, 200)
    push.ended(ok=True, now_s=6.0)
    assert not push.wants_to_ask(400)  # what had to be sent once is nobody else's
    push.lose()
    assert push.num_expected == 0
    assert push.wants_to_ask(200)


def test_a_decode_server_without_room_is_left_alone() -> None:
    """For a while."""
    push = StreamPush(PEER)
    push.push(7, 100)
    assert not push.may_push(1.0)
    push.ended(ok=False, now_s=1.0)
    assert push.num_expected == 0
    assert not push.may_push(1.0)
    assert push.may_push(1.0 + REFUSED_PAUSE_S)
