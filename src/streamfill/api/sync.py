"""The synchronous twin of the asyncio client, for programs without an event loop.

::

    with SyncClient("127.0.0.1:50051") as client:
        with client.stream() as stream:
            stream.append("The first part of a long document ...")
            for text in stream.commit("Sum it up.", max_tokens=64).texts():
                print(text, end="")

The asyncio client does the work, in a thread of its own; methods, results and errors are the same.
Threads may share a client, but each stream and each answer has one user at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from streamfill.api import loop_thread
from streamfill.api.answer import Answer
from streamfill.api.client import DEFAULT_TARGET, Client
from streamfill.api.loop_thread import LoopThread
from streamfill.api.resumption import RECONNECT_S
from streamfill.api.stream import Stream
from streamfill.api.sync_stream import SyncAnswer, SyncStream
from streamfill.api.types import (
    ClusterInfo,
    Mode,
    PolicyResult,
    Result,
    SamplingOptions,
    Server,
    ServerStreams,
)
from streamfill.errors import FailedPreconditionError

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SyncClient:
    """A connection to one router, used inside ``with``. As ``Client``."""

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
        """As ``Client``."""
        self._client = Client(
            target,
            api_key=api_key,
            tls_ca_file=tls_ca_file,
            tls_cert_file=tls_cert_file,
            tls_key_file=tls_key_file,
            reconnect_s=reconnect_s,
            one_call=one_call,
        )
        self._loop: LoopThread | None = None

    def __enter__(self) -> SyncClient:
        self._loop = loop_thread.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that are still open are cancelled. Idempotent."""
        if self._loop is not None:
            self._loop.run(self._client.close())
            self._loop = None
            loop_thread.release()

    def stream(
        self,
        *,
        mode: Mode = "append",
        priority: int = 0,
        request_id: str = "",
        deadline_s: float | None = None,
        ttft_slo_ms: float | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
    ) -> SyncStream:
        """A new stream, for ``with``. With ``messages`` a chat, whose last message grows."""

        async def make() -> Stream:
            return self._client.stream(
                mode=mode,
                priority=priority,
                request_id=request_id,
                deadline_s=deadline_s,
                ttft_slo_ms=ttft_slo_ms,
                messages=messages,
            )

        loop = self._running_loop()
        return SyncStream(loop, loop.run(make()))

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
    ) -> SyncAnswer:
        """The answer to a whole prompt: exactly one of text, token ids and chat messages."""

        async def make() -> Answer:
            return self._client.generate(
                prompt,
                token_ids=token_ids,
                messages=messages,
                priority=priority,
                request_id=request_id,
                deadline_s=deadline_s,
                ttft_slo_ms=ttft_slo_ms,
                **sampling,
            )

        loop = self._running_loop()
        return SyncAnswer(loop, loop.run(make()))

    def complete(
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
        with self.generate(
            prompt,
            token_ids=token_ids,
            messages=messages,
            priority=priority,
            request_id=request_id,
            deadline_s=deadline_s,
            ttft_slo_ms=ttft_slo_ms,
            **sampling,
        ) as answer:
            return answer.read()

    def server_info(self) -> ClusterInfo:
        """The cluster at this moment."""
        return self._running_loop().run(self._client.server_info())

    def flush_caches(self, timeout_s: float = 10.0) -> dict[str, bool]:
        """Empty the KV caches of all servers; by server id, whether it did."""
        return self._running_loop().run(self._client.flush_caches(timeout_s))

    def set_policy(
        self,
        name: str,
        options: Mapping[str, str] | None = None,
        *,
        server_id: str | None = None,
        timeout_s: float = 10.0,
    ) -> Mapping[str, PolicyResult]:
        """Make prefill servers schedule by another policy, while they run."""
        loop = self._running_loop()
        return loop.run(
            self._client.set_policy(name, options, server_id=server_id, timeout_s=timeout_s)
        )

    def describe_streams(
        self, stream_id: int | None = None, *, timeout_s: float = 10.0
    ) -> Mapping[str, ServerStreams]:
        """Why each stream runs or waits, by server id, or why one stream does."""
        loop = self._running_loop()
        return loop.run(self._client.describe_streams(stream_id, timeout_s=timeout_s))

    def drain_server(
        self, server_id: str, *, move_answers_after_s: float | None = None, force: bool = False
    ) -> Server:
        """Give a server nothing new and move its streams to others."""
        return self._running_loop().run(
            self._client.drain_server(
                server_id, move_answers_after_s=move_answers_after_s, force=force
            )
        )

    def resume_server(self, server_id: str) -> Server:
        """Take a drain back."""
        return self._running_loop().run(self._client.resume_server(server_id))

    def wait_ready(self, timeout_s: float = 60.0) -> ClusterInfo:
        """Wait until the router is there and a prefill server is alive."""
        return self._running_loop().run(self._client.wait_ready(timeout_s))

    def _running_loop(self) -> LoopThread:
        if self._loop is None:
            raise FailedPreconditionError("the client is not open; use it inside `with`")
        return self._loop
