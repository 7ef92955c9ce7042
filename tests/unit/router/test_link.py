"""The router's end of the links, against a bare socket."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from router.link import MAX_MESSAGES_PER_TURN, Identity, RouterLink
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.batch import MAX_MESSAGES, BatchDecoder
from streamfill.messages.codec import encode
from tests.unit.router.cluster_for_tests import until


class Peer:
    """A router's link, and a server's bare socket that has said something to it."""

    def __init__(self) -> None:
        self.heard: list[s.ServerToRouter] = []
        self.identity = b""
        self.unreachable: list[Identity] = []
        self.link = RouterLink(self._on_message, on_unreachable=self.unreachable.append)
        self._decoder: BatchDecoder[r.RouterToServer] = BatchDecoder(r.RouterToServer)
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0

    def _on_message(self, identity: Identity, message: s.ServerToRouter) -> None:
        self.identity = identity
        if message == closed(13):
            raise ZeroDivisionError
        self.heard.append(message)

    async def frame(self) -> list[r.RouterToServer]:
        """The messages of the next one."""
        return self._decoder.decode((await self.socket.recv_multipart())[0])

    async def connect(self) -> None:
        self.socket.connect(f"tcp://127.0.0.1:{self.link.bind('127.0.0.1', 0)}")
        await self.socket.send(encode(closed(0)))
        await until(lambda: self.heard)
        self.heard.clear()

    def close(self) -> None:
        self.link.close()
        self.socket.close()
        self._context.term()


@asynccontextmanager
async def connected() -> AsyncIterator[Peer]:
    peer = Peer()
    try:
        await peer.connect()
        yield peer
    finally:
        peer.close()


def closed(stream_id: int) -> s.Closed:
    return s.Closed(stream_id=stream_id, attempt=1)


def cancel(stream_id: int) -> r.Cancel:
    return r.Cancel(stream_id=stream_id, attempt=1)


async def test_what_is_sent_in_one_turn_leaves_in_one_frame() -> None:
    """In order; what comes later, in another one."""
    async with connected() as peer:
        messages = [cancel(number) for number in range(20)]
        for message in messages:
            peer.link.send(peer.identity, message)
        assert await peer.frame() == messages
        peer.link.send(peer.identity, cancel(99))
        assert await peer.frame() == [cancel(99)]


async def test_more_than_a_frame_takes() -> None:
    """Are several, in order."""
    async with connected() as peer:
        messages = [cancel(number) for number in range(2 * MAX_MESSAGES + 1)]
        for message in messages:
            peer.link.send(peer.identity, message)
        frames = [await peer.frame() for _ in range(3)]
        assert [len(frame) for frame in frames] == [MAX_MESSAGES, MAX_MESSAGES, 1]
        assert [message for frame in frames for message in frame] == messages


async def test_messages_of_one_frame_are_handed_on_in_order() -> None:
    """One that its handler fails on takes none of the others down."""
    async with connected() as peer:
        numbers = [10, 13, *range(14, 60)]
        await peer.socket.send(msgspec.msgpack.encode([closed(number) for number in numbers]))
        await until(lambda: len(peer.heard) == len(numbers) - 1)
        assert peer.heard == [closed(number) for number in numbers if number != 13]


async def test_other_work_gets_its_turn_between_full_frames() -> None:
    """However many wait."""
    async with connected() as peer:
        frame = msgspec.msgpack.encode([closed(1)] * MAX_MESSAGES)
        most = 0
        for _ in range(20):
            await peer.socket.send(frame)
        while len(peer.heard) < 20 * MAX_MESSAGES:
            before = len(peer.heard)
            await asyncio.sleep(0)
            most = max(most, len(peer.heard) - before)
        assert most < MAX_MESSAGES_PER_TURN + MAX_MESSAGES


async def test_what_waits_is_sent_when_the_link_is_closed() -> None:
    """Such as cancellations."""
    async with connected() as peer:
        peer.link.send(peer.identity, cancel(1))
        peer.link.close()
        assert await peer.frame() == [cancel(1)]
        peer.link.send(peer.identity, cancel(2))  # of no effect
        peer.link.close()


async def test_a_connection_that_is_gone() -> None:
    """Is told of, once for what would have left together; others are served."""
    async with connected() as peer:
        for number in (1, 2):
            peer.link.send(b"nobody", cancel(number))
        peer.link.send(peer.identity, cancel(3))
        assert await peer.frame() == [cancel(3)]
        assert peer.unreachable == [b"nobody"]


async def test_a_frame_that_cannot_be_sent_takes_no_others_along(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts as lost on the way, and the log says so."""
    async with connected() as peer:
        send = zmq.Socket.send_multipart

        def fail_for_one(socket: Any, frames: Sequence[bytes], *rest: Any) -> Any:
            if frames[0] == b"broken":
                raise zmq.ZMQError(errno.EIO)
            return send(socket, frames, *rest)

        monkeypatch.setattr(zmq.Socket, "send_multipart", fail_for_one)
        peer.link.send(b"broken", cancel(1))
        peer.link.send(peer.identity, cancel(2))
        assert await asyncio.wait_for(peer.frame(), 5) == [cancel(2)]
        assert "frame_not_sent" in caplog.text
        assert peer.unreachable == []


async def test_a_frame_with_one_bad_message_is_refused_whole() -> None:
    """Its sender repeats what was not acknowledged, as if the frame had been lost."""
    async with connected() as peer:
        good = encode(closed(1))
        await peer.socket.send(b"\x92" + good + encode(cancel(1)))
        answer = (await peer.frame())[0]
        assert isinstance(answer, r.Malformed)
        assert peer.heard == []
        assert peer.link.num_malformed_frames == 1
