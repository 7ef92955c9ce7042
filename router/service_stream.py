"""The messages of one stream in a two-way call, as ``call_messages``, and back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from router import service_replies as replies
from router import service_requests as requests
from router.call_messages import (
    Append,
    CallEvent,
    Cancel,
    ClientMessage,
    Commit,
    Failed,
    Open,
    Opened,
    Operation,
    Refused,
    Resume,
    Unreadable,
    Update,
)
from router.service_decode import Undecodable
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.status_details import error_event, failed_event
from streamfill.errors import InvalidArgumentError


async def client_messages(
    requests_read: AsyncIterator[pb.StreamRequest | Undecodable[pb.StreamRequest]],
    vocab_size: int,
) -> AsyncIterator[ClientMessage]:
    """What the messages of a call ask for. Their values are checked when they are applied."""
    async for request in requests_read:
        if isinstance(request, Undecodable):
            seq = request.rest.seq if request.rest.HasField("seq") else None
            yield ClientMessage(seq, Unreadable(request.error))
        else:
            yield client_message(request, vocab_size)


def client_message(request: pb.StreamRequest, vocab_size: int) -> ClientMessage:
    """What one message asks for."""
    seq = request.seq if request.HasField("seq") else None
    return ClientMessage(seq, _operation(request, vocab_size))


def call_event(event: CallEvent, stream_id: int) -> pb.StreamEvent:
    """What a client is told.

    Args:
        stream_id: of the call's stream; of no meaning before it is open.
    """
    match event:
        case Opened():
            return pb.StreamEvent(opened=replies.opened(event))
        case Refused():
            return error_event(event.error, event.seq)
        case Failed():
            return failed_event(event.error)
        case _:
            return replies.stream_event(event, stream_id)


def _operation(request: pb.StreamRequest, vocab_size: int) -> Operation:
    match request.WhichOneof("operation"):
        case "open":
            return Open(partial(requests.open_options, request.open))
        case "resume":
            return Resume(partial(requests.resume_point, request.resume))
        case "append":
            return Append(partial(requests.segment, request.append.segment, vocab_size))
        case "update":
            return Update(partial(requests.segment, request.update.segment, vocab_size))
        case "commit":
            return Commit(partial(requests.commit_options, request.commit, vocab_size))
        case "cancel":
            return Cancel(request.cancel.reason)
    return Unreadable(InvalidArgumentError("the message has no operation"))
