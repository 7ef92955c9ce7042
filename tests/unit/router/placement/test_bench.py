"""The simulation that placement policies are compared in."""

from __future__ import annotations

import json
from array import array

import pytest

from router.placement.bench import main, make_placer
from router.placement.simulation import Outcome, Reader, Simulation

DOCUMENT = array("i", range(320))


def _simulate(name: str) -> Outcome:
    """Two streams that read ten blocks in two pieces, one a second behind the other."""
    readers = [
        Reader(opened_s=at, prompts=(DOCUMENT[:160], DOCUMENT), due_s=(at, at + 0.5))
        for at in (0.0, 1.0)
    ]
    simulation = Simulation(
        make_placer(name, {}), num_servers=2, tokens_per_s=1000.0, cache_tokens=1000
    )
    return simulation.run(readers)


def test_sharing_is_what_the_simulation_measures() -> None:
    """Every token is computed on both servers by round-robin; cache-aware computes it once, and the
    last token of each piece again."""
    apart, together = _simulate("round-robin"), _simulate("cache-aware")
    assert apart.num_computed_tokens == 640
    assert apart.busy_s == pytest.approx((0.32, 0.32))
    assert apart.ttft_s == pytest.approx((0.16, 0.16))
    assert together.num_computed_tokens == 322
    assert sum(busy_s > 0 for busy_s in together.busy_s) == 1
    assert together.least_computed_tokens == 320


def test_the_last_line_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    """One object, with the figures of each policy that was asked for."""
    main(["--policies", "round-robin", "dualmap(slack_tokens=512)", "--decisions", "20"])
    name, _, text = capsys.readouterr().out.splitlines()[-1].partition(" ")
    result = json.loads(text)
    assert name == "RESULT"
    shared = result["dualmap(slack_tokens=512)"]
    assert 1.0 <= shared["of_least"] < result["round-robin"]["of_least"]
