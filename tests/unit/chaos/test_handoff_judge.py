"""The oracle of the hand-off run finds what is planted in made-up streams, and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from streamfill.api.types import Metadata, Result, Timing, Usage
from streamfill.models.tiny import make_tiny_model
from streamfill.stream.state import StreamState
from streamfill.stream.tokenizer import load_tokenizer
from tests.chaos.handoff_faults import parse
from tests.chaos.handoff_judge import (
    Recovery,
    judge_disturbance,
    judge_endings,
    judge_played,
    recovery,
    silences_s,
)
from tests.chaos.handoff_kills import Kill
from tests.chaos.handoff_run import HandoffReport, Undisturbed, count_faults
from tests.chaos.handoff_streams import PlayedStream, plan_streams
from tests.chaos.judge import Rule

RESULT = Result(
    text="abc",
    text_tail="",
    tokens=(),
    finish_reason="length",
    matched_stop=None,
    usage=Usage(
        num_prompt_tokens=3, num_output_tokens=3, num_cached_tokens=0, num_invalidated_tokens=0
    ),
    metadata=Metadata(
        stream_id=1,
        prefill_server="prefill-1",
        decode_server="decode-1",
        decoded_by_prefill=False,
        handoff="done",
        num_attempts=1,
    ),
    timing=Timing(
        ttft_s=0.1, ttft_from_last_segment_s=0.1, total_s=0.3, token_times_s=(), lifetime=()
    ),
)
KILL = Kill(server_id="decode-0", at_s=100.0, num_streams=2)


def played(
    number: int = 0, *, begins_s: float = 0.0, result: Result | None = RESULT
) -> PlayedStream:
    """Three tokens, a second each."""
    return PlayedStream(
        number=number,
        began_s=begins_s,
        committed_s=begins_s,
        ended_s=begins_s + 3,
        indices=[0, 1, 2],
        token_ids=[7, 8, 9],
        token_times_s=[begins_s + 1, begins_s + 2, begins_s + 3],
        result=result,
    )


def rules(*streams: PlayedStream) -> list[Rule]:
    """What the oracle says of streams that ought to be like ``played()``."""
    wanted = [played(each.number) for each in streams]
    return [violation.rule for violation in judge_played(wanted, streams)]


def test_a_good_run_is_good() -> None:
    assert rules(played(0), played(1)) == []
    endings = {"x0": [StreamState.DONE], "x1": [StreamState.DONE]}
    assert judge_endings([played(0), played(1)], "x", endings) == []


def test_answers_that_differ() -> None:
    """In a token, in their number, in the text, or already before an error."""
    other = played()
    other.token_ids = [7, 8, 1]
    assert rules(other) == [Rule.ANSWER]
    short = played()
    short.token_ids, short.indices = [7, 8], [0, 1]
    assert rules(short) == [Rule.ANSWER]
    assert rules(played(result=replace(RESULT, text="abd"))) == [Rule.ANSWER]
    failed = played(result=None)
    failed.errors, failed.token_ids, failed.indices = ["UNAVAILABLE"], [7, 1], [0, 1]
    assert rules(failed) == [Rule.OUTCOME, Rule.ANSWER]


def test_tokens_that_are_missing_or_come_twice() -> None:
    for indices in ([0, 2, 3], [0, 1, 1], [1, 2, 3]):
        stream = played()
        stream.indices = indices
        assert rules(stream) == [Rule.TOKENS]


def test_endings_that_are_none_or_two() -> None:
    """By the client's account, and by the router's."""
    both, none = played(), played(result=None)
    both.errors = ["UNAVAILABLE"]
    assert rules(both) == [Rule.ONE_ENDING]
    assert rules(none) == [Rule.ONE_ENDING, Rule.OUTCOME]
    for states in ([], [StreamState.DONE] * 2, [StreamState.FAILED]):
        (violation,) = judge_endings([played(5)], "x", {"x5": states})
        assert violation.rule is Rule.ONE_ENDING
        assert violation.number == 5


def test_recovery_is_of_answers_begun_after_the_kill() -> None:
    """One begun before it may have been all but over; one that failed is none."""
    restarted = replace(RESULT, metadata=replace(RESULT.metadata, decode_server="decode-0"))
    alone = replace(RESULT, metadata=replace(RESULT.metadata, decode_server=""))
    streams = [
        played(begins_s=99.0, result=restarted),
        played(begins_s=101.0, result=alone),
        played(begins_s=101.0, result=None),
        played(begins_s=104.0),
        played(begins_s=112.0, result=restarted),
    ]
    found = recovery(KILL, streams)
    assert (found.role_s, found.server_s) == (7.0, 15.0)
    found = recovery(KILL, streams[:3])
    assert (found.role_s, found.server_s) == (None, None)


def test_silences_are_of_streams_that_were_tried_again() -> None:
    retried = replace(RESULT, metadata=replace(RESULT.metadata, num_attempts=2))
    waiting = played(begins_s=99.5, result=retried)
    waiting.token_times_s[:] = [99.9, 104.5, 105.0]
    waiting.ended_s = 105.0
    streams = [waiting, played(begins_s=99.5), played(begins_s=101, result=retried)]
    assert silences_s([KILL], streams) == [4.5]
    assert waiting.longest_wait_s == pytest.approx(4.6)


def test_too_little_disturbance_and_too_slow_a_recovery() -> None:
    good = recovery(KILL, [played(begins_s=101.0)])
    good = replace(good, server_s=12.0)

    def judged(*recoveries: Recovery, num_faults: int = 80, silence_s: float = 1.0) -> list[Rule]:
        found = judge_disturbance(
            recoveries,
            [silence_s],
            Counter({"damaged": num_faults}),
            fewest_faults=80,
            num_kills=1,
        )
        return [violation.rule for violation in found]

    assert judged(good) == []
    assert judged(good, num_faults=79) == [Rule.FAULTS]
    assert judged(good, good) == [Rule.FAULTS]
    assert judged(good, silence_s=10.1) == [Rule.RECOVERY]
    assert judged(replace(good, role_s=10.1)) == [Rule.RECOVERY]
    assert judged(replace(good, role_s=None, server_s=None)) == [Rule.RECOVERY] * 2


def test_faults_are_counted_over_all_lives_of_a_server(tmp_path: Path) -> None:
    """Each transfer once, by kind."""
    line = "2026-11-21T05:00:00.123Z WARNING decode-0 kv_fault_injected kind={} transfer_id={}\n"
    earlier = line.format("damaged", 5) + line.format("accept_lost", 10)
    (tmp_path / "decode-0.1.log").write_text(earlier)
    (tmp_path / "decode-0.log").write_text("READY {}\n" + line.format("damaged", 5) * 2)
    (tmp_path / "prefill-0.log").write_text(line.format("damaged", 15))
    assert count_faults(tmp_path) == {"damaged": 2, "accept_lost": 1}


def test_streams_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    """All modes and both ways of sampling are among them."""
    tokenizer = load_tokenizer(make_tiny_model(tmp_path / "tiny"))
    streams = plan_streams(tokenizer, 3, 60)
    assert streams == plan_streams(tokenizer, 3, 60)
    assert streams != plan_streams(tokenizer, 4, 60)
    assert streams[:20] == plan_streams(tokenizer, 3, 20)
    kinds = {(each.story.mode, each.is_one_shot) for each in streams}
    assert kinds == {("append", False), ("update", False), ("append", True)}
    assert 10 <= sum("seed" in each.sampling for each in streams) <= 30


def test_the_report_of_a_run() -> None:
    """Its line is plain data."""
    options, keeps_logs = parse(["--seed", "4", "--kills", "decode-0", "--streams", "100"])
    assert not keeps_logs
    assert (options.fewest_faults, options.most_streams, options.kills) == (16, 130, ("decode-0",))
    streams = [played(0), played(1)]
    report = HandoffReport(
        options=options,
        undisturbed=Undisturbed(played=streams, wall_s=2.0),
        played=streams,
        violations=[],
        recoveries=[recovery(KILL, [played(begins_s=104.0)])],
        silences=[],
        faults=Counter({"damaged": 20}),
        disturbed_s=9.0,
    )
    facts = report.facts
    assert facts["ok"] is True
    assert facts["num_done"] == 2
    assert facts["handoffs"] == {"done": 2}
    assert facts["longest_wait_s"] == 1.0
    assert facts["kills"] == [
        {"server": "decode-0", "num_streams": 2, "role_s": 7.0, "server_s": None}
    ]


@pytest.mark.parametrize(
    "arguments",
    [["--kills", "router"], ["--kills", "decode-0,decode-0"], ["--every", "2"], ["--rate", "0"]],
)
def test_wrong_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert arguments[0] in capsys.readouterr().err
