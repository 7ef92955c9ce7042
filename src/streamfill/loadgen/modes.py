"""What a client does with a request whose context arrives over time.

* ``oneshot`` waits until the prompt is complete, then sends it.
* ``warmup`` sends the prompt as far as it is known as an ordinary request with one output token,
  so that the whole one finds it in the cache. One at a time: when one has ended, the newest state
  of the prompt is sent, if there is one that was not sent. The whole prompt is sent when it is due,
  whether one is running or not.
* ``stream`` opens a stream when the query arrives and sends each piece when it is there. It does
  not wait for one piece to be taken before it sends the next. The last piece goes with the commit
  where the script has them at the same time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from streamfill.errors import StreamError
from streamfill.loadgen.records import ModeName
from streamfill.loadgen.request_log import RequestLog
from streamfill.loadgen.target import Ask, Reply, Target
from streamfill.messages.common import StreamMode
from streamfill.traces.script import Content, Script


async def play(
    mode: ModeName,
    target: Target,
    log: RequestLog,
    *,
    ttft_slo_ms: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Does one request and notes everything but its failure. Starts when the request is due.

    Args:
        ttft_slo_ms: as in ``Ask``; extra requests of ``warmup`` do not have it.
        clock: the event loop's own, in seconds; tests have another one.

    Raises:
        StreamError: there is no answer.
    """
    client = _Client(target, log, ttft_slo_ms, clock)
    match mode:
        case ModeName.ONESHOT:
            await client.one_shot()
        case ModeName.WARMUP:
            await client.warm_up()
        case ModeName.STREAM:
            await client.stream()


class _Client:
    def __init__(
        self,
        target: Target,
        log: RequestLog,
        ttft_slo_ms: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._target = target
        self._log = log
        self._script: Script = log.script
        self._clock = clock
        self._ask = Ask(
            request_id=self._script.request_id,
            max_output_tokens=self._script.max_output_tokens,
            ttft_slo_ms=ttft_slo_ms,
        )

    async def one_shot(self) -> None:
        await self._until(self._script.commit_due_s)
        await self._send_whole()

    async def warm_up(self) -> None:
        warm_ups = _WarmUps(self._target, self._log, self._clock)
        try:
            for number, step in enumerate(self._script.steps[:-1], start=1):
                await self._until(step.due_s)
                warm_ups.offer(number, self._log.due_s + step.due_s)
            await self._until(self._script.commit_due_s)
            warm_ups.withdraw()
            await self._send_whole()
            await warm_ups.join()
        finally:
            await warm_ups.cancel()

    async def stream(self) -> None:
        script, log = self._script, self._log
        log.note_act(log.due_s, self._clock())
        async with self._target.open(script.mode, self._ask) as stream:
            log.note_free(self._clock())
            num_steps = len(script.steps)
            num_alone = num_steps - 1 if script.commits_with_last else num_steps
            try:
                # Tasks begin in the order in which they are made, and the target keeps it.
                async with asyncio.TaskGroup() as sending:
                    for number, step in enumerate(script.steps[:num_alone], start=1):
                        await self._until(step.due_s)
                        self._note_sent(number, step.due_s)
                        if step.piece or script.mode is StreamMode.UPDATE:
                            sending.create_task(stream.send(step.piece))
                    await self._until(script.commit_due_s)
                    self._note_sent(num_steps, script.commit_due_s)
                    final = script.steps[-1].piece if script.commits_with_last else None
                    answering = sending.create_task(stream.commit(final))
            except ExceptionGroup as group:
                first = group.exceptions[0]  # others follow from it
                raise first from first.__cause__
            log.note_reply(answering.result(), self._clock())

    async def _send_whole(self) -> None:
        self._note_sent(len(self._script.steps), self._script.commit_due_s)
        reply = await self._target.generate(self._script.prompt, self._ask)
        self._log.note_reply(reply, self._clock())

    def _note_sent(self, num_segments: int, due_s: float) -> None:
        now_s = self._clock()
        self._log.note_act(self._log.due_s + due_s, now_s)
        self._log.note_sent(num_segments, now_s)

    async def _until(self, due_s: float) -> None:
        wait_s = self._log.due_s + due_s - self._clock()
        if wait_s > 0:
            await asyncio.sleep(wait_s)


class _WarmUps:
    """The extra requests of one client: one at a time, always the newest state of the prompt."""

    def __init__(self, target: Target, log: RequestLog, clock: Callable[[], float]) -> None:
        self._target = target
        self._log = log
        self._clock = clock
        self._newest: tuple[int, float] | None = None
        self._running: asyncio.Task[None] | None = None

    def offer(self, num_segments: int, due_s: float) -> None:
        """So many pieces of the prompt are known now."""
        self._newest = (num_segments, due_s)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())

    def withdraw(self) -> None:
        """What was not sent yet need not be."""
        self._newest = None

    async def join(self) -> None:
        """Wait for the one that is running: what it cost belongs to the request."""
        if self._running is not None:
            await self._running

    async def cancel(self) -> None:
        """End the one that is running, if any."""
        if self._running is not None and not self._running.done():
            self._running.cancel()
            await asyncio.wait({self._running})

    async def _run(self) -> None:
        is_first = True
        while self._newest is not None:
            (num_segments, due_s), self._newest = self._newest, None
            prompt = self._log.script.prompt_after(num_segments)
            if not prompt:
                continue
            now_s = self._clock()
            if is_first:  # the others waited for the target
                self._log.note_act(due_s, now_s)
            is_first = False
            self._log.note_sent(num_segments, now_s)
            request_id = f"{self._log.script.request_id}-warm-up-{num_segments}"
            ask = Ask(request_id=request_id, max_output_tokens=1)
            self._log.note_warm_up(await self._outcome(prompt, ask))

    async def _outcome(self, prompt: Content, ask: Ask) -> Reply | StreamError:
        try:
            return await self._target.generate(prompt, ask)
        except StreamError as error:
            return error
