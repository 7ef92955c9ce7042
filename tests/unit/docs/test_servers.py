"""docs/servers.md names what there is and the numbers that are in force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router import timing
from router.rebalance import RebalanceLimits
from router.rebalancer import LOOK_EVERY_S
from router.service_server import READINESS
from streamfill.cli.servers import COMMANDS
from streamfill.config import RouterSection, ServerConfig, from_mapping
from streamfill.launcher.control_messages import CONTROL_SOCKET
from streamfill.observability.metrics import Metric

PAGE = (Path(__file__).parents[3] / "docs" / "servers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words",
    [
        *(f"streamfill servers {name}" for name in COMMANDS),
        f"`{CONTROL_SOCKET}`",
        f"`{READINESS}`",
        f"`{Metric.READY.spec.name}`",
        f"`{Metric.STREAMS_MOVED.spec.name}`",
    ],
)
def test_names_are_those_of_the_code(words: str) -> None:
    """Each of the page is there."""
    assert words in PAGE


def test_the_rule_is_the_one_in_force() -> None:
    """Every number of the section about balance."""
    limits = RebalanceLimits()
    assert (limits.hot_s, limits.hot_ratio, limits.hold_s) == (1.0, 2.0, 1.0)
    assert (limits.min_avoided_s, limits.cost_factor) == (0.5, 2.0)
    assert (limits.max_moves, limits.rest_s, limits.max_per_round) == (2, 10.0, 4)
    assert LOOK_EVERY_S == 0.5
    assert timing.SUSPECT_AFTER_S == 1.0
    assert RouterSection().rebalance
    assert RouterSection().ready_without_decode


def test_the_example_of_another_machine_is_a_configuration() -> None:
    """As a server would read it."""
    text = PAGE.split("```json")[1].split("```")[0]
    config = from_mapping(ServerConfig, json.loads(text), "the page")
    assert config.server_id == "rack2-prefill-0"
