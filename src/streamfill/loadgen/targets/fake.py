"""A target in this process, for tests and for trying things out: answers are a function of the
prompt, times are fixed, and everything that it was sent is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from streamfill.errors import InvalidArgumentError, StreamError
from streamfill.loadgen.target import Ask, Reply, ServerAccount, TargetFacts, TargetStream
from streamfill.messages.common import StreamMode
from streamfill.observability.lifetime import LifetimeEntry, LifetimeEvent
from streamfill.traces.format import ChatMessage
from streamfill.traces.script import Content, join

VOCAB_SIZE = 32_000


@dataclass(frozen=True, kw_only=True)
class FakeTimes:
    """How long the fake takes, in seconds.

    Attributes:
        open_s: until a stream is there.
        acknowledge_s: until a piece is taken.
        first_token_s: from the commit.
        next_token_s: between tokens.
    """

    open_s: float = 0.0
    acknowledge_s: float = 0.0
    first_token_s: float = 0.0
    next_token_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Something that reached the fake.

    Attributes:
        at_s: when, by the fake's clock.
        kind: ``generate``, ``open``, ``send``, ``commit`` or ``cancel``.
    """

    at_s: float
    kind: str
    request_id: str
    content: Content | None = None


class FakeTarget:
    """As ``Target`` and ``policy_control.ScheduledTarget``.

    Attributes:
        sent: all that came, in order.
        policy_by_server: in force.
        policies_set: what was asked for, in order.
        refusals: why a server does not take a policy, by both.
    """

    name = "fake"
    has_streams = True

    def __init__(
        self,
        times: FakeTimes | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        fails: Callable[[str, str], StreamError | None] = lambda kind, request_id: None,
    ) -> None:
        """
        Args:
            fails: of the kind and the request id of what was sent: the error to answer with.
        """
        self.times = times or FakeTimes()
        self.sent: list[Sent] = []
        self.num_emptied = 0
        self.is_closed = False
        self.policy_by_server = {"prefill-0": "adaptive"}
        self.policies_set: list[str] = []
        self.refusals: dict[tuple[str, str], str] = {}
        self._clock = clock
        self._fails = fails
        self._num_computed_tokens = 0

    async def facts(self) -> TargetFacts:
        """As ``Target.facts``."""
        return TargetFacts(model="fake", vocab_size=VOCAB_SIZE, context_tokens=0)

    async def generate(self, prompt: Content, ask: Ask) -> Reply:
        """As ``Target.generate``."""
        opened_s = self._clock()
        self.note("generate", ask, prompt)
        return await self.answer(prompt, ask, opened_s)

    @asynccontextmanager
    async def open(self, mode: StreamMode, ask: Ask) -> AsyncIterator[TargetStream]:
        """As ``Target.open``."""
        opened_s = self._clock()
        self.note("open", ask)
        await asyncio.sleep(self.times.open_s)
        stream = _FakeStream(self, mode, ask, opened_s)
        try:
            yield stream
        finally:
            if not stream.is_complete:
                self.sent.append(Sent(at_s=self._clock(), kind="cancel", request_id=ask.request_id))

    async def empty_caches(self) -> None:
        """As ``Target.empty_caches``."""
        self.num_emptied += 1

    async def set_policy(self, spec: str, server_id: str | None = None) -> dict[str, str]:
        """As ``ScheduledTarget.set_policy``."""
        refusals = {
            server: self.refusals[server, spec]
            for server in self.policy_by_server
            if server_id in (None, server) and (server, spec) in self.refusals
        }
        for server in self.policy_by_server:
            if server_id in (None, server) and server not in refusals:
                self.policy_by_server[server] = spec
        self.policies_set.append(spec if server_id is None else f"{server_id}: {spec}")
        return refusals

    async def policies(self) -> dict[str, str]:
        """As ``ScheduledTarget.policies``."""
        return dict(self.policy_by_server)

    async def counters(self) -> dict[str, int]:
        """As ``Target.counters``."""
        return {"num_computed_tokens": self._num_computed_tokens}

    async def close(self) -> None:
        """As ``Target.close``."""
        self.is_closed = True

    def note(self, kind: str, ask: Ask, content: Content | None = None) -> None:
        """Keeps what came; raises the error that it is to be answered with."""
        at_s = self._clock()
        self.sent.append(Sent(at_s=at_s, kind=kind, request_id=ask.request_id, content=content))
        error = self._fails(kind, ask.request_id)
        if error is not None:
            raise error

    async def answer(self, prompt: Content, ask: Ask, opened_s: float) -> Reply:
        """The answer to a prompt that is complete now."""
        if not prompt:
            raise InvalidArgumentError("the prompt is empty")
        committed_s = self._clock()
        times_s: list[float] = []
        for number in range(ask.max_output_tokens):
            pause_s = self.times.next_token_s if number else self.times.first_token_s
            await asyncio.sleep(pause_s)
            times_s.append(self._clock())
        token_ids = answer_token_ids(prompt, ask.max_output_tokens)
        self._num_computed_tokens += len(prompt)
        lifetime = (
            LifetimeEntry(LifetimeEvent.OPENED, 0.0),
            LifetimeEntry(LifetimeEvent.COMMIT_RECEIVED, committed_s - opened_s),
            LifetimeEntry(LifetimeEvent.COMPUTE_STARTED, committed_s - opened_s),
            LifetimeEntry(
                LifetimeEvent.COMPUTE_DONE, times_s[0] - opened_s, num_tokens=len(prompt)
            ),
            LifetimeEntry(LifetimeEvent.FIRST_TOKEN, times_s[0] - opened_s),
            LifetimeEntry(LifetimeEvent.DONE, times_s[-1] - opened_s),
        )
        return Reply(
            text=answer_text(token_ids),
            token_ids=token_ids,
            token_times_s=tuple(times_s),
            account=ServerAccount(
                num_prompt_tokens=len(prompt),
                num_cached_tokens=0,
                num_computed_tokens=len(prompt),
                num_recomputed_tokens=0,
                num_reused_tokens=0,
                num_invalidated_tokens=0,
                handoff="none",
                lifetime=lifetime,
                opened_s=opened_s,
            ),
        )


class _FakeStream:
    def __init__(self, target: FakeTarget, mode: StreamMode, ask: Ask, opened_s: float) -> None:
        self.is_complete = False
        self._target = target
        self._mode = mode
        self._ask = ask
        self._opened_s = opened_s
        self._pieces: list[Content] = []

    async def send(self, piece: Content) -> None:
        self._target.note("send", self._ask, piece)
        self._take(piece)
        await asyncio.sleep(self._target.times.acknowledge_s)

    async def commit(self, piece: Content | None) -> Reply:
        self._target.note("commit", self._ask, piece)
        if piece is not None:
            self._take(piece)
        prompt = join(self._pieces) if self._pieces else ()
        reply = await self._target.answer(prompt, self._ask, self._opened_s)
        self.is_complete = True
        return reply

    def _take(self, piece: Content) -> None:
        if self._mode is StreamMode.UPDATE:
            self._pieces.clear()
        self._pieces.append(piece)


def answer_token_ids(prompt: Content, num_tokens: int) -> tuple[int, ...]:
    """The answer of a fake: the same for the same prompt, however it was sent."""
    seed = hashlib.blake2b(_as_bytes(prompt), digest_size=8).digest()
    return tuple(
        int.from_bytes(hashlib.blake2b(seed + number.to_bytes(4, "big"), digest_size=4).digest())
        % VOCAB_SIZE
        for number in range(num_tokens)
    )


def answer_text(token_ids: tuple[int, ...]) -> str:
    """The answer of a fake as text."""
    return "".join(f" {token_id}" for token_id in token_ids)


def _as_bytes(prompt: Content) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode()
    return "\0".join(
        f"{part.role}\1{part.content}" if isinstance(part, ChatMessage) else str(part)
        for part in prompt
    ).encode()
