"""Which pages host memory holds: against a plain model, and the order in which they go."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_server.host_index import STALE_POOLS, HostIndex, block_keys


def _q(*token_ids: int) -> array[int]:
    return array("q", token_ids)


def test_keys_tell_the_whole_prefix() -> None:
    first = block_keys(_q(1, 2, 3, 4, 5), 2)
    other_start = block_keys(_q(9, 2, 3, 4), 2)
    assert len(first) == 2
    assert first[1] != other_start[1]
    assert block_keys(_q(1, 2, 3, 4, 9), 2) == first


def test_longer_prompts_have_the_keys_of_shorter_ones() -> None:
    ids = _q(*range(70))
    keys = block_keys(ids, 16)
    assert len(keys) == 4
    assert block_keys(ids[:40], 16) == keys[:2]


def test_no_page_no_key() -> None:
    assert block_keys(_q(1, 2, 3), 4) == []


def test_pages_are_put_once() -> None:
    index = HostIndex(4)
    keys = block_keys(_q(1, 2, 3), 1)
    assert index.put(keys) == [(keys[0], 0), (keys[1], 1), (keys[2], 2)]
    assert index.put(keys) == []
    assert index.find(keys) == [0, 1, 2]
    assert (len(index), index.num_free) == (3, 1)


def test_what_waits_is_not_given_up() -> None:
    """The newcomer gets what is free, and no more."""
    index = HostIndex(4)
    old, new = block_keys(_q(1, 2, 3), 1), block_keys(_q(7, 8), 1)
    index.put(old)
    assert len(index.put(new)) == 1
    assert (index.num_present(old), index.num_present(new)) == (3, 1)
    assert index.num_dropped == 0
    assert index.num_spare == 0


def test_more_than_fits_in_turn_keeps_what_is_there() -> None:
    """Where the oldest went first, each of five that take turns would find nothing of its own in
    room for four, round after round."""
    index = HostIndex(8)
    streams = [block_keys(_q(10 * number, 10 * number + 1), 1) for number in range(5)]
    for keys in streams:
        index.put(keys)
    for _ in range(6):
        found = 0
        for keys in streams:
            num_here = index.num_present(keys)
            found += num_here
            index.find(keys[:num_here])  # it comes back,
            index.put(keys)  # and goes again
        assert found == 8


def test_what_nobody_asks_for_is_forgotten() -> None:
    """After four times as much as there is room for was to be put in."""
    index = HostIndex(4)
    left = block_keys(_q(1, 2, 3, 4), 1)
    index.put(left)
    for number in range(STALE_POOLS * 4 - 1):
        assert index.put(block_keys(_q(100 + number), 1)) == [], number
    new = block_keys(_q(7), 1)
    assert len(index.put(new)) == 1
    assert (index.num_present(left), index.num_present(new)) == (3, 1)
    index.touch(left[:3])
    assert index.put(block_keys(_q(8), 1)) == []


def test_the_device_pools_own_go_before_what_waits() -> None:
    """Of copies of KV that is there too, the end of the longest unused sequence first."""
    index = HostIndex(6)
    waiting, first, second = (block_keys(_q(x, x + 1), 1) for x in (1, 3, 5))
    index.put(waiting)
    index.put(first, is_resident=True)
    index.put(second)
    index.find(second)
    assert index.num_spare == 4
    index.put(block_keys(_q(7), 1))
    assert [index.num_present(keys) for keys in (waiting, first, second)] == [2, 1, 2]
    index.put(block_keys(_q(8, 9), 1))
    assert [index.num_present(keys) for keys in (waiting, first, second)] == [2, 0, 1]
    index.put(block_keys(_q(10, 11), 1))
    assert [index.num_present(keys) for keys in (waiting, first, second)] == [2, 0, 0]
    assert index.num_spare == 0


def test_a_copy_of_what_leaves_the_device_pool_waits() -> None:
    """From then on; nothing is written again."""
    index = HostIndex(2)
    keys = block_keys(_q(1, 2), 1)
    index.put(keys, is_resident=True)
    assert index.num_spare == 2
    assert index.put(keys) == []
    assert index.num_spare == 0
    assert index.put(block_keys(_q(7), 1)) == []


def test_a_sequence_does_not_take_the_room_of_its_own_beginning() -> None:
    index = HostIndex(3)
    keys = block_keys(_q(1, 2, 3, 4, 5), 1)
    index.put(keys[:3], is_resident=True)
    assert index.put(keys, is_resident=True) == []
    assert index.num_present(keys) == 3


def test_the_demoted_go_before_all() -> None:
    index = HostIndex(4)
    old, new = block_keys(_q(1, 2), 1), block_keys(_q(5, 6), 1)
    index.put(old, is_resident=True)
    index.put(new)
    index.demote(new)
    assert index.num_spare == 4
    index.put(block_keys(_q(7), 1))
    assert (index.num_present(old), index.num_present(new)) == (2, 1)
    index.touch(new)
    assert index.num_spare == 2


def test_all_are_demoted() -> None:
    """The least recently used goes first."""
    index = HostIndex(3)
    keys = [block_keys(_q(x), 1) for x in (1, 2, 3)]
    for each in keys:
        index.put(each)
    index.demote(None)
    assert index.num_spare == 3
    index.put(block_keys(_q(7), 1))
    assert [index.num_present(each) for each in keys] == [0, 1, 1]


def test_too_little_room_keeps_the_beginning() -> None:
    index = HostIndex(3)
    keys = block_keys(_q(1, 2, 3, 4, 5), 1)
    assert len(index.put(keys)) == 3
    assert index.num_present(keys) == 3
    longer = block_keys(_q(1, 2, 3, 4, 5, 6), 1)
    assert index.put(longer) == []  # what is here must not be given up for what follows it


@pytest.mark.parametrize("number", [0, 1])
def test_no_room_at_all(number: int) -> None:
    index = HostIndex(number)
    keys = block_keys(_q(1, 2), 1)
    assert len(index.put(keys)) == number
    assert index.num_present(keys) == number


def test_a_missing_page_is_not_found() -> None:
    index = HostIndex(2)
    with pytest.raises(KeyError):
        index.find(block_keys(_q(1), 1))


_SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=6)
_ACTIONS = st.lists(
    st.tuples(st.sampled_from(["put", "touch", "demote", "clear"]), _SEQUENCES), max_size=40
)


@given(st.integers(0, 5), _ACTIONS)
def test_no_page_is_used_twice(num_pages: int, actions: list[tuple[str, list[int]]]) -> None:
    index = HostIndex(num_pages)
    contents: dict[int, bytes] = {}
    for action, ids in actions:
        keys = block_keys(_q(*ids), 1)
        num_spare = index.num_spare
        if action == "put":
            for key, page in index.put(keys):
                contents[page] = key
            assert index.num_present(keys) >= min(len(keys), num_spare)
        elif action == "clear":
            index.clear()
        else:
            getattr(index, action)(keys)
        assert len(index) + index.num_free == num_pages
        assert index.num_free <= index.num_spare <= num_pages
        present = keys[: index.num_present(keys)]
        assert [contents[page] for page in index.find(present)] == present
