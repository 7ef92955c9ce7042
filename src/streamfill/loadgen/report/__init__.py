"""One self-contained page about a comparison: ``write_report``.

* ``page``: puts everything together and writes the file; ``page.jinja`` is its text and look.
* ``loads``: which runs may be set beside each other.
* ``story``: the sentences on top: what came out, and what to be careful about.
* ``tables``: the table of modes, environment and configuration.
* ``distributions``, ``trends``, ``stages``, ``timeline``: the charts, as plain data for plotly.js.
* ``stream_marks``: what a timeline shows of each stream.
* ``drawing``: what charts have in common; ``palette``: colours; ``wording``: numbers as text.

Everything but ``page`` is pure. Nothing here imports plotly but to copy its script into the page.
"""

from streamfill.loadgen.report.page import write_report

__all__ = ["write_report"]
