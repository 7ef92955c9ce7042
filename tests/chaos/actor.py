"""Plays one script.

1. Open; then its steps, with pauses and whatever goes wrong around them.
2. Commit, and read the answer; at the moment that the script names, its fate.
3. Whatever happened was taken down. How the stream ended is for the judge.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from tests.chaos.history import PrankAnswer, Recorder
from tests.chaos.scripts import ENDS_OPEN, REFUSALS, Fate, Form, Prank, Script
from tests.chaos.weather import Weather
from tests.chaos.wire_bidi import BidiWire
from tests.chaos.wire_unary import OneShotWire, UnaryWire
from tests.chaos.wires import Operation, RefusedError, StreamOverError, Wire
from tests.support.stories import Piece

LIFE_S = 240.0
"""For a whole stream; far more than one takes among 64 on two busy cores."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all streams of a soak share."""

    weather: Weather
    context_tokens: int
    vocab_size: int


async def act(
    script: Script, request_id: str, stub: StreamfillStub, stage: Stage, recorder: Recorder
) -> None:
    """Play the script to its end. Never raises but when it is cancelled."""
    actor = _Actor(script, request_id, stub, stage, recorder)
    try:
        async with asyncio.timeout(LIFE_S):
            await actor.live()
    except StreamOverError:
        recorder.note("over")
    except RefusedError as error:
        recorder.trouble(f"refused: {error}")
    except TimeoutError:
        recorder.trouble(f"not over after {LIFE_S:g} s")
    finally:
        actor.leave()


class _Actor:
    def __init__(
        self,
        script: Script,
        request_id: str,
        stub: StreamfillStub,
        stage: Stage,
        recorder: Recorder,
    ) -> None:
        self._script = script
        self._stage = stage
        self._recorder = recorder
        self._seq = 0
        self._num_received = 0
        self._last: tuple[Operation, int] | None = None
        self._opening = pb.Open(
            mode=pb.STREAM_MODE_APPEND if script.mode == "append" else pb.STREAM_MODE_UPDATE,
            priority=script.priority,
            request_id=request_id,
            deadline_s=script.deadline_s,
        )
        self._one_shot = OneShotWire(stub, recorder, self._opening)
        self._wire: Wire | None = None
        if script.form is not Form.ONE_SHOT:
            self._wire = (BidiWire if script.form is Form.BIDI else UnaryWire)(stub, recorder)

    async def live(self) -> None:
        """All of the stream's life."""
        script, note = self._script, self._recorder.note
        if self._wire is None:
            self._one_shot.start(self._commit(script.steps[0].piece))
            note("one shot sent")
            await self._read_answer(self._one_shot)
            return
        wire = self._wire
        await wire.open(self._opening)
        note(f"opened, stream {self._recorder.stream_id}")
        if script.fate in (Fate.CANCELLED_OPENING, Fate.LEFT_OPENING):
            await self._meet_fate(wire)
            return
        ends_open = script.fate in ENDS_OPEN
        for step in script.steps[: script.num_before] if ends_open else script.steps:
            await self._stage.weather.wait(step.gap_s)
            await self._play_prank(wire, step.before)
            await self._send(wire, step.piece)
            await self._play_prank(wire, step.after)
        if ends_open:
            await self._meet_fate(wire)
            return
        await self._play_prank(wire, script.before_commit)
        self._seq += 1
        await wire.commit(self._commit(script.final), self._seq)
        note(f"committed as {self._seq}")
        if script.after_commit is not None and script.form is Form.UNARY:
            await wire.read()  # two calls may overtake each other before
        await self._play_prank(wire, script.after_commit)
        if script.fate is Fate.CANCELLED_COMMITTED:
            await self._meet_fate(wire)
        else:
            await self._read_answer(wire)

    def leave(self) -> None:
        """Drop what is open."""
        (self._wire or self._one_shot).leave()

    async def _send(self, wire: Wire, piece: Piece) -> None:
        operation = self._piece_operation(segment_of(piece))
        self._seq += 1
        acknowledged = await wire.operate(operation, self._seq)
        self._num_received = acknowledged.num_received_tokens
        self._last = operation, self._seq
        kind = "characters" if isinstance(piece, str) else "token ids"
        self._recorder.note(
            f"{self._script.mode} {self._seq}: {len(piece)} {kind}, "
            f"{self._num_received} tokens so far"
        )

    async def _read_answer(self, wire: Wire | OneShotWire) -> None:
        script, recorder = self._script, self._recorder
        if script.fate is Fate.LEFT_COMMITTED:
            await asyncio.sleep(script.fate_after_s)
            recorder.note("leaves")
            return
        while await wire.read():
            is_far = len(recorder.tokens) >= script.num_before
            if is_far and script.fate is Fate.LEFT_ANSWERING:
                recorder.note(f"leaves after {len(recorder.tokens)} tokens")
                return
            if is_far and script.fate is Fate.CANCELLED_ANSWERING and wire is self._wire:
                await self._meet_fate(self._wire)
                return

    async def _meet_fate(self, wire: Wire) -> None:
        script = self._script
        await asyncio.sleep(script.fate_after_s)
        self._recorder.note(f"{script.fate}, {len(self._recorder.tokens)} tokens read")
        match script.fate:
            case Fate.HALF_CLOSED:
                await wire.close_side()
            case Fate.DEADLINE_OPEN:
                await wire.until_over()
            case Fate.LEFT_OPENING | Fate.LEFT_OPEN:
                return
            case _:
                await wire.cancel()

    async def _play_prank(self, wire: Wire, prank: Prank | None) -> None:
        if prank is None or (prank in (Prank.RESENT, Prank.GAP) and self._last is None):
            return
        before = self._num_received
        try:
            if prank not in REFUSALS:
                assert self._last is not None
                operation, seq = self._last
                seq = seq if prank is Prank.RESENT else self._seq + 7
                acknowledged = await wire.repeat(operation, seq)
            else:
                self._seq += 1
                acknowledged = await wire.operate(self._wrong_operation(prank), self._seq)
        except RefusedError as error:
            self._recorder.note(f"{prank}: {error}")
            self._recorder.pranks.append(PrankAnswer(prank=prank, code=error.code))
            return
        after = acknowledged.num_received_tokens
        self._recorder.note(f"{prank}: acknowledged, {after} tokens")
        self._recorder.pranks.append(
            PrankAnswer(prank=prank, code=None, num_tokens_before=before, num_tokens_after=after)
        )

    def _wrong_operation(self, prank: Prank) -> Operation:
        match prank:
            case Prank.OTHER_MODE:
                segment = pb.Segment(text="wrong")
                is_append = self._script.mode == "append"
                return pb.Update(segment=segment) if is_append else pb.Append(segment=segment)
            case Prank.UNKNOWN_TOKEN:
                return self._piece_operation(segment_of((self._stage.vocab_size,)))
            case Prank.BROKEN_UTF8:
                return self._piece_operation(pb.Segment(text_utf8=b"broken \xff\xfe"))
            case Prank.TOO_LONG:
                too_many = (1,) * (self._stage.context_tokens + 1)
                return self._piece_operation(segment_of(too_many))
            case Prank.BAD_SAMPLING:
                return pb.Commit(sampling=pb.Sampling(temperature=-1.0))
            case Prank.SECOND_OPEN:
                return self._opening
            case Prank.LATE_PIECE:
                return self._piece_operation(pb.Segment(text="too late"))
            case _:
                return self._piece_operation(pb.Segment())

    def _piece_operation(self, segment: pb.Segment) -> Operation:
        is_append = self._script.mode == "append"
        return pb.Append(segment=segment) if is_append else pb.Update(segment=segment)

    def _commit(self, final: Piece | None) -> pb.Commit:
        script = self._script
        sampling = pb.Sampling(
            temperature=0.0 if script.is_greedy else 1.0,
            max_tokens=script.max_tokens,
            ignore_eos=True,
            seed=script.sampling_seed,
        )
        segment = None if final is None else segment_of(final)
        return pb.Commit(sampling=sampling, final_segment=segment)


def segment_of(piece: Piece) -> pb.Segment:
    """A piece as a message."""
    if isinstance(piece, str):
        return pb.Segment(text=piece)
    return pb.Segment(token_ids=pb.TokenIds(ids=piece))
