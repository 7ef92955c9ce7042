"""Plays one stream against a cluster in which anything may go wrong.

A client as the documentation wants it: what was refused with a code that says "again, later" is
said again under its number; what broke and cannot be gone on with is the end of the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import grpc.aio

from streamfill.api import Client, requests
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.answer import Answer
from streamfill.api.status_details import from_rpc_error
from streamfill.api.stream import Stream
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.api.types import Metadata, Usage
from streamfill.errors import ErrorCode, StreamError
from tests.chaos.cluster_history import Acknowledgement, Answered, StreamHistory
from tests.chaos.cluster_streams import Fate, Form, PlannedStream

LIFE_S = 60.0
"""For a whole stream: a server is replaced within 30 s, or its streams fail."""

AGAIN_WITHIN_S = 20.0
"""So long what was refused for now is said again; a killed router is back in a few seconds."""

_PAUSE_S = 0.2
_FOR_NOW = (ErrorCode.UNAVAILABLE, ErrorCode.RESOURCE_EXHAUSTED)

T = TypeVar("T")


async def play(planned: PlannedStream, client: Client, address: str, prefix: str) -> StreamHistory:
    """Play it to its end. Never raises but when it is cancelled.

    Args:
        planned: what to do.
        client: of the cluster, shared by all streams that keep their connection.
        address: of the cluster, for those that cut theirs.
        prefix: of request ids.
    """
    history = StreamHistory(number=planned.number)
    player = _Player(planned, history, f"{prefix}{planned.number}")
    try:
        async with asyncio.timeout(LIFE_S):
            if planned.fate is Fate.CUT:
                await _cut(player, planned, address)
            else:
                await player.live(client)
        history.ended_s = time.monotonic()
    except StreamError as error:
        history.failed(error)
        history.ended_s = time.monotonic()
    except TimeoutError:
        history.note(f"!! not over after {LIFE_S:g} s")
    return history


async def _cut(player: _Player, planned: PlannedStream, address: str) -> None:
    async with Client(address) as client:
        life = asyncio.create_task(player.live(client))
        await asyncio.wait({life}, timeout=planned.fate_after)
        player.history.left = not life.done()
        player.history.note("cuts its connection")
        await client.close()
        life.cancel()
        await asyncio.wait({life})
    if not life.cancelled() and life.exception() is None:
        player.history.left = False  # the end of its answer was already here
    error = None if life.cancelled() else life.exception()
    if isinstance(error, StreamError) and not player.history.left:
        raise error


class _Player:
    def __init__(self, planned: PlannedStream, history: StreamHistory, request_id: str) -> None:
        self.history = history
        self._planned = planned
        self._request_id = request_id

    async def live(self, client: Client) -> None:
        match self._planned.form:
            case Form.BIDI:
                await self._by_one_call(client)
            case Form.UNARY:
                await self._by_unary_calls(client)
            case Form.ONE_SHOT:
                await self._in_one_shot(client)

    async def _by_one_call(self, client: Client) -> None:
        planned, history = self._planned, self.history
        stream = await self._again(lambda: self._open(client))
        history.note(f"opened, stream {stream.stream_id}")
        put = stream.append if planned.mode == "append" else stream.update

        def is_over() -> bool:
            return stream._call.end is not None

        try:
            for place, segment in enumerate(self._before_commit):
                await asyncio.sleep(planned.gaps_s[place])
                progress = await self._again(partial(put, segment), is_over)
                self._acknowledge(place, progress.num_received_tokens)
            final = await self._final()

            async def commit() -> None:
                await self._read_answer(stream.commit(final, **planned.sampling))

            await self._again(commit, is_over)
        finally:
            await stream.__aexit__(None, None, None)

    async def _open(self, client: Client) -> Stream:
        stream = client.stream(mode=self._planned.mode, request_id=self._next_request_id())
        await stream.__aenter__()
        return stream

    async def _in_one_shot(self, client: Client) -> None:
        planned = self._planned

        async def ask() -> None:
            request_id = self._next_request_id()
            answer = client.generate(planned.text, request_id=request_id, **planned.sampling)
            await self._read_answer(answer)

        await self._again(ask)

    async def _read_answer(self, answer: Answer) -> None:
        self.history.committed_s = time.monotonic()
        async with answer:
            async for token in answer:
                self.history.token(token.index, token.token_id)
                if self._leaves():
                    return
        result = answer.result
        self._answered(result.finish_reason, result.usage, result.metadata)

    async def _by_unary_calls(self, client: Client) -> None:
        planned, stub = self._planned, client.stub
        mode = pb.STREAM_MODE_APPEND if planned.mode == "append" else pb.STREAM_MODE_UPDATE

        async def opened() -> int:
            opening = pb.Open(mode=mode, request_id=self._next_request_id())
            with _translated():
                reply = await stub.OpenStream(pb.OpenStreamRequest(open=opening))
            return reply.stream_id

        stream_id = await self._again(opened)
        self.history.note(f"opened, stream {stream_id}")
        for place, segment in enumerate(self._before_commit):
            await asyncio.sleep(planned.gaps_s[place])
            put = partial(self._put, stub, stream_id, place + 1, segment)
            self._acknowledge(place, await self._again(put))
        commit = pb.Commit(
            sampling=requests.sampling(planned.sampling),
            final_segment=requests.optional_segment(await self._final(), None, None),
        )
        request = pb.CommitStreamRequest(
            stream_id=stream_id, seq=len(self._before_commit) + 1, commit=commit
        )

        async def read() -> None:
            request.next_token_index = len(self.history.indices)
            await self._read_call(stub.CommitStream(request))

        await self._again(read, can_go_on=True)

    async def _put(self, stub: StreamfillStub, stream_id: int, seq: int, text: str) -> int:
        segment = requests.segment(text, None, None, None)
        with _translated():
            if self._planned.mode == "append":
                append = pb.AppendSegmentRequest(stream_id=stream_id, seq=seq, segment=segment)
                return (await stub.AppendSegment(append)).num_received_tokens
            update = pb.UpdateContextRequest(stream_id=stream_id, seq=seq, segment=segment)
            return (await stub.UpdateContext(update)).num_received_tokens

    async def _read_call(self, call: AsyncIterable[pb.StreamEvent]) -> None:
        self.history.committed_s = self.history.committed_s or time.monotonic()
        with _translated():
            async for event in call:
                match event.WhichOneof("event"):
                    case "token":
                        self.history.token(event.token.index, event.token.token_id)
                        if self._leaves():
                            return
                    case "done":
                        done = event.done
                        self._answered(done.finish_reason, done.usage, done.metadata)

    async def _again(
        self,
        work: Callable[[], Awaitable[T]],
        is_over: Callable[[], bool] = lambda: False,
        can_go_on: bool = False,
    ) -> T:
        """Do it until it is not refused for now. When ``is_over``, nothing is said again, nor once
        a token came, unless it ``can_go_on`` behind that one."""
        end_s = time.monotonic() + AGAIN_WITHIN_S
        while True:
            try:
                return await work()
            except StreamError as error:
                if (
                    error.code not in _FOR_NOW
                    or (self.history.indices and not can_go_on)
                    or is_over()
                    or time.monotonic() > end_s
                ):
                    raise
                self.history.num_retries += 1
                self.history.note(f"again, after {error}")
                await asyncio.sleep(_PAUSE_S)

    @property
    def _before_commit(self) -> tuple[str, ...]:
        segments = self._planned.segments
        return segments[:-1] if self._planned.commit_brings_last else segments

    async def _final(self) -> str | None:
        """What the commit brings, after its gap."""
        if not self._planned.commit_brings_last:
            return None
        await asyncio.sleep(self._planned.gaps_s[-1])
        return self._planned.segments[-1]

    def _next_request_id(self) -> str:
        """A stream that could not be opened is opened under another id, so that each is one."""
        number = len(self.history.request_ids)
        self.history.request_ids.append(f"{self._request_id}.{number}")
        return self.history.request_ids[-1]

    def _acknowledge(self, place: int, num_received: int) -> None:
        self.history.note(f"segment {place}: {num_received} tokens")
        self.history.acknowledged.append(Acknowledgement(place=place, num_received=num_received))

    def _leaves(self) -> bool:
        planned = self._planned
        is_far = len(self.history.indices) >= planned.fate_after
        if planned.fate is Fate.CANCELLED and is_far:
            self.history.left = True
            self.history.note(f"leaves after {len(self.history.indices)} tokens")
            return True
        return False

    def _answered(
        self, reason: str, usage: Usage | pb.Usage, metadata: Metadata | pb.AnswerMetadata
    ) -> None:
        self.history.note(f"done: {reason}, hand-off {metadata.handoff}")
        self.history.answered = Answered(
            finish_reason=reason,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_output_tokens=usage.num_output_tokens,
            num_attempts=metadata.num_attempts,
            handoff=metadata.handoff,
            prefill_server=metadata.prefill_server,
            decode_server=metadata.decode_server,
        )


@contextmanager
def _translated() -> Iterator[None]:
    """gRPC's errors as ours."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
