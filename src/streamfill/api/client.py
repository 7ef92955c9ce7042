"""The asyncio client.

::

    async with Client("127.0.0.1:50051") as client:
        async with client.stream(mode="append") as stream:
            await stream.append("The first part of a long document ...")
            await stream.append("... and the rest.")
            async for text in stream.commit("Sum it up.", max_tokens=64).texts():
                print(text, end="")
            print(stream.result.timing.ttft_s)

Errors are those of ``streamfill.errors``. All calls of one client share one connection.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import grpc.aio

from streamfill.api import replies, requests, scheduling_calls, server_calls
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.answer import Answer
from streamfill.api.channel import checked_key, checked_target, credentials, open_channel, with_key
from streamfill.api.generate_call import GenerateSource
from streamfill.api.lanes import Lanes
from streamfill.api.resumption import RECONNECT_S, Call
from streamfill.api.status_details import from_rpc_error
from streamfill.api.stream import Stream
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.api.types import (
    ClusterInfo,
    Mode,
    PolicyResult,
    Result,
    SamplingOptions,
    Server,
    ServerStreams,
)
from streamfill.errors import ErrorCode, InvalidArgumentError, StreamError, UnavailableError
from streamfill.tls import TlsFiles

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_TARGET = "127.0.0.1:50051"

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""The same as the router's: a long document in one piece, far below what could fill a memory."""

INFO_TIMEOUT_S = 10.0
"""The router answers from memory; a loaded machine may take seconds to schedule it."""

API_KEY_VARIABLE = "STREAMFILL_API_KEY"
"""Of the environment: the key of clients that are given none."""

READY_POLL_S = 0.1
"""Short against the start of a server, long against one ``ServerInfo`` call."""

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # An idle stream must notice a router that vanished without a word. The router permits 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # `wait_ready` starts before the router does; the default back-off grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Its name misleads: gRPC gives one attempt to connect so long, the router's first HTTP/2 frame
    # included, which a loaded machine may take seconds to send.
    ("grpc.min_reconnect_backoff_ms", 10_000),
)


class Client:
    """A connection to one router. Used inside ``async with``, in one event loop."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        tls_ca_file: str | None = None,
        tls_cert_file: str | None = None,
        tls_key_file: str | None = None,
        reconnect_s: float = RECONNECT_S,
        one_call: bool = False,
    ) -> None:
        """Args:
        target: ``host:port`` of the router.
        api_key: sent with each call. None: what STREAMFILL_API_KEY says; "": none.
        tls_ca_file: who vouches for the router's certificate (PEM), which must be for the target's
            host. With one of these three the connection is encrypted.
        tls_cert_file: of the client, for a router that asks for it (PEM).
        tls_key_file: its private key (PEM, not encrypted).
        reconnect_s: when the router vanishes, open streams look for it for so long, and go on if it
            kept them in its log. 0: they fail at once.
        one_call: all streams share one call. Costs this process and the router far less for each
            message, so it is for hosts with hundreds of streams; an answer that is not read waits
            in this process.

        Raises:
            InvalidArgumentError: the target is a URL of HTTP; the key has characters that no key
                has; or `reconnect_s` is not 0 or more.
            ConfigError: a file cannot be read, or is not what it should be.
        """
        if not 0 <= reconnect_s < float("inf"):
            raise InvalidArgumentError(f"reconnect_s is {reconnect_s}, must be 0 or more")
        self._target = checked_target(target)
        self._reconnect_s = reconnect_s
        if api_key is None:
            api_key = os.environ.get(API_KEY_VARIABLE, "")
        self._api_key = checked_key(api_key)
        self._credentials = credentials(
            TlsFiles(cert_file=tls_cert_file, key_file=tls_key_file, ca_file=tls_ca_file)
        )
        self._channel: grpc.aio.Channel | None = None
        self._stub: StreamfillStub | None = None
        self._one_call = one_call
        self._lanes: Lanes | None = None

    async def __aenter__(self) -> Client:
        self.stub  # noqa: B018 - connects
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that are still open are cancelled. Idempotent."""
        channel, self._channel, self._stub = self._channel, None, None
        lanes, self._lanes = self._lanes, None
        if lanes is not None:
            await lanes.close()
        if channel is not None:
            await channel.close(None)

    @property
    def stub(self) -> StreamfillStub:
        """The generated stub, for the unary forms of the operations. Raises gRPC's errors."""
        if self._stub is None:
            self._channel = open_channel(self._target, _CHANNEL_OPTIONS, self._credentials)
            self._stub = StreamfillStub(with_key(self._channel, self._api_key))
        return self._stub

    def stream(
        self,
        *,
        mode: Mode = "append",
        priority: int = 0,
        request_id: str = "",
        deadline_s: float | None = None,
        ttft_slo_ms: float | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
    ) -> Stream:
        """A new stream, for ``async with``. With ``messages`` a chat, whose last message grows.

        Args:
            priority: larger is more urgent.
            request_id: the caller's own name for it, in the logs.
            deadline_s: the stream ends with DEADLINE_EXCEEDED this long after it was opened.
            ttft_slo_ms: the time from the commit to the first token that is wanted, above 0; for
                scheduling policies that know deadlines. Nothing fails when it is missed.
        """
        opening = requests.open_message(
            mode=mode,
            priority=priority,
            request_id=request_id,
            deadline_s=deadline_s,
            ttft_slo_ms=ttft_slo_ms,
            messages=messages,
        )
        return Stream(self._open_call, opening, self._reconnect_s)

    def generate(
        self,
        prompt: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        priority: int = 0,
        request_id: str = "",
        deadline_s: float | None = None,
        ttft_slo_ms: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """The answer to a whole prompt: exactly one of text, token ids and chat messages."""
        with requests.sendable():
            request = pb.GenerateRequest(
                prompt=requests.segment(prompt, token_ids, messages),
                sampling=requests.sampling(sampling),
                priority=priority,
                request_id=request_id,
                deadline_s=deadline_s,
                ttft_slo_ms=ttft_slo_ms,
            )
        return Answer(GenerateSource(self.stub, request))

    def _open_call(self) -> Call:
        if not self._one_call:
            return self.stub.Stream(None)
        if self._lanes is None:
            self._lanes = Lanes(self.stub)
        return self._lanes.open()

    async def complete(
        self,
        prompt: str | bytes | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        priority: int = 0,
        request_id: str = "",
        deadline_s: float | None = None,
        ttft_slo_ms: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Result:
        """As ``generate``, all at once."""
        answer = self.generate(
            prompt,
            token_ids=token_ids,
            messages=messages,
            priority=priority,
            request_id=request_id,
            deadline_s=deadline_s,
            ttft_slo_ms=ttft_slo_ms,
            **sampling,
        )
        async with answer:
            return await answer.read()

    async def server_info(self) -> ClusterInfo:
        """The cluster at this moment.

        Raises:
            UnavailableError: no router is there.
        """
        try:
            reply = await self.stub.ServerInfo(pb.ServerInfoRequest(), timeout=INFO_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return replies.cluster_info(reply)

    async def flush_caches(self, timeout_s: float = 10.0) -> dict[str, bool]:
        """Empty the KV caches of all servers; by server id, whether it did.

        A server that has streams refuses. For measurements with a cold cache.
        """
        request = pb.FlushCachesRequest(timeout_s=timeout_s)
        try:
            reply = await self.stub.FlushCaches(request, timeout=timeout_s + INFO_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return dict(reply.flushed)

    async def set_policy(
        self,
        name: str,
        options: Mapping[str, str] | None = None,
        *,
        server_id: str | None = None,
        timeout_s: float = 10.0,
    ) -> Mapping[str, PolicyResult]:
        """Make prefill servers schedule by another policy, while they run.

        Args:
            name: as ``streamfill policy list`` shows it.
            options: of the policy, by name; what is left out gets the policy's default.
            server_id: the one prefill server to change. None: all that are alive, and those that
                start later.
            timeout_s: for the servers, at most 60. One that is slower changes all the same.

        Returns:
            by server id, what is in force there now.

        Raises:
            InvalidArgumentError: no server knows the policy or an option; names those it knows.
            StreamNotFoundError: no living prefill server has this id.
            UnavailableError: no prefill server is alive, or no router is there.
        """
        return await scheduling_calls.set_policy(
            self.stub, name, options or {}, server_id, timeout_s
        )

    async def describe_streams(
        self, stream_id: int | None = None, *, timeout_s: float = 10.0
    ) -> Mapping[str, ServerStreams]:
        """Why each stream runs or waits, by server id, or why one stream does.

        Raises:
            StreamNotFoundError: there is no stream of this id, or not any more.
        """
        return await scheduling_calls.describe_streams(self.stub, stream_id, timeout_s)

    async def drain_server(
        self, server_id: str, *, move_answers_after_s: float | None = None, force: bool = False
    ) -> Server:
        """Give a server nothing new and move its streams to others, while their clients stream on.
        Returns at once; ``server_info`` shows how many are left. Again: with another time.

        Args:
            server_id: as ``server_info`` names it.
            move_answers_after_s: answers that have not ended by then are moved as well. None: they
                are finished there.
            force: also the last prefill server that takes new streams.

        Raises:
            StreamNotFoundError: no living server has this id.
            FailedPreconditionError: it is the last prefill server that takes new streams.
            PermissionDeniedError: the API key is no operator's.
        """
        return await server_calls.drain_server(
            self.stub, server_id, move_answers_after_s, force=force
        )

    async def resume_server(self, server_id: str) -> Server:
        """Take a drain back.

        Raises:
            StreamNotFoundError: no living server has this id.
            FailedPreconditionError: the server is about to end.
            PermissionDeniedError: the API key is no operator's.
        """
        return await server_calls.resume_server(self.stub, server_id)

    async def wait_ready(self, timeout_s: float = 60.0) -> ClusterInfo:
        """Wait until the router is there and a prefill server is alive.

        Raises:
            UnavailableError: that is not so after ``timeout_s``.
            UnauthenticatedError: the router wants an API key, or another one.
        """
        end_s = time.monotonic() + timeout_s
        seen = "no prefill server is alive"
        cause: StreamError | None = None
        while True:
            try:
                info = await self.server_info()
                if info.ready:
                    return info
            except StreamError as error:
                if error.code is ErrorCode.UNAUTHENTICATED:
                    raise
                seen, cause = error.message, error
            if time.monotonic() >= end_s:
                message = (
                    f"the cluster at {self._target} is not ready after {timeout_s:g} s: {seen}"
                )
                raise UnavailableError(message) from cause
            await asyncio.sleep(READY_POLL_S)
