"""The target that speaks the client API, against the fake router over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from streamfill.errors import ResourceExhaustedError, StreamError, UnavailableError
from streamfill.loadgen.fake_router import fake_router
from streamfill.loadgen.fake_service import FakeBehaviour, FakeService
from streamfill.loadgen.records import ModeName
from streamfill.loadgen.runner import RunPlan, replay
from streamfill.loadgen.target import Ask
from streamfill.loadgen.targets.fake import VOCAB_SIZE, answer_token_ids
from streamfill.loadgen.targets.streamfill import StreamfillTarget
from streamfill.messages.common import StreamMode
from streamfill.observability.lifetime import LifetimeEvent
from streamfill.traces.format import ChatMessage
from streamfill.traces.script import Content
from tests.unit.loadgen.script_builders import script

ASK = Ask(request_id="q0", max_output_tokens=3)
CHAT = (ChatMessage(role="system", content="be brief"), ChatMessage(role="user", content="hello"))


@asynccontextmanager
async def connected(
    behaviour: FakeBehaviour | None = None,
) -> AsyncIterator[tuple[StreamfillTarget, FakeService]]:
    async with fake_router(behaviour) as (address, service):
        target = StreamfillTarget(address)
        try:
            yield target, service
        finally:
            await target.close()


async def test_facts() -> None:
    """As the router tells them."""
    async with connected() as (target, _):
        facts = await target.facts()
    assert (facts.model, facts.vocab_size) == ("fake", VOCAB_SIZE)


@pytest.mark.parametrize("prompt", ["some text", (5, 6, 7), CHAT])
async def test_generate_sends_any_kind_of_prompt(prompt: Content) -> None:
    """The answer is that of the prompt, with times and the server's account."""
    async with connected() as (target, _):
        before_s = time.monotonic()
        reply = await target.generate(prompt, ASK)
        after_s = time.monotonic()
    assert reply.token_ids == answer_token_ids(prompt, 3)
    assert len(reply.token_times_s) == 3
    assert before_s <= reply.token_times_s[0] <= reply.token_times_s[2] <= after_s
    account = reply.account
    assert account.num_prompt_tokens == account.num_computed_tokens
    assert account.num_prompt_tokens
    assert account.handoff == "none"
    assert account.opened_s is not None
    assert before_s <= account.opened_s <= reply.token_times_s[0]
    assert account.lifetime[0].event is LifetimeEvent.OPENED


@pytest.mark.parametrize(
    ("mode", "pieces", "final", "prompt"),
    [
        (StreamMode.APPEND, ["one ", "two "], "three", "one two three"),
        (StreamMode.APPEND, ["one ", "two "], None, "one two "),
        (StreamMode.APPEND, [(1, 2), (3,)], (), (1, 2, 3)),
        (StreamMode.APPEND, [CHAT[:1]], CHAT[1:], CHAT),
        (StreamMode.UPDATE, ["one", "two"], "three", "three"),
        (StreamMode.UPDATE, [(1, 2), (3,)], None, (3,)),
    ],
)
async def test_a_stream_makes_the_prompt_of_its_pieces(
    mode: StreamMode, pieces: list[Content], final: Content | None, prompt: Content
) -> None:
    """The answer is the one that the whole prompt gets."""
    async with connected() as (target, service):
        async with target.open(mode, ASK) as stream:
            for piece in pieces:
                await stream.send(piece)
            reply = await stream.commit(final)
        whole = await target.generate(prompt, ASK)
    assert reply.token_ids == whole.token_ids
    assert service.num_cancelled == 0


async def test_pieces_that_overlap_keep_their_order() -> None:
    """Each is sent before the one before it is acknowledged, and so is the commit."""
    async with connected(FakeBehaviour(acknowledge_s=0.01)) as (target, _):
        async with (
            target.open(StreamMode.APPEND, ASK) as stream,
            asyncio.TaskGroup() as sending,
        ):
            for number in range(10):
                sending.create_task(stream.send(f"piece {number} "))
            answering = sending.create_task(stream.commit("end"))
        whole = "".join(f"piece {number} " for number in range(10)) + "end"
        assert answering.result().token_ids == answer_token_ids(whole, 3)


async def test_a_stream_that_is_left_is_cancelled() -> None:
    """On the server too."""
    async with connected() as (target, service):
        async with target.open(StreamMode.APPEND, ASK) as stream:
            await stream.send("piece")
        async with asyncio.timeout(60.0):
            while service.num_cancelled == 0:  # noqa: ASYNC110 - the fake has no event for it
                await asyncio.sleep(0.01)


async def test_errors_of_the_router_come_through() -> None:
    """With their code, from whole prompts, from pieces and from commits."""

    def refuses(request_id: str) -> StreamError:
        return ResourceExhaustedError(f"no room for {request_id}")

    async with connected(FakeBehaviour(fails=refuses, refuses_pieces=refuses)) as (target, _):
        with pytest.raises(ResourceExhaustedError, match="no room for q0"):
            await target.generate("text", ASK)
        async with target.open(StreamMode.APPEND, ASK) as stream:
            with pytest.raises(ResourceExhaustedError, match="no room for q0"):
                await stream.send("text")
            with pytest.raises(ResourceExhaustedError, match="no room for q0"):
                await stream.commit("text")


async def test_nobody_there_is_unavailable() -> None:
    """Also to a stream."""
    async with connected() as (target, _):
        pass
    gone = StreamfillTarget("127.0.0.1:1")
    try:
        with pytest.raises(UnavailableError):
            await gone.generate("text", ASK)
        with pytest.raises(UnavailableError):
            async with gone.open(StreamMode.APPEND, ASK):
                pass
        with pytest.raises(UnavailableError):
            await gone.counters()
    finally:
        await gone.close()
    await target.close()


async def test_counters_are_totals_and_by_role() -> None:
    """They grow with what was computed."""
    async with connected() as (target, _):
        before = await target.counters()
        await target.generate((1, 2, 3), ASK)
        after = await target.counters()
    for name in ("num_computed_tokens", "prefill.num_computed_tokens"):
        assert after[name] - before[name] == 3


async def test_caches_are_emptied() -> None:
    """The router is asked once when it succeeds at once."""
    async with connected() as (target, service):
        await target.empty_caches()
    assert service.num_flushes == 1


async def test_all_modes_get_the_same_answers() -> None:
    """Over the wire, through the runner."""
    pieces = ("one ", "two ", "three")
    answers = []
    async with connected(FakeBehaviour(ttft_s=0.01)) as (target, _):
        for mode in ModeName:
            scripts = [
                script(f"q{number}", pieces=pieces, dues_s=(0.0, 0.02, 0.04), mode=stream_mode)
                for number, stream_mode in enumerate(StreamMode)
            ]
            plan = RunPlan(mode=mode, label=mode.value)
            result = await replay(target, scripts, [0.0, 0.01], plan)
            assert [record.error_code for record in result.records] == [None, None]
            assert all(record.num_segments == 3 for record in result.records)
            answers.append([record.token_ids for record in result.records])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] == answer_token_ids("one two three", 3)
    assert answers[0][1] == answer_token_ids("three", 3)


@pytest.mark.parametrize("mode", list(ModeName))
async def test_each_request_tells_its_slo(mode: ModeName) -> None:
    """The one that is answered does, whole or streamed; what only warms up does not."""
    scripts = [script("q0", dues_s=(0.0, 0.02, 0.04)), script("q1", dues_s=(0.0, 0.0, 0.0))]
    async with connected() as (target, service):
        plan = RunPlan(mode=mode, label=mode.value, ttft_slo_ms=250.0)
        await replay(target, scripts, [0.0, 0.0], plan)
        assert service.slos_ms == {"q0": 250.0, "q1": 250.0}
        await replay(
            target, [script("q2", dues_s=(0.0, 0.0, 0.0))], [0.0], RunPlan(mode=mode, label="x")
        )
        assert "q2" not in service.slos_ms


async def test_many_streams_share_one_connection() -> None:
    """Two hundred are open at the same time."""
    num = 200
    scripts = [
        script(f"q{number}", pieces=("a", "b"), dues_s=(0.0, 3.0), max_output_tokens=1)
        for number in range(num)
    ]
    async with connected() as (target, service):
        plan = RunPlan(mode=ModeName.STREAM, label="stream", timeout_s=30.0)
        starts_s = [0.0005 * number for number in range(num)]
        result = await replay(target, scripts, starts_s, plan)
    assert [record.error_code for record in result.records] == [None] * num
    assert service.num_most_open > num // 2
    assert service.num_pieces == 2 * num
