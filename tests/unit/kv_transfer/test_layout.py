"""The layout of KV, and what fits it."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from streamfill.kv_transfer.layout import KvLayout
from tests.unit.kv_transfer.builders import LAYOUT


def test_bytes_per_token_counts_keys_and_values_of_all_layers() -> None:
    """2 layers, 2 heads, 8 + 4 elements, 4 bytes."""
    assert LAYOUT.k_bytes_per_token == 2 * 2 * 8 * 4
    assert LAYOUT.v_bytes_per_token == 2 * 2 * 4 * 4
    assert LAYOUT.bytes_per_token == 192


def test_equal_layouts_match() -> None:
    """Equality is what lets two ranks exchange KV."""
    assert LAYOUT.mismatch(msgspec.structs.replace(LAYOUT)) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("page_size", 16), ("dtype", "bfloat16"), ("num_kv_heads", 1), ("head_dim", 64)],
)
def test_a_mismatch_names_both_values(field: str, value: object) -> None:
    """Whoever reads the message knows what to change on which side."""
    other = msgspec.structs.replace(LAYOUT, **{field: value})
    text = LAYOUT.mismatch(other)
    assert text is not None
    assert f"{field} is {getattr(LAYOUT, field)} here and {value} there" in text


@pytest.mark.parametrize(
    ("ids", "first", "tokens", "num_bytes", "complaint"),
    [
        (8, 4, 4, 4 * 192, None),
        (4, 4, 0, 0, None),
        (8, 4, 8, 8 * 192, "do not add up"),
        (9, 4, 5, 5 * 192, "whole pages"),
        (9, 5, 4, 4 * 192, "whole pages"),
        (8, 4, 4, 100, "take 768 bytes, not 100"),
        (4, -4, 8, 8 * 192, "negative"),
    ],
)
def test_sizes_of_a_transfer_are_checked(
    ids: int, first: int, tokens: int, num_bytes: int, complaint: str | None
) -> None:
    """Sizes must agree with each other, with the layout and with its pages of 4 tokens."""
    layout = msgspec.structs.replace(LAYOUT, page_size=4)
    problem = layout.transfer_problem(
        num_token_ids=ids, first_token=first, num_tokens=tokens, num_bytes=num_bytes
    )
    assert problem is None if complaint is None else complaint in (problem or "")


def test_a_layout_from_the_wire_has_positive_sizes() -> None:
    """A layout with nothing in it would make every transfer fit."""
    frame = msgspec.msgpack.encode(msgspec.structs.replace(LAYOUT, num_layers=0))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(frame, type=KvLayout)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("streamfill.messages.handoff", "torch"),
        ("streamfill.kv_transfer.sender, streamfill.kv_transfer.receiver", "sglang"),
    ],
)
def test_imports_stay_light(modules: str, absent: str) -> None:
    """The messages need no torch, the transport needs no sglang."""
    code = f"import sys, {modules}; sys.exit({absent!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
