"""The bytes of every message, as they are in ``golden.txt``: one line each, its tag and its frame
in hex.

Both sides of a socket must agree on them. A test here fails when a field is renamed, added or
moved, when a tag or the value of an enum changes. If that is meant, raise ``PROTOCOL_VERSION`` and
put the new line there.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from streamfill.messages import control, router_to_server, server_to_router
from streamfill.messages.codec import FrameDecoder, encode
from streamfill.messages.common import FinishReason, Role, StreamMode
from tests.unit.messages.samples import CONTROL, ROUTER_TO_SERVER, SERVER_TO_ROUTER

GOLDEN = dict(
    line.split(" ") for line in Path(__file__).with_name("golden.txt").read_text().splitlines()
)
UNIONS = {
    "router_to_server": (router_to_server.RouterToServer, ROUTER_TO_SERVER),
    "server_to_router": (server_to_router.ServerToRouter, SERVER_TO_ROUTER),
    "control": (control.ServerToController | control.ControllerToServer, CONTROL),
}
SAMPLES = [
    pytest.param(union, message, id=f"{direction}-{type(message).__name__}")
    for direction, (union, samples) in UNIONS.items()
    for message in samples
]


def tag_of(message: msgspec.Struct) -> str:
    return str(message.__struct_config__.tag)


@pytest.mark.parametrize(("union", "message"), SAMPLES)
def test_bytes_are_the_golden_ones(union: object, message: msgspec.Struct) -> None:
    """A message becomes exactly its golden frame, and that frame becomes the message."""
    frame = encode(message)
    line = f"{tag_of(message)} {frame.hex()}"
    assert frame.hex() == GOLDEN.get(tag_of(message)), f"now: {line}"
    decoder: FrameDecoder[msgspec.Struct] = FrameDecoder(union)
    assert decoder.decode(bytes.fromhex(GOLDEN[tag_of(message)])) == message


@pytest.mark.parametrize("direction", UNIONS)
def test_every_message_has_a_sample(direction: str) -> None:
    """No message of a union is left out here."""
    union, samples = UNIONS[direction]
    assert {type(message) for message in samples} == set(get_args(union))


def test_no_golden_line_is_left_over() -> None:
    """The golden file has a line for each message and no other; no tag is used twice."""
    tags = [tag_of(message) for _, samples in UNIONS.values() for message in samples]
    assert sorted(tags) == sorted(GOLDEN)
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize(("union", "message"), SAMPLES)
def test_samples_set_every_field(union: object, message: msgspec.Struct) -> None:
    """A sample leaves no field at its default, so that every field is in its golden bytes."""
    _assert_no_defaults(message)


def _assert_no_defaults(value: object) -> None:
    if isinstance(value, tuple):
        for each in value:
            _assert_no_defaults(each)
    if isinstance(value, msgspec.Struct):
        for field in msgspec.structs.fields(value):
            inner = getattr(value, field.name)
            assert field.required or inner != field.default, field.name
            _assert_no_defaults(inner)


def test_enum_values() -> None:
    """The words of the enums on the wire."""
    assert [each.value for each in Role] == ["prefill", "decode"]
    assert [each.value for each in StreamMode] == ["append", "update"]
    assert [each.value for each in FinishReason] == ["stop", "length", "abort"]
    assert [each.value for each in control.Residency] == ["device", "host", "none"]
    assert [each.value for each in control.PreemptionAction] == ["keep", "recompute", "swap"]
