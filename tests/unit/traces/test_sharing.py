"""What prompts have in common is found without keeping them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamfill.traces.format import Segment
from streamfill.traces.sharing import (
    CHARS_PER_BLOCK,
    TOKENS_PER_BLOCK,
    PrefixIndex,
    common_block_tokens,
    common_prefix,
)


def test_only_the_beginning_counts() -> None:
    """A text that comes again counts as far as it begins a prompt, in whole blocks."""
    index = PrefixIndex()
    text = "".join(chr(97 + n % 26) for n in range(3 * CHARS_PER_BLOCK))
    assert index.text(text) == 0
    assert index.text(text + "more") == 3 * CHARS_PER_BLOCK
    assert index.text(text[: CHARS_PER_BLOCK + 5]) == CHARS_PER_BLOCK
    assert index.text("x" + text) == 0


def test_token_prompts() -> None:
    """Token ids are compared as such; a text never equals token ids."""
    index = PrefixIndex()
    ids = tuple(range(4 * TOKENS_PER_BLOCK))
    assert index.tokens(ids) == 0
    assert index.tokens((*ids[: 2 * TOKENS_PER_BLOCK], 999, *ids)) == 2 * TOKENS_PER_BLOCK
    assert index.text(str(ids)) == 0


def test_blocks() -> None:
    """Whole blocks are compared by their ids, across segments that end with a block."""
    index = PrefixIndex()
    assert index.blocks([Segment(num_tokens=1024, block_ids=(1, 2))]) == 0
    again = [Segment(num_tokens=512, block_ids=(1,)), Segment(num_tokens=600, block_ids=(2, 3))]
    assert index.blocks(again) == 1024
    shifted = [Segment(num_tokens=500, block_ids=(1,)), Segment(num_tokens=512, block_ids=(2,))]
    assert index.blocks(shifted) == 0


def test_a_full_index_says_so() -> None:
    """Memory is bounded; what is found afterwards is a lower bound."""
    index = PrefixIndex(max_blocks=2)
    first, second = "a" * 2 * CHARS_PER_BLOCK, "b" * 2 * CHARS_PER_BLOCK
    states = []
    for text in (first, second):
        index.text(text)
        states.append(index.is_full)
    assert states == [False, True]
    assert index.text(first) == len(first)
    assert index.text(second) == 0


SHORT = st.text("ab", max_size=12)


@given(SHORT, SHORT, SHORT)
def test_common_prefix(start: str, first: str, second: str) -> None:
    """It is the longest one: the next elements differ, or one sequence ends there."""
    first, second = start + first, start + second
    length = common_prefix(first, second)
    assert length >= len(start)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or first == second


def test_common_blocks() -> None:
    """Segments of blocks have whole blocks in common, cut at the shorter length."""
    long = Segment(num_tokens=1200, block_ids=(1, 2, 3))
    assert common_block_tokens(long, Segment(num_tokens=1536, block_ids=(1, 2, 4))) == 1024
    assert common_block_tokens(long, Segment(num_tokens=700, block_ids=(1, 2))) == 700
    assert common_block_tokens(long, Segment(num_tokens=512, block_ids=(9,))) == 0
