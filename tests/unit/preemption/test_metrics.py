"""The controller's `/metrics`, scraped while it plans."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streamfill.observability.exposition import MetricsServer
from streamfill.observability.metrics import Metric, Owner
from streamfill.preemption.client import ControllerClient
from streamfill.preemption.controller import Controller
from tests.support.metrics import scrape
from tests.support.waiting import wait_until
from tests.unit.preemption.builders import report, stream
from tests.unit.preemption.test_controller import WAIT_S, running


@pytest.fixture
def controller() -> Iterator[Controller]:
    with running() as started:
        yield started


@pytest.fixture
def port(controller: Controller) -> Iterator[int]:
    registry = controller.metrics.set.registry
    server = MetricsServer(registry, host="127.0.0.1", port=0, section="controller")
    yield server.port
    server.close()


def test_reports_plans_and_victims(controller: Controller, port: int) -> None:
    """Each report is counted, and so are the plan that it led to and the streams in it."""
    wait_until("its first round", lambda: Metric.PLANS.spec.name[:-6] in scrape(port).names, WAIT_S)
    assert scrape(port).value(Metric.REPORTS) == 0
    client = ControllerClient(f"tcp://127.0.0.1:{controller.port}", "p0", 1)
    try:
        client.report(report(stream(1), stream(2), server_id="p0", incarnation=1))
        plan = wait_until("a plan", client.poll, WAIT_S)
        assert plan is not None
    finally:
        client.close()
    wait_until("it is published", lambda: scrape(port).value(Metric.PLANS), WAIT_S)
    page = scrape(port)
    assert page.value(Metric.REPORTS) == 1
    assert page.value(Metric.PLANS) == plan.version == 1
    assert page.value(Metric.PLANS_SENT) == 1
    assert page.value(Metric.VICTIMS_RANKED) == len(plan.victims) == 2
    assert page.value(Metric.STANDING_VERSION, server="p0") == 1
    assert page.value(Metric.STANDING_VICTIMS, server="p0") == 2
    assert page.value(Metric.KNOWN_STREAMS) == 2
    wanted = {
        metric.spec.name.removesuffix("_total")
        for metric in Metric
        if metric.spec.owner in (Owner.CONTROLLER, Owner.EVERY)
    }
    assert {name for name in page.names if name.startswith("streamfill_")} == wanted
