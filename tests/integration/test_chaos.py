"""The short versions of ``make chaos-kills`` and ``make chaos``: a whole cluster under load, with
processes killed and paused, links and transfers that go wrong, and a clock that jumps."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamfill.launcher.state import find_cluster
from tests.chaos.cluster_options import ChaosOptions
from tests.chaos.cluster_plan import ChaosPlan, FaultKind, draw_plan, kill_plan
from tests.chaos.cluster_report import ChaosReport
from tests.chaos.cluster_run import run, start
from tests.chaos.progress import Progress

pytestmark = [pytest.mark.integration, pytest.mark.clusters, pytest.mark.slow]

_SEED = 62
_LOAD_S = 9.0
_SERVICE_WITHIN_S = 30.0
"""The commands hold the cluster to five seconds; here other work may keep the machine busy."""


async def test_kill_9_of_one_process_of_each_kind_under_load(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cluster serves again soon after each, all streams go on with the same answers
    but for one-shot requests that the router takes with it, and nothing is left behind."""
    plan = kill_plan(1, ("prefill-0", "decode-0", "controller", "router"), 2.5, 2.5)
    report = await _play(
        plan,
        ChaosOptions(load_s=plan.load_s, service_within_s=_SERVICE_WITHIN_S),
        tiny_model,
        tmp_path,
        capsys,
    )
    facts = report.facts
    assert [kill["process"] for kill in facts["kills"]] == [x.target for x in plan.faults]
    assert facts["num_answered"] > 20
    assert facts["num_moved"] + facts["num_retries"] > 0, "nobody noticed"


async def test_everything_goes_wrong_at_once(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One seed of many: every stream ends, cleanly, with its own answer; all faults happened."""
    plan = draw_plan(_SEED, _LOAD_S)
    report = await _play(
        plan,
        ChaosOptions(load_s=_LOAD_S, service_within_s=_SERVICE_WITHIN_S),
        tiny_model,
        tmp_path,
        capsys,
    )
    facts = report.facts
    assert {fault.kind for fault in plan.faults} >= {FaultKind.KILL, FaultKind.PAUSE}
    assert facts["num_compared"] > 15
    assert facts["link_faults"]


async def _play(
    plan: ChaosPlan,
    options: ChaosOptions,
    model: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> ChaosReport:
    cluster, clock = start(folder, model, options, plan)
    try:
        report = await run(cluster, clock, model, options, plan)
    finally:
        cluster.stop()
    if report.violations:
        with capsys.disabled():
            report.tell(Progress().out)
    assert not report.violations
    assert find_cluster(folder / "run" / "chaos") is None
    return report
