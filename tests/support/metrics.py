"""Reading ``/metrics`` as Prometheus reads it: over a socket, through the parser of its library."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from streamfill.observability.metrics import METRICS_PATH, Metric

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Scrape:
    """All samples of one page, by name and labels."""

    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]
    names: frozenset[str]
    """Of the metrics, as their type is declared; counters without ``_total``."""

    def value(self, metric: Metric | str, **labels: str) -> float:
        """Of exactly these labels."""
        name = metric.spec.name if isinstance(metric, Metric) else metric
        return self.samples[name, frozenset(labels.items())]

    def total(self, metric: Metric | str, **labels: str) -> float:
        """The sum over all samples that have these labels and perhaps others."""
        name = metric.spec.name if isinstance(metric, Metric) else metric
        wanted = frozenset(labels.items())
        return sum(value for (n, has), value in self.samples.items() if n == name and wanted <= has)

    def count(self, metric: Metric) -> float:
        """Observations of a histogram, over all labels."""
        return self.total(f"{metric.spec.name}_count")

    def sum(self, metric: Metric) -> float:
        """Of these observations."""
        return self.total(f"{metric.spec.name}_sum")


def scrape(port: int, timeout_s: float = TIMEOUT_S) -> Scrape:
    """The page on this port of the loopback address."""
    return scrape_url(f"http://127.0.0.1:{port}{METRICS_PATH}", timeout_s)


def scrape_url(url: str, timeout_s: float = TIMEOUT_S) -> Scrape:
    """The page at this address."""
    with urllib.request.urlopen(url, timeout=timeout_s) as reply:
        return _parsed(reply.read().decode())


def scrape_registry(registry: Collector) -> Scrape:
    """The page that would be made of it."""
    return _parsed(generate_latest(registry).decode())


def _parsed(text: str) -> Scrape:
    families = list(text_string_to_metric_families(text))
    samples = {
        (sample.name, frozenset(sample.labels.items())): float(sample.value)
        for family in families
        for sample in family.samples
    }
    return Scrape(samples, frozenset(family.name for family in families))
