"""The load of a soak: so many streams at a time, each of which plays a script and is judged at its
end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc.aio

from streamfill.api import Client
from streamfill.api import streamfill_pb2 as pb
from streamfill.stream.state import StreamState
from tests.chaos.actor import Stage, act
from tests.chaos.history import History, Recorder, Source
from tests.chaos.judge import Violation, judge_stream
from tests.chaos.options import SoakOptions
from tests.chaos.router_log import RouterLog
from tests.chaos.script_writer import ScriptWriter
from tests.chaos.scripts import Fate, Script

SETTLE_S = 60.0
"""From the last word of a client to the router's, on top of the router's idle time-out."""

NEVER_OPENED_S = 3.0
"""A call that was given up at once and is not in the router's log by then did not get there."""

MOST_VIOLATIONS = 100
"""More say nothing new; the load ends."""

_LOG_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Played:
    """A script and what became of it."""

    script: Script
    history: History


class Load:
    """``run`` makes it.

    Attributes:
        played: streams that have ended.
        violations: of them.
        outcomes: of them, by state.
    """

    def __init__(
        self,
        options: SoakOptions,
        *,
        address: str,
        client: Client,
        log: RouterLog,
        writer: ScriptWriter,
        stage: Stage,
    ) -> None:
        self.played: list[Played] = []
        self.violations: list[Violation] = []
        self.outcomes: Counter[str] = Counter()
        self.num_in_flight = 0
        self._options = options
        self._address = address
        self._client = client
        self._log = log
        self._writer = writer
        self._stage = stage
        self._numbers: Iterator[int] = (
            iter(options.only) if options.only else iter(range(options.most_streams))
        )
        self._end_s = 0.0
        self._is_stopped: Callable[[], bool] = lambda: False

    async def run(self, is_stopped: Callable[[], bool]) -> None:
        """Until the time is over, or the options or ``is_stopped`` end it earlier.

        Streams that have begun come to their end.
        """
        self._end_s = time.monotonic() + self._options.load_s
        self._is_stopped = is_stopped
        reader = asyncio.create_task(self._read_log())
        try:
            async with asyncio.TaskGroup() as slots:
                for _ in range(self._options.num_streams):
                    slots.create_task(self._slot())
        finally:
            reader.cancel()
            await asyncio.wait({reader})

    @property
    def is_over(self) -> bool:
        """No stream is begun any more."""
        return (
            time.monotonic() >= self._end_s
            or self._is_stopped()
            or len(self.violations) >= MOST_VIOLATIONS
        )

    async def _slot(self) -> None:
        while not self.is_over:
            number = next(self._numbers, None)
            if number is None:
                return
            self.num_in_flight += 1
            await self._play(self._writer.script(number))
            self.num_in_flight -= 1

    async def _play(self, script: Script) -> None:
        request_id = f"{prefix_of(self._options)}{script.number}"
        recorder = Recorder()
        if script.fate is Fate.DISCONNECTED:
            await self._play_disconnected(script, request_id, recorder)
        else:
            await act(script, request_id, self._client.stub, self._stage, recorder)
        await self._settle(request_id, recorder)
        history = recorder.history(was_opened=request_id in self._log.openings)
        self.played.append(Played(script=script, history=history))
        self.outcomes[str(history.state or "NEVER OPENED")] += 1
        self.violations += judge_stream(script, history)

    async def _play_disconnected(self, script: Script, request_id: str, recorder: Recorder) -> None:
        async with Client(self._address) as client:
            life = asyncio.create_task(act(script, request_id, client.stub, self._stage, recorder))
            await asyncio.wait({life}, timeout=script.fate_after_s)
            recorder.is_gone = True
            recorder.note("cuts its connection")
            await client.close()
            life.cancel()
            await asyncio.wait({life})
        error = None if life.cancelled() else life.exception()
        if error is not None and not isinstance(
            error, asyncio.InvalidStateError | grpc.aio.UsageError
        ):
            raise error

    async def _settle(self, request_id: str, recorder: Recorder) -> None:
        """Wait for the end in the router's log, and ask for the state."""
        began_s = time.monotonic()
        end_s = began_s + self._options.idle_timeout_s + SETTLE_S
        while not self._log.endings.get(request_id):
            now_s = time.monotonic()
            is_opened = recorder.stream_id is not None or request_id in self._log.openings
            if now_s >= (end_s if is_opened else began_s + NEVER_OPENED_S):
                return
            await asyncio.sleep(_LOG_POLL_S)
        for state in self._log.endings[request_id]:
            recorder.ended(Source.LOG, state)
        if recorder.stream_id is None:
            return
        request = pb.GetStreamRequest(stream_id=recorder.stream_id)
        try:
            reply = await self._client.stub.GetStream(request)
        except grpc.aio.AioRpcError as error:
            recorder.is_gone = False
            recorder.trouble(f"GetStream: {error.code().name}: {error.details()}")
        else:
            recorder.ended(Source.STATUS, StreamState(reply.state))

    async def _read_log(self) -> None:
        while True:
            self._log.read_on()
            await asyncio.sleep(_LOG_POLL_S)


def prefix_of(options: SoakOptions) -> str:
    """What the request ids of all streams of a soak begin with."""
    return f"soak-{options.seed}-"
