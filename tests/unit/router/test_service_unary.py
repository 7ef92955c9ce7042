"""The unary forms, the one-shot call, and what is wrong in a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.messages.common import StreamMode
from tests.unit.router.fake_manager import STEP_S, VOCAB_SIZE, FakeManager, serve

HELLO = pb.Segment(text="hello")


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager()


@pytest.fixture
async def stub(manager: FakeManager) -> AsyncIterator[StreamfillStub]:
    async with serve(manager) as target, grpc.aio.insecure_channel(target) as channel:
        yield StreamfillStub(channel)


async def open_stream(stub: StreamfillStub, mode: pb.StreamMode = pb.STREAM_MODE_APPEND) -> int:
    return (await stub.OpenStream(pb.OpenStreamRequest(open=pb.Open(mode=mode)))).stream_id


async def test_a_stream_lives_without_a_call(stub: StreamfillStub, manager: FakeManager) -> None:
    """Open, append, look, commit, each in a call of its own; ids use all 64 bits."""
    opening = pb.Open(request_id="doc-1", priority=3, deadline_s=9.5)
    stream_id = (await stub.OpenStream(pb.OpenStreamRequest(open=opening))).stream_id
    assert stream_id >= 2**63
    acknowledged = await stub.AppendSegment(
        pb.AppendSegmentRequest(stream_id=stream_id, seq=1, segment=HELLO)
    )
    assert acknowledged == pb.Acknowledged(seq=1, num_received_tokens=5)
    assert await stub.GetStream(pb.GetStreamRequest(stream_id=stream_id)) == pb.GetStreamResponse(
        stream_id=stream_id,
        request_id="doc-1",
        mode=pb.STREAM_MODE_APPEND,
        priority=3,
        state="OPEN",
        acknowledged=acknowledged,
    )
    call = stub.CommitStream(pb.CommitStreamRequest(stream_id=stream_id, seq=2))
    kinds = [event.WhichOneof("event") async for event in call]
    assert kinds == ["token", "token", "token", "done"]
    assert manager.get(stream_id).options.deadline_s == 9.5


async def test_the_context_of_an_update_stream_is_replaced(
    stub: StreamfillStub, manager: FakeManager
) -> None:
    """UpdateContext, and a repeated number is acknowledged without effect."""
    stream_id = await open_stream(stub, pb.STREAM_MODE_UPDATE)
    assert manager.get(stream_id).mode is StreamMode.UPDATE
    for content in ("first", "another"):
        acknowledged = await stub.UpdateContext(
            pb.UpdateContextRequest(stream_id=stream_id, seq=1, segment=pb.Segment(text=content))
        )
        assert acknowledged == pb.Acknowledged(seq=1, num_received_tokens=5)


async def test_a_stream_is_cancelled_by_its_id(stub: StreamfillStub, manager: FakeManager) -> None:
    """With the client's reason."""
    stream_id = await open_stream(stub)
    await stub.CancelStream(pb.CancelStreamRequest(stream_id=stream_id, reason="enough"))
    assert manager.get(stream_id).cancelled_because == "enough"


@pytest.mark.parametrize("name", ["AppendSegment", "UpdateContext", "CommitStream", "GetStream"])
async def test_an_unknown_stream_is_not_found(stub: StreamfillStub, name: str) -> None:
    """The message names the id."""
    kind = {
        "AppendSegment": pb.AppendSegmentRequest,
        "UpdateContext": pb.UpdateContextRequest,
        "CommitStream": pb.CommitStreamRequest,
        "GetStream": pb.GetStreamRequest,
    }[name]
    call = getattr(stub, name)(kind(stream_id=12345))
    assert await call.code() is grpc.StatusCode.NOT_FOUND
    assert await call.details() == "there is no stream 12345"


async def test_the_states_of_a_stream_are_guarded(stub: StreamfillStub) -> None:
    """Wrong mode, append after commit, commit twice: FAILED_PRECONDITION."""
    stream_id = await open_stream(stub)
    wrong_mode = stub.UpdateContext(pb.UpdateContextRequest(stream_id=stream_id, segment=HELLO))
    await stub.AppendSegment(pb.AppendSegmentRequest(stream_id=stream_id, segment=HELLO))
    async for _ in stub.CommitStream(pb.CommitStreamRequest(stream_id=stream_id)):
        pass
    late = stub.AppendSegment(pb.AppendSegmentRequest(stream_id=stream_id, segment=HELLO))
    again = stub.CommitStream(pb.CommitStreamRequest(stream_id=stream_id))
    for call in (wrong_mode, late, again):
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_refused_commit_leaves_the_stream_open(
    stub: StreamfillStub, manager: FakeManager
) -> None:
    """It may be corrected and sent again."""
    stream_id = await open_stream(stub)
    refused = stub.CommitStream(pb.CommitStreamRequest(stream_id=stream_id))
    assert await refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    commit = pb.Commit(final_segment=HELLO)
    accepted = stub.CommitStream(pb.CommitStreamRequest(stream_id=stream_id, commit=commit))
    assert [event async for event in accepted]
    assert manager.get(stream_id).cancelled_because is None


async def test_a_commit_under_the_number_of_another_operation_is_refused(
    stub: StreamfillStub,
) -> None:
    """The core ignores it, and there is no acknowledgement to send: the call must not hang."""
    stream_id = await open_stream(stub)
    await stub.AppendSegment(pb.AppendSegmentRequest(stream_id=stream_id, seq=1, segment=HELLO))
    call = stub.CommitStream(pb.CommitStreamRequest(stream_id=stream_id, seq=1))
    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "number 1" in await call.details()


@pytest.mark.parametrize("name", ["CommitStream", "Generate"])
async def test_an_answer_whose_client_goes_away_is_cancelled(
    stub: StreamfillStub, manager: FakeManager, name: str
) -> None:
    """Before the first token."""
    manager.hold_answer = True
    call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.StreamEvent]
    if name == "Generate":
        call = stub.Generate(pb.GenerateRequest(prompt=HELLO))
    else:
        commit = pb.Commit(final_segment=HELLO)
        stream_id = await open_stream(stub)
        request = pb.CommitStreamRequest(stream_id=stream_id, commit=commit)
        call = stub.CommitStream(request)  # type: ignore[assignment]
    await asyncio.wait_for(manager.any_commit.wait(), STEP_S)
    (stream,) = manager.streams.values()
    call.cancel()
    await asyncio.wait_for(stream.ended.wait(), STEP_S)
    assert stream.cancelled_because == "the client went away"


async def test_a_commit_whose_client_goes_away_is_cancelled(
    stub: StreamfillStub, manager: FakeManager
) -> None:
    """The core has taken it, or does in any case, and nobody would listen to the answer."""
    manager.hold_commit = True
    stream_id = await open_stream(stub)
    commit = pb.Commit(final_segment=HELLO)
    call = stub.CommitStream(pb.CommitStreamRequest(stream_id=stream_id, commit=commit))
    await asyncio.wait_for(manager.any_commit.wait(), STEP_S)
    call.cancel()
    stream = manager.get(stream_id)
    await asyncio.wait_for(stream.ended.wait(), STEP_S)
    assert stream.cancelled_because == "the client went away"


async def test_a_whole_prompt_is_answered(stub: StreamfillStub, manager: FakeManager) -> None:
    """Generate, with what was asked of the sampler."""
    sampling = pb.Sampling(
        temperature=0.0, top_k=4, max_tokens=7, min_tokens=2, seed=11, logprobs=2, ignore_eos=True
    )
    sampling.stop.extend(["\n", "END"])
    sampling.stop_token_ids.append(5)
    call = stub.Generate(pb.GenerateRequest(prompt=HELLO, sampling=sampling))
    events = [event async for event in call]
    assert [event.token.text for event in events[:-1]] == ["Hello", " ", "world"]
    assert [top.token_id for top in events[1].token.logprob.top] == [1, 9]
    assert events[-1].done.usage.num_output_tokens == 3
    (stream,) = manager.streams.values()
    options = stream.committed
    assert options is not None
    assert options.stop == ("\n", "END")
    assert options.skip_special_tokens
    assert options.sampling.stop_token_ids == (5,)
    got = options.sampling
    assert (got.temperature, got.top_k, got.top_p, got.seed) == (0.0, 4, 1.0, 11)
    assert (got.max_new_tokens, got.min_new_tokens, got.num_logprobs) == (7, 2, 2)
    assert got.ignore_eos


async def test_a_prompt_may_be_chat_messages(stub: StreamfillStub, manager: FakeManager) -> None:
    """They reach the core whole."""
    messages = [pb.ChatMessage(role="user", content="hi")]
    prompt = pb.Segment(messages=pb.ChatMessages(messages=messages))
    assert [event async for event in stub.Generate(pb.GenerateRequest(prompt=prompt))]
    (stream,) = manager.streams.values()
    assert stream.committed is not None
    assert stream.committed.final_segment is not None
    assert stream.committed.final_segment.messages == [{"role": "user", "content": "hi"}]


def sampling(**values: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=HELLO, sampling=pb.Sampling(**values))  # type: ignore[arg-type]


def chat(*messages: pb.ChatMessage) -> pb.GenerateRequest:
    prompt = pb.Segment(messages=pb.ChatMessages(messages=messages))
    return pb.GenerateRequest(prompt=prompt)


def ids(*token_ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Segment(token_ids=pb.TokenIds(ids=token_ids)))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (sampling(temperature=-1.0), "sampling.temperature is -1.0; it must be in [0, 1000000]"),
        (sampling(top_k=2**31), "sampling.top_k is 2147483648"),
        (sampling(repetition_penalty=1e-39), "sampling.repetition_penalty is 1e-39"),
        (sampling(temperature=float("nan")), "sampling.temperature is nan"),
        (sampling(temperature=float("inf")), "sampling.temperature is inf"),
        (sampling(top_p=0.0), "sampling.top_p is 0.0; it must be in (0, 1]"),
        (sampling(top_p=1.5), "sampling.top_p is 1.5"),
        (sampling(top_k=0), "sampling.top_k is 0"),
        (sampling(top_k=-2), "sampling.top_k is -2"),
        (sampling(min_p=1.1), "sampling.min_p is 1.1"),
        (sampling(frequency_penalty=3.0), "sampling.frequency_penalty is 3.0"),
        (sampling(presence_penalty=-3.0), "sampling.presence_penalty is -3.0"),
        (sampling(repetition_penalty=0.0), "sampling.repetition_penalty is 0.0"),
        (sampling(max_tokens=0), "sampling.max_tokens is 0; it must be 1 or more"),
        (sampling(min_tokens=-1), "sampling.min_tokens is -1"),
        (sampling(min_tokens=9, max_tokens=8), "sampling.min_tokens is 9; it must be at most max"),
        (sampling(min_tokens=129), "at most max_tokens, which is 128"),
        (sampling(seed=-1), "sampling.seed is -1"),
        (sampling(logprobs=21), "sampling.logprobs is 21; it must be in 0 .. 20"),
        (sampling(stop=["x"] * 17), "sampling.stop is 17 strings; it must be at most 16"),
        (sampling(stop=["x", ""]), "sampling.stop[1] is ''"),
        (sampling(stop=["x" * 2000]), "sampling.stop[0] is 2000 bytes"),
        (sampling(stop_token_ids=[VOCAB_SIZE]), "sampling.stop_token_ids[0] is 1000, outside"),
        (ids(1, 2, VOCAB_SIZE), "prompt.token_ids[2] is 1000, outside the vocabulary of 1000"),
        (ids(-3), "prompt.token_ids[0] is -3"),
        (ids(2**40), "prompt.token_ids[0] is 1099511627776"),
        (chat(), "prompt.messages is empty"),
        (chat(pb.ChatMessage(content="hi")), "prompt.messages[0].role is ''"),
        (pb.GenerateRequest(), "prompt has no content"),
        (pb.GenerateRequest(prompt=HELLO, deadline_s=0.0), "generate.deadline_s is 0.0"),
        (
            pb.GenerateRequest(prompt=HELLO, ttft_slo_ms=0.0),
            "generate.ttft_slo_ms is 0.0; it must be greater than 0",
        ),
        (pb.GenerateRequest(prompt=pb.Segment(text_utf8=b"\xff")), "byte 0xff at offset 0"),
    ],
)
async def test_a_wrong_value_is_named(
    stub: StreamfillStub, manager: FakeManager, request_: pb.GenerateRequest, words: str
) -> None:
    """INVALID_ARGUMENT with the field, the value and what it must be; no stream is made."""
    call = stub.Generate(request_)
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in await call.details()
    assert not manager.streams


@pytest.mark.parametrize(
    ("opening", "words"),
    [
        (pb.Open(deadline_s=-1.0), "open.deadline_s is -1.0; it must be greater than 0"),
        (pb.Open(ttft_slo_ms=-5.0), "open.ttft_slo_ms is -5.0; it must be greater than 0"),
        (pb.Open(ttft_slo_ms=float("nan")), "open.ttft_slo_ms is nan"),
        (pb.Open(ttft_slo_ms=float("inf")), "open.ttft_slo_ms is inf"),
        (pb.Open(mode=7), "open.mode is 7"),  # type: ignore[arg-type]
        (pb.Open(messages=[pb.ChatMessage(content="x")]), "open.messages[0].role is ''"),
    ],
)
async def test_a_wrong_opening_is_named(
    stub: StreamfillStub, manager: FakeManager, opening: pb.Open, words: str
) -> None:
    """As for the answer's options."""
    call = stub.OpenStream(pb.OpenStreamRequest(open=opening))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in await call.details()
    assert not manager.streams


async def test_a_bug_of_the_core_is_an_internal_error(
    stub: StreamfillStub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The call is answered and logged, and the server goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(FakeManager, "open", None)
        call = stub.OpenStream(pb.OpenStreamRequest())
        assert await call.code() is grpc.StatusCode.INTERNAL
        assert "OpenStream failed: TypeError" in await call.details()
    assert "call_failed" in caplog.text
    assert await open_stream(stub)


async def test_the_cluster_is_described(stub: StreamfillStub) -> None:
    """ServerInfo passes on what the core says, all counters included."""
    info = await stub.ServerInfo(pb.ServerInfoRequest())
    assert (info.model, info.vocab_size, info.ready) == ("fake", VOCAB_SIZE, True)
    assert info.num_streams_by_outcome == {"DONE": 3}
    (server,) = info.servers
    assert (server.role, server.state, server.pid) == ("prefill", "alive", 4711)
    assert server.policy == "fcfs"
    assert server.counters["num_free_tokens"] == 9
