"""The one internal form of append and update: keep so many tokens, then put these behind them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

TOKEN_TYPECODE = "i"
"""Token ids are kept as `array('i')`: 4 bytes each, compared and copied as memory."""

_FIRST_BLOCK_TOKENS = 64


def token_array(ids: Sequence[int] = ()) -> array[int]:
    """`ids` as a token array; an array of the right type is copied as memory."""
    return array(TOKEN_TYPECODE, ids)


@dataclass(frozen=True, slots=True)
class Splice:
    """A change of a token sequence.

    Attributes:
        keep_tokens: length of the unchanged beginning; everything behind it is gone.
        new_token_ids: what now stands behind the kept tokens. Owned by the splice: never changed.
    """

    keep_tokens: int
    new_token_ids: array[int]

    def __post_init__(self) -> None:
        if self.keep_tokens < 0:
            raise ValueError(f"keep_tokens must not be negative, got {self.keep_tokens}")

    @property
    def num_tokens(self) -> int:
        """Length of the sequence after the splice."""
        return self.keep_tokens + len(self.new_token_ids)

    def is_noop_on(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` tokens stays as it is."""
        return self.keep_tokens == num_tokens and not self.new_token_ids


def apply_splice(ids: array[int], splice: Splice) -> None:
    """Carry `splice` out on `ids`, in place, at the cost of the changed part only.

    Raises:
        ValueError: the splice keeps more tokens than there are; `ids` is unharmed.
    """
    if splice.keep_tokens > len(ids):
        raise ValueError(f"splice keeps {splice.keep_tokens} tokens of {len(ids)}")
    del ids[splice.keep_tokens :]
    ids.extend(splice.new_token_ids)


def lcp(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two token sequences.

    Two arrays of the same type are compared in doubling blocks of memory.
    """
    limit = min(len(a), len(b))
    if not (isinstance(a, array) and isinstance(b, array) and a.typecode == b.typecode):
        return next((i for i in range(limit) if a[i] != b[i]), limit)
    view_a, view_b = memoryview(a).cast("B"), memoryview(b).cast("B")
    size = a.itemsize
    start, block = 0, _FIRST_BLOCK_TOKENS
    while start < limit:
        end = min(limit, start + block)
        if view_a[start * size : end * size] == view_b[start * size : end * size]:
            start, block = end, block * 2
        elif block == 1:
            return start
        else:
            block = max(1, (end - start) // 2)
    return limit


def common_prefix_chars(a: str, b: str) -> int:
    """Length in characters of the longest common prefix of two texts, compared as memory."""
    limit = min(len(a), len(b))
    start, block = 0, 4 * _FIRST_BLOCK_TOKENS
    while start < limit:
        end = min(limit, start + block)
        if a[start:end] == b[start:end]:
            start, block = end, block * 2
        elif block == 1:
            return start
        else:
            block = max(1, (end - start) // 2)
    return limit


def splice_between(old: array[int], new: array[int]) -> Splice:
    """The smallest splice that turns `old` into `new`."""
    keep = lcp(old, new)
    return Splice(keep, new[keep:])
