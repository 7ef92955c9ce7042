"""Writes the page: sentences, tables and charts, with everything they need in one file.

The page loads nothing: plotly's script stands in it once, and its content policy forbids any
request. Foreign texts, such as ids from a trace, are escaped in HTML by the template, in charts by
``drawing.plain``, and in the page's data by ``_script_data``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from streamfill.errors import ConfigError
from streamfill.loadgen.metrics import RunSummary
from streamfill.loadgen.records import RunResult
from streamfill.loadgen.report.costs import costs_chart
from streamfill.loadgen.report.distributions import distribution_charts
from streamfill.loadgen.report.drawing import Chart, Drawing
from streamfill.loadgen.report.loads import batches
from streamfill.loadgen.report.stages import stages_chart
from streamfill.loadgen.report.story import (
    Remark,
    all_remarks,
    settings,
    story,
    subject,
    tiles,
)
from streamfill.loadgen.report.tables import COLUMNS, DEFINITIONS, GROUPS, facts, mode_rows
from streamfill.loadgen.report.timeline import timeline_charts
from streamfill.loadgen.report.trends import over_rate_chart, over_time_chart


def write_report(
    path: Path,
    results: Sequence[RunResult],
    summaries: Sequence[RunSummary],
    environment: Mapping[str, Any] | msgspec.Struct,
    *,
    skipped: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    command: str = "",
    remarks: Sequence[str] = (),
    option: str = "--report",
) -> None:
    """Writes one HTML page about runs, which may have met several loads.

    Args:
        path: the file; replaced if it is there.
        results: at least one run. Of one load and mode, no two have the same number; see
            ``loads.renumbered``.
        summaries: of each, in the same order.
        environment: where it was measured.
        skipped: why a mode did not run, by its label.
        config: of the load and the servers, for the table at the end.
        command: the command line that made the runs.
        remarks: more warnings, each a sentence.
        option: by which the user named the file, for errors.

    Raises:
        ConfigError: the file cannot be written.
        ValueError: there are no runs, or not as many summaries.
    """
    text = render(
        results,
        summaries,
        environment,
        skipped=skipped or {},
        config=config,
        command=command,
        remarks=remarks,
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); name a file in a folder that exists"
        raise ConfigError(option, str(path), remedy) from error


def render(
    results: Sequence[RunResult],
    summaries: Sequence[RunSummary],
    environment: Mapping[str, Any] | msgspec.Struct,
    *,
    skipped: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
    command: str = "",
    remarks: Sequence[str] = (),
) -> str:
    """The page as text.

    Raises:
        ValueError: there are no runs, or not as many summaries.
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    by_load = batches(results, summaries)
    if not by_load:
        raise ValueError("a report needs at least one run")
    focus = by_load[-1]
    over_rate, costs = over_rate_chart(by_load), costs_chart(by_load)
    charts = {
        "distributions": distribution_charts(by_load),
        "trends": [
            *([over_rate] if over_rate else []),
            over_time_chart(by_load),
            *([costs] if costs else []),
        ],
        "stages": [stages_chart(by_load)],
        "timelines": timeline_charts(by_load),
    }
    template = resources.files("streamfill.loadgen.report").joinpath("page.jinja")
    # No loader and no filters of a file's own: the template is all there is.
    jinja = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return jinja.from_string(template.read_text(encoding="utf-8")).render(
        subject=subject(by_load),
        story=story(focus),
        settings=settings(by_load),
        focus=focus.name if len(by_load) > 1 else "",
        tiles=tiles(focus),
        remarks=[*(Remark("warning", text) for text in remarks), *all_remarks(by_load, skipped)],
        tables=[(batch.name, mode_rows(batch)) for batch in by_load],
        groups=GROUPS,
        columns=COLUMNS,
        charts=charts,
        definitions=DEFINITIONS,
        environment=facts(environment),
        config=facts(config),
        command=command,
        plotly=Markup(get_plotlyjs()),
        drawings=Markup(_script_data(_drawings([c for each in charts.values() for c in each]))),
        summaries=Markup(_script_data(msgspec.to_builtins(list(summaries)))),
    )


def _drawings(charts: Sequence[Chart]) -> dict[str, Any]:
    """Every drawing once, and by chart the names under which it shows them."""
    numbers: dict[int, int] = {}
    drawings: list[Drawing] = []
    views: dict[str, dict[str, int]] = {}
    for chart in charts:
        for drawing in chart.views.values():
            if id(drawing) not in numbers:
                numbers[id(drawing)] = len(drawings)
                drawings.append(drawing)
        views[chart.id] = {name: numbers[id(each)] for name, each in chart.views.items()}
    return {"drawings": drawings, "charts": views}


def _script_data(value: Any) -> str:
    """JSON that may stand in a script element, whatever texts are in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
