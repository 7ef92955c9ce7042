"""Bytes that a broken or hostile peer may send: random ones, and good ones with a few mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import strategies as st

MAX_RANDOM_BYTES = 512
MAX_MISTAKES = 6
_INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xc1",
    b"\xdd\xff\xff\xff\xff",
    b'"',
    b"{",
    b"[",
)
"""Ends of ranges, a code that msgpack never uses, a length of four billion."""


@st.composite
def mutated(draw: st.DrawFn, samples: Sequence[bytes]) -> bytes:
    """One of ``samples`` with some mistakes."""
    data = bytearray(draw(st.sampled_from(list(samples))))
    for _ in range(draw(st.integers(1, MAX_MISTAKES))):
        place = draw(st.integers(0, len(data)))
        end = min(len(data), place + draw(st.integers(0, 8)))
        match draw(st.sampled_from(("flip", "insert", "delete", "cut", "double", "splice", "odd"))):
            case "flip" if place < len(data):
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=4))
            case "delete":
                del data[place:end]
            case "cut":
                del data[place:]
            case "double":
                data[place:place] = data[place:end]
            case "splice":
                other = draw(st.sampled_from(list(samples)))
                data[place:] = other[draw(st.integers(0, len(other))) :]
            case "odd":
                data[place:end] = draw(st.sampled_from(_INTERESTING))
    return bytes(data)


def hostile(samples: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Random bytes, and ``samples`` with mistakes."""
    return st.one_of(st.binary(max_size=MAX_RANDOM_BYTES), mutated(samples))


NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "\x00", "\ud800", "\u202e", "\U0010ffff", "a" * 5000, "NaN", "1e999"]),
)


def values(names: Sequence[str] = ()) -> st.SearchStrategy[Any]:
    """Anything that JSON can say, with keys out of ``names`` among others."""
    keys = st.one_of(st.sampled_from(list(names)), st.text(max_size=8)) if names else st.text()
    return st.recursive(
        st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
        lambda inner: st.one_of(
            st.lists(inner, max_size=5), st.dictionaries(keys, inner, max_size=6)
        ),
        max_leaves=12,
    )


@st.composite
def altered(draw: st.DrawFn, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One of these objects with some fields replaced, added or left out."""
    made = dict(draw(st.sampled_from(list(samples))))
    names = sorted({name for sample in samples for name in sample})
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(names))
        if draw(st.booleans()):
            made[name] = draw(values(names))
        else:
            made.pop(name, None)
    return made


def encodable(encode: Any, value: object) -> bytes | None:
    """As ``encode`` writes it; None where it cannot, as lone surrogates and large integers."""
    try:
        return bytes(encode(value))
    except (UnicodeEncodeError, OverflowError, msgspec.EncodeError, ValueError, TypeError):
        return None
