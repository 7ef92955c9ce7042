"""The oracle of the soak: what is wrong with a history. Pure, and tested on made-up histories."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamfill.stream.state import StreamState
from tests.chaos.history import History, PrankAnswer, Source
from tests.chaos.scripts import REFUSALS, Script


class Rule(enum.StrEnum):
    """What must hold."""

    ONE_ENDING = "each stream ends in exactly one terminal state"
    OUTCOME = "each stream ends as its script allows"
    TOKENS = "no token is missing or comes twice"
    ANSWER = "each greedy answer is that of one shot"
    USAGE = "the counts of an answer are those of its script"
    REFUSAL = "a wrong operation is refused, a repeated one changes nothing"
    PROMPTNESS = "everything is answered in time"
    TOTALS = "the router's counts by outcome are those of the streams"
    COUNTERS = "the counters return to their base"
    FINAL_REQUEST = "a request after everything succeeds"
    MEMORY = "the router's memory does not grow"
    PROCESSES = "no process dies or reports an error"
    POLICY = "a policy is changed when asked"
    FAULTS = "faults and kills happen as often as they should"
    RECOVERY = "what was killed is replaced in time"
    SEGMENTS = "each segment counts once, in its place"
    HEALTH = "all processes are healthy afterwards"


@dataclass(frozen=True, kw_only=True)
class Violation:
    """Something that must hold and does not."""

    rule: Rule
    text: str
    number: int | None = None
    """Of the script."""


def judge_stream(script: Script, history: History) -> list[Violation]:
    """What is wrong with the life of one stream, its answer's content aside."""
    found = [
        *_judge_ending(script, history),
        *_judge_tokens(history),
        *_judge_dones(script, history),
        *(problem for answer in history.pranks for problem in _judge_prank(answer)),
        *((Rule.PROMPTNESS, trouble) for trouble in history.troubles),
    ]
    return [Violation(rule=rule, text=text, number=script.number) for rule, text in found]


def judge_answer(script: Script, history: History, one_shot: Sequence[int]) -> list[Violation]:
    """Compare a greedy answer, or the beginning that was read of it, with the one-shot's of the
    same prompt, which is at least as long as any complete answer."""
    ours = history.token_ids
    theirs = tuple(one_shot[: len(ours)])
    compared = ours[: len(theirs)]
    problems = []
    if compared != theirs:
        place = next(i for i, (a, b) in enumerate(zip(compared, theirs, strict=True)) if a != b)
        problems.append(f"parts from one shot at token {place}: {ours} instead of {theirs}")
    if StreamState.DONE is history.state and history.dones and len(one_shot) < len(ours):
        problems.append(f"{len(ours)} tokens, compared with only {len(one_shot)} of one shot")
    return [Violation(rule=Rule.ANSWER, text=text, number=script.number) for text in problems]


def judge_totals(
    endings: Mapping[str, int], num_opened: int, router_counts: Mapping[str, int]
) -> list[Violation]:
    """Compare the streams that were opened and how they ended with what the router counted."""
    texts = []
    ours = {state: count for state, count in endings.items() if count}
    theirs = {state: count for state, count in router_counts.items() if count}
    if ours != theirs:
        texts.append(f"the router counts {theirs}, the streams ended as {ours}")
    if sum(router_counts.values()) != num_opened:
        texts.append(f"{num_opened} streams were opened, the router counts {theirs}")
    return [Violation(rule=Rule.TOTALS, text=text) for text in texts]


def judge_log(openings: Counter[str], endings: Counter[str]) -> list[Violation]:
    """Each stream that the router's log says was opened ended once, by its request id."""
    return [
        Violation(
            rule=Rule.ONE_ENDING,
            text=f"{request_id}: opened {openings[request_id]} times, ended {endings[request_id]}",
        )
        for request_id in sorted(openings.keys() | endings.keys())
        if openings[request_id] != 1 or endings[request_id] != 1
    ]


def judge_memory(start_mb: float, end_mb: float, most_growth: float) -> list[Violation]:
    """Compare the router's resident memory at both ends of the load."""
    if end_mb <= start_mb * most_growth:
        return []
    text = f"from {start_mb:.0f} MB to {end_mb:.0f} MB, more than {most_growth:g} times as much"
    return [Violation(rule=Rule.MEMORY, text=text)]


_Problems = list[tuple[Rule, str]]


def _judge_ending(script: Script, history: History) -> _Problems:
    if not history.was_opened and not history.endings and not history.dones:
        # Given up before the router had it; only whoever waits for `Opened` knows better.
        return []
    states = {ending.state for ending in history.endings}
    num_logged = sum(ending.source is Source.LOG for ending in history.endings)
    named = ", ".join(f"{ending.state} ({ending.source})" for ending in history.endings) or "none"
    if len(states) != 1 or num_logged != 1:
        return [(Rule.ONE_ENDING, f"endings: {named}")]
    if not states <= script.allowed:
        allowed = " or ".join(sorted(script.allowed))
        return [(Rule.OUTCOME, f"{script.fate}, so {allowed}; endings: {named}")]
    return []


def _judge_tokens(history: History) -> _Problems:
    indices = [token.index for token in history.tokens]
    if indices == list(range(len(indices))):
        return []
    twice = sorted(index for index, count in Counter(indices).items() if count > 1)
    missing = sorted(set(range(max(indices) + 1)) - set(indices))
    place = next(place for place, index in enumerate(indices) if place != index)
    text = f"{len(indices)} tokens: number {indices[place]} came as number {place}"
    return [(Rule.TOKENS, f"{text}; twice {twice}, missing {missing}")]


def _judge_dones(script: Script, history: History) -> _Problems:
    problems: _Problems = []
    must_see = script.allowed == {StreamState.DONE} and not history.lost_status
    if len(history.dones) > 1 or (must_see and not history.dones):
        problems.append((Rule.OUTCOME, f"{len(history.dones)} Done events"))
    for done in history.dones:
        num_tokens = len(history.tokens)
        if num_tokens != script.max_tokens or done.num_output_tokens != script.max_tokens:
            problems.append(
                (
                    Rule.TOKENS,
                    f"{num_tokens} tokens came and {done.num_output_tokens} were counted, "
                    f"not {script.max_tokens}",
                )
            )
        if done.finish_reason != "length":
            problems.append((Rule.USAGE, f"finish reason {done.finish_reason}, not length"))
        if done.num_prompt_tokens != len(script.prompt_ids):
            counts = f"{done.num_prompt_tokens} prompt tokens, not {len(script.prompt_ids)}"
            problems.append((Rule.USAGE, counts))
    return problems


def _judge_prank(answer: PrankAnswer) -> _Problems:
    wanted = REFUSALS.get(answer.prank)
    if answer.code != wanted:
        got = answer.code or "acknowledged"
        return [(Rule.REFUSAL, f"{answer.prank}: {got}, not {wanted or 'acknowledged'}")]
    if wanted is None and answer.num_tokens_after != answer.num_tokens_before:
        before, after = answer.num_tokens_before, answer.num_tokens_after
        return [(Rule.REFUSAL, f"{answer.prank}: {before} prompt tokens became {after}")]
    return []
