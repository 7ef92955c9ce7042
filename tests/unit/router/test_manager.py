"""The life of a stream through the router's core, with fake servers that do as they should."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.interface import Acknowledged, CommitOptions, Segment
from router.manager import Manager
from streamfill.config import RouterConfig
from streamfill.errors import (
    CancelledStreamError,
    ConfigError,
    DeadlineExceededError,
    ErrorCode,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StreamError,
    StreamNotFoundError,
    UnavailableError,
)
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Finish, FinishReason, StreamMode
from streamfill.observability.lifetime import LifetimeEvent, token_times_s
from streamfill.stream.state import StreamState
from streamfill.stream.tokenizer import load_tokenizer
from tests.unit.router.cluster_for_tests import (
    PATIENCE_S,
    TestCluster,
    answer_of,
    commit_of,
    ids,
    text,
    until,
)
from tests.unit.router.fake_server import expected_answer, random_ids


@pytest.fixture
async def cluster(tiny_model: Path) -> AsyncIterator[TestCluster]:
    async with TestCluster(tiny_model) as started:
        yield started


async def test_text_streamed_in_becomes_the_ids_of_the_whole(cluster: TestCluster) -> None:
    """The prefill server ends up with the ids of the whole text, and the answer is its answer."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    handle = await cluster.open()
    for piece in ("The quick bro", "wn fox jum", "ps over", " the lazy dog."):
        await handle.append(text(piece))
    await handle.commit(commit_of(8))
    tokens, done = await answer_of(handle)
    prompt = cluster.encode("The quick brown fox jumps over the lazy dog.")
    assert [token.token_id for token in tokens] == expected_answer(prompt, 8, cluster.vocab_size)
    assert done.finish_reason == "length"
    assert (done.prefill_server, done.decode_server) == (prefill.server_id, decode.server_id)
    assert (done.handoff, done.decoded_by_prefill, done.num_attempts) == ("done", False, 1)
    assert done.usage.num_prompt_tokens == done.usage.num_cached_tokens == len(prompt)
    assert cluster.outcomes() == {"DONE": 1}
    await until(lambda: not prefill.streams and not decode.streams)
    assert decode.of_type(r.Forget)
    cluster.assert_no_load()


async def test_the_text_of_the_tokens_is_the_text_of_the_answer(cluster: TestCluster) -> None:
    """Pieces and tail, put together, are what the tokenizer makes of all ids behind the prompt."""
    await cluster.prefill()
    handle = await cluster.open()
    await handle.append(text("x y z"))
    await handle.commit(commit_of(40))
    tokens, done = await answer_of(handle)
    shown = "".join(token.text for token in tokens) + done.text_tail
    all_ids = [token.token_id for token in tokens]
    assert shown == cluster.tokenizer.decode(all_ids, skip_special_tokens=True)


async def test_update_replaces_the_context(cluster: TestCluster) -> None:
    """In update mode the last text counts, and the common beginning is not sent again."""
    prefill, _ = await cluster.prefill(), await cluster.decode()
    handle = await cluster.open(StreamMode.UPDATE)
    await handle.update(text("one two three four five six seven"))
    await handle.update(text("one two three four FIVE six"))
    await handle.commit(commit_of(4))
    tokens, _ = await answer_of(handle)
    prompt = cluster.encode("one two three four FIVE six")
    assert [token.token_id for token in tokens] == expected_answer(prompt, 4, cluster.vocab_size)
    second = prefill.of_type(r.Splice)[1]
    assert second.keep_tokens > 0


async def test_final_segment_comes_with_the_commit(cluster: TestCluster) -> None:
    """The final segment is part of the prompt."""
    await cluster.prefill()
    handle = await cluster.open()
    await handle.append(text("Question:"))
    await handle.commit(commit_of(2, final_segment=text(" why?")))
    tokens, _ = await answer_of(handle)
    prompt = cluster.encode("Question: why?")
    assert [token.token_id for token in tokens] == expected_answer(prompt, 2, cluster.vocab_size)


async def test_chat_is_closed_by_the_commit(cluster: TestCluster) -> None:
    """The prompt is the template's text of the complete messages."""
    await cluster.prefill()
    handle = await cluster.open(messages=[{"role": "user", "content": "Tell me"}])
    await handle.append(text(" about tea. "))
    await handle.append(text("  Please."))
    await handle.commit(commit_of(2))
    tokens, _ = await answer_of(handle)
    complete = [{"role": "user", "content": "Tell me about tea.   Please."}]
    template = cluster.manager._template
    assert template is not None
    prompt = cluster.tokenizer.encode(template.render(complete), add_special_tokens=False)
    assert [token.token_id for token in tokens] == expected_answer(prompt, 2, cluster.vocab_size)


async def test_acknowledgements_tell_progress(cluster: TestCluster) -> None:
    """Received tokens at once, computed ones when the server reports them."""
    await cluster.prefill()
    handle = await cluster.open()
    acknowledged = await handle.append(ids(20, 21, 22))
    assert (acknowledged.client_seq, acknowledged.num_received_tokens) == (1, 3)
    async for event in handle.events():
        assert isinstance(event, Acknowledged)
        if event.num_computed_tokens == 3:
            break


async def test_what_an_update_replaced_is_not_computed(cluster: TestCluster) -> None:
    """From its acknowledgement on, also while what the server says is of the time before it."""
    prefill = await cluster.prefill()
    handle = await cluster.open(StreamMode.UPDATE)
    await handle.update(ids(20, 21, 22, 23))
    await until(lambda: handle.acknowledged().num_computed_tokens == 4)
    prefill.hold_progress = True
    assert (await handle.update(ids(20, 31, 32, 33))).num_computed_tokens == 1
    assert (await handle.update(ids(20, 31, 42, 43))).num_computed_tokens == 1

    async def computed(seq: int, num_tokens: int) -> int:
        num_invalidated = handle.acknowledged().num_invalidated_tokens + 1
        progress = s.Progress(
            stream_id=handle.stream_id,
            attempt=1,
            seq=seq,
            num_known_tokens=4,
            num_computed_tokens=num_tokens,
            num_invalidated_tokens=num_invalidated,
        )
        await prefill.send(progress)
        await until(lambda: handle.acknowledged().num_invalidated_tokens == num_invalidated)
        return handle.acknowledged().num_computed_tokens

    assert await computed(1, 4) == 1
    assert await computed(2, 4) == 2
    assert await computed(3, 3) == 3


async def test_repeated_and_foreign_numbers_are_acknowledged_and_ignored(
    cluster: TestCluster,
) -> None:
    """A repeated number changes nothing, a number behind a gap neither."""
    await cluster.prefill()
    handle = await cluster.open()
    await handle.append(ids(20), client_seq=1)
    again = await handle.append(ids(21), client_seq=1)
    foreign = await handle.append(ids(22), client_seq=7)
    assert (again.client_seq, foreign.client_seq) == (1, 1)
    assert again.num_received_tokens == foreign.num_received_tokens == 1
    assert (await handle.append(ids(23), client_seq=2)).num_received_tokens == 2


async def test_number_of_a_refused_operation_is_used_up_but_may_be_sent_again(
    cluster: TestCluster,
) -> None:
    """After a refused operation both its own and the next number are welcome."""
    await cluster.prefill()
    for next_seq in (1, 2):
        handle = await cluster.open()
        with pytest.raises(InvalidArgumentError):
            await handle.append(ids(-1), client_seq=1)
        acknowledged = await handle.append(ids(30), client_seq=next_seq)
        assert (acknowledged.client_seq, acknowledged.num_received_tokens) == (next_seq, 1)


async def test_wrong_operations_leave_the_stream_unharmed(cluster: TestCluster) -> None:
    """Each wrong operation is refused with its code, and the answer comes all the same."""
    prefill = await cluster.prefill()
    prefill.output_limit = 0
    handle = await cluster.open()
    with pytest.raises(InvalidArgumentError, match="empty"):
        await handle.commit(commit_of(1))
    await handle.append(ids(20, 21))
    with pytest.raises(FailedPreconditionError, match="append mode"):
        await handle.update(ids(22))
    with pytest.raises(InvalidArgumentError, match=f"{cluster.vocab_size}"):
        await handle.append(ids(cluster.vocab_size))
    with pytest.raises(InvalidArgumentError, match="-1 is outside"):
        await handle.commit(CommitOptions(final_segment=ids(-1)))
    with pytest.raises(InvalidArgumentError, match="surrogate"):
        await handle.append(text("\ud800"))
    await handle.commit(commit_of(2))
    with pytest.raises(FailedPreconditionError, match="committed"):
        await handle.append(ids(22))
    with pytest.raises(FailedPreconditionError, match="committed"):
        await handle.commit(commit_of(2))
    prefill.output_limit = 100
    tokens, _ = await answer_of(handle)
    expected = expected_answer([20, 21], 2, cluster.vocab_size)
    assert [token.token_id for token in tokens] == expected
    with pytest.raises(FailedPreconditionError, match="DONE"):
        await handle.append(ids(22))


async def test_prompt_that_outgrows_the_pool_is_refused_with_both_numbers(
    cluster: TestCluster,
) -> None:
    """The append that crosses the limit is refused; what was there before stays usable."""
    await cluster.prefill(pool_tokens=100)
    handle = await cluster.open()
    first = random_ids(0, 90, cluster.vocab_size)
    await handle.append(Segment(token_ids=first))
    with pytest.raises(InvalidArgumentError, match=r"100 tokens.*100") as refused:
        await handle.append(Segment(token_ids=random_ids(1, 10, cluster.vocab_size)))
    assert refused.value.details == {"num_tokens": 100, "limit_tokens": 100}
    with pytest.raises(InvalidArgumentError):
        await handle.append(text("word " * 50))
    await handle.commit(commit_of(2))
    tokens, done = await answer_of(handle)
    assert done.usage.num_prompt_tokens == 90
    expected = expected_answer(first, 2, cluster.vocab_size)
    assert [token.token_id for token in tokens] == expected


async def test_prompt_that_outgrows_the_context_is_refused(tiny_model: Path) -> None:
    """The configured context counts, one token of it is for the answer."""
    async with TestCluster(tiny_model, context_tokens=16) as cluster:
        await cluster.prefill()
        handle = await cluster.open()
        with pytest.raises(InvalidArgumentError, match=r"16 tokens.*takes 16"):
            await handle.append(Segment(token_ids=[20] * 16))
        assert (await handle.append(Segment(token_ids=[20] * 15))).num_received_tokens == 15


async def test_max_new_tokens_is_cut_to_what_fits(tiny_model: Path) -> None:
    """An answer that would leave the context ends by length where SGLang would end it."""
    async with TestCluster(tiny_model, context_tokens=16) as cluster:
        await cluster.prefill()
        handle = await cluster.open()
        await handle.append(ids(20, 21, 22, 23))
        await handle.commit(commit_of(1000))
        tokens, done = await answer_of(handle)
        assert (len(tokens), done.finish_reason) == (10, "length")


async def test_stop_string_ends_the_text_before_it(cluster: TestCluster) -> None:
    """Text up to the stop string is shown, the servers are told to stop."""
    await cluster.prefill()
    decode = await cluster.decode()
    prompt = [20, 21, 22]
    answer = expected_answer(prompt, 30, cluster.vocab_size)
    whole = cluster.tokenizer.decode(answer, skip_special_tokens=True)
    stop = next(whole[i : i + 3] for i in range(12, 30) if whole[i : i + 3].isprintable())
    handle = await cluster.open()
    await handle.append(ids(*prompt))
    await handle.commit(commit_of(1000, stop=["never there", stop]))
    tokens, done = await answer_of(handle)
    assert "".join(token.text for token in tokens) + done.text_tail == whole[: whole.index(stop)]
    assert (done.finish_reason, done.matched_stop) == ("stop", stop)
    assert done.usage.num_output_tokens == len(tokens)
    await until(lambda: decode.of_type(r.Cancel))
    await until(lambda: not decode.streams)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "hand-off not reported"])
async def test_a_server_that_is_to_keep_the_kv_is_not_cancelled(
    cluster: TestCluster, alone: bool
) -> None:
    """The answer ends at a stop string before the prefill server knows: `Forget`, behind which it
    keeps what the commit asked for."""
    prefill = await cluster.prefill()
    prefill.drop_outgoing = lambda message: isinstance(message, s.HandoffReport)
    decode = None if alone else await cluster.decode()
    prompt = [20, 21, 22]
    answer = expected_answer(prompt, 30, cluster.vocab_size)
    whole = cluster.tokenizer.decode(answer, skip_special_tokens=True)
    handle = await cluster.open()
    await handle.append(ids(*prompt))
    stop = next(whole[i : i + 3] for i in range(12, 30) if whole[i : i + 3].isprintable())
    await handle.commit(commit_of(1000, stop=[stop], keep_s=60.0))
    _, done = await answer_of(handle)
    assert done.matched_stop == stop
    await until(lambda: not prefill.streams)
    assert prefill.of_type(r.Forget)
    assert not prefill.of_type(r.Cancel)
    if decode is not None:
        await until(lambda: decode.of_type(r.Cancel))


async def test_stop_token_shows_no_text(cluster: TestCluster) -> None:
    """The token that ends the answer is an event without text, and the end names it."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    stop = Finish(reason=FinishReason.STOP, matched_token_id=77)
    decode.finish_at[3] = stop
    handle = await cluster.open()
    await handle.append(ids(20))
    await handle.commit(commit_of(100))
    tokens, done = await answer_of(handle)
    assert (tokens[-1].token_id, tokens[-1].text, len(tokens)) == (77, "", 4)
    assert (done.finish_reason, done.matched_stop) == ("stop", 77)
    prefill.finish_at[0] = stop
    handle = await cluster.open()
    await handle.append(ids(20))
    await handle.commit(commit_of(100))
    tokens, done = await answer_of(handle)
    assert (len(tokens), done.matched_stop, done.decode_server) == (1, 77, "")
    assert not done.decoded_by_prefill
    assert len(decode.of_type(r.Generate)) == 1


@pytest.fixture
def padded_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The vocabulary of many a model is larger than that of its tokenizer; here it is twice as
    large."""
    folder = tmp_path / "padded"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


async def test_a_prompt_may_end_with_ids_that_only_the_model_knows(padded_model: Path) -> None:
    """It is answered like any other."""
    prompt = [20, load_tokenizer(padded_model).vocab_size]
    async with TestCluster(padded_model) as cluster:
        server = await cluster.prefill()
        server.finish_at[0] = Finish(reason=FinishReason.STOP, matched_token_id=21)
        handle = await cluster.open()
        await handle.append(ids(*prompt))
        await handle.commit(commit_of(2))
        tokens, done = await answer_of(handle)
    assert [token.token_id for token in tokens] == [21]
    assert done.usage.num_prompt_tokens == 2


async def test_an_answer_may_have_ids_that_only_the_model_knows(padded_model: Path) -> None:
    """They are tokens without a text."""
    tokenizer = load_tokenizer(padded_model)
    async with TestCluster(padded_model) as cluster:
        await cluster.prefill()
        handle = await cluster.open()
        await handle.append(ids(20, 21))
        await handle.commit(commit_of(16))
        tokens, done = await answer_of(handle)
        assert cluster.manager.token_bytes(tokenizer.vocab_size) == b""
    known = [each.token_id for each in tokens if each.token_id < tokenizer.vocab_size]
    of_known = tokenizer.decode(known, skip_special_tokens=True)
    assert 0 < len(known) < len(tokens) == 16
    shown = "".join(each.text for each in tokens) + done.text_tail
    assert shown.strip() == of_known.strip()


async def test_an_answer_has_no_ids_that_the_model_does_not_know(cluster: TestCluster) -> None:
    """A server that sends them is broken."""
    prefill = await cluster.prefill()
    prefill.vocab_size = 10**6
    handle = await cluster.open()
    await handle.append(ids(20))
    await handle.commit(commit_of(4))
    with pytest.raises(InternalError, match="vocabulary of"):
        await answer_of(handle)


async def test_one_token_needs_no_decode_server(cluster: TestCluster) -> None:
    """With max_new_tokens = 1 the prefill server does it all, which is no fall-back."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    handle = await cluster.open()
    await handle.append(ids(20))
    await handle.commit(commit_of(1))
    tokens, done = await answer_of(handle)
    assert (len(tokens), done.finish_reason, done.handoff) == (1, "length", "none")
    assert not done.decoded_by_prefill
    assert all(isinstance(message, r.DescribeStreams) for message in decode.received)
    await until(lambda: not prefill.streams)


async def test_without_a_decode_server_the_prefill_server_answers_and_says_so(
    cluster: TestCluster,
) -> None:
    """The answer is the same, and flagged."""
    await cluster.prefill()
    assert not cluster.manager.info().decode_available
    handle = await cluster.open()
    await handle.append(ids(20, 30))
    await handle.commit(commit_of(12))
    tokens, done = await answer_of(handle)
    expected = expected_answer([20, 30], 12, cluster.vocab_size)
    assert [token.token_id for token in tokens] == expected
    assert (done.decoded_by_prefill, done.decode_server) == (True, "")


async def test_failed_handoff_is_told_to_the_decode_server(cluster: TestCluster) -> None:
    """The decode server hears that the KV does not come, and the client gets its answer."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    prefill.handoff_error = "no memory"
    decode.output_limit = 0
    handle = await cluster.open()
    await handle.append(ids(20, 30))
    await handle.commit(commit_of(5))
    await until(lambda: decode.of_type(r.Generate))
    generate = decode.of_type(r.Generate)[0]
    assert isinstance(generate, r.Generate)
    if generate.transfer_id is not None:
        await until(lambda: decode.of_type(r.HandoffFailed))
    decode.output_limit = 100
    tokens, done = await answer_of(handle)
    assert len(tokens) == 5
    assert done.handoff == "failed: no memory"


async def test_two_servers_share_the_streams(cluster: TestCluster) -> None:
    """Four streams that open at once are spread evenly, before any server reported anything."""
    first, second = await cluster.prefill(0), await cluster.prefill(1)
    await asyncio.gather(*(cluster.open() for _ in range(4)))
    await until(lambda: len(first.streams) == len(second.streams) == 2)


@pytest.mark.parametrize("committed", [False, True])
async def test_cancel_reaches_every_server_before_the_first_token(
    cluster: TestCluster, committed: bool
) -> None:
    """The stream ends as cancelled, once, and the server forgets it."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    prefill.output_limit = 0
    handle = await cluster.open()
    await handle.append(ids(20))
    if committed:
        await handle.commit(commit_of(5))
    await until(lambda: prefill.streams)
    await handle.cancel("enough")
    await handle.cancel("enough")
    await until(lambda: not prefill.streams)
    assert not decode.streams
    with pytest.raises(CancelledStreamError, match="enough"):
        await answer_of(handle)
    assert cluster.outcomes() == {"ABORTED": 1}
    cluster.assert_no_load()


async def test_cancel_reaches_both_servers_while_decoding(cluster: TestCluster) -> None:
    """Both servers are told, whichever is at work."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    decode.output_limit = 3
    prefill.drop_outgoing = lambda message: type(message).__name__ == "HandoffReport"
    handle = await cluster.open()
    await handle.append(ids(20))
    await handle.commit(commit_of(50))
    await until(lambda: handle.status().num_output_tokens == 3)
    await handle.cancel("gone")
    await until(lambda: prefill.of_type(r.Cancel) and decode.of_type(r.Cancel))
    await until(lambda: not prefill.streams and not decode.streams)


async def test_cancel_is_repeated_until_confirmed(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost cancellation is sent again; a confirmed one is not."""
    monkeypatch.setattr("router.timing.RETRANSMIT_AFTER_S", 0.05)
    prefill = await cluster.prefill()
    handle = await cluster.open()

    def num_cancels() -> int:
        return sum(isinstance(message, r.Cancel) for message in prefill.received)

    prefill.drop_incoming = lambda message: isinstance(message, r.Cancel) and num_cancels() < 2
    await until(lambda: prefill.streams)
    await handle.cancel("enough")
    await until(lambda: not prefill.streams)
    await until(lambda: not len(cluster.manager._cluster.cancels))
    # What was on its way to the server before it confirmed comes before this does.
    await cluster.open()
    await until(lambda: prefill.streams)
    confirmed = num_cancels()
    assert confirmed >= 2
    await asyncio.sleep(0.2)
    assert num_cancels() == confirmed


async def test_deadline_ends_the_stream(cluster: TestCluster) -> None:
    """The client hears DEADLINE_EXCEEDED and the server is told to stop."""
    prefill = await cluster.prefill()
    handle = await cluster.open(deadline_s=0.15)
    await handle.append(ids(20))
    with pytest.raises(DeadlineExceededError, match=r"0\.15"):
        await answer_of(handle)
    assert handle.status().state is StreamState.DEADLINE
    await until(lambda: not prefill.streams)


async def test_idle_stream_is_aborted(tiny_model: Path) -> None:
    """A stream that nobody touches ends as aborted, with the reason."""
    async with TestCluster(tiny_model, idle_stream_timeout_s=0.15) as cluster:
        await cluster.prefill()
        handle = await cluster.open()
        with pytest.raises(StreamError, match="not touched") as ended:
            await answer_of(handle)
        assert ended.value.code is ErrorCode.ABORTED
        assert cluster.outcomes() == {"ABORTED": 1}


async def test_without_a_prefill_server_opening_is_unavailable(cluster: TestCluster) -> None:
    """It is said within about a second, and readiness says so all along."""
    assert not cluster.manager.info().ready
    started_s = time.monotonic()
    with pytest.raises(UnavailableError):
        await cluster.open()
    assert time.monotonic() - started_s < 10
    change = asyncio.ensure_future(cluster.manager.wait_readiness_change())
    await cluster.prefill()
    assert await asyncio.wait_for(change, PATIENCE_S) is True


async def test_commit_without_a_prefill_server_leaves_the_stream_unharmed(
    cluster: TestCluster,
) -> None:
    """UNAVAILABLE; after a server came back the same commit works, final segment included once."""
    prefill = await cluster.prefill()
    handle = await cluster.open()
    await handle.append(ids(20))
    await cluster.kill(prefill)
    await until(lambda: not cluster.manager.info().ready)
    commit = commit_of(3, final_segment=ids(40))
    with pytest.raises(UnavailableError):
        await handle.commit(commit, client_seq=2)
    assert (await handle.append(ids(30), client_seq=2)).num_received_tokens == 2
    await cluster.prefill()
    await handle.commit(commit, client_seq=3)
    tokens, _ = await answer_of(handle)
    expected = expected_answer([20, 30, 40], 3, cluster.vocab_size)
    assert [token.token_id for token in tokens] == expected


async def test_more_streams_than_allowed_are_refused(tiny_model: Path) -> None:
    """The limit is named, and an ended stream makes room."""
    async with TestCluster(tiny_model, max_streams=2) as cluster:
        await cluster.prefill()
        first, _ = await cluster.open(), await cluster.open()
        with pytest.raises(ResourceExhaustedError, match="2"):
            await cluster.open()
        await first.cancel("room")
        await cluster.open()


async def test_unknown_stream_is_not_found(cluster: TestCluster) -> None:
    """An id that was never given out is NOT_FOUND; an ended stream keeps its state for a while."""
    await cluster.prefill()
    with pytest.raises(StreamNotFoundError, match="17"):
        cluster.manager.get(17)
    handle = await cluster.open()
    await handle.cancel("done")
    late = cluster.manager.get(handle.stream_id)
    with pytest.raises(FailedPreconditionError, match="ABORTED"):
        await late.append(ids(20))


async def test_ended_streams_are_forgotten(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while nothing is left of an ended stream."""
    monkeypatch.setattr("router.timing.FINISHED_RETENTION_S", 0.0)
    await cluster.prefill()
    handle = await cluster.open()
    await handle.cancel("done")
    await until(lambda: not cluster.manager._handles)
    with pytest.raises(StreamNotFoundError):
        cluster.manager.get(handle.stream_id)


@pytest.mark.parametrize("num_turns", range(4))
async def test_a_client_that_leaves_when_a_server_comes(
    cluster: TestCluster, num_turns: int
) -> None:
    """Its stream is not opened for nobody, whichever of the two the loop comes to first."""
    opening = asyncio.ensure_future(cluster.open())
    await asyncio.sleep(0.01)
    core = cluster.manager._cluster
    core.is_usable = lambda role: True  # type: ignore[method-assign]
    core.became_usable()
    for _ in range(num_turns):
        await asyncio.sleep(0)
    left = opening.cancel()
    await asyncio.wait({opening}, timeout=PATIENCE_S)
    assert opening.cancelled() is left


async def test_second_consumer_takes_the_events_over(cluster: TestCluster) -> None:
    """The newer call gets what comes from then on, the older one is told."""
    await cluster.prefill()
    handle = await cluster.open()

    async def read() -> None:
        async for _ in handle.events():
            pass

    first = asyncio.ensure_future(read())
    await asyncio.sleep(0)
    await handle.append(ids(20))
    await handle.commit(commit_of(3))
    tokens, _ = await answer_of(handle)
    assert len(tokens) == 3
    with pytest.raises(FailedPreconditionError, match="took over"):
        await first


async def test_lifetime_has_every_step(cluster: TestCluster) -> None:
    """From the opening to the end, each token once."""
    await cluster.prefill()
    await cluster.decode()
    handle = await cluster.open()
    await handle.append(ids(20, 21))
    await until(lambda: handle.status().acknowledged.num_computed_tokens == 2)
    await handle.commit(commit_of(4))
    _, done = await answer_of(handle)
    events = [entry.event for entry in done.lifetime.entries]
    steps = [event for event in events if event is not LifetimeEvent.HANDOFF_DONE]
    assert [str(step) for step in steps] == [
        "OPENED",
        "SEGMENT_RECEIVED",
        "SEGMENT_TOKENISED",
        "SEGMENT_SENT",
        "SEGMENT_COMPUTED",
        "COMMIT_RECEIVED",
        "COMMIT_SENT",
        "FIRST_TOKEN",
        "HANDOFF_STARTED",
        "SECOND_TOKEN",
        "TOKEN",
        "LAST_TOKEN",
        "DONE",
    ]
    assert len(token_times_s(done.lifetime.entries)) == 4


async def test_drain_waits_then_cancels(cluster: TestCluster) -> None:
    """Nothing new is taken, what does not end in time is cancelled on its server."""
    prefill = await cluster.prefill()
    handle = await cluster.open()
    await until(lambda: prefill.streams)
    draining = asyncio.ensure_future(cluster.manager.drain(0.1))
    await asyncio.sleep(0)
    assert not cluster.manager.info().ready
    with pytest.raises(UnavailableError, match="shutting down"):
        await cluster.open()
    await asyncio.wait_for(draining, PATIENCE_S)
    assert not prefill.streams
    assert handle.status().state is StreamState.ABORTED


async def test_port_in_use_stops_the_start(tiny_model: Path) -> None:
    """The error has key, value and remedy."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = RouterConfig(
            model_path=str(tiny_model), host="127.0.0.1", grpc_port=0, zmq_port=port
        )
        with pytest.raises(ConfigError, match="in use") as refused:
            await Manager(config).start()
    assert (refused.value.key, refused.value.value) == ("router.zmq_port", port)


async def test_long_text_does_not_stop_the_loop(cluster: TestCluster) -> None:
    """A text that is tokenised in a thread is applied even when its call is given up."""
    await cluster.prefill()
    handle = await cluster.open(StreamMode.UPDATE)
    long = "word " * 20_000
    with pytest.raises(InvalidArgumentError, match="takes"):
        await handle.update(text(long))
    call = asyncio.ensure_future(handle.update(text(long)))
    await asyncio.sleep(0)
    call.cancel()
    assert (await handle.update(text("short"))).num_received_tokens > 0


async def test_caches_are_flushed_where_no_stream_is(cluster: TestCluster) -> None:
    """Each server says whether it did."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    await cluster.open()
    await until(lambda: prefill.streams)
    flushed = await cluster.manager.flush_caches(PATIENCE_S)
    assert flushed == {prefill.server_id: False, decode.server_id: True}
