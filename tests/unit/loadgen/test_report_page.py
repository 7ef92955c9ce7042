"""The page as a file: what is in it, that it loads nothing, and that odd runs do not break it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from plotly import graph_objects
from plotly.offline import get_plotlyjs

from streamfill.errors import ConfigError
from streamfill.loadgen.figures import Figure
from streamfill.loadgen.metrics import RunSummary, summarise
from streamfill.loadgen.outcome import median_of
from streamfill.loadgen.records import ModeName, RequestRecord, RunResult
from streamfill.loadgen.report import write_report
from streamfill.loadgen.report.page import render
from streamfill.loadgen.report.wording import milliseconds
from tests.unit.loadgen.report_builders import comparison, simulated_run
from tests.unit.loadgen.run_builders import failed, result

MOST_BYTES = 15_000_000
EVIL = "</script><script>alert(1)</script><a href='http://evil.example'>"


def page_of(results: Sequence[RunResult], **options: Any) -> str:
    summaries = [summarise(each) for each in results]
    return render(results, summaries, {"cpu": "slow"}, **{"skipped": {}, **options})


def without_plotly(page: str) -> str:
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def data(page: str, name: str) -> Any:
    """What a data element of the page holds."""
    found = re.search(f'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found.group(1))


def with_records(run: RunResult, **fields: Any) -> RunResult:
    """The run with fields of all its requests replaced."""
    records = tuple(msgspec.structs.replace(record, **fields) for record in run.records)
    return msgspec.structs.replace(run, records=records)


@pytest.fixture(scope="module")
def compared() -> list[RunResult]:
    """Two runs of each mode."""
    return comparison(num_runs=2, num_requests=30)


@pytest.fixture(scope="module")
def page(compared: list[RunResult]) -> str:
    """Their page."""
    return page_of(compared, command="streamfill bench compare --trace t")


def test_page_loads_nothing(page: str) -> None:
    """Nothing in the page points outside, and its policy lets a browser load nothing."""
    rest = without_plotly(page)
    assert not re.search(r"https?://|@import|url\(|\bsrc=|\bhref=|<link|<iframe|<img", rest)
    assert "default-src 'none'" in rest
    assert 'plotlyServerURL: ""' in rest


def test_figures_are_those_of_the_summaries(compared: list[RunResult], page: str) -> None:
    """The page holds the summaries themselves, and its table their medians."""
    summaries = [summarise(each) for each in compared]
    assert msgspec.convert(data(page, "summaries"), list[RunSummary]) == summaries
    for label in ("oneshot", "warmup", "stream"):
        runs = [summary for summary in summaries if summary.label == label]
        row = re.search(f"</span>{label}</th>(.*?)</tr>", page)
        assert row is not None
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row.group(1))
        figures = (Figure.TTFT_LAST_SEGMENT, Figure.TTFT_QUERY)
        wanted = [milliseconds(median_of(runs, f, p)) for f in figures for p in (50, 95, 99)]
        assert cells[:6] == wanted


def test_every_drawing_is_one_for_plotly(page: str) -> None:
    """All drawings are figures that plotly accepts, and each chart shows one that is there."""
    held = data(page, "drawings")
    for drawing in held["drawings"]:
        graph_objects.Figure(drawing)
    for name, views in held["charts"].items():
        shown = re.search(f'id="{name}" data-shown="(.*?)"', page)
        assert shown is not None
        assert views[shown.group(1)] < len(held["drawings"])


def test_foreign_texts_stay_texts(compared: list[RunResult]) -> None:
    """Ids, errors and names with HTML in them are shown, not obeyed."""
    evil = [
        msgspec.structs.replace(
            with_records(run, request_id=EVIL, error=EVIL, session_id=EVIL, text=EVIL),
            label=f"{EVIL}:{run.label}",
            trace=EVIL,
        )
        for run in compared[:2]
    ]
    broken = with_records(evil[1], error_code=EVIL)
    page = page_of(
        [evil[0], broken],
        skipped={EVIL: EVIL},
        command=EVIL,
        config={EVIL: EVIL},
        remarks=[EVIL],
    )
    rest = without_plotly(page)
    assert "<script>alert" not in rest
    assert "<a " not in rest
    assert rest.count("</script>") == 4
    texts = list(_texts(data(page, "drawings")))
    assert any("&lt;script&gt;" in text for text in texts)
    assert not any("<script" in text or "<a " in text for text in texts)


def _texts(value: Any) -> list[str]:
    """All texts that plotly may show."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, each in value.items() if key != "charts" for text in _texts(each)]
    return [text for each in value for text in _texts(each)] if isinstance(value, list) else []


def _silent(run: RunResult) -> RunResult:
    return with_records(run, server_events=(), num_prompt_tokens=None, handoff=None)


def _one_token(run: RunResult) -> RunResult:
    def cut(record: RequestRecord) -> RequestRecord:
        names = ("SECOND_TOKEN", "TOKEN", "LAST_TOKEN")
        events = tuple(event for event in record.client_events if event[0] not in names)
        return msgspec.structs.replace(record, client_events=events)

    return msgspec.structs.replace(run, records=tuple(cut(record) for record in run.records))


@pytest.mark.parametrize(
    "results",
    [
        pytest.param([simulated_run(ModeName.STREAM, num_requests=1)], id="one request"),
        pytest.param([simulated_run(ModeName.WARMUP, num_requests=9)], id="one run"),
        pytest.param([result(failed(0), failed(1), label="stream")], id="nothing completed"),
        pytest.param([result(label="stream"), result(label="oneshot")], id="no requests"),
        pytest.param([_silent(each) for each in comparison(1, 9)], id="no server events"),
        pytest.param([_one_token(each) for each in comparison(1, 9)], id="one token"),
        pytest.param(
            [with_records(each, lag_s=(), is_warm_up=True) for each in comparison(1, 5)],
            id="warm-ups only",
        ),
        pytest.param(
            [*comparison(1, 9), result(failed(0), label="vllm:oneshot")], id="one mode failed"
        ),
    ],
)
def test_odd_runs_have_a_page(results: list[RunResult]) -> None:
    """A page is drawn of runs that lack whatever a run can lack."""
    page = page_of(results)
    for drawing in data(page, "drawings")["drawings"]:
        graph_objects.Figure(drawing)
    assert "NaN" not in json.dumps(data(page, "summaries"))


def test_file_that_cannot_be_written(tmp_path: Path, compared: list[RunResult]) -> None:
    """The error names the option and the file."""
    path = tmp_path / "missing" / "report.html"
    with pytest.raises(ConfigError, match=r"--report.*missing"):
        write_report(path, compared, [summarise(each) for each in compared], {})


def test_no_runs_have_no_page() -> None:
    """A page about nothing is a mistake of the caller."""
    with pytest.raises(ValueError, match="at least one run"):
        page_of([])


@pytest.mark.slow
def test_large_comparison_stays_small() -> None:
    """Six runs of 2,000 requests with long answers make a page that opens quickly."""
    runs = [simulated_run(mode, num_requests=100, num_output=32) for mode in ModeName]
    large = [
        msgspec.structs.replace(each, run=number, records=_repeated(each.records, 20))
        for number in range(2)
        for each in runs
    ]
    assert sum(len(each.records) for each in large) == 12_000
    assert len(page_of(large).encode()) < MOST_BYTES


def _repeated(records: Sequence[RequestRecord], times: int) -> tuple[RequestRecord, ...]:
    return tuple(
        msgspec.structs.replace(record, index=record.index + len(records) * number)
        for number in range(times)
        for record in records
    )
