"""Which pages host memory holds: against a plain model, and the order in which they go."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_server.host_index import HostIndex, block_keys


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


def test_the_end_of_the_longest_unused_sequence_goes_first() -> None:
    index = HostIndex(4)
    old, new = block_keys(_q(1, 2, 3), 1), block_keys(_q(7, 8), 1)
    index.put(old)
    index.put(new)
    assert index.num_present(old) == 2
    assert index.num_present(new) == 2
    assert index.num_dropped == 1


def test_use_protects() -> None:
    index = HostIndex(4)
    old, other = block_keys(_q(1, 2), 1), block_keys(_q(5, 6), 1)
    index.put(old)
    index.put(other)
    index.touch(old)
    index.put(block_keys(_q(7), 1))
    assert (index.num_present(old), index.num_present(other)) == (2, 1)


def test_use_keeps_the_beginning_for_longer() -> None:
    index = HostIndex(4)
    old, other = block_keys(_q(1, 2), 1), block_keys(_q(5, 6), 1)
    index.put(other)
    index.put(old)
    index.touch(old)
    index.put(block_keys(_q(7, 8, 9), 1))
    assert (index.num_present(old), index.num_present(other)) == (1, 0)


def test_the_demoted_go_before_all() -> None:
    index = HostIndex(4)
    old, new = block_keys(_q(1, 2), 1), block_keys(_q(5, 6), 1)
    index.put(old)
    index.put(new)
    index.demote(new)
    assert index.num_demoted == 2
    index.put(block_keys(_q(7), 1))
    assert (index.num_present(old), index.num_present(new)) == (2, 1)


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
        if action == "put":
            for key, page in index.put(keys):
                contents[page] = key
            assert index.num_present(keys) == min(len(keys), num_pages)
        elif action == "clear":
            index.clear()
        else:
            getattr(index, action)(keys)
        assert len(index) + index.num_free == num_pages
        assert index.num_demoted <= len(index)
        present = keys[: index.num_present(keys)]
        assert [contents[page] for page in index.find(present)] == present
