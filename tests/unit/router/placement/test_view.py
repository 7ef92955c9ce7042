"""Which prefix is where, as the router sees it."""

from __future__ import annotations

from router.placement.view import EXPECT_S, MAX_EXPECTED_BLOCKS, PrefixView
from streamfill.stream.ids import ServerId

A, B = ServerId("a"), ServerId("b")


def test_what_was_sent_is_expected_for_a_while() -> None:
    """Until the server says otherwise, or says nothing for too long."""
    view = PrefixView(100)
    view.expect(A, [1, 2, 3], now_s=0.0)
    assert view.num_matched(A, [1, 2, 9], 1.0) == 2
    assert view.num_matched(B, [1, 2], 1.0) == 0
    view.apply(A, stored=[1], removed=[])
    view.apply(A, stored=[], removed=[3])
    assert view.num_matched(A, [1, 2, 3], EXPECT_S - 0.1) == 2
    assert view.num_matched(A, [1, 2, 3], EXPECT_S) == 1
    assert view.held(A) == {1}


def test_sending_again_extends_the_expectation() -> None:
    """A second stream with the same beginning."""
    view = PrefixView(100)
    view.expect(A, [1, 2], now_s=0.0)
    view.expect(A, [1], now_s=10.0)
    assert view.num_matched(A, [1, 2], EXPECT_S + 1) == 1


def test_memory_is_bounded() -> None:
    """Both sets have a cap; what is beyond it is not known, and no error."""
    view = PrefixView(10)
    view.replace(A, range(50))
    view.apply(A, stored=range(50, 100), removed=[0])
    assert view.held(A) == {*range(1, 10), 50}
    view.expect(A, range(1000, 1000 + 2 * MAX_EXPECTED_BLOCKS), now_s=0.0)
    assert view.num_matched(A, [1000], 0.0) == 0
    assert view.num_matched(A, [1000 + 2 * MAX_EXPECTED_BLOCKS - 1], 0.0) == 1


def test_a_complete_report_confirms_and_replaces() -> None:
    """What is on its way stays expected; what was held before and is not in it is gone."""
    view = PrefixView(100)
    view.replace(A, [1, 2])
    view.expect(A, [3, 4], now_s=0.0)
    view.replace(A, [1, 3])
    assert view.held(A) == {1, 3}
    assert view.num_matched(A, [1, 3, 4], 1.0) == 3
    assert view.num_matched(A, [1, 3, 4], EXPECT_S) == 2
    view.drop(A)
    assert view.num_matched(A, [1], 1.0) == 0
