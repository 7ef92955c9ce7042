"""Several messages in one frame."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import ProtocolError
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.batch import (
    MAX_BATCH_BYTES,
    MAX_LOGGED_IDS,
    MAX_MESSAGES,
    BatchDecoder,
    MessageBatch,
    some_stream_ids,
)
from streamfill.messages.codec import MAX_FRAME_BYTES, FrameDecoder, encode
from tests.unit.messages.samples import ROUTER_TO_SERVER, SERVER_TO_ROUTER

DECODER: BatchDecoder[r.RouterToServer] = BatchDecoder(r.RouterToServer)


def batch_of(*messages: msgspec.Struct) -> MessageBatch:
    batch = MessageBatch()
    for message in messages:
        encoded = encode(message)
        assert batch.has_room_for(encoded)
        batch.add(encoded)
    return batch


def received(seq: int, stream_id: int = 1) -> s.Received:
    return s.Received(stream_id=stream_id, attempt=1, seq=seq)


@given(st.lists(st.sampled_from(ROUTER_TO_SERVER), min_size=1, max_size=40))
def test_messages_come_out_as_they_went_in(messages: list[r.RouterToServer]) -> None:
    """In order, and the batch is empty then."""
    batch = batch_of(*messages)
    assert len(batch) == len(messages)
    assert DECODER.decode(batch.take()) == messages
    assert len(batch) == 0


@pytest.mark.parametrize("num_messages", [1, 2, 15, 16, 17, MAX_MESSAGES])
def test_every_length_of_an_array(num_messages: int) -> None:
    """As msgpack writes them, with either of its two heads."""
    messages = [received(seq) for seq in range(num_messages)]
    frame = batch_of(*messages).take()
    assert BatchDecoder[s.ServerToRouter](s.ServerToRouter).decode(frame) == messages
    if num_messages > 1:
        assert frame == msgspec.msgpack.encode(messages)


@pytest.mark.parametrize("message", SERVER_TO_ROUTER, ids=lambda message: type(message).__name__)
def test_a_message_alone_is_a_frame_as_it_is(message: s.ServerToRouter) -> None:
    """So that a process of another version can read a registration, and be read in refusing it."""
    frame = batch_of(message).take()
    assert frame == encode(message)
    assert FrameDecoder[s.ServerToRouter](s.ServerToRouter).decode(frame) == message


def test_a_batch_is_full_by_count() -> None:
    """One more is for the next frame."""
    batch = batch_of(*(received(seq) for seq in range(MAX_MESSAGES)))
    assert not batch.has_room_for(encode(received(0)))


def test_a_batch_is_full_by_size() -> None:
    """A message that alone is larger still goes, alone."""
    huge = encode(
        r.Splice(stream_id=1, attempt=1, seq=1, keep_tokens=0, token_ids=bytes(MAX_BATCH_BYTES))
    )
    batch = MessageBatch()
    assert batch.has_room_for(huge)
    batch.add(huge)
    assert not batch.has_room_for(encode(received(1)))
    assert batch.take() == huge
    assert batch.has_room_for(encode(received(1)))


def test_a_batch_that_is_cleared() -> None:
    """Has room again."""
    batch = batch_of(*(received(seq) for seq in range(MAX_MESSAGES)))
    batch.clear()
    assert len(batch) == 0
    assert batch.has_room_for(encode(received(0)))


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="empty frame"),
        pytest.param(b"\x90", id="no message"),
        pytest.param(b"\xdc\x00\x00", id="no message, long head"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="a length and nothing behind it"),
        pytest.param(b"\x92" + encode(ROUTER_TO_SERVER[0]), id="one is missing"),
        pytest.param(b"\x91" + 2 * encode(ROUTER_TO_SERVER[0]), id="one too many"),
        pytest.param(b"\x92" + encode(ROUTER_TO_SERVER[0]) + b"\xc0", id="no message is one"),
        pytest.param(b"\x91\x91" + encode(ROUTER_TO_SERVER[0]), id="a batch in a batch"),
        pytest.param(
            msgspec.msgpack.encode([ROUTER_TO_SERVER[0], received(1)]), id="one of the other side"
        ),
        pytest.param(
            msgspec.msgpack.encode([ROUTER_TO_SERVER[0]] * (MAX_MESSAGES + 1)), id="too many"
        ),
        pytest.param(bytes(MAX_FRAME_BYTES + 1), id="too long"),
        pytest.param(b"\x91" + bytes(MAX_FRAME_BYTES), id="too long, of an array"),
    ],
)
def test_frames_that_are_no_batches(frame: bytes) -> None:
    """Are refused whole."""
    with pytest.raises(ProtocolError):
        DECODER.decode(frame)


def test_which_streams_a_lost_batch_was_about() -> None:
    """Some of them, each once, and none for a message about no stream."""
    assert some_stream_ids(batch_of(received(1, stream_id=7)).take()) == [7]
    assert some_stream_ids(batch_of(r.FlushCache(request_id=1)).take()) == []
    many = [received(1, stream_id) for stream_id in (9, 3, 3, *range(100, 200))]
    assert some_stream_ids(batch_of(*many).take()) == [3, 9, *range(100, 98 + MAX_LOGGED_IDS)]
