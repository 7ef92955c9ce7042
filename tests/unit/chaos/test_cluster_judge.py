"""The oracle of the chaos runs finds what is planted in a made-up history, and nothing else."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest

from streamfill.errors import ErrorCode
from streamfill.stream.state import StreamState
from tests.chaos.cluster_evidence import Evidence
from tests.chaos.cluster_history import Acknowledgement, Answered, Failure, StreamHistory
from tests.chaos.cluster_inflict import Inflicted
from tests.chaos.cluster_judge import (
    Promise,
    Service,
    judge_answer,
    judge_faults,
    judge_log,
    judge_restarts,
    judge_service,
    judge_stream,
    service_after,
)
from tests.chaos.cluster_plan import ChaosPlan, FaultKind, PlannedFault
from tests.chaos.cluster_probe import Probe
from tests.chaos.cluster_rest import SPARE, Use, too_much
from tests.chaos.cluster_streams import Fate, Form, PlannedStream
from tests.chaos.judge import Rule

PLANNED = PlannedStream(
    number=7,
    form=Form.BIDI,
    mode="append",
    fate=Fate.FINISHED,
    segments=("[7/0] a", "[7/1] b", "[7/2] c"),
    gaps_s=(0.0, 0.0, 0.0),
    commit_brings_last=True,
    max_tokens=3,
    sampling_seed=None,
    fate_after=1,
    num_received=(4, 8, 12),
    prompt_ids=tuple(range(12)),
)
ANSWERED = Answered(
    finish_reason="length",
    num_prompt_tokens=12,
    num_output_tokens=3,
    num_attempts=1,
    handoff="done",
    prefill_server="prefill-0",
    decode_server="decode-0",
)
PROMISE = Promise(keeps_streams=True)
LOST = Failure(code=ErrorCode.UNAVAILABLE, text="UNAVAILABLE: gone")
KILL = Inflicted(
    fault=PlannedFault(kind=FaultKind.KILL, at_s=1.0, target="prefill-0"),
    began_s=100.0,
    ended_s=100.1,
    is_real=True,
)


def history(**changes: Any) -> StreamHistory:
    """A good one, with changes."""
    values: dict[str, Any] = {
        "number": 7,
        "began_s": 95.0,
        "ended_s": 110.0,
        "acknowledged": [Acknowledgement(place=n, num_received=4 * n + 4) for n in range(2)],
        "indices": [0, 1, 2],
        "token_ids": [5, 6, 7],
        "answered": ANSWERED,
        "request_ids": ["chaos-7.0"],
    }
    return StreamHistory(**{**values, **changes})


def rules(seen: StreamHistory, promise: Promise = PROMISE) -> list[Rule]:
    """What is found wrong."""
    return [violation.rule for violation in judge_stream(PLANNED, seen, promise)]


def evidence(**changes: Any) -> Evidence:
    """Of the log of the good history, with changes."""
    values: dict[str, Any] = {
        "openings": Counter({"chaos-7.0": 1}),
        "endings": defaultdict(list, {"chaos-7.0": [StreamState.DONE]}),
    }
    return Evidence(**{**values, **changes})


def test_a_good_run_is_good() -> None:
    """Nothing is found where nothing is wrong."""
    assert rules(history()) == []
    assert judge_answer(PLANNED, history(), [5, 6, 7, 8]) == []
    assert judge_log([history()], evidence(), PROMISE) == []
    assert rules(history(answered=None, left=True, indices=[0], token_ids=[5])) == []


def test_a_stream_that_does_not_end_is_found() -> None:
    """Rule 1."""
    assert rules(history(ended_s=None, answered=None)) == [Rule.PROMPTNESS]


@pytest.mark.parametrize(
    "changes", [{"answered": None}, {"failure": LOST}, {"left": True}], ids=["none", "both", "left"]
)
def test_an_end_in_no_way_or_in_two_is_found(changes: dict[str, Any]) -> None:
    """Exactly one of an answer, an error, and leaving."""
    assert Rule.ONE_ENDING in rules(history(**changes))


@pytest.mark.parametrize("code", [ErrorCode.INTERNAL, ErrorCode.UNKNOWN, ErrorCode.DATA_LOSS])
def test_an_error_that_is_not_clean_is_found(code: ErrorCode) -> None:
    """Also where a lost stream would be excused."""
    failure = Failure(code=code, text=f"{code}: what")
    promise = Promise(keeps_streams=False, router_deaths_s=[100.0])
    assert rules(history(answered=None, failure=failure), promise) == [Rule.OUTCOME]


def test_a_lost_stream_is_excused_only_by_the_death_of_a_router_without_a_log() -> None:
    """And only when it was alive then, and its client heard of it soon."""
    lost = history(answered=None, failure=LOST)
    dead = Promise(keeps_streams=False, router_deaths_s=[100.0])
    assert rules(lost, dead) == []
    assert rules(lost, Promise(keeps_streams=True, router_deaths_s=[100.0])) == [Rule.OUTCOME]
    assert rules(lost, Promise(keeps_streams=False)) == [Rule.OUTCOME]
    for death_s in (94.0, 111.0):
        early_or_late = Promise(keeps_streams=False, router_deaths_s=[death_s])
        assert rules(lost, early_or_late) == [Rule.OUTCOME]
    assert rules(replace(lost, ended_s=130.0), dead) == [Rule.OUTCOME]
    other = Failure(code=ErrorCode.RESOURCE_EXHAUSTED, text="full")
    assert rules(replace(lost, failure=other), dead) == [Rule.OUTCOME]


def test_a_router_with_a_log_may_lose_one_shots_when_it_dies() -> None:
    """They are not in its log; without its death none is lost."""
    lost = history(answered=None, failure=LOST, acknowledged=[])
    one_shot = replace(PLANNED, form=Form.ONE_SHOT)
    died = Promise(keeps_streams=True, router_deaths_s=[100.0])
    assert judge_stream(one_shot, lost, died) == []
    assert judge_stream(one_shot, lost, PROMISE)


@pytest.mark.parametrize(
    "acknowledged",
    [
        [(0, 4), (1, 4)],
        [(0, 4), (1, 12)],
        [(0, 8), (1, 8)],
        [(0, 4), (0, 4)],
        [(1, 8), (0, 4)],
        [(1, 8)],
    ],
    ids=["lost", "doubled", "another's", "twice", "out of order", "missing"],
)
def test_segments_that_do_not_count_once_are_found(acknowledged: list[tuple[int, int]]) -> None:
    """By what the router said it has after each."""
    seen = [Acknowledgement(place=place, num_received=num) for place, num in acknowledged]
    assert Rule.SEGMENTS in rules(history(acknowledged=seen))


def test_a_prompt_of_another_length_is_found() -> None:
    """As the end of the answer counts it."""
    short = replace(ANSWERED, num_prompt_tokens=8)
    assert rules(history(answered=short)) == [Rule.SEGMENTS]


@pytest.mark.parametrize("indices", [[0, 1, 1], [0, 2, 3], [1, 0, 2], [1, 2, 3]])
def test_tokens_that_are_missing_or_doubled_are_found(indices: list[int]) -> None:
    """By their numbers."""
    assert rules(history(indices=indices)) == [Rule.TOKENS]


def test_an_answer_of_another_length_is_found() -> None:
    """Too short, too long, counted wrongly, or ended for another reason."""
    assert rules(history(indices=[0, 1], token_ids=[5, 6])) == [Rule.TOKENS]
    assert rules(history(indices=[0, 1, 2, 3], token_ids=[5, 6, 7, 8])) == [Rule.TOKENS]
    assert rules(history(answered=replace(ANSWERED, num_output_tokens=4))) == [Rule.TOKENS]
    assert rules(history(answered=replace(ANSWERED, finish_reason="stop"))) == [Rule.OUTCOME]


@pytest.mark.parametrize("one_shot", [[5, 6, 8], [6, 5, 7], [5, 6], []])
def test_another_answer_than_in_one_shot_is_found(one_shot: list[int]) -> None:
    """Also when it only goes on behind it; what came before an end is compared, too."""
    (violation,) = judge_answer(PLANNED, history(), one_shot)
    assert violation.rule is Rule.ANSWER
    assert violation.number == 7


def test_a_log_that_says_something_else_is_found() -> None:
    """Opened twice, ended twice or never; a router that died without a log may owe the end."""
    twice = evidence(endings=defaultdict(list, {"chaos-7.0": [StreamState.DONE] * 2}))
    never = evidence(endings=defaultdict(list))
    again = evidence(openings=Counter({"chaos-7.0": 2}))
    dead = Promise(keeps_streams=True, router_deaths_s=[100.0])
    for wrong in (twice, never, again):
        assert [x.rule for x in judge_log([history()], wrong, PROMISE)] == [Rule.ONE_ENDING]
    assert judge_log([history()], never, dead) == []
    assert judge_log([history()], twice, dead)


def test_faults_that_did_not_happen_are_found() -> None:
    """Rule 3: none planned, one not carried out, one without effect, one that no log tells of."""
    plan = ChaosPlan(
        seed=1,
        load_s=10.0,
        faults=(KILL.fault, PlannedFault(kind=FaultKind.LINKS, at_s=0.0, lasts_s=5.0)),
    )
    links = replace(KILL, fault=plan.faults[1])
    told = evidence(link_faults=Counter(dropped=3))
    assert judge_faults(plan, [KILL, links], told, []) == []
    for inflicted, seen, problems in (
        ([links], told, []),
        ([replace(KILL, is_real=False), links], told, []),
        ([KILL, links], evidence(), []),
        ([KILL, links], told, ["prefill-0 is not up"]),
    ):
        found = judge_faults(plan, inflicted, seen, problems)
        assert [violation.rule for violation in found] == [Rule.FAULTS]
    assert judge_faults(replace(plan, faults=()), [], evidence(), [])


def test_restarts_without_kills_are_found() -> None:
    """And kills without restarts, and errors in logs."""
    assert judge_restarts([KILL], {"prefill-0": 1, "router": 0}, []) == []
    for restarts, errors in (
        ({"prefill-0": 1, "router": 1}, []),
        ({"prefill-0": 0, "router": 0}, []),
        ({"prefill-0": 2, "router": 0}, []),
        ({"prefill-0": 1, "router": 0}, ["router.log: Traceback"]),
    ):
        found = judge_restarts([KILL], restarts, errors)
        assert [violation.rule for violation in found] == [Rule.PROCESSES]


def probe(began_s: float, took_s: float, *, is_ok: bool = True) -> Probe:
    """One question."""
    return Probe(began_s=began_s, ended_s=began_s + took_s, is_ok=is_ok)


def test_service_that_does_not_come_back_is_found() -> None:
    """Only what was asked after the kill counts, and only what was answered."""
    before, bad = probe(99.0, 0.2), probe(100.5, 0.1, is_ok=False)
    good = service_after(KILL, [KILL], [before, bad, probe(101.0, 2.0), probe(104.0, 0.5)])
    assert good == Service(target="prefill-0", back_s=3.0, slowest_s=2.0, allowed_s=5.0)
    assert judge_service([good]) == []
    late = service_after(KILL, [KILL], [before, bad, probe(104.0, 2.0)])
    never = service_after(KILL, [KILL], [before, bad])
    assert [len(judge_service([each])) for each in (late, never)] == [1, 1]


def test_service_may_wait_for_what_we_stopped_ourselves() -> None:
    """As long as it stood still after the kill; the controller is not waited for."""

    def pause(target: str, began_s: float, ended_s: float) -> Inflicted:
        fault = PlannedFault(kind=FaultKind.PAUSE, at_s=0.0, target=target, lasts_s=1.0)
        return replace(KILL, fault=fault, began_s=began_s, ended_s=ended_s)

    for target, began_s, ended_s, allowed_s in (
        ("router", 98.0, 103.0, 8.0),
        ("decode-1", 104.0, 106.0, 7.0),
        ("decode-1", 90.0, 99.0, 5.0),
        ("decode-1", 106.0, 109.0, 5.0),
        ("controller", 99.0, 104.0, 5.0),
    ):
        paused = pause(target, began_s, ended_s)
        service = service_after(KILL, [KILL, paused], [probe(101.0, 1.0)])
        assert service.allowed_s == pytest.approx(allowed_s)


def test_leaks_of_descriptors_and_threads_are_found() -> None:
    """Beyond what a process may have more."""
    base = {"router": Use(num_fds=20, num_threads=10)}
    most = Use(num_fds=20 + SPARE.num_fds, num_threads=10 + SPARE.num_threads)
    assert too_much(base, {"router": most}) == []
    assert len(too_much(base, {"router": replace(most, num_fds=most.num_fds + 1)})) == 1
    assert len(too_much(base, {"router": replace(most, num_threads=most.num_threads + 1)})) == 1
