"""What comes over gRPC, from bytes to what the core is asked: the only error is ``StreamError``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from router import service_requests as requests
from router import service_scheduling as scheduling
from router.call_messages import Append, ClientMessage, Commit, Open, Update
from router.service_decode import Undecodable, decoder
from router.service_server import MAX_MESSAGE_BYTES, SERVICE
from router.service_stream import client_messages
from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import InvalidArgumentError, StreamError
from tests.fuzz.bounds import bounded_memory, examples
from tests.fuzz.strategies import NUMBERS, TEXTS, hostile

VOCAB_SIZE = 300
KINDS = sorted(
    {GetMessageClass(method.input_type) for method in SERVICE.methods},
    key=lambda kind: str(kind.DESCRIPTOR.name),
)


@st.composite
def messages(draw: st.DrawFn, kind: type[Any], depth: int = 0) -> Any:
    """A message with random fields, each of its type."""
    made = kind()
    for field in kind.DESCRIPTOR.fields:
        if depth > 4 or not draw(st.booleans()):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(made, field.name)["order"] = "newest"
            continue
        num_values = draw(st.integers(1, 3)) if field.is_repeated else 1
        for _ in range(num_values):
            _set(draw, made, field, depth)
    return made


def _set(draw: st.DrawFn, made: Any, field: Any, depth: int) -> None:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        inner = draw(messages(GetMessageClass(field.message_type), depth + 1))
        if field.is_repeated:
            getattr(made, field.name).append(inner)
        else:
            getattr(made, field.name).CopyFrom(inner)
        return
    value = draw(TEXTS if field.type == FieldDescriptor.TYPE_STRING else NUMBERS)
    try:
        if field.is_repeated:
            getattr(made, field.name).append(value)
        else:
            setattr(made, field.name, value)
    except (ValueError, TypeError, UnicodeEncodeError, OverflowError):
        return  # nobody can send it


def samples(kind: type[Any]) -> list[bytes]:
    """Some messages of a kind, fixed."""
    segment = pb.Segment(text="a text")
    filled: dict[str, Any] = {
        "stream_id": 3,
        "seq": 1,
        "segment": segment,
        "prompt": segment,
        "open": pb.Open(mode=pb.STREAM_MODE_APPEND, request_id="r"),
        "commit": pb.Commit(sampling=pb.Sampling(stop=["a", "b"], max_tokens=3)),
        "policy": "lcas",
    }
    names = {field.name for field in kind.DESCRIPTOR.fields}
    whole = kind(**{name: value for name, value in filled.items() if name in names})
    more = [pb.StreamRequest(seq=1, append=pb.Append(segment=segment))]
    found = [whole.SerializeToString(), *(each.SerializeToString() for each in more)]
    return [data for data in found if data] or [b"\x08\x01"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.DESCRIPTOR.name))
@given(data=st.data())
@examples(40)
def test_bytes(kind: type[Message], data: st.DataObject) -> None:
    """A message, or the error that is told and an empty or readable rest; never an exception."""
    raw = data.draw(hostile(samples(kind)))
    with bounded_memory(len(raw)):
        found = decoder(kind)(raw)
    if isinstance(found, Undecodable):
        assert isinstance(found.error, InvalidArgumentError)
        assert isinstance(found.rest, kind)
    else:
        assert isinstance(found, kind)


async def next_of(read: AsyncIterator[ClientMessage]) -> ClientMessage:
    return await anext(read)


@given(data=st.data())
@examples(150)
def test_operations(data: st.DataObject) -> None:
    """What a message of a call asks for is something that the core takes, or refused."""
    request = data.draw(messages(pb.StreamRequest))

    async def one() -> Any:
        yield request

    operation = asyncio.run(next_of(client_messages(one(), VOCAB_SIZE))).operation
    if isinstance(operation, Open | Append | Update | Commit):
        _call(operation.read)


@given(data=st.data())
@examples(150)
def test_unary_requests(data: st.DataObject) -> None:
    """The same of the other calls."""
    generate = data.draw(messages(pb.GenerateRequest))
    _call(lambda: requests.generate_options(generate, VOCAB_SIZE))
    policy = data.draw(messages(pb.SetPolicyRequest))
    _call(lambda: scheduling.policy_wish(policy))
    describe = data.draw(messages(pb.DescribeStreamsRequest))
    _call(lambda: requests.server_timeout_s(describe))


def _call(read: Any) -> None:
    try:
        read()
    except StreamError:
        return


@pytest.mark.parametrize(
    "field", [b"\x52\x01\xff", b"\x52\x01a" * 50 + b"\x52\x01\xff", b"\x52\x00", b"\x07"]
)
def test_a_message_as_large_as_can_be_is_refused_soon(field: bytes) -> None:
    """However much is wrong with it: the router's loop would stand still meanwhile."""
    sampling = field * (MAX_MESSAGE_BYTES // len(field) // 8)
    length = len(sampling)
    prefix = bytearray(b"\x12")
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    raw = bytes(prefix) + sampling + b"\x22\x01\xff"  # and a request_id that is not UTF-8
    begun_s = time.monotonic()
    found = decoder(pb.GenerateRequest)(raw)
    assert isinstance(found, Undecodable)
    assert time.monotonic() - begun_s < 10.0  # a quarter of a second on a quiet machine
