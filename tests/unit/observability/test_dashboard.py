"""The dashboard and the Prometheus configuration speak of metrics and files that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from streamfill.launcher.metrics_targets import TARGETS_FILE
from streamfill.observability.metrics import METRICS_PATH, Metric, MetricKind

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARD: dict[str, Any] = json.loads(
    (DEPLOY / "grafana" / "streamfill.json").read_text(encoding="utf-8")
)
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = sorted(
    {target["expr"] for panel in PANELS for target in panel.get("targets", ())}
    | {
        variable["query"]["query"]
        for variable in DASHBOARD["templating"]["list"]
        if isinstance(variable["query"], dict)
    }
)
BY_NAME = {metric.spec.name: metric.spec for metric in Metric}
PROMETHEUS_LABELS = {"cluster", "le"}
"""Put on by the targets file, and by histograms."""


def used(query: str) -> Iterator[tuple[str, str, set[str]]]:
    """Each metric of a query: its name in the enum, the suffix of a histogram's part, and the
    labels that it is selected by."""
    for name, selector in re.findall(r"\b(streamfill_[a-z_]+)(\{[^}]*\})?", query):
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        full = bare if bare in BY_NAME and bare != name else name
        yield full, name[len(full) :], set(re.findall(r"(\w+)=~?\"", selector))


def test_there_is_something_to_check() -> None:
    """So that an empty dashboard does not pass."""
    assert len(QUERIES) > 30


@pytest.mark.parametrize("query", QUERIES)
def test_queries_speak_of_the_enum(query: str) -> None:
    """Every name exists, counters are looked at as rates, histograms by their parts, and labels are
    those of the metric."""
    found = list(used(query))
    assert found
    for name, part, labels in found:
        spec = BY_NAME[name]
        assert labels <= {*spec.labels, *PROMETHEUS_LABELS}
        assert bool(part) == (spec.kind is MetricKind.HISTOGRAM)
        if spec.kind is not MetricKind.GAUGE:
            assert re.search(rf"rate\({name}{part}\{{[^}}]*\}}\[\$__rate_interval\]\)", query)
    grouped = re.search(r"by \(([^)]*)\)", query)
    if grouped is not None:
        known = set().union(*(BY_NAME[name].labels for name, _, _ in found))
        assert set(grouped[1].split(", ")) <= known | PROMETHEUS_LABELS


def test_legends_name_labels_that_are_there() -> None:
    """A placeholder without its label would be shown as an empty text."""
    for panel in PANELS:
        for target in panel.get("targets", ()):
            known = {label for name, _, _ in used(target["expr"]) for label in BY_NAME[name].labels}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known


def test_panels_do_not_overlap() -> None:
    """Each has its own number and its own place in the grid of 24 columns."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


def test_panels_explain_themselves() -> None:
    """With a title and a sentence, and the data source that the user chooses."""
    for panel in PANELS:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize(
    "subject",
    ["ttft", "open_streams", "kv_used", "preemptions", "handoffs", "servers", "placement"],
)
def test_what_a_cluster_is_watched_for_is_there(subject: str) -> None:
    """Waits, streams, memory, preemptions, hand-offs, servers, placement."""
    assert any(subject in query for query in QUERIES)


def test_prometheus_reads_what_the_launcher_writes() -> None:
    """By the name of the file, at the path that every process answers."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    (files,) = (found["files"] for found in jobs["streamfill"]["file_sd_configs"])
    assert all(Path(path).name == TARGETS_FILE for path in files)
    for job in jobs.values():
        assert job.get("metrics_path", "/metrics") == METRICS_PATH
    (elsewhere,) = jobs["streamfill-elsewhere"]["static_configs"]
    assert set(elsewhere["labels"]) == {"cluster"}
