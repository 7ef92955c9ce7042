"""Which heads go where between servers of different tensor-parallel sizes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.kv_transfer.slices import HeadRange, HeadShare, is_covered, num_received

_SIZES = range(1, 9)
_CASES = [
    (num_heads, senders, receivers)
    for num_heads in range(1, 17)
    for senders in _SIZES
    for receivers in _SIZES
    if all(max(num_heads, size) % min(num_heads, size) == 0 for size in (senders, receivers))
]
"""Every pair of sizes that SGLang allows."""


def _held(num_heads: int, tp_size: int, rank: int) -> set[int]:
    """The slow way, head by head, as SGLang loads its weights."""
    if tp_size <= num_heads:
        each = num_heads // tp_size
        return {head for head in range(num_heads) if head // each == rank}
    return {rank // (tp_size // num_heads)}


@given(st.sampled_from(_CASES))
def test_every_rank_gets_each_of_its_heads_once(case: tuple[int, int, int]) -> None:
    """From one sender that holds it, in one run of heads per sender."""
    num_heads, num_senders, num_receivers = case
    for receiver in range(num_receivers):
        got: Counter[int] = Counter()
        parts = []
        for sender in range(num_senders):
            share = HeadShare(num_heads, num_senders, sender)
            sent = share.heads_to(receiver, num_receivers)
            assert (receiver in share.receivers(num_receivers)) == (sent is not None)
            if sent is not None:
                parts.append(sent)
                heads = range(sent.first, sent.end)
                assert _held(num_heads, num_senders, sender).issuperset(heads)
                got.update(heads)
        assert set(got) == _held(num_heads, num_receivers, receiver)
        assert set(got.values()) == {1}
        assert is_covered(HeadShare(num_heads, num_receivers, receiver).heads, parts)
        assert not is_covered(HeadShare(num_heads, num_receivers, receiver).heads, parts[1:])


@given(st.sampled_from(_CASES))
def test_what_is_sent_adds_up_and_is_dealt_out_evenly(case: tuple[int, int, int]) -> None:
    """Of ranks that hold the same head none feeds two more than another."""
    num_heads, num_senders, num_receivers = case
    total = 0
    by_head: dict[int, list[int]] = {}
    for sender in range(num_senders):
        share = HeadShare(num_heads, num_senders, sender)
        parts = [share.heads_to(receiver, num_receivers) for receiver in range(num_receivers)]
        total += sum(part.num for part in parts if part is not None)
        for head in _held(num_heads, num_senders, sender):
            num = sum(part is not None and part.first <= head < part.end for part in parts)
            by_head.setdefault(head, []).append(num)
    assert total == num_received(num_heads, num_receivers)
    assert all(max(each) - min(each) <= 1 for each in by_head.values())
    assert 0 in HeadShare(num_heads, num_senders, 0).receivers(num_receivers)


@given(st.sampled_from(_CASES))
def test_equal_sizes_send_rank_to_rank(case: tuple[int, int, int]) -> None:
    """All that a rank holds, to the one like it and to no other."""
    num_heads, size, _ = case
    for rank in range(size):
        share = HeadShare(num_heads, size, rank)
        assert share.receivers(size) == [rank]
        assert share.heads_to(rank, size) == share.heads


def test_sizes_that_do_not_go_with_the_heads_are_refused() -> None:
    """With both numbers."""
    with pytest.raises(ValueError, match="2 ranks cannot share 3 KV heads"):
        HeadShare(3, 2)
    with pytest.raises(ValueError, match="5 ranks cannot share 2 KV heads"):
        HeadShare(2).receivers(5)
    with pytest.raises(ValueError, match="0 ranks"):
        HeadShare(2).receivers(0)
    with pytest.raises(ValueError, match="no rank 2 of 2"):
        HeadShare(2, 2, 2)
    with pytest.raises(
        ValueError, match="holds 2 KV heads, but rank 1 of 2 has 4 of the model's 8"
    ):
        HeadShare(8, 2, 1).check_pool(2)


def test_ranges() -> None:
    """Half-open runs of heads."""
    assert HeadRange(2, 4).overlap(HeadRange(4, 8)) == HeadRange(4, 2)
    assert HeadRange(2, 4).overlap(HeadRange(6, 1)) is None
    assert HeadRange(6, 2).behind(4) == HeadRange(2, 2)
