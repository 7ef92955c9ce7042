"""What the fake router answers. Only the calls that the load generator makes are there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc.aio

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.status_details import error_event, status_code, trailing_metadata
from streamfill.api.streamfill_pb2_grpc import StreamfillServicer
from streamfill.errors import (
    CancelledStreamError,
    FailedPreconditionError,
    InvalidArgumentError,
    StreamError,
)
from streamfill.loadgen.fake_account import (
    FakeAccount,
    count_tokens,
    read_content,
    read_message,
)
from streamfill.loadgen.targets.fake import VOCAB_SIZE, answer_token_ids
from streamfill.messages.common import StreamMode
from streamfill.observability.lifetime import LifetimeEvent
from streamfill.scheduling.registry import DEFAULT_POLICY, format_policy_spec
from streamfill.traces.script import Content, join

_DEFAULT_MAX_TOKENS: Final = 128
_SERVERS: Final = ("prefill", "decode")

Call = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class FakeBehaviour:
    """How the fake router answers.

    Attributes:
        ttft_s: from the commit to the first token.
        tpot_s: from one token to the next.
        acknowledge_s: from a piece to its acknowledgement.
        fails: the error, if any, for a request of this id; given at the commit.
        refuses_pieces: the error, if any, for each piece of a stream of this request id.
        policy: in force at the start.
        refuses_policy: why this policy is not taken; empty: it is.
    """

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    acknowledge_s: float = 0.0
    fails: Callable[[str], StreamError | None] = lambda request_id: None
    refuses_pieces: Callable[[str], StreamError | None] = lambda request_id: None
    policy: str = DEFAULT_POLICY
    refuses_policy: Callable[[str], str] = lambda spec: ""


class FakeService(StreamfillServicer):
    """The calls of one fake router.

    Attributes:
        num_pieces: appends, updates and final pieces that came.
        num_cancelled: streams that were left before their answer.
        num_flushes: how often the caches were emptied.
        policy: in force.
        policies_set: taken, in order.
        slos_ms: the time to the first token that requests wanted, by request id.
    """

    def __init__(self, behaviour: FakeBehaviour) -> None:
        self.num_pieces = 0
        self.num_streams = 0
        self.num_most_open = 0
        self.num_cancelled = 0
        self.num_flushes = 0
        self.policy = behaviour.policy
        self.policies_set: list[str] = []
        self.slos_ms: dict[str, float] = {}
        self._behaviour = behaviour
        self._num_open = 0
        self._num_computed_tokens = 0

    async def Stream(  # noqa: N802 - gRPC's name
        self, requests: AsyncIterator[pb.StreamRequest], context: Call
    ) -> None:
        """As the router's, without limits and deadlines."""
        first = await context.read()
        if not isinstance(first, pb.StreamRequest) or first.WhichOneof("operation") != "open":
            await _abort(context, InvalidArgumentError("the first message must be open"))
        assert isinstance(first, pb.StreamRequest)
        self._enter(first.open)
        is_complete = False
        try:
            await context.write(pb.StreamEvent(opened=pb.Opened(stream_id=self.num_streams)))
            is_complete = await self._converse(first.open, context)
        finally:
            self._num_open -= 1
            self.num_cancelled += not is_complete

    async def Generate(  # noqa: N802 - gRPC's name
        self, request: pb.GenerateRequest, context: Call
    ) -> None:
        """A whole prompt."""
        account = FakeAccount()
        self._enter(request)
        try:
            account.note(LifetimeEvent.OPENED)
            account.note_segment()
            prompt = read_content(request.prompt)
            await self._answer(request.request_id, prompt, request.sampling, account, context)
        finally:
            self._num_open -= 1

    async def ServerInfo(  # noqa: N802 - gRPC's name
        self, request: pb.ServerInfoRequest, context: Call
    ) -> pb.ServerInfoResponse:
        """A cluster of one server of each kind."""
        counters = {"num_computed_tokens": self._num_computed_tokens}
        return pb.ServerInfoResponse(
            model="fake",
            vocab_size=VOCAB_SIZE,
            ready=True,
            decode_available=True,
            num_open_streams=self._num_open,
            servers=[
                pb.Server(
                    server_id=f"{role}-0",
                    role=role,
                    state="alive",
                    counters=counters if role == "prefill" else {},
                    policy=self.policy if role == "prefill" else "",
                )
                for role in _SERVERS
            ],
        )

    async def SetPolicy(  # noqa: N802 - gRPC's name
        self, request: pb.SetPolicyRequest, context: Call
    ) -> pb.SetPolicyResponse:
        """Any policy, unless the behaviour refuses it."""
        spec = format_policy_spec(request.policy, request.options)
        reason = self._behaviour.refuses_policy(spec)
        if not reason:
            self.policy = spec
            self.policies_set.append(spec)
        result = pb.PolicyResult(ok=not reason, policy=self.policy, reason=reason)
        return pb.SetPolicyResponse(results={"prefill-0": result})

    async def FlushCaches(  # noqa: N802 - gRPC's name
        self, request: pb.FlushCachesRequest, context: Call
    ) -> pb.FlushCachesResponse:
        """There is nothing to empty."""
        self.num_flushes += 1
        return pb.FlushCachesResponse(flushed={f"{role}-0": True for role in _SERVERS})

    def _enter(self, request: pb.Open | pb.GenerateRequest) -> None:
        if request.HasField("ttft_slo_ms"):
            self.slos_ms[request.request_id] = request.ttft_slo_ms
        self.num_streams += 1
        self._num_open += 1
        self.num_most_open = max(self.num_most_open, self._num_open)

    async def _converse(self, opening: pb.Open, context: Call) -> bool:
        """The stream after its opening; whether it was answered."""
        account = FakeAccount()
        account.note(LifetimeEvent.OPENED)
        mode = StreamMode.UPDATE if opening.mode == pb.STREAM_MODE_UPDATE else StreamMode.APPEND
        pieces: list[Content] = []
        if opening.messages:
            pieces.append(tuple(read_message(one) for one in opening.messages))
        while True:
            request = await context.read()
            if not isinstance(request, pb.StreamRequest):
                return False  # the client ended the call
            match request.WhichOneof("operation"):
                case "append" | "update":
                    refusal = self._behaviour.refuses_pieces(opening.request_id)
                    if refusal is not None:
                        await context.write(error_event(refusal, request.seq))
                        continue
                    is_append = request.WhichOneof("operation") == "append"
                    segment = (request.append if is_append else request.update).segment
                    self._take(segment, mode, pieces, account)
                    if self._behaviour.acknowledge_s > 0:
                        await asyncio.sleep(self._behaviour.acknowledge_s)
                    await context.write(
                        pb.StreamEvent(acknowledged=pb.Acknowledged(seq=request.seq))
                    )
                case "commit":
                    if request.commit.HasField("final_segment"):
                        self._take(request.commit.final_segment, mode, pieces, account)
                    await self._answer(
                        opening.request_id,
                        join(pieces) if pieces else (),
                        request.commit.sampling,
                        account,
                        context,
                    )
                    return True
                case "cancel":
                    await _abort(context, CancelledStreamError(request.cancel.reason))
                case other:
                    await _abort(context, FailedPreconditionError(f"{other} in an open stream"))

    def _take(
        self, segment: pb.Segment, mode: StreamMode, pieces: list[Content], account: FakeAccount
    ) -> None:
        self.num_pieces += 1
        if mode is StreamMode.UPDATE:
            pieces.clear()
        pieces.append(read_content(segment))
        account.note_segment()

    async def _answer(
        self,
        request_id: str,
        prompt: Content,
        sampling: pb.Sampling,
        account: FakeAccount,
        context: Call,
    ) -> None:
        error = self._behaviour.fails(request_id)
        if error is None and not prompt:
            error = InvalidArgumentError("the prompt is empty")
        if error is not None:
            await _abort(context, error)
        num_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else _DEFAULT_MAX_TOKENS
        num_prompt_tokens = count_tokens(prompt)
        account.note(LifetimeEvent.COMMIT_RECEIVED)
        account.note(LifetimeEvent.COMPUTE_STARTED)
        token_ids = answer_token_ids(prompt, num_tokens)
        for index, token_id in enumerate(token_ids):
            pause_s = self._behaviour.tpot_s if index else self._behaviour.ttft_s
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            if index == 0:
                account.note(LifetimeEvent.COMPUTE_DONE, num_tokens=num_prompt_tokens)
                account.note(LifetimeEvent.FIRST_TOKEN)
            token = pb.Token(index=index, token_id=token_id, text=f" {token_id}")
            await context.write(pb.StreamEvent(token=token))
        account.note(LifetimeEvent.LAST_TOKEN)
        account.note(LifetimeEvent.DONE)
        self._num_computed_tokens += num_prompt_tokens
        usage = pb.Usage(
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_tokens,
            num_computed_tokens=num_prompt_tokens,
        )
        metadata = pb.AnswerMetadata(
            stream_id=self.num_streams,
            prefill_server="prefill-0",
            handoff="none",
            num_attempts=1,
            lifetime=account.events,
        )
        done = pb.Done(finish_reason="length", usage=usage, metadata=metadata)
        await context.write(pb.StreamEvent(done=done))


async def _abort(context: Call, error: StreamError) -> None:
    """Ends the call; never returns."""
    await context.abort(status_code(error.code), error.message, trailing_metadata(error))
