"""The oracle of the soak finds every fault that is planted in a made-up history, and no other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from streamfill.errors import ErrorCode
from streamfill.stream.state import StreamState
from tests.chaos.history import DoneSeen, Ending, History, PrankAnswer, Recorder, Source, Token
from tests.chaos.judge import (
    Rule,
    judge_answer,
    judge_log,
    judge_memory,
    judge_stream,
    judge_totals,
)
from tests.chaos.scripts import Fate, Form, Prank, Script, Step

ONE_SHOT = (7, 8, 9, 10, 11, 12)
"""Longer than the answer of ``SCRIPT``, as other streams with this prompt may want more."""

SCRIPT = Script(
    number=17,
    form=Form.BIDI,
    mode="append",
    fate=Fate.FINISHED,
    steps=(Step(gap_s=0.0, piece=(1, 2)),),
    final=(3,),
    before_commit=None,
    after_commit=None,
    prompt_ids=(1, 2, 3),
    max_tokens=4,
    sampling_seed=None,
    priority=0,
    deadline_s=None,
    num_before=1,
    fate_after_s=0.0,
)
DONE_SEEN = DoneSeen(finish_reason="length", num_prompt_tokens=3, num_output_tokens=4)


def tokens(*ids: int) -> tuple[Token, ...]:
    return tuple(Token(index=index, token_id=token_id) for index, token_id in enumerate(ids))


def endings(state: StreamState, *sources: Source) -> tuple[Ending, ...]:
    return tuple(Ending(source=source, state=state) for source in sources)


GOOD = History(
    was_opened=True,
    tokens=tokens(7, 8, 9, 10),
    dones=(DONE_SEEN,),
    endings=endings(StreamState.DONE, Source.DONE, Source.LOG, Source.STATUS),
)
ABORTED = History(was_opened=True, endings=endings(StreamState.ABORTED, Source.LOG, Source.STATUS))


def rules(history: History, script: Script = SCRIPT) -> set[Rule]:
    found = judge_stream(script, history)
    assert all(violation.number == script.number and violation.text for violation in found)
    return {violation.rule for violation in found}


def test_good_stream() -> None:
    """A stream that did what its script says is blameless."""
    assert not judge_stream(SCRIPT, GOOD)
    assert not judge_answer(SCRIPT, GOOD, ONE_SHOT)


def test_good_cancelled_stream() -> None:
    """So is one that was cancelled, and one that was done before it was."""
    cancelled = replace(SCRIPT, fate=Fate.CANCELLED_COMMITTED)
    assert not judge_stream(cancelled, ABORTED)
    assert not judge_stream(cancelled, GOOD)
    assert not judge_stream(replace(SCRIPT, fate=Fate.DISCONNECTED), History(was_opened=False))


def test_lost_token() -> None:
    """A token in the middle that never came is missed."""
    lost = replace(GOOD, tokens=(*tokens(7, 8), Token(index=3, token_id=10)))
    assert rules(lost) == {Rule.TOKENS}
    assert "missing [2]" in judge_stream(SCRIPT, lost)[0].text


def test_lost_last_token() -> None:
    """Also when it is the last one, whatever the router counts."""
    lost = replace(GOOD, tokens=tokens(7, 8, 9))
    assert rules(lost) == {Rule.TOKENS}
    counted = replace(DONE_SEEN, num_output_tokens=3)
    assert rules(replace(lost, dones=(counted,))) == {Rule.TOKENS}


def test_duplicate_token() -> None:
    """A token that comes twice is found, also in an answer that nobody finished."""
    twice = (*tokens(7, 8), Token(index=1, token_id=8), Token(index=2, token_id=9))
    assert rules(replace(GOOD, tokens=twice)) == {Rule.TOKENS}
    cancelled = replace(SCRIPT, fate=Fate.CANCELLED_ANSWERING)
    assert rules(replace(ABORTED, tokens=twice), cancelled) == {Rule.TOKENS}


def test_tokens_out_of_order() -> None:
    """The right tokens in the wrong order are wrong."""
    first, second, *rest = GOOD.tokens
    assert rules(replace(GOOD, tokens=(second, first, *rest))) == {Rule.TOKENS}


@pytest.mark.parametrize(
    "faulty",
    [
        pytest.param(
            (*GOOD.endings, Ending(source=Source.STATUS, state=StreamState.ABORTED)),
            id="two states",
        ),
        pytest.param(
            endings(StreamState.DONE, Source.DONE, Source.LOG, Source.LOG), id="logged twice"
        ),
        pytest.param(endings(StreamState.DONE, Source.DONE, Source.STATUS), id="not in the log"),
        pytest.param((), id="none"),
    ],
)
def test_not_one_ending(faulty: tuple[Ending, ...]) -> None:
    """A stream that ended twice, in two ways, or never is found."""
    assert rules(replace(GOOD, endings=faulty)) == {Rule.ONE_ENDING}


@pytest.mark.parametrize("state", [s for s in StreamState if s.is_terminal])
@pytest.mark.parametrize("fate", list(Fate))
def test_outcomes(fate: Fate, state: StreamState) -> None:
    """Each fate permits its own endings only; none permits REJECTED or FAILED."""
    script = replace(SCRIPT, fate=fate)
    history = History(was_opened=True, endings=endings(state, Source.LOG))
    is_allowed = Rule.OUTCOME not in rules(history, replace(script))
    if fate is Fate.FINISHED:
        assert not is_allowed, "no Done was seen"
        return
    assert is_allowed == (state in script.allowed)
    assert not script.allowed & {StreamState.REJECTED, StreamState.FAILED}


def test_done_is_seen_once() -> None:
    """A stream that nobody cancelled tells its client once that it is done."""
    assert Rule.OUTCOME in rules(replace(GOOD, dones=()))
    assert Rule.OUTCOME in rules(replace(GOOD, dones=(DONE_SEEN, DONE_SEEN)))
    assert not rules(replace(GOOD, dones=(), lost_status=True)), "gRPC lost it"


@pytest.mark.parametrize(
    "done",
    [
        replace(DONE_SEEN, finish_reason="abort"),
        replace(DONE_SEEN, num_prompt_tokens=4),
    ],
)
def test_wrong_counts(done: DoneSeen) -> None:
    """An answer to another prompt, or one that a server gave up, is found."""
    assert rules(replace(GOOD, dones=(done,))) == {Rule.USAGE}


def test_wrong_answer() -> None:
    """One token that differs from one shot is found, also before a cancellation."""
    wrong = replace(GOOD, tokens=tokens(7, 8, 99, 10))
    assert {v.rule for v in judge_answer(SCRIPT, wrong, ONE_SHOT)} == {Rule.ANSWER}
    beginning = replace(ABORTED, tokens=tokens(7, 99))
    assert judge_answer(SCRIPT, beginning, ONE_SHOT)
    assert not judge_answer(SCRIPT, replace(ABORTED, tokens=tokens(7, 8)), ONE_SHOT)


def test_too_short_one_shot() -> None:
    """Nothing is compared with less than it needs."""
    assert judge_answer(SCRIPT, GOOD, ONE_SHOT[:3])


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (PrankAnswer(prank=Prank.TOO_LONG, code=ErrorCode.INVALID_ARGUMENT), True),
        (PrankAnswer(prank=Prank.TOO_LONG, code=ErrorCode.INTERNAL), False),
        (PrankAnswer(prank=Prank.OTHER_MODE, code=None), False),
        (
            PrankAnswer(prank=Prank.RESENT, code=None, num_tokens_before=5, num_tokens_after=5),
            True,
        ),
        (
            PrankAnswer(prank=Prank.RESENT, code=None, num_tokens_before=5, num_tokens_after=9),
            False,
        ),
        (PrankAnswer(prank=Prank.GAP, code=ErrorCode.INVALID_ARGUMENT), False),
    ],
)
def test_pranks(answer: PrankAnswer, is_right: bool) -> None:
    """Wrong operations must be refused in their own way, repeated ones change nothing."""
    assert rules(replace(GOOD, pranks=(answer,))) == (set() if is_right else {Rule.REFUSAL})


def test_no_reply() -> None:
    """What the actor could not explain is a fault."""
    recorder = Recorder()
    recorder.trouble("not over after 240 s")
    history = recorder.history(was_opened=True)
    assert rules(replace(GOOD, troubles=history.troubles)) == {Rule.PROMPTNESS}


def test_a_cut_connection_says_nothing() -> None:
    """What the calls of a client say that cut its own connection is no word of the router."""
    recorder = Recorder(is_gone=True)
    recorder.trouble("the call failed")
    recorder.ended(Source.ERROR, StreamState.ABORTED)
    recorder.ended(Source.LOG, StreamState.DONE)
    assert recorder.history(was_opened=True).state is StreamState.DONE
    assert not recorder.troubles
    assert len(recorder.notes) == 3


def test_totals() -> None:
    """A stream that the router counts wrongly, twice or not at all is found."""
    ends = Counter({"DONE": 5, "ABORTED": 2})
    assert not judge_totals(ends, 7, {"DONE": 5, "ABORTED": 2, "FAILED": 0})
    assert judge_totals(ends, 7, {"DONE": 6, "ABORTED": 1})
    assert judge_totals(ends, 7, {"DONE": 5, "ABORTED": 2, "FAILED": 1})
    assert judge_totals(ends, 8, {"DONE": 5, "ABORTED": 2}), "one never ended"


def test_log() -> None:
    """A stream that stands in the log with two endings, or none, is found by its name."""
    assert not judge_log(Counter(["a", "b"]), Counter(["a", "b"]))
    assert "b: opened 1 times, ended 2" in judge_log(Counter("ab"), Counter("abb"))[0].text
    assert judge_log(Counter("ab"), Counter("a"))
    assert judge_log(Counter("a"), Counter("ab"))


def test_memory() -> None:
    """Growth above the factor is found."""
    assert not judge_memory(100.0, 150.0, 1.5)
    assert judge_memory(100.0, 151.0, 1.5)
