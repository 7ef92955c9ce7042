"""The oracle of a run against the whole cluster: what is wrong with what was seen. Pure, and tested
on made-up histories.

1. Every stream ends in time.
2. It ends with a whole answer or a clean, documented error; which errors are excused is said by
   `Promise`. Its segments count once and in order, its tokens come once and in order, and they are
   those of its prompt sent at once to a cluster that is left alone.
3. The faults of the plan really happened.
4. Afterwards all processes are healthy, and none was restarted that was not killed.
5. All counters are back at their base.
6. A request succeeds.

And after each kill the cluster serves again within five seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamfill.errors import ErrorCode
from tests.chaos.cluster_evidence import Evidence
from tests.chaos.cluster_history import StreamHistory
from tests.chaos.cluster_inflict import Inflicted
from tests.chaos.cluster_plan import ChaosPlan, FaultKind, role_of
from tests.chaos.cluster_probe import Probe
from tests.chaos.cluster_streams import Form, PlannedStream
from tests.chaos.judge import Rule, Violation

SERVICE_WITHIN_S = 5.0
"""From a kill to the end of the first probe that was begun after it and succeeds."""

CLEAN_CODES = frozenset(
    {
        ErrorCode.UNAVAILABLE,
        ErrorCode.NOT_FOUND,
        ErrorCode.RESOURCE_EXHAUSTED,
        ErrorCode.DEADLINE_EXCEEDED,
        ErrorCode.ABORTED,
        ErrorCode.CANCELLED,
        ErrorCode.FAILED_PRECONDITION,
    }
)
"""Those of docs/api.md that a cluster in trouble may say to a client that does nothing wrong."""

_ROUTER_GONE = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.NOT_FOUND})
"""What a client hears when the router with its stream died and kept no log."""

_HEARD_WITHIN_S = 20.0
"""From the router's death until a client that says everything again knows that its stream is
lost."""

_Problems = list[tuple[Rule, str]]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What the documents except from "no stream is lost"."""

    keeps_streams: bool
    """The router has a log: its own death costs one-shot requests only, which are in no log."""
    router_deaths_s: Sequence[float] = ()

    def excuses(self, planned: PlannedStream, history: StreamHistory) -> bool:
        """Whether the way in which a stream failed is documented, and had its cause."""
        failure, ended_s = history.failure, history.ended_s
        if failure is None or ended_s is None:
            return False
        if self.keeps_streams and planned.form is not Form.ONE_SHOT:
            return False
        return failure.code in _ROUTER_GONE and any(
            history.began_s <= death_s <= ended_s <= death_s + _HEARD_WITHIN_S
            for death_s in self.router_deaths_s
        )


def judge_stream(
    planned: PlannedStream, history: StreamHistory, promise: Promise
) -> list[Violation]:
    """Rules 1 and 2 for one stream, but for what its tokens are."""
    found = [
        *_judge_end(planned, history, promise),
        *_judge_segments(planned, history),
        *_judge_tokens(planned, history),
    ]
    return [Violation(rule=rule, text=text, number=planned.number) for rule, text in found]


def judge_answer(
    planned: PlannedStream, history: StreamHistory, one_shot: Sequence[int]
) -> list[Violation]:
    """The tokens, or those that came before the end, are those of one shot."""
    wanted = list(one_shot[: len(history.token_ids)])
    if history.token_ids == wanted:
        return []
    pairs = zip(history.token_ids, wanted, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(wanted))
    text = f"parts from one shot at token {place}: {history.token_ids} instead of {wanted}"
    return [Violation(rule=Rule.ANSWER, text=text, number=planned.number)]


def judge_log(
    histories: Sequence[StreamHistory], evidence: Evidence, promise: Promise
) -> list[Violation]:
    """The router ended each stream that it opened, once; one that died with it not at all."""
    found = []
    for history in histories:
        for request_id in history.request_ids:
            num_opened = evidence.openings[request_id]
            endings = evidence.endings.get(request_id, [])
            # One that died with the router is ended by nobody.
            fewest = 0 if promise.router_deaths_s else num_opened
            if num_opened > 1 or not fewest <= len(endings) <= num_opened:
                states = [str(state) for state in endings]
                text = f"{request_id}: opened {num_opened} times, ended as {states}"
                found.append(Violation(rule=Rule.ONE_ENDING, text=text, number=history.number))
    return found


def judge_faults(
    plan: ChaosPlan, inflicted: Sequence[Inflicted], evidence: Evidence, problems: Sequence[str]
) -> list[Violation]:
    """Rule 3."""
    texts = list(problems)
    if not plan.faults:
        texts.append("there is no fault in the plan")
    planned = Counter(fault.kind for fault in plan.faults)
    done = Counter(each.fault.kind for each in inflicted if each.is_real)
    texts += [
        f"{kind}: {done[kind]} of {count} happened"
        for kind, count in sorted(planned.items())
        if done[kind] != count
    ]
    seen = {
        FaultKind.LINKS: evidence.link_faults.total(),
        FaultKind.KV: evidence.kv_faults.total(),
    }
    texts += [
        f"{kind}: planned, and no log tells of it"
        for kind, count in sorted(seen.items())
        if planned[kind] and not count
    ]
    return [Violation(rule=Rule.FAULTS, text=text) for text in texts]


def judge_restarts(
    inflicted: Sequence[Inflicted], restarts: Mapping[str, int], errors: Sequence[str]
) -> list[Violation]:
    """Rule 4, as far as it is not asked of the living: what was killed was started again, what was
    not was not, and nobody logged an error."""
    kills = Counter(each.fault.target for each in inflicted if each.fault.kind is FaultKind.KILL)
    texts = [
        f"{name}: {count} restarts after {kills[name]} kills"
        for name, count in sorted(restarts.items())
        if count != kills[name]
    ]
    if errors:
        texts.append(f"{len(errors)} errors in the logs, the first: {errors[0][:500]}")
    return [Violation(rule=Rule.PROCESSES, text=text) for text in texts]


@dataclass(frozen=True, kw_only=True)
class Service:
    """How the cluster came back after a kill; seconds since it. None: it did not."""

    target: str
    back_s: float | None
    """End of the first probe that was begun after the kill and succeeded."""
    slowest_s: float | None
    """The longest of the probes that were begun in the time in which it is to serve again."""
    allowed_s: float


def service_after(
    kill: Inflicted,
    inflicted: Sequence[Inflicted],
    probes: Sequence[Probe],
    within_s: float = SERVICE_WITHIN_S,
) -> Service:
    """What the probes say of one kill, behind which the cluster is to serve again in time. Where
    somebody else stands still at that time by our own doing, it gets as much more time."""
    later = [probe for probe in probes if probe.began_s > kill.began_s]
    good = [probe.ended_s - kill.began_s for probe in later if probe.is_ok]
    near = [
        probe.ended_s - probe.began_s for probe in later if probe.began_s <= kill.began_s + within_s
    ]
    end_s = kill.began_s + within_s
    pauses = sorted(
        (each.began_s, each.ended_s)
        for each in inflicted
        if each.fault.kind is FaultKind.PAUSE and role_of(each.fault.target) != "controller"
    )
    for began_s, ended_s in pauses:
        if began_s < end_s and ended_s > kill.began_s:
            end_s += ended_s - max(began_s, kill.began_s)
    return Service(
        target=kill.fault.target,
        back_s=min(good, default=None),
        slowest_s=max(near, default=None),
        allowed_s=end_s - kill.began_s,
    )


def judge_service(services: Sequence[Service]) -> list[Violation]:
    """After each kill the cluster serves again in time."""
    return [
        Violation(
            rule=Rule.RECOVERY,
            text=f"{each.target} was killed, and the cluster served again "
            + ("never" if each.back_s is None else f"after {each.back_s:.1f} s")
            + f", not within {each.allowed_s:.1f} s",
        )
        for each in services
        if each.back_s is None or each.back_s > each.allowed_s
    ]


def _judge_end(planned: PlannedStream, history: StreamHistory, promise: Promise) -> _Problems:
    if history.ended_s is None:
        return [(Rule.PROMPTNESS, "it did not end in time")]
    ways = [history.answered is not None, history.failure is not None, history.left]
    if sum(ways) != 1:
        text = f"answered {ways[0]}, failed {ways[1]}, left by its client {ways[2]}"
        return [(Rule.ONE_ENDING, text)]
    failure = history.failure
    if failure is None:
        return []
    if failure.code not in CLEAN_CODES:
        return [(Rule.OUTCOME, f"no clean end: {failure.text}")]
    if not promise.excuses(planned, history):
        return [(Rule.OUTCOME, f"lost: {failure.text}")]
    return []


def _judge_segments(planned: PlannedStream, history: StreamHistory) -> _Problems:
    problems: _Problems = []
    places = [each.place for each in history.acknowledged]
    if places != list(range(len(places))):
        problems.append((Rule.SEGMENTS, f"segments {places} were acknowledged"))
    problems += [
        (
            Rule.SEGMENTS,
            f"{each.num_received} tokens after segment {each.place}, "
            f"not {planned.num_received[each.place]}",
        )
        for each in history.acknowledged
        if each.num_received != planned.num_received[each.place]
    ]
    answered = history.answered
    if answered is not None and answered.num_prompt_tokens != len(planned.prompt_ids):
        counts = f"{answered.num_prompt_tokens} prompt tokens, not {len(planned.prompt_ids)}"
        problems.append((Rule.SEGMENTS, counts))
    return problems


def _judge_tokens(planned: PlannedStream, history: StreamHistory) -> _Problems:
    problems: _Problems = []
    indices = history.indices
    if indices != list(range(len(indices))):
        twice = sorted(index for index, count in Counter(indices).items() if count > 1)
        missing = sorted(set(range(max(indices) + 1)) - set(indices))
        text = f"tokens came as {indices}; twice {twice}, missing {missing}"
        problems.append((Rule.TOKENS, text))
    answered = history.answered
    if answered is not None:
        num = len(history.token_ids)
        if {num, answered.num_output_tokens} != {planned.max_tokens}:
            text = (
                f"{num} tokens came and {answered.num_output_tokens} were counted, "
                f"not {planned.max_tokens}"
            )
            problems.append((Rule.TOKENS, text))
        if answered.finish_reason != "length":
            problems.append((Rule.OUTCOME, f"finish reason {answered.finish_reason}, not length"))
    return problems
