"""What a stream logs, put together again: the same stream, wherever the log ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.events import EventQueue
from router.interface import (
    Acknowledged,
    CommitOptions,
    DoneEvent,
    OpenOptions,
    Segment,
    TokenEvent,
    Usage,
)
from router.prompt import Prompt, PromptLimits
from router.recovery import journal as journal_module
from router.recovery import records as rec
from router.recovery.journal import Journal
from router.recovery.log_file import Row
from router.recovery.replay import LoggedStream, replay
from router.recovery.translate import done_of
from streamfill.errors import FailedPreconditionError, InvalidArgumentError, StreamError
from streamfill.messages.common import Sampling, StreamMode, TokenLogprob
from streamfill.observability.lifetime import Lifetime, LifetimeEvent
from streamfill.stream.chat import ChatTemplate
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from tests.unit.router.recovery.log_in_memory import LogInMemory

LIMITS = PromptLimits(vocab_size=1000, context_tokens=100_000, pool_tokens=None)
STREAM_ID = 7
PATIENCE_S = 60.0
SLOW_IS_WELL = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

TEXTS = st.text(alphabet="ab \n1é日\U0001f600<|im_end|>", max_size=12)
SEGMENTS = st.one_of(
    TEXTS.map(lambda value: Segment(text=value)),
    st.lists(st.integers(0, 300), max_size=6).map(lambda value: Segment(token_ids=value)),
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}),
        min_size=1,
        max_size=3,
    ).map(lambda value: Segment(messages=value)),
)


class Model:
    """Tokenizer and template of a tiny model."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: TextTokenizer = load_tokenizer(folder)
        self.template = ChatTemplate.load(folder)

    def prompt(self) -> Prompt:
        return Prompt(self.tokenizer, self.template)

    def restored(self, found: LoggedStream) -> Prompt:
        prompt = self.prompt()
        prompt.restore(found.prompt.ids[:], found.prompt.state)
        return prompt


@pytest.fixture(scope="module", params=["tiny_model", "tiny_sentencepiece_model"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.getfixturevalue(request.param))


def only(rows: Sequence[Any]) -> LoggedStream:
    found = replay(rows)
    assert not found.bad_rows
    (stream,) = found.streams.values()
    return stream


def apply(prompt: Prompt, mode: StreamMode, segment: Segment) -> list[Any] | None:
    """What was logged of the prompt; None: the segment was refused."""
    try:
        return prompt.record(prompt.draft(mode, segment, LIMITS))
    except StreamError:
        return None


@pytest.mark.parametrize("mode", list(StreamMode))
@pytest.mark.parametrize("is_rewritten", [False, True])
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW_IS_WELL)
@given(before=st.lists(SEGMENTS, max_size=8), behind=st.lists(SEGMENTS, max_size=4))
def test_a_crash_between_any_two_records(
    model: Model,
    mode: StreamMode,
    is_rewritten: bool,
    before: list[Segment],
    behind: list[Segment],
) -> None:
    """A prompt that is made of any beginning of the log has the ids and the number of that moment,
    and goes on as the original would have."""
    with pytest.MonkeyPatch.context() as patched:
        if is_rewritten:
            patched.setattr(journal_module, "REWRITE_BYTES", 200)
            patched.setattr(journal_module, "REWRITE_RATIO", 0)
        log, prompt = LogInMemory(), model.prompt()
        journal = Journal(log, STREAM_ID, EventQueue())
        journal.opened(OpenOptions(mode=mode), 1.0, prompt, [])
        moments = [(list(log.rows), 0, 0)]
        for number, segment in enumerate(before, 1):
            logged = apply(prompt, mode, segment)
            if logged is None:
                journal.refused(number, InvalidArgumentError("no"))
            else:
                journal.changed(number, prompt, logged)
            moments.append((list(log.rows), number, int(logged is None)))
        # Again from the start, stopping at each moment.
        for rows, number, _ in moments:
            found = only(rows)
            original = model.prompt()
            applied = 0
            for seq, segment in enumerate(before[:number], 1):
                if apply(original, mode, segment) is not None:
                    applied = seq
            assert found.client_seq == applied
            assert found.newest_seq == number
            again = model.restored(found)
            assert list(again.log.ids) == list(original.log.ids)
            assert again.text_state() == original.text_state()
            for segment in behind:
                done = apply(original, mode, segment) is None
                assert (apply(again, mode, segment) is None) == done
                assert list(again.log.ids) == list(original.log.ids)
            endings = [_commit(each, mode) for each in (original, again)]
            assert endings[0] == endings[1]


def _commit(prompt: Prompt, mode: StreamMode) -> list[int] | str:
    try:
        prompt.record(prompt.draft_commit(mode, Segment(text="?"), LIMITS))
    except StreamError as error:
        return str(error)
    return list(prompt.log.ids)


def token(index: int, logprob: TokenLogprob | None = None) -> TokenEvent:
    return TokenEvent(index=index, token_id=100 + index, text="t", logprob=logprob)


def done(matched_stop: str | int | None = None) -> DoneEvent:
    lifetime = Lifetime()
    lifetime.record(LifetimeEvent.OPENED, at_s=1.0)
    lifetime.record(LifetimeEvent.DONE, at_s=3.0)
    return DoneEvent(
        finish_reason="stop",
        text_tail="é",
        matched_stop=matched_stop,
        usage=Usage(
            num_prompt_tokens=1, num_output_tokens=2, num_cached_tokens=3, num_invalidated_tokens=4
        ),
        prefill_server="prefill-0",
        decode_server="decode-0",
        decoded_by_prefill=False,
        handoff="done",
        num_attempts=2,
        lifetime=lifetime,
        handoff_bytes=5,
        handoff_s=0.5,
        kv_codec="float16",
    )


def answered(log: LogInMemory, model: Model, events: EventQueue) -> Journal:
    """A committed stream's journal."""
    prompt = model.prompt()
    journal = Journal(log, STREAM_ID, events)
    journal.opened(OpenOptions(), 1.0, prompt, [])
    logged = prompt.record(prompt.draft_commit(StreamMode.APPEND, Segment(text="Hi"), LIMITS))
    options = CommitOptions(stop=["END"], keep_s=4.0, skip_special_tokens=False)
    journal.committed(1, prompt, logged, Sampling(max_new_tokens=9, seed=3), options)
    return journal


async def events_of(queue: EventQueue, number: int) -> list[Any]:
    found: list[Any] = []
    async for event in queue.events():
        found.append(event)
        if len(found) == number:
            break
    return found


async def test_the_whole_of_an_answer(model: Model) -> None:
    """Commit, tokens with log probabilities, and the end are as they were."""
    log = LogInMemory()
    journal = answered(log, model, EventQueue())
    logprob = TokenLogprob(token_id=101, logprob=-0.5, top=((1, -0.5), (2, -1.5)))
    journal.token(token(0))
    journal.flush()
    journal.token(token(1, logprob))
    journal.flush()
    journal.token(token(2))
    end = done(matched_stop=102)
    journal.ended("DONE", end)
    found = only(log.rows)
    assert found.committed is not None
    assert found.committed.sampling == Sampling(max_new_tokens=9, seed=3)
    assert (found.committed.stop, found.committed.keep_s) == (("END",), 4.0)
    assert not found.committed.skip_special_tokens
    assert [each.token_id for each in found.tokens] == [100, 101, 102]
    assert [each.logprob for each in found.tokens] == [None, logprob, None]
    assert [each.is_silent for each in found.tokens] == [False, False, True]
    assert found.ended is not None
    assert found.ended.finished is not None
    again = done_of(found.ended.finished)
    assert again.lifetime.entries == end.lifetime.entries
    assert again.usage == end.usage
    for name in ("finish_reason", "text_tail", "matched_stop", "handoff_bytes", "kv_codec"):
        assert getattr(again, name) == getattr(end, name)


async def test_nothing_is_told_before_it_is_durable(model: Model) -> None:
    """Neither a token nor an end, nor the number of an operation."""
    log, queue = LogInMemory(is_quick=False), EventQueue()
    journal = answered(log, model, queue)
    assert journal.durable_seq == 0
    waiting = asyncio.create_task(journal.durable())
    await asyncio.sleep(0)
    assert not waiting.done()
    journal.token(token(0))
    journal.flush()
    said: list[str] = []
    journal.ended("DONE", done(), lambda: said.append("ended"))
    reading = asyncio.create_task(events_of(queue, 2))
    await asyncio.sleep(0.01)
    assert not reading.done()
    assert not said
    assert queue.end is None
    log.make_durable()
    await asyncio.wait_for(waiting, PATIENCE_S)
    assert said == ["ended"]
    assert journal.durable_seq == 1
    first, second = await asyncio.wait_for(reading, PATIENCE_S)
    assert (first, second.finish_reason) == (token(0), "stop")


async def test_records_that_do_not_fit_cost_their_stream_only(model: Model) -> None:
    """A missing record in the middle, garbage, and records behind an end."""
    logs = {}
    for name in ("missing", "garbage", "whole"):
        log = LogInMemory()
        journal = answered(log, model, EventQueue())
        journal.token(token(0))
        journal.flush()
        journal.token(token(1))
        journal.flush()
        logs[name] = log.rows
    del logs["missing"][2]
    logs["garbage"][1] = logs["garbage"][1]._replace(body=b"\xc1")
    rows = [
        row._replace(stream_id=number, row_id=100 * number + row.row_id)
        for number, each in enumerate(logs.values())
        for row in each
    ]
    found = replay(rows)
    assert set(found.streams) == {2}
    assert found.lost_streams == {0, 1}
    assert sorted(found.bad_rows) == [row.row_id for row in rows if row.stream_id != 2]


@pytest.mark.parametrize("message", [b"\xc1", b"", b"\x01", b"\xa1\xff", b"\x92" * 2000])
def test_a_message_that_is_none_costs_its_stream_only(message: bytes) -> None:
    """The record around it can be read."""
    bad = rec.Change(
        keep_tokens=0, is_chat=True, chat=rec.ChatChange(keep_messages=0, new=(message,))
    )
    rows = [
        Row(n, n, rec.encode_record(rec.Opened(mode=StreamMode.APPEND, opened_s=0.0, change=each)))
        for n, each in enumerate((bad, None), 1)
    ]
    found = replay(rows)
    assert set(found.streams) == {2}
    assert (found.lost_streams, found.bad_rows) == ({1}, [1])


async def test_tokens_are_given_again_from_any_index() -> None:
    """As long as the queue keeps them; then it says which are left."""
    queue = EventQueue()
    queue.keeps_tokens = True
    for index in range(4):
        queue.put_token(token(index))
    assert await events_of(queue, 4) == [token(index) for index in range(4)]
    queue.rewind(2)
    far = Acknowledged(
        client_seq=1, num_received_tokens=0, num_computed_tokens=0, num_invalidated_tokens=0
    )
    queue.put_acknowledged(lambda: far)
    assert (await events_of(queue, 3))[1:] == [token(2), token(3)]
    queue.keeps_tokens = False
    queue.put_token(token(4))
    assert await events_of(queue, 1) == [token(4)]
    with pytest.raises(StreamError, match="first one that is has the index 5"):
        queue.rewind(2)


def test_an_operation_that_was_applied_at_last_was_not_refused(model: Model) -> None:
    """A refused one may be sent again under its number; here and in the next process."""
    log, prompt = LogInMemory(), model.prompt()
    journal = Journal(log, STREAM_ID, EventQueue())
    journal.opened(OpenOptions(), 1.0, prompt, [])
    for seq in (1, 2, 3):
        journal.refused(seq, InvalidArgumentError("no"))
    logged = apply(prompt, StreamMode.APPEND, Segment(text="a"))
    assert logged is not None
    journal.changed(1, prompt, logged)
    logged = prompt.record(prompt.draft_commit(StreamMode.APPEND, None, LIMITS))
    journal.committed(3, prompt, logged, Sampling(), CommitOptions())
    assert [seq for seq, _ in journal.refusals_from(1)] == [2]
    found = only(log.rows)
    assert [each.seq for each in found.refused] == [2]


async def test_a_call_that_is_taken_over_takes_no_token_of_the_new_one() -> None:
    """From the moment at which another one said where it goes on, before it reads."""
    queue = EventQueue()
    queue.keeps_tokens = True
    old = queue.events()
    for index in range(3):
        queue.put_token(token(index))
        assert await anext(old) == token(index)
    waiting = asyncio.ensure_future(anext(old))
    await asyncio.sleep(0)
    queue.rewind(1)
    queue.put_token(token(3))
    with pytest.raises(FailedPreconditionError, match="took over"):
        await asyncio.wait_for(waiting, PATIENCE_S)
    assert await events_of(queue, 3) == [token(1), token(2), token(3)]


def test_a_log_of_updates_stays_small(model: Model) -> None:
    """A context that is replaced a hundred times is rewritten, not piled up."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal_module, "REWRITE_BYTES", 1000)
        log, prompt = LogInMemory(), model.prompt()
        journal = Journal(log, STREAM_ID, EventQueue())
        journal.opened(OpenOptions(mode=StreamMode.UPDATE), 1.0, prompt, [])
        largest = 0
        for number in range(1, 101):
            segment = Segment(text=f"{number} " * 50)
            logged = apply(prompt, StreamMode.UPDATE, segment)
            assert logged is not None
            journal.changed(number, prompt, logged)
            largest = max(largest, sum(len(row.body) for row in log.rows))
        state_bytes = 4 * prompt.log.num_tokens + 200
        assert largest < 8 * state_bytes
        assert list(only(log.rows).prompt.ids) == list(prompt.log.ids)
