"""The short version of ``make soak``: everything at random, for as long as a test may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamfill.launcher.signals import StopRequest
from tests.chaos.options import SoakOptions
from tests.chaos.progress import Progress
from tests.chaos.report import print_report
from tests.chaos.run import soak
from tests.chaos.script_writer import Habits
from tests.chaos.weather import Climate

pytestmark = [pytest.mark.integration, pytest.mark.clusters, pytest.mark.slow]

_OPTIONS = SoakOptions(
    seed=20_261,
    load_s=8.0,
    num_streams=16,
    num_prompts=16,
    longest_prompt_tokens=400,
    prefill_pool_tokens=1500,
    decode_pool_tokens=1500,
    switch_every_s=0.5,
    idle_timeout_s=3.0,
    # Not yet at its plateau after so short a time, which is what the long version looks at.
    most_router_growth=3.0,
    habits=Habits(longest_gap_s=0.4, longest_deadline_s=2.0),
    climate=Climate(shortest_calm_s=2.0, longest_calm_s=4.0, longest_pause_s=1.0, burst_s=1.0),
)


async def test_soak(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """16 streams append, update, cancel, leave, repeat and err, in pauses and bursts, under one
    policy after the other; all end as they should and leave nothing."""
    report = await soak(_OPTIONS, tiny_model, tmp_path, StopRequest(), Progress())
    facts = report.facts
    if report.violations:
        with capsys.disabled():
            print_report(report, Progress().out)
    assert not report.violations
    assert facts["counters_at_base"]
    # It did something: the oracle would be content with nothing.
    assert facts["num_compared"] > 50
    assert facts["num_refusals"] > 20
    assert facts["num_repeats"] > 20
    assert facts["num_bursts"] > 0
    assert facts["num_switches"] >= 8
    assert len(facts["policies"]) == 11
    assert facts["num_evicted_tokens"] > 0, "there was no want of memory"
    assert set(facts["by_outcome"]) == {"DONE", "ABORTED", "DEADLINE"}
