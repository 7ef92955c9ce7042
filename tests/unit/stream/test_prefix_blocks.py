"""Names of blocks of prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import ProtocolError
from streamfill.stream.prefix_blocks import PrefixChain, block_keys, pack_keys, unpack_keys
from streamfill.stream.splice import Splice, apply_splice, token_array

_IDS = st.lists(st.integers(0, 3), max_size=40)


def test_equal_keys_mean_equal_prefixes() -> None:
    """A block of the same tokens behind others, or in another namespace, has another key."""
    keys = block_keys([1, 2, 3, 4, 1, 2], 2)
    assert len(set(keys)) == len(keys) == 3
    assert block_keys([1, 2, 3, 4, 9, 9, 9], 2)[:2] == keys[:2]
    assert not set(block_keys([1, 2, 3, 4], 2, "tenant")) & set(keys)
    assert all(0 <= key < 1 << 64 for key in keys)


def test_a_part_goes_on_behind_its_beginning() -> None:
    """Keys of the rest are the same as in one piece."""
    ids = list(range(20))
    first = block_keys(ids[:8], 4, "a")
    assert first + block_keys(ids[8:], 4, "a", after=first[-1]) == block_keys(ids, 4, "a")


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 40), _IDS), max_size=8))
def test_a_chain_has_the_keys_of_its_prompt(
    block_tokens: int, changes: list[tuple[int, list[int]]]
) -> None:
    """Whatever the prompt went through; and what it says is new was not there before."""
    chain, prompt = PrefixChain(block_tokens, "n"), token_array()
    for keep, new in changes:
        splice = Splice(min(keep, len(prompt)), token_array(new))
        apply_splice(prompt, splice)
        fresh = chain.splice(splice.keep_tokens, prompt)
        assert chain.keys == block_keys(prompt, block_tokens, "n")
        assert fresh == chain.keys[splice.keep_tokens // block_tokens :]


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_keys_survive_the_wire(keys: list[int]) -> None:
    """Unchanged, eight bytes each."""
    assert list(unpack_keys(pack_keys(keys))) == keys
    with pytest.raises(ProtocolError, match="not whole 64-bit"):
        unpack_keys(pack_keys(keys) + b"1")
