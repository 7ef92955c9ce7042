"""A server for the router's tests: speaks the wire protocol in the test's own loop, with no model.

It answers like a real one, and every server the same: the answer to a prompt is a function of the
prompt. So a test compares what a client got with `expected_answer`, whatever went wrong on the way.
Faults are switched on by setting attributes.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import zmq
import zmq.asyncio

from streamfill.curve.keys import ConnectKeys
from streamfill.links.inbound_gate import InboundGate
from streamfill.messages import PROTOCOL_VERSION
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.batch import BatchDecoder
from streamfill.messages.codec import encode, pack_ids, unpack_ids
from streamfill.messages.common import (
    Finish,
    FinishReason,
    Role,
    Sampling,
    ServerCounters,
    StreamAccount,
    StreamDecision,
)

HEARTBEAT_INTERVAL_S = 0.1
REGISTER_PATIENCE_S = 60.0
"""It takes milliseconds; what does not has failed."""
HANDOFF_BYTES_PER_TOKEN = 8
HANDOFF_S = 0.25
FIRST_TEXT_ID = 10
"""Ids below are special tokens."""

M = TypeVar("M", bound=r.RouterToServer)

_num_incarnations = 0


def expected_token(prompt: Sequence[int], index: int, vocab_size: int) -> int:
    """The token at `index` of the answer to `prompt`."""
    digest = zlib.crc32(pack_ids(prompt), index)
    return FIRST_TEXT_ID + digest % (vocab_size - FIRST_TEXT_ID)


def expected_answer(prompt: Sequence[int], num_tokens: int, vocab_size: int) -> list[int]:
    """The first tokens of the answer to `prompt`."""
    return [expected_token(prompt, index, vocab_size) for index in range(num_tokens)]


class FakeStream:
    """What the server knows of one stream."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.prompt: array[int] = array("i")
        self.seq = 0
        self.committed = False
        self.outputs: list[int] = []
        self.first_output = 0
        self.finish: Finish | None = None
        self.task: asyncio.Task[None] | None = None


class FakeServer:
    """One fake server. `start` connects it; `stop` closes the connection like a killed process."""

    def __init__(
        self,
        port: int,
        server_id: str,
        role: Role,
        vocab_size: int,
        *,
        page_size: int = 1,
        pool_tokens: int = 4096,
        model_id: str = "model",
        protocol_version: int = PROTOCOL_VERSION,
        keys: ConnectKeys | None = None,
    ) -> None:
        global _num_incarnations
        _num_incarnations += 1
        self.incarnation = _num_incarnations
        self.vocab_size = vocab_size
        self.register = s.Register(
            server_id=server_id,
            incarnation=self.incarnation,
            role=role,
            protocol_version=protocol_version,
            pid=1,
            model_id=model_id,
            vocab_size=vocab_size,
            context_tokens=8192,
            pool_tokens=pool_tokens,
            page_size=page_size,
            tp_size=1,
            kv_host="127.0.0.1",
            kv_control_ports=(1,),
            engine_version="fake",
        )
        self.received: list[r.RouterToServer] = []
        """Every message but heartbeats, also what is said again, before any fault."""
        self.streams: dict[int, FakeStream] = {}
        self.refused: str | None = None
        self.registered = asyncio.Event()
        self.num_router_losses = 0
        self._router_incarnation: int | None = None
        # Faults.
        self.drop_incoming: Callable[[r.RouterToServer], bool] = lambda message: False
        self.drop_outgoing: Callable[[s.ServerToRouter], bool] = lambda message: False
        self.num_copies = 1
        """Of every frame sent and every frame received."""
        self.mute = False
        """No heartbeats."""
        self.output_limit = 1_000_000
        """Tokens from this index on are held back until it is raised."""
        self.hold_progress = False
        """It computes nothing that is not committed."""
        self.num_computed = self.num_pending = 0
        """Tokens, as it says in its heartbeats."""
        self.fail_commit: tuple[str, str] | None = None
        self.fail_generate: tuple[str, str] | None = None
        self.handoff_error: str | None = None
        self.policy = "fcfs"
        """In force."""
        self.known_policies: tuple[str, ...] = ("fcfs", "lcas")
        self.decisions: tuple[StreamDecision, ...] = ()
        """What it says of its streams when it is asked."""
        self.account: StreamAccount | None = None
        """What it says of its work, with the first token of each answer."""
        self.finish_at: dict[int, Finish] = {}
        """Index of a token at which the answer ends."""
        self._gate = InboundGate()
        self._decoder: BatchDecoder[r.RouterToServer] = BatchDecoder(r.RouterToServer)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        if keys is not None:
            keys.secure(self._socket)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def server_id(self) -> str:
        return self.register.server_id

    def of_type(self, kind: type[M]) -> list[M]:
        """What was received of this type, each message once: the router says again what was not
        acknowledged in time, and on a busy machine that may be anything."""
        found: dict[Hashable, M] = {}
        for message in self.received:
            if isinstance(message, kind):
                found.setdefault(_identity(message), message)
        return list(found.values())

    async def start(self) -> FakeServer:
        self._spawn(self._receive())
        self._spawn(self._beat())
        await asyncio.wait_for(self.registered.wait(), REGISTER_PATIENCE_S)
        return self

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()

    async def send(self, message: s.ServerToRouter) -> None:
        if not self.drop_outgoing(message):
            for _ in range(self.num_copies):
                await self._socket.send(encode(message))

    async def send_raw(self, *frames: bytes) -> None:
        await self._socket.send_multipart(frames)

    def _spawn(self, work: asyncio.Future[None] | object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _beat(self) -> None:
        while True:
            if not self.mute:
                await self._say_hello()
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    async def _say_hello(self) -> None:
        if self._router_incarnation is None:
            await self._socket.send(encode(self.register))
            return
        beat = s.ServerHeartbeat(
            server_id=self.server_id,
            incarnation=self.incarnation,
            loop_age_s=0.0,
            controller_alive=True,
            counters=ServerCounters(
                num_streams=len(self.streams),
                num_computed_tokens=self.num_computed,
                num_pending_tokens=self.num_pending,
            ),
        )
        await self._socket.send(encode(beat))

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            for message in self._decoder.decode(frames[0]):
                await self._hear(message)

    async def _hear(self, message: r.RouterToServer) -> None:
        match message:
            case r.Registered(router_incarnation=incarnation):
                self._router_incarnation = incarnation
                self.registered.set()
            case r.RouterHeartbeat(router_incarnation=incarnation):
                if self._router_incarnation not in (None, incarnation):
                    self._lose_router()
            case r.RegistrationRefused(reason=reason):
                self.refused = reason
                self.registered.set()
            case _:
                self.received.append(message)
                if not self.drop_incoming(message):
                    for _ in range(self.num_copies):
                        await self._take(message)

    def _lose_router(self) -> None:
        self.num_router_losses += 1
        self._router_incarnation = None
        self._gate.clear()
        for stream_id in list(self.streams):
            self._remove(stream_id)

    async def _take(self, message: r.RouterToServer) -> None:
        admission = self._gate.admit(message)
        if admission.reply is not None:
            await self.send(admission.reply)
        if admission.deliver:
            await self._apply(message)

    async def _apply(self, message: r.RouterToServer) -> None:
        match message:
            case r.OpenStream():
                self._remove(message.stream_id)
                self.streams[message.stream_id] = FakeStream(message.attempt)
            case r.Splice():
                await self._splice(self.streams[message.stream_id], message)
            case r.Commit():
                await self._commit(self.streams[message.stream_id], message)
            case r.HandOff():
                await self._hand_off(message)
            case r.Generate():
                await self._generate(message)
            case r.Cancel() | r.Forget():
                known = self.streams.get(message.stream_id)
                if known is not None and known.attempt <= message.attempt:
                    self._remove(message.stream_id)
                closed = s.Closed(stream_id=message.stream_id, attempt=message.attempt)
                await self.send(closed)
            case r.ResendOutput():
                await self._resend(message)
            case r.FlushCache(request_id=request_id):
                await self.send(s.CacheFlushed(request_id=request_id, ok=not self.streams))
            case r.SetPolicy():
                await self._set_policy(message)
            case r.DescribeStreams(request_id=request_id):
                described = s.StreamsDescribed(
                    request_id=request_id, policy=self.policy, streams=self.decisions
                )
                await self.send(described)
            case _:
                pass

    async def _set_policy(self, message: r.SetPolicy) -> None:
        known = message.policy in self.known_policies
        reason = f"there is no policy {message.policy!r}; known: {', '.join(self.known_policies)}"
        if known:
            options = ", ".join(f"{key}={value}" for key, value in message.options.items())
            self.policy = f"{message.policy}({options})" if options else message.policy
        await self.send(
            s.PolicySet(
                request_id=message.request_id,
                ok=known,
                policy=self.policy,
                reason="" if known else reason,
            )
        )

    def _remove(self, stream_id: int) -> None:
        stream = self.streams.pop(stream_id, None)
        if stream is not None and stream.task is not None:
            stream.task.cancel()

    async def _splice(self, stream: FakeStream, message: r.Splice) -> None:
        assert message.seq == stream.seq + 1
        assert message.keep_tokens <= len(stream.prompt)
        stream.seq = message.seq
        del stream.prompt[message.keep_tokens :]
        stream.prompt.extend(unpack_ids(message.token_ids))
        if not self.hold_progress:
            await self.send(
                s.Progress(
                    stream_id=message.stream_id,
                    attempt=message.attempt,
                    seq=message.seq,
                    num_known_tokens=len(stream.prompt),
                    num_computed_tokens=len(stream.prompt),
                    num_invalidated_tokens=0,
                )
            )

    async def _commit(self, stream: FakeStream, message: r.Commit) -> None:
        assert message.num_prompt_tokens == len(stream.prompt)
        stream.committed = True
        if self.fail_commit is not None:
            await self._fail(message.stream_id, message.attempt, self.fail_commit)
            return
        handoff = message.handoff
        num_tokens = 1 if handoff is not None else message.sampling.max_new_tokens
        transfer_id = None if handoff is None else handoff.transfer_id
        stream.task = self._spawn(
            self._produce(message.stream_id, stream, num_tokens, message.sampling, transfer_id)
        )

    async def _hand_off(self, message: r.HandOff) -> None:
        """Says that the KV is there, or why not."""
        reason = self.handoff_error or ""
        if message.stream_id not in self.streams:
            reason = "the prompt is not here any more"
        await self.send(
            s.HandoffReport(
                stream_id=message.stream_id,
                attempt=message.attempt,
                transfer_id=message.target.transfer_id,
                ok=not reason,
                reason=reason,
                num_tokens=0 if reason else 4,
                num_bytes=0 if reason else 400,
                seconds=0.0,
            )
        )

    async def _generate(self, message: r.Generate) -> None:
        known = self.streams.get(message.stream_id)
        if known is not None and known.attempt >= message.attempt:
            return
        self._remove(message.stream_id)
        if self.fail_generate is not None:
            await self._fail(message.stream_id, message.attempt, self.fail_generate)
            return
        stream = self.streams[message.stream_id] = FakeStream(message.attempt)
        stream.prompt = unpack_ids(message.prompt_ids)
        stream.first_output = len(unpack_ids(message.output_ids))
        sampling = message.sampling
        stream.task = self._spawn(
            self._produce(message.stream_id, stream, sampling.max_new_tokens, sampling, None)
        )

    async def _fail(self, stream_id: int, attempt: int, failure: tuple[str, str]) -> None:
        self._gate.drop(stream_id, attempt)
        self._remove(stream_id)
        code, text = failure
        await self.send(
            s.StreamFailed(stream_id=stream_id, attempt=attempt, code=code, message=text)
        )

    async def _produce(
        self,
        stream_id: int,
        stream: FakeStream,
        end: int,
        sampling: Sampling,
        transfer_id: int | None,
    ) -> None:
        for index in range(stream.first_output, end):
            while index >= self.output_limit:  # noqa: ASYNC110  a test raises it at any time
                await asyncio.sleep(0.005)
            finish = self.finish_at.get(index)
            if finish is None and index + 1 >= sampling.max_new_tokens:
                finish = Finish(reason=FinishReason.LENGTH)
            token_id = expected_token(stream.prompt, index, self.vocab_size)
            if finish is not None and finish.matched_token_id is not None:
                token_id = finish.matched_token_id
            stream.outputs.append(token_id)
            stream.finish = finish
            await self._send_output(stream_id, stream, index, [token_id], finish)
            await asyncio.sleep(0)
            if finish is not None:
                return
        if transfer_id is not None:
            await self.send(
                s.HandoffReport(
                    stream_id=stream_id,
                    attempt=stream.attempt,
                    transfer_id=transfer_id,
                    ok=self.handoff_error is None,
                    reason=self.handoff_error or "",
                    num_tokens=len(stream.prompt),
                    num_bytes=HANDOFF_BYTES_PER_TOKEN * len(stream.prompt),
                    seconds=HANDOFF_S,
                )
            )

    async def _send_output(
        self,
        stream_id: int,
        stream: FakeStream,
        first_index: int,
        token_ids: list[int],
        finish: Finish | None,
    ) -> None:
        await self.send(
            s.Output(
                stream_id=stream_id,
                attempt=stream.attempt,
                first_index=first_index,
                token_ids=pack_ids(token_ids),
                finish=finish,
                num_cached_tokens=len(stream.prompt),
                account=self.account if first_index == stream.first_output else None,
            )
        )

    async def _resend(self, message: r.ResendOutput) -> None:
        stream = self.streams.get(message.stream_id)
        if stream is None or stream.attempt != message.attempt:
            resync = s.ResyncRequest(
                stream_id=message.stream_id, attempt=message.attempt, have_seq=-1
            )
            await self.send(resync)
            return
        missing = stream.outputs[message.from_index - stream.first_output :]
        if missing:
            await self._send_output(
                message.stream_id, stream, message.from_index, missing, stream.finish
            )


def _identity(message: r.RouterToServer) -> Hashable:
    """The same for a message and its repetitions."""
    match message:
        case r.Splice(stream_id=stream_id, attempt=attempt, seq=seq):
            return r.Splice, stream_id, attempt, seq
        case r.OpenStream() | r.Commit() | r.Generate() | r.Cancel() | r.Forget():
            return type(message), message.stream_id, message.attempt
        case _:
            return id(message)


def random_ids(seed: int, num_tokens: int, vocab_size: int) -> list[int]:
    """Reproducible token ids."""
    generator = random.Random(seed)
    return [generator.randrange(FIRST_TEXT_ID, vocab_size) for _ in range(num_tokens)]
