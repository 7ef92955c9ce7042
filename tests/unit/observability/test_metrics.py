"""The enum of all metrics, its page, and what counts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from streamfill.observability.metric_values import MetricSet, Sample
from streamfill.observability.metrics import Metric, MetricKind, Owner
from streamfill.observability.metrics_page import BEGIN, END, main, metrics_tables, with_tables

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def page_of(metrics: MetricSet) -> str:
    return generate_latest(metrics.registry).decode()


@pytest.mark.parametrize("metric", Metric, ids=lambda metric: metric.spec.name)
def test_names_keep_to_prometheus_rules(metric: Metric) -> None:
    """Base units at the end, ``_total`` for counters and for nothing else, a sentence, buckets."""
    spec = metric.spec
    assert re.fullmatch(r"streamfill(_[a-z]+)+", spec.name)
    assert all(re.fullmatch(r"[a-z]+", label) for label in spec.labels)
    assert spec.name.endswith("_total") == (spec.kind is MetricKind.COUNTER)
    bare = spec.name.removesuffix("_total")
    for unit in ("seconds", "bytes"):
        assert (spec.unit == unit) == bare.endswith(f"_{unit}")
    assert spec.help[0].isupper()
    assert spec.help.endswith(".")
    assert bool(spec.buckets) == (spec.kind is MetricKind.HISTOGRAM)
    assert list(spec.buckets) == sorted(set(spec.buckets))


def test_no_name_is_given_twice() -> None:
    """An enum would silently make the second one an alias."""
    names = [member.spec.name for member in Metric.__members__.values()]
    assert len(names) == len(set(names)) == len(Metric)


def test_the_page_is_what_the_enum_says() -> None:
    """docs/metrics.md holds the generated tables; `metrics_page --write` renews them."""
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page
    assert all(f"| `{metric.spec.name}` | {metric.spec.kind.value} " in page for metric in Metric)


def test_the_tables_are_put_between_the_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of the page stays, and a page without marks is refused with a reason."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    assert main(["--write", str(page)]) == 0
    assert page.read_text() == f"before\n{BEGIN}\n{metrics_tables()}\n{END}\nbehind\n"
    page.write_text("nothing here\n")
    assert main(["--write", str(page)]) == 2
    assert BEGIN in capsys.readouterr().err
    assert main([]) == 0
    assert all(owner.value in capsys.readouterr().out for owner in list(Owner)[:1])


def test_counters_and_histograms_count() -> None:
    """Under the names of the enum, without one more series per series."""
    metrics = MetricSet("router", lambda: 0.0)
    metrics.counter(Metric.TOKENS_OUT).inc(3)
    metrics.counter(Metric.HANDOFFS).labels("done").inc()
    metrics.histogram(Metric.TTFT_COMMIT).observe(0.3)
    page = page_of(metrics)
    assert "\nstreamfill_router_tokens_out_total 3.0\n" in page
    assert '\nstreamfill_router_handoffs_total{outcome="done"} 1.0\n' in page
    assert 'streamfill_router_ttft_from_commit_seconds_bucket{le="0.2"} 0.0' in page
    assert 'streamfill_router_ttft_from_commit_seconds_bucket{le="0.35"} 1.0' in page
    assert "_created" not in page


def test_a_source_is_asked_at_each_scrape() -> None:
    """And its values stand under the labels that the enum gives them."""
    metrics = MetricSet("prefill-0", lambda: 1.5)
    values = [1.0]
    metrics.add_source(
        lambda: [
            Sample(Metric.KV_USED, values[0], ("prefill-0", "prefill")),
            Sample(Metric.KV_USED, 9, ("prefill-1", "prefill")),
        ]
    )
    line = 'streamfill_server_kv_used_tokens{role="prefill",server="prefill-0"} '
    assert f"{line}1.0" in page_of(metrics)
    values[0] = 2.0
    page = page_of(metrics)
    assert f"{line}2.0" in page
    assert page.count("# TYPE streamfill_server_kv_used_tokens gauge") == 1
    assert 'streamfill_loop_age_seconds{process="prefill-0"} 1.5' in page
    assert "process_cpu_seconds_total" in page


def test_a_metric_is_made_as_what_it_is() -> None:
    """A gauge cannot be counted, nor a counter observed."""
    metrics = MetricSet("router", lambda: 0.0)
    with pytest.raises(ValueError, match="streamfill_router_ready is a gauge"):
        metrics.counter(Metric.READY)
    with pytest.raises(ValueError, match="is a counter"):
        metrics.histogram(Metric.TOKENS_OUT)
