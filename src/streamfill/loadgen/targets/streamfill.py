"""A streamfill cluster as a target, through its client API."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypedDict

from streamfill.api import Answer, Client, Mode, Result, SamplingOptions, Stream
from streamfill.api.cold_caches import empty_caches
from streamfill.errors import UnavailableError
from streamfill.loadgen.target import Ask, Reply, ServerAccount, TargetFacts, TargetStream
from streamfill.messages.common import StreamMode
from streamfill.scheduling.registry import parse_policy_spec
from streamfill.tls import NO_TLS, TlsFiles
from streamfill.traces.format import ChatMessage
from streamfill.traces.script import Content

READY_TIMEOUT_S: Final = 60.0
COUNTERS_POLL_S: Final = 0.1
COUNTERS_TIMEOUT_S: Final = 10.0
"""Heartbeats come every second or so; a loaded machine may delay some."""

_MODES: Final[dict[StreamMode, Mode]] = {StreamMode.APPEND: "append", StreamMode.UPDATE: "update"}


class StreamfillTarget:
    """One cluster, through one connection: 2,000 streams at a time are no burden to it."""

    name = "streamfill"
    has_streams = True

    def __init__(self, address: str, tls: TlsFiles = NO_TLS) -> None:
        """
        Args:
            address: ``host:port`` of the router.
            tls: how it is to be encrypted.
        """
        self.address = address
        """Of the router."""
        self._client = Client(
            address,
            tls_ca_file=tls.ca_file,
            tls_cert_file=tls.cert_file,
            tls_key_file=tls.key_file,
        )

    async def facts(self) -> TargetFacts:
        """As ``Target.facts``; waits until the cluster is ready."""
        info = await self._client.wait_ready(READY_TIMEOUT_S)
        return TargetFacts(
            model=info.model, vocab_size=info.vocab_size, context_tokens=info.context_tokens
        )

    async def generate(self, prompt: Content, ask: Ask) -> Reply:
        """As ``Target.generate``."""
        opened_s = time.monotonic()
        piece = _piece(prompt)
        answer = self._client.generate(
            piece.get("text"),
            token_ids=piece.get("token_ids"),
            messages=piece.get("messages"),
            request_id=ask.request_id,
            ttft_slo_ms=ask.ttft_slo_ms,
            **_greedy(ask),
        )
        async with answer:
            return await _read(answer, opened_s)

    @asynccontextmanager
    async def open(self, mode: StreamMode, ask: Ask) -> AsyncIterator[TargetStream]:
        """As ``Target.open``."""
        opened_s = time.monotonic()
        opening = self._client.stream(
            mode=_MODES[mode], request_id=ask.request_id, ttft_slo_ms=ask.ttft_slo_ms
        )
        async with opening as stream:
            yield _OpenStream(stream, mode, ask, opened_s)

    async def empty_caches(self) -> None:
        """As ``Target.empty_caches``; waits while servers forget streams that have ended."""
        await empty_caches(self._client)

    async def set_policy(self, spec: str, server_id: str | None = None) -> dict[str, str]:
        """As ``ScheduledTarget.set_policy``."""
        name, options = parse_policy_spec(spec)
        results = await self._client.set_policy(name, options, server_id=server_id)
        return {
            server: f"{result.reason} (it has {result.policy or 'its old policy'})"
            for server, result in results.items()
            if not result.ok
        }

    async def policies(self) -> dict[str, str]:
        """As ``ScheduledTarget.policies``."""
        info = await self._client.server_info()
        return {
            server.server_id: server.policy
            for server in info.servers
            if server.role == "prefill" and server.state == "alive"
        }

    async def counters(self) -> dict[str, int]:
        """As ``Target.counters``, and the same by role: ``prefill.num_computed_tokens``.

        The router knows them from heartbeats, so this waits for a new one of each server.
        """
        asked_s = time.monotonic()
        while True:
            info = await self._client.server_info()
            waited_s = time.monotonic() - asked_s
            alive = [server for server in info.servers if server.state == "alive"]
            if alive and all(server.heartbeat_age_s < waited_s for server in alive):
                break
            if waited_s > COUNTERS_TIMEOUT_S:
                late = ", ".join(s.server_id for s in alive if s.heartbeat_age_s >= waited_s)
                raise UnavailableError(f"no heartbeat came from: {late or 'any server'}")
            await asyncio.sleep(COUNTERS_POLL_S)
        totals: Counter[str] = Counter()
        for server in info.servers:
            for name, value in server.counters.items():
                totals[name] += value
                totals[f"{server.role}.{name}"] += value
        return dict(totals)

    async def close(self) -> None:
        """As ``Target.close``."""
        await self._client.close()


class _OpenStream:
    """As ``TargetStream``. Operations take their place in the order in which they are begun."""

    def __init__(self, stream: Stream, mode: StreamMode, ask: Ask, opened_s: float) -> None:
        self._stream = stream
        self._mode = mode
        self._ask = ask
        self._opened_s = opened_s

    async def send(self, piece: Content) -> None:
        if self._mode is StreamMode.UPDATE:
            await self._stream.update(**_piece(piece))
        else:
            await self._stream.append(**_piece(piece))

    async def commit(self, piece: Content | None) -> Reply:
        final: _Piece = {} if piece is None or self._adds_nothing(piece) else _piece(piece)
        answer = self._stream.commit(**final, **_greedy(self._ask))
        async with answer:
            return await _read(answer, self._opened_s)

    def _adds_nothing(self, piece: Content) -> bool:
        return not piece and self._mode is StreamMode.APPEND


class _Piece(TypedDict, total=False):
    text: str
    token_ids: Sequence[int]
    messages: Sequence[dict[str, str]]


def _piece(content: Content) -> _Piece:
    """The arguments of the client API."""
    if isinstance(content, str):
        return {"text": content}
    messages = [one for one in content if isinstance(one, ChatMessage)]
    if messages:
        return {"messages": [{"role": one.role, "content": one.content} for one in messages]}
    return {"token_ids": content}  # type: ignore[typeddict-item]  # of one kind


def _greedy(ask: Ask) -> SamplingOptions:
    return {"temperature": 0.0, "ignore_eos": True, "max_tokens": ask.max_output_tokens}


async def _read(answer: Answer, opened_s: float) -> Reply:
    token_times_s: list[float] = []
    async for _ in answer:
        token_times_s.append(time.monotonic())
    result = answer.result
    return Reply(
        text=result.text,
        token_ids=result.token_ids,
        token_times_s=tuple(token_times_s),
        account=account(result, opened_s),
    )


def account(result: Result, opened_s: float) -> ServerAccount:
    """What the cluster said of an answer.

    Args:
        result: the answer.
        opened_s: when the client asked for it.
    """
    usage, about = result.usage, result.metadata
    return ServerAccount(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_computed_tokens=usage.num_computed_tokens,
        num_recomputed_tokens=usage.num_recomputed_tokens,
        num_reused_tokens=usage.num_reused_tokens,
        num_invalidated_tokens=usage.num_invalidated_tokens,
        handoff=about.handoff,
        handoff_bytes=about.handoff_bytes,
        lifetime=result.timing.lifetime,
        opened_s=opened_s,
    )
