"""The curves of a cost profile as one page that needs no network: points, fit, and how good it
is."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any, Final

from streamfill.profiling.fits import Curve, Point
from streamfill.profiling.profile_file import CostProfile

TITLES: Final = {
    "recompute": "Recompute: one forward pass",
    "swap_out": "Swap out: device to host memory",
    "swap_in": "Swap in: host memory to device",
    "handoff": "Hand-off: to a decode server",
}
_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
.warning{{background:#fff3cd;color:#533f03;padding:.5rem .8rem;border-radius:.3rem}}</style>
<script>{plotly}</script></head><body><h1>{title}</h1><p>{facts}</p>{sections}
<script>for (const [id, figure] of Object.entries({figures}))
Plotly.newPlot(id, figure.data, figure.layout, {{responsive: true}})</script></body></html>
"""


def render_profile(profile: CostProfile) -> str:
    """The page as text. Needs plotly."""
    from plotly.offline import get_plotlyjs

    title = html.escape(f"Cost profile of {profile.model} on {profile.device}")
    versions = ", ".join(f"{name} {text}" for name, text in sorted(profile.versions.items()))
    facts = html.escape(f"{profile.bytes_per_token} bytes of KV per token; {versions}")
    figures = {name: _figure(name, curve) for name, curve in profile.curves.items()}
    sections = "".join(_section(name, curve) for name, curve in profile.curves.items())
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    return _PAGE.format(
        title=title, facts=facts, plotly=get_plotlyjs(), sections=sections, figures=data
    )


def _section(name: str, curve: Curve) -> str:
    coefficients = ", ".join(f"{key} = {value:.4g}" for key, value in curve.coefficients.items())
    warning = ""
    if curve.warning:
        warning = f'<p class="warning">This fit is poor: {html.escape(curve.warning)}.</p>'
    quality = f"R² {curve.r2:.4f}, median error {100 * curve.median_error:.1f} %"
    return (
        f"<h2>{TITLES.get(name, name)}</h2>{warning}"
        f"<p>{html.escape(coefficients)}<br>{quality}, {len(curve.points)} points</p>"
        f'<div id="{name}"></div>'
    )


def _figure(name: str, curve: Curve) -> dict[str, Any]:
    is_recompute = name == "recompute"
    groups: dict[str, list[Point]] = {}
    for point in curve.points:
        group = f"behind {point.x['prefix_tokens']:.0f} tokens" if is_recompute else "measured"
        groups.setdefault(group, []).append(point)
    axis = "num_tokens" if is_recompute else "num_bytes"
    scale = 1.0 if is_recompute else 1e-6
    data: list[dict[str, Any]] = []
    for group, points in groups.items():
        ordered = sorted(points, key=lambda point: point.x[axis])
        x = [point.x[axis] * scale for point in ordered]
        if not is_recompute or len(groups) <= _FEW_GROUPS:
            data.append(_trace(group, x, [point.seconds for point in ordered], "markers"))
            data.append(_trace("fit", x, [point.predicted_s for point in ordered], "lines"))
    if not data:  # too many prefixes for a line each
        data.append(
            _trace(
                "measured against predicted",
                [1000 * point.predicted_s for point in curve.points],
                [point.seconds for point in curve.points],
                "markers",
            )
        )
        title = "predicted, ms"
    else:
        title = "new tokens" if is_recompute else "MB"
    return {
        "data": data,
        "layout": {
            "height": 380,
            "margin": {"l": 60, "r": 16, "t": 12, "b": 48},
            "xaxis": {"title": {"text": title}},
            "yaxis": {"title": {"text": "measured, ms"}},
        },
    }


_FEW_GROUPS: Final = 8


def _trace(name: str, x: Sequence[float], seconds: Sequence[float], mode: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": list(x),
        "y": [1000 * value for value in seconds],
    }
