"""A server's `/metrics`, and the steps that its core counts."""

from __future__ import annotations

import threading
import time

import msgspec

from streamfill.messages.common import Role, ServerCounters
from streamfill.observability.exposition import MetricsServer
from streamfill.observability.metrics import Metric, Owner
from streamfill.scheduling.plan import RunReason
from streamfill.serving.core import StepCounts
from streamfill.serving.metrics import COUNTER_METRICS, ServerMetrics, ServerSnapshot
from tests.support.metrics import scrape
from tests.unit.serving.builders import PrefillUnderTest, commit, opened, splice, tokens

LABELS = {"server": "prefill-0", "role": "prefill"}


def snapshot(counters: ServerCounters, steps: StepCounts | None = None) -> ServerSnapshot:
    return ServerSnapshot(
        at_s=time.monotonic(),
        counters=counters,
        steps=steps or StepCounts(),
        controller_alive=True,
        registered=True,
    )


def test_every_counter_has_its_metric() -> None:
    """A field that is added to `ServerCounters` needs a name here, each its own."""
    fields = {field.name for field in msgspec.structs.fields(ServerCounters)}
    assert set(COUNTER_METRICS) == fields
    assert len(set(COUNTER_METRICS.values())) == len(fields)


def test_all_of_a_server_is_exported() -> None:
    """Each metric that the enum gives to servers, with the value that was published."""
    metrics = ServerMetrics("prefill-0", Role.PREFILL)
    server = MetricsServer(metrics.set.registry, host="127.0.0.1", port=0, section="prefill")
    fields = msgspec.structs.fields(ServerCounters)
    counters = ServerCounters(**{field.name: 100 + n for n, field in enumerate(fields)})
    try:
        assert scrape(server.port).value(Metric.KV_USED, **LABELS) == 0
        metrics.publish(snapshot(counters, StepCounts(7, 5, {RunReason.SEGMENT: 3})))
        page = scrape(server.port)
    finally:
        server.close()
    for name, metric in COUNTER_METRICS.items():
        assert page.value(metric, **LABELS) == getattr(counters, name)
    assert page.value(Metric.TURNS, **LABELS) == 7
    assert page.value(Metric.STEPS, **LABELS) == 5
    assert page.value(Metric.RUNS, **LABELS, reason="segment") == 3
    assert page.value(Metric.RUNS, **LABELS, reason="commit") == 0
    assert page.value(Metric.CONTROLLER_ALIVE, **LABELS) == 1
    wanted = {
        metric.spec.name.removesuffix("_total")
        for metric in Metric
        if metric.spec.owner in (Owner.SERVER, Owner.EVERY)
    }
    assert {name for name in page.names if name.startswith("streamfill_")} == wanted


def test_a_scrape_in_the_middle_of_a_long_step() -> None:
    """It is answered at once from what was published before the step, and says how old that is."""
    metrics = ServerMetrics("prefill-0", Role.PREFILL)
    server = MetricsServer(metrics.set.registry, host="127.0.0.1", port=0, section="prefill")
    is_published, step_over = threading.Event(), threading.Event()

    def loop() -> None:
        metrics.publish(snapshot(ServerCounters(num_running=3)))
        is_published.set()
        step_over.wait(60.0)
        metrics.publish(snapshot(ServerCounters(num_running=0)))

    scheduler = threading.Thread(target=loop)
    scheduler.start()
    try:
        assert is_published.wait(20.0)
        time.sleep(0.3)
        page = scrape(server.port)
        assert page.value(Metric.RUNNING, **LABELS) == 3
        assert page.value(Metric.LOOP_AGE, process="prefill-0") >= 0.25
        over_s = time.monotonic()
        step_over.set()
        scheduler.join(10.0)
        page = scrape(server.port)
        assert page.value(Metric.RUNNING, **LABELS) == 0
        assert page.value(Metric.LOOP_AGE, process="prefill-0") < time.monotonic() - over_s
    finally:
        step_over.set()
        server.close()


def test_steps_and_runs_are_counted() -> None:
    """A turn with work behind it is a step; each request to the engine counts with its reason."""
    server = PrefillUnderTest()
    server.turn()
    assert server.core.step_counts() == StepCounts(1, 0, {})
    server.run(opened(), splice(tokens(100)))
    counts = server.core.step_counts()
    num_segments = counts.num_runs[RunReason.SEGMENT]
    assert num_segments >= 2, "100 tokens do not fit one step of 64"
    assert counts.num_steps >= num_segments
    assert counts.num_turns > counts.num_steps
    server.run(commit(100))
    assert server.core.step_counts().num_runs[RunReason.COMMIT] == 1
