"""Messages between the processes: whatever comes, the only error is ``ProtocolError``."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import ProtocolError
from streamfill.links.inbound_gate import InboundGate
from streamfill.messages import control, handoff, router_to_server, server_to_router
from streamfill.messages.codec import FrameDecoder, encode, pack_ids, unpack_ids
from tests.fuzz.bounds import bounded_memory, examples
from tests.fuzz.strategies import altered, encodable, hostile
from tests.unit.kv_transfer.test_handoff_messages import _GOLDEN as HANDOFF
from tests.unit.messages.samples import CONTROL, ROUTER_TO_SERVER, SERVER_TO_ROUTER

FRAMES = {
    "router to server": [encode(message) for message in ROUTER_TO_SERVER],
    "server to router": [encode(message) for message in SERVER_TO_ROUTER],
    "control": [encode(message) for message in CONTROL],
    "hand-off": [frame for _, frame in HANDOFF],
}
UNIONS: list[tuple[object, str]] = [
    (router_to_server.RouterToServer, "router to server"),
    (server_to_router.ServerToRouter, "server to router"),
    (control.ServerToController, "control"),
    (control.ControllerToServer, "control"),
    (handoff.ToReceiver, "hand-off"),
    (handoff.ToSender, "hand-off"),
]
DECODERS = [
    pytest.param(FrameDecoder(union), FRAMES[name], id=f"{number} {name}")
    for number, (union, name) in enumerate(UNIONS)
]


def decode(decoder: FrameDecoder[Any], frame: bytes) -> Any:
    """The message, or None for the one error that there is; in memory that grows with the frame."""
    with bounded_memory(len(frame)):
        try:
            return decoder.decode(frame)
        except ProtocolError:
            return None


@pytest.mark.parametrize(("decoder", "samples"), DECODERS)
@given(data=st.data())
@examples(60)
def test_bytes(decoder: FrameDecoder[Any], samples: list[bytes], data: st.DataObject) -> None:
    """A frame is a message or an error; a message that was read is written as something that is
    read as the same."""
    message = decode(decoder, data.draw(hostile(samples)))
    if message is not None:
        assert repr(decoder.decode(encode(message))) == repr(message)


@pytest.mark.parametrize(("decoder", "samples"), DECODERS)
@given(data=st.data())
@examples(60)
def test_fields(decoder: FrameDecoder[Any], samples: list[bytes], data: st.DataObject) -> None:
    """The same of well-formed msgpack whose fields are something else."""
    fields = [msgspec.msgpack.decode(sample) for sample in samples]
    frame = encodable(msgspec.msgpack.encode, data.draw(altered(fields)))
    if frame is not None:
        decode(decoder, frame)


@pytest.mark.parametrize(("decoder", "samples"), DECODERS)
def test_announced_lengths_and_depth(decoder: FrameDecoder[Any], samples: list[bytes]) -> None:
    """An announced size takes no memory before its bytes are there, and no depth is too deep."""
    for frame in (
        *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"),
        *(b"\x91" * 200_000, b"\x81\xa1a" * 100_000),
    ):
        for whole in (frame, samples[0][:1] + frame, b"\x81\xa4type" + frame):
            assert decode(decoder, whole) is None


@given(data=st.binary(max_size=64))
@examples(50)
def test_token_ids(data: bytes) -> None:
    """Whole integers, or the error."""
    try:
        ids = unpack_ids(data)
    except ProtocolError:
        assert len(data) % 4
        return
    assert pack_ids(ids) == data


@given(data=st.data())
@examples(100)
def test_the_gate_behind_the_decoder(data: st.DataObject) -> None:
    """Takes every sequence of messages that can be read: each number of a stream is delivered at
    most once, in order, and what it keeps is one entry a stream."""
    decoder: FrameDecoder[router_to_server.RouterToServer] = FrameDecoder(
        router_to_server.RouterToServer
    )
    gate = InboundGate()
    samples = [msgspec.msgpack.decode(frame) for frame in FRAMES["router to server"]]
    delivered: dict[tuple[int, int], int] = {}
    for _ in range(data.draw(st.integers(1, 20))):
        fields = dict(data.draw(st.sampled_from(samples)))
        for name, values in (("stream_id", (1, 2)), ("attempt", (1, 2)), ("seq", (1, 2, 3))):
            if name in fields:
                fields[name] = data.draw(st.sampled_from(values))
        message = decoder.decode(msgspec.msgpack.encode(fields))
        admission = gate.admit(message)
        if isinstance(message, router_to_server.OpenStream) and admission.deliver:
            delivered[message.stream_id, message.attempt] = 0
        if isinstance(message, router_to_server.Splice | router_to_server.Commit):
            key = (message.stream_id, message.attempt)
            if admission.deliver:
                assert message.seq == delivered[key] + 1
                delivered[key] = message.seq
    assert len(gate) <= 2
