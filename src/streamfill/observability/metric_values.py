"""What counts the metrics of one process, made from the enum; the border to `prometheus_client`.

Two ways to give a value:

- `MetricSet.counter` and `MetricSet.histogram` are counted where something happens, by any thread;
- what a loop knows anyway it *publishes*: it puts a frozen object in its place, and a function
  given to `MetricSet.add_source` makes samples of the newest one when somebody asks. Asking
  therefore never waits for the loop, and costs it nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from streamfill import __version__
from streamfill.observability.metrics import Metric, MetricKind


class Sample(NamedTuple):
    """One value of a counter or gauge."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()
    """In the order of the metric's labels."""


class MetricSet:
    """The metrics of one process. Made at its start; each metric at most once."""

    def __init__(self, process_name: str, age_s: Callable[[], float]) -> None:
        """
        Args:
            process_name: ``router``, ``controller`` or the id of a server.
            age_s: seconds since the process's loop last published. For any thread.
        """
        # Without it there is one more series per series, which nobody draws.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        self.add_source(
            lambda: (
                Sample(Metric.BUILD, 1, (process_name, __version__)),
                Sample(Metric.LOOP_AGE, max(0.0, age_s()), (process_name,)),
            )
        )

    def counter(self, metric: Metric) -> Counter:
        """Counts where something happens. Without labels it is there from the start, as 0."""
        spec = metric.spec
        _check_kind(metric, MetricKind.COUNTER)
        return Counter(spec.name, spec.help, spec.labels, registry=self.registry)

    def histogram(self, metric: Metric) -> Histogram:
        """Takes observations where something happens."""
        spec = metric.spec
        _check_kind(metric, MetricKind.HISTOGRAM)
        return Histogram(
            spec.name, spec.help, spec.labels, registry=self.registry, buckets=spec.buckets
        )

    def add_source(self, samples: Callable[[], Iterable[Sample]]) -> None:
        """Ask `samples` at each scrape, in the thread that answers it. It must not wait for the
        process's loop, and look at nothing that the loop changes."""
        self.registry.register(_Source(samples))


class _Source(Collector):
    """Samples as Prometheus's families."""

    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Family]:
        families: dict[Metric, CounterMetricFamily | GaugeMetricFamily] = {}
        for metric, value, labels in self._samples():
            if metric not in families:
                spec = metric.spec
                is_counter = spec.kind is MetricKind.COUNTER
                kind = CounterMetricFamily if is_counter else GaugeMetricFamily
                families[metric] = kind(spec.name, spec.help, labels=spec.labels)
            families[metric].add_metric(labels, value)
        yield from families.values()


def _check_kind(metric: Metric, kind: MetricKind) -> None:
    if metric.spec.kind is not kind:
        raise ValueError(f"{metric.spec.name} is a {metric.spec.kind.value}, no {kind.value}")
