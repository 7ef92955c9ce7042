"""The parts of a hand-off run, which the command and the test put together.

1. The streams are played on a cluster that is left alone.
2. They are played again, on one whose transfers go wrong and whose servers are killed.
3. Everything is compared and counted.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamfill.api import Client
from streamfill.kv_transfer.faults import VARIABLE
from streamfill.launcher.log_files import log_file
from streamfill.stream.tokenizer import TextTokenizer
from tests.chaos import checks
from tests.chaos.handoff_judge import (
    RECOVERY_S,
    Recovery,
    judge_disturbance,
    judge_endings,
    judge_played,
    recovery,
    silences_s,
)
from tests.chaos.handoff_kills import Killer
from tests.chaos.handoff_streams import PlannedStream, PlayedStream, play_streams
from tests.chaos.judge import Rule, Violation
from tests.chaos.router_log import RouterLog, error_lines
from tests.support.cluster import RunningCluster, start_cluster

_PREFIX = "handoff-"
_FAULT = re.compile(r"kv_fault_injected kind=(\w+) transfer_id=(\d+)")


@dataclass(frozen=True, kw_only=True)
class HandoffOptions:
    """How much, and how."""

    seed: int
    num_streams: int = 500
    every: int = 5
    """Of the transfers one is spoiled; at least 3, so that not all can be."""
    fewest_faults: int = 80
    """That must happen. Fewer than the transfers divided by ``every``: which ids transfers get is
    chance, and some end, with their server or their stream, before it is their turn."""
    num_prefill: int = 2
    num_decode: int = 2
    kills: tuple[str, ...] = ("decode-0", "prefill-0", "decode-1", "prefill-1")
    """Servers, in the order of their deaths."""
    num_at_once: int = 24
    rate: float = 6.0
    """Streams that begin each second of the disturbed run, unless too many are open."""
    recovery_s: float = RECOVERY_S
    """The longest that anybody may have to wait after a kill."""

    @property
    def most_streams(self) -> int:
        """The disturbed run goes on with more streams until it was disturbed as it should be."""
        return int(1.3 * self.num_streams)


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What every stream is to be answered with."""

    played: Sequence[PlayedStream]
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class HandoffReport:
    """Everything that was found."""

    options: HandoffOptions
    undisturbed: Undisturbed
    played: Sequence[PlayedStream]
    violations: Sequence[Violation]
    recoveries: Sequence[Recovery]
    silences: Sequence[float]
    faults: Counter[str]
    disturbed_s: float

    @property
    def facts(self) -> dict[str, Any]:
        """The ``RESULT`` line."""
        broken = Counter(violation.rule for violation in self.violations)
        results = [each.result for each in self.played if each.result is not None]
        handoffs = Counter(each.metadata.handoff.partition(":")[0] for each in results)
        return {
            "ok": not self.violations,
            "seed": self.options.seed,
            "num_streams": len(self.played),
            "num_done": len(results),
            "num_different": broken[Rule.ANSWER],
            "num_tokens": sum(len(each.token_ids) for each in self.played),
            "handoffs": dict(sorted(handoffs.items())),
            "num_retried": sum(each.metadata.num_attempts > 1 for each in results),
            "num_decoded_by_prefill": sum(each.metadata.decoded_by_prefill for each in results),
            "num_faults": self.faults.total(),
            "faults": dict(sorted(self.faults.items())),
            "kills": [
                {
                    "server": each.kill.server_id,
                    "num_streams": each.kill.num_streams,
                    "role_s": _rounded(each.role_s),
                    "server_s": _rounded(each.server_s),
                }
                for each in self.recoveries
            ],
            "num_silences": len(self.silences),
            "longest_silence_s": _rounded(max(self.silences, default=None)),
            "longest_wait_s": _rounded(max(each.longest_wait_s for each in self.played)),
            "counters_at_base": not broken[Rule.COUNTERS],
            "final_request_ok": not broken[Rule.FINAL_REQUEST],
            "undisturbed_s": round(self.undisturbed.wall_s, 1),
            "disturbed_s": round(self.disturbed_s, 1),
            "num_violations": len(self.violations),
            "violations": {rule.name: count for rule, count in sorted(broken.items())},
        }


def start(
    folder: Path, model: Path, name: str, options: HandoffOptions, *, with_faults: bool
) -> RunningCluster:
    """A cluster for one of the two runs."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = f"every={options.every},seed={options.seed}"
    return start_cluster(
        folder,
        model,
        name,
        settings=[
            f"prefill.count={options.num_prefill}",
            f"decode.count={options.num_decode}",
            "prefill.threads=1",
            "decode.threads=1",
        ],
        environment={VARIABLE: plan} if with_faults else {},
    )


async def play_undisturbed(
    address: str,
    streams: Sequence[PlannedStream],
    tokenizer: TextTokenizer,
    options: HandoffOptions,
) -> Undisturbed:
    """Play them with nothing in their way.

    Raises:
        AssertionError: a stream failed all the same.
    """
    began_s = time.monotonic()
    async with Client(address) as client:
        played = await play_streams(
            client,
            streams,
            tokenizer=tokenizer,
            prefix=f"un{_PREFIX}",
            num_at_once=options.num_at_once,
        )
    assert all(each.is_done for each in played), [each.errors for each in played if each.errors]
    return Undisturbed(played=played, wall_s=time.monotonic() - began_s)


async def play_disturbed(
    cluster: RunningCluster,
    streams: Sequence[PlannedStream],
    tokenizer: TextTokenizer,
    undisturbed: Undisturbed,
    options: HandoffOptions,
) -> HandoffReport:
    """Play them on a cluster with faults, killing servers, and check everything."""
    began_s = time.monotonic()
    logs = Path(cluster.state.run_dir) / "logs"
    async with Client(cluster.address) as client:
        killer = Killer(cluster, client, options.kills, options.num_streams)
        killing = asyncio.create_task(killer.run())
        ended: list[PlayedStream] = []

        async def may_begin(place: int) -> bool:
            await killer.begins(place)
            if place < options.num_streams:
                return True
            # What else is played is for servers that are there again.
            await asyncio.wait({killing})
            return (
                any(recovery(kill, ended).server_s is None for kill in killer.kills)
                or count_faults(logs).total() < options.fewest_faults
            )

        try:
            played = await play_streams(
                client,
                streams,
                tokenizer=tokenizer,
                prefix=_PREFIX,
                num_at_once=options.num_at_once,
                rate=options.rate,
                may_begin=may_begin,
                on_end=ended.append,
            )
            await killing
        finally:
            killing.cancel()
        disturbed_s = time.monotonic() - began_s
        violations = judge_played(undisturbed.played[: len(played)], played)
        violations += await checks.check_rest(client)
        violations += await _check_final_request(client)
    log = RouterLog(log_file(logs, "router"), _PREFIX)
    log.read_on()
    violations += judge_endings(played, _PREFIX, log.endings)
    recoveries = [recovery(kill, played) for kill in killer.kills]
    silences = silences_s(killer.kills, played)
    faults = count_faults(logs)
    violations += [Violation(rule=Rule.PROCESSES, text=text) for text in killer.problems]
    violations += judge_disturbance(
        recoveries,
        silences,
        faults,
        fewest_faults=options.fewest_faults,
        num_kills=len(options.kills),
        recovery_s=options.recovery_s,
    )
    violations += _judge_processes(cluster, logs, options.kills)
    return HandoffReport(
        options=options,
        undisturbed=undisturbed,
        played=played,
        violations=violations,
        recoveries=recoveries,
        silences=silences,
        faults=faults,
        disturbed_s=disturbed_s,
    )


async def _check_final_request(client: Client) -> list[Violation]:
    """The cluster answers, with a hand-off, unless just that one is to be spoiled: a stream takes
    two numbers, so of two in a row at most one is."""
    for _ in range(2):
        violations = await checks.check_final_request(client)
        if not violations:
            return []
    return violations


def count_faults(logs: Path) -> Counter[str]:
    """The faults that the servers' logs tell of, those of earlier lives included, by kind."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in logs.glob("*.log"):
        for match in _FAULT.finditer(path.read_text(encoding="utf-8", errors="replace")):
            # A transfer that was offered once more, to a receiver that restarted, counts once.
            found[match[1]].add(match[2])
    return Counter({kind: len(transfers) for kind, transfers in found.items()})


def _judge_processes(cluster: RunningCluster, logs: Path, killed: Sequence[str]) -> list[Violation]:
    """What was killed was started again once, all is ready, and none logged an error."""
    texts = [
        f"{each.name}: {each.state}, {each.num_restarts} restarts"
        for each in cluster.state.processes
        if each.state != "ready" or each.num_restarts != int(each.name in killed)
    ]
    lines = error_lines(logs)
    if lines:
        texts.append(f"{len(lines)} errors in the logs, the first: {lines[0][:500]}")
    return [Violation(rule=Rule.PROCESSES, text=text) for text in texts]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
