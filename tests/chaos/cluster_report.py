"""What chaos runs found, for people and for programs. ``docs/benchmarks/chaos.md`` explains each
key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from tests.chaos.cluster_evidence import Evidence
from tests.chaos.cluster_history import StreamHistory
from tests.chaos.cluster_inflict import Inflicted
from tests.chaos.cluster_judge import Service
from tests.chaos.cluster_plan import ChaosPlan
from tests.chaos.cluster_rest import Use
from tests.chaos.cluster_streams import PlannedStream
from tests.chaos.judge import Rule, Violation

MOST_STORIES = 12
"""Violations that are told in full."""


@dataclass(frozen=True, kw_only=True)
class ChaosReport:
    """Everything that was found in one run."""

    plan: ChaosPlan
    planned: Sequence[PlannedStream]
    histories: Sequence[StreamHistory]
    violations: Sequence[Violation]
    inflicted: Sequence[Inflicted]
    services: Sequence[Service]
    evidence: Evidence
    num_compared: int
    num_probes: int
    base: Mapping[str, Use]
    used: Mapping[str, Use]
    load_wall_s: float
    wall_s: float

    @property
    def facts(self) -> dict[str, Any]:
        """The line of one seed."""
        histories, evidence = self.histories, self.evidence
        broken = Counter(violation.rule for violation in self.violations)
        failures = Counter(str(x.failure.code) for x in histories if x.failure is not None)
        answered = [each.answered for each in histories if each.answered is not None]
        handoffs = Counter(each.handoff.partition(":")[0] for each in answered)
        return {
            "ok": not self.violations,
            "seed": self.plan.seed,
            "wall_s": round(self.wall_s, 1),
            "load_s": round(self.load_wall_s, 1),
            "num_streams": len(histories),
            "num_answered": len(answered),
            "num_left": sum(each.left for each in histories),
            "failures": dict(sorted(failures.items())),
            "num_tokens": sum(len(each.token_ids) for each in histories),
            "num_compared": self.num_compared,
            "num_different": broken[Rule.ANSWER],
            "num_moved": sum(each.num_attempts > 1 for each in answered),
            "num_retries": sum(each.num_retries for each in histories),
            "handoffs": dict(sorted(handoffs.items())),
            "longest_wait_s": round(max((x.longest_wait_s for x in histories), default=0.0), 2),
            "faults": dict(sorted(Counter(x.fault.kind.value for x in self.inflicted).items())),
            "link_faults": dict(sorted(evidence.link_faults.items())),
            "kv_faults": evidence.kv_faults.total(),
            "events": dict(sorted(evidence.events.items())),
            "kills": [
                {
                    "process": each.target,
                    "back_s": _rounded(each.back_s),
                    "slowest_probe_s": _rounded(each.slowest_s),
                    "allowed_s": _rounded(each.allowed_s),
                }
                for each in self.services
            ],
            "num_probes": self.num_probes,
            "healthy": not broken[Rule.HEALTH],
            "counters_at_base": not broken[Rule.COUNTERS],
            "final_request_ok": not broken[Rule.FINAL_REQUEST],
            "uses": {
                name: [list(asdict(use).values()), list(asdict(self.used[name]).values())]
                for name, use in sorted(self.base.items())
                if name in self.used
            },
            "violations": {rule.name: count for rule, count in sorted(broken.items())},
        }

    def tell(self, out: TextIO) -> None:
        """Violations with the stories of their streams, and the faults around them."""
        if self.violations:
            out.write(f"\nSeed {self.plan.seed}, the faults:\n")
            out.writelines(f"  {fault.describe()}\n" for fault in self.plan.faults)
        stories = {each.number: each for each in self.histories}
        scripts = {each.number: each for each in self.planned}
        for violation in self.violations[:MOST_STORIES]:
            out.write(f"VIOLATION {violation.rule.name}: {violation.rule}\n  {violation.text}\n")
            if violation.number is not None:
                out.write(f"  stream {violation.number}: {scripts[violation.number].describe()}\n")
                out.writelines(f"  {note}\n" for note in stories[violation.number].notes)
        if len(self.violations) > MOST_STORIES:
            out.write(f"and {len(self.violations) - MOST_STORIES} more violations\n")
        out.write(f"SEED {json.dumps(self.facts, allow_nan=False)}\n")
        out.flush()


def summary(reports: Sequence[ChaosReport], failed_starts: Sequence[int]) -> dict[str, Any]:
    """The ``RESULT`` line, of all seeds together."""
    facts = [each.facts for each in reports]
    kills = [kill for each in facts for kill in each["kills"]]
    backs = [kill["back_s"] for kill in kills if kill["back_s"] is not None]
    broken = Counter[str]()
    for each in facts:
        broken.update(each["violations"])
    return {
        "ok": bool(facts) and all(each["ok"] for each in facts) and not failed_starts,
        "seeds": [each["seed"] for each in facts],
        "failed_seeds": [each["seed"] for each in facts if not each["ok"]] + list(failed_starts),
        "num_streams": sum(each["num_streams"] for each in facts),
        "num_answered": sum(each["num_answered"] for each in facts),
        "num_left": sum(each["num_left"] for each in facts),
        "failures": dict(_sum(each["failures"] for each in facts)),
        "num_tokens": sum(each["num_tokens"] for each in facts),
        "num_compared": sum(each["num_compared"] for each in facts),
        "num_different": sum(each["num_different"] for each in facts),
        "faults": dict(_sum(each["faults"] for each in facts)),
        "link_faults": dict(_sum(each["link_faults"] for each in facts)),
        "kv_faults": sum(each["kv_faults"] for each in facts),
        "killed": dict(sorted(Counter(kill["process"] for kill in kills).items())),
        "longest_back_s": max(backs, default=None),
        "longest_wait_s": max((each["longest_wait_s"] for each in facts), default=None),
        "wall_s": round(sum(each["wall_s"] for each in facts), 1),
        "violations": dict(sorted(broken.items())),
    }


def _sum(counts: Any) -> list[tuple[str, int]]:
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return sorted(total.items())


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
