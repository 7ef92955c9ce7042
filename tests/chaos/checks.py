"""What is checked when the load is over: answers, counters, totals, processes, and that the cluster
still works."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from streamfill.api import Client
from streamfill.errors import StreamError
from streamfill.launcher.managed_process import ProcessState, ProcessStatus
from streamfill.stream.state import StreamState
from tests.chaos.judge import Rule, Violation, judge_answer, judge_log, judge_totals
from tests.chaos.load import Played
from tests.chaos.router_log import RouterLog, error_lines
from tests.support.counters import empty_caches, wait_until_at_rest

REST_WITHIN_S = 30.0
"""From the end of the last stream to counters at their base."""

_FINAL_TOKENS = 4


async def check_rest(client: Client) -> list[Violation]:
    """All queue counters of servers and router return to their base in time."""
    try:
        await wait_until_at_rest(client, REST_WITHIN_S)
    except AssertionError as error:
        return [Violation(rule=Rule.COUNTERS, text=str(error))]
    return []


async def check_totals(client: Client, before: Counter[str], log: RouterLog) -> list[Violation]:
    """The router's counts, less those ``before`` the load, are those of its log, in which each
    stream stands once."""
    log.read_on()
    counted = Counter((await client.server_info()).num_streams_by_outcome)
    counted.subtract(before)
    num_endings = Counter({request_id: len(states) for request_id, states in log.endings.items()})
    return [
        *judge_log(log.openings, num_endings),
        *judge_totals(log.outcomes, log.num_opened, counted),
    ]


async def check_answers(
    client: Client,
    played: Sequence[Played],
    *,
    is_stopped: Callable[[], bool],
    say: Callable[[int, int], None],
) -> tuple[list[Violation], int]:
    """Every greedy answer, complete or not, is that of one shot, in caches that were emptied. Each
    prompt is asked once, alone.

    Args:
        say: told how many of how many prompts are done.

    Returns:
        what is wrong, and how many complete answers were compared.
    """
    violations: list[Violation] = []
    by_prompt: defaultdict[tuple[int, ...], list[Played]] = defaultdict(list)
    for each in played:
        if each.script.is_greedy and each.history.tokens:
            by_prompt[each.script.prompt_ids].append(each)
    try:
        await empty_caches(client)
    except AssertionError as error:
        violations.append(Violation(rule=Rule.COUNTERS, text=f"caches: {error}"))
    num_compared = 0
    for place, (prompt_ids, group) in enumerate(by_prompt.items()):
        if is_stopped():
            break
        longest = max(len(each.history.tokens) for each in group)
        try:
            result = await client.complete(
                token_ids=prompt_ids, temperature=0.0, max_tokens=longest, ignore_eos=True
            )
        except StreamError as error:
            text = f"one shot of {len(prompt_ids)} tokens: {error}"
            violations.append(Violation(rule=Rule.FINAL_REQUEST, text=text))
            break
        for each in group:
            violations += judge_answer(each.script, each.history, result.token_ids)
            num_compared += each.history.state is StreamState.DONE and bool(each.history.dones)
        say(place + 1, len(by_prompt))
    return violations, num_compared


async def check_final_request(client: Client) -> list[Violation]:
    """The cluster answers, with a hand-off."""
    try:
        result = await client.complete(
            "Is anybody there?", max_tokens=_FINAL_TOKENS, temperature=0.0, ignore_eos=True
        )
    except StreamError as error:
        return [Violation(rule=Rule.FINAL_REQUEST, text=str(error))]
    if len(result.token_ids) != _FINAL_TOKENS or result.metadata.handoff != "done":
        text = f"{len(result.token_ids)} tokens, hand-off {result.metadata.handoff}"
        return [Violation(rule=Rule.FINAL_REQUEST, text=text)]
    return []


def check_processes(statuses: Sequence[ProcessStatus], logs: Path) -> list[Violation]:
    """None was restarted, none is down, none logged an error."""
    texts = [
        f"{status.name}: {status.state.value}, {status.num_restarts} restarts"
        for status in statuses
        if status.num_restarts or status.state is not ProcessState.READY
    ]
    lines = error_lines(logs)
    if lines:
        texts.append(f"{len(lines)} errors in the logs, the first: {lines[0][:500]}")
    return [Violation(rule=Rule.PROCESSES, text=text) for text in texts]
