"""What a soak found, for people and for programs. ``docs/benchmarks/soak.md`` explains each key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from tests.chaos.judge import Rule, Violation
from tests.chaos.load import Played
from tests.chaos.options import SoakOptions
from tests.chaos.scripts import Prank

MOST_STORIES = 20
"""Told in full; the other violations are only counted."""


@dataclass(frozen=True, kw_only=True)
class SoakReport:
    """Everything that was found."""

    options: SoakOptions
    played: Sequence[Played]
    violations: Sequence[Violation]
    num_opened: int
    by_outcome: Mapping[str, int]
    """As the router counted."""
    num_compared: int
    num_bursts: int
    num_switches: int
    policies: Sequence[str]
    num_evicted_tokens: int
    """By both servers together."""
    rss_start_mb: Mapping[str, float]
    rss_end_mb: Mapping[str, float]
    wall_s: float
    interrupted: bool

    @property
    def facts(self) -> dict[str, Any]:
        """The ``RESULT`` line."""
        histories = [each.history for each in self.played]
        pranks = Counter(answer.prank for history in histories for answer in history.pranks)
        num_repeats = pranks[Prank.RESENT] + pranks[Prank.GAP]
        broken = Counter(violation.rule for violation in self.violations)
        start_mb, end_mb = self.rss_start_mb.get("router", 0), self.rss_end_mb.get("router", 0)
        return {
            "ok": not self.violations,
            "seed": self.options.seed,
            "interrupted": self.interrupted,
            "wall_s": round(self.wall_s, 1),
            "num_streams": self.num_opened,
            "by_outcome": dict(sorted(self.by_outcome.items())),
            "by_fate": dict(sorted(Counter(str(each.script.fate) for each in self.played).items())),
            "by_form": dict(sorted(Counter(str(each.script.form) for each in self.played).items())),
            "num_tokens": sum(len(history.tokens) for history in histories),
            "num_compared": self.num_compared,
            "num_different": broken[Rule.ANSWER],
            "num_refusals": pranks.total() - num_repeats,
            "num_repeats": num_repeats,
            "num_lost_statuses": sum(history.lost_status for history in histories),
            "num_bursts": self.num_bursts,
            "num_switches": self.num_switches,
            "policies": sorted(self.policies),
            "num_evicted_tokens": self.num_evicted_tokens,
            "counters_at_base": not broken[Rule.COUNTERS],
            "totals_agree": not broken[Rule.TOTALS],
            "final_request_ok": not broken[Rule.FINAL_REQUEST],
            "rss_start_mb": _rounded(self.rss_start_mb),
            "rss_end_mb": _rounded(self.rss_end_mb),
            "router_growth": round(end_mb / start_mb, 3) if start_mb else None,
            "num_violations": len(self.violations),
            "violations": {rule.name: count for rule, count in sorted(broken.items())},
        }


def print_report(report: SoakReport, out: TextIO) -> None:
    """All violations with the stories of their streams, then the ``RESULT`` line."""
    by_number = {each.script.number: each for each in report.played}
    for violation in report.violations[:MOST_STORIES]:
        out.write(f"\nVIOLATION {violation.rule.name}: {violation.rule}\n  {violation.text}\n")
        played = None if violation.number is None else by_number.get(violation.number)
        if played is not None:
            out.write(f"  stream {violation.number}: {played.script.describe()}\n")
            out.writelines(f"  {note}\n" for note in played.history.notes)
            out.write(f"  again, alone: --seed {report.options.seed} --only {violation.number}\n")
    if len(report.violations) > MOST_STORIES:
        out.write(f"\nand {len(report.violations) - MOST_STORIES} more violations\n")
    if report.violations:
        out.write(f"\nagain: --seed {report.options.seed}\n")
    out.write(f"\nRESULT {json.dumps(report.facts)}\n")
    out.flush()


def _rounded(sizes_mb: Mapping[str, float]) -> dict[str, float]:
    return {name: round(size_mb, 1) for name, size_mb in sizes_mb.items()}
