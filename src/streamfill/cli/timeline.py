"""A picture of what happened when, made of characters. Pure.

::

                0 s       1 s       2 s       3 s
    streamed
      sent      1         2         3         ?
      computed  ======    ======    ======    ==
      answer                                    1-2--------|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LABEL_WIDTH: Final = 12
_MIN_COLUMNS: Final = 20
_STEPS_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
_MIN_COLUMNS_PER_MARK: Final = 9


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One piece of the prompt. Times are in seconds on the axis that all runs share."""

    sent_s: float
    computed_s: float


@dataclass(frozen=True, kw_only=True)
class TimelineRun:
    """One request."""

    title: str
    pieces: Sequence[Piece]
    """Those before the commit."""
    commit_s: float
    """When the last piece was sent."""
    token_s: Sequence[float]
    """When each token came; at least one."""


def draw_timeline(runs: Sequence[TimelineRun], width: int) -> list[str]:
    """The runs below one time axis, in lines of at most `width` characters.

    A digit is a piece as it is sent (its number modulo 10), ``?`` the last piece, ``=`` computing
    the prompt; in the answer ``1`` and ``2`` are the first two tokens and ``|`` the last.
    """
    columns = max(_MIN_COLUMNS, width - LABEL_WIDTH)
    end_s = max((time_s for run in runs for time_s in (*run.token_s, run.commit_s)), default=0.0)
    scale = _Scale(columns, end_s)
    lines = [" " * LABEL_WIDTH + scale.axis()]
    for run in runs:
        lines.append(run.title)
        lines.extend(_rows(run, scale))
    return [line.rstrip() for line in lines]


def _rows(run: TimelineRun, scale: _Scale) -> list[str]:
    first_s = run.token_s[0]
    sent, computed, answer = scale.blank(), scale.blank(), scale.blank()
    for piece in run.pieces:
        scale.fill(computed, piece.sent_s, piece.computed_s, "=")
    scale.fill(computed, run.commit_s, first_s, "=")
    for number, piece in enumerate(run.pieces, start=1):
        scale.put(sent, piece.sent_s, str(number % 10))
    scale.put(sent, run.commit_s, "?")
    scale.fill(answer, first_s, run.token_s[-1], "-")
    scale.put(answer, run.token_s[-1], "|")
    if len(run.token_s) > 1:
        scale.put(answer, run.token_s[1], "2")
    scale.put(answer, first_s, "1")
    rows = (("sent", sent), ("computed", computed), ("answer", answer))
    return [f"  {name}".ljust(LABEL_WIDTH) + "".join(cells) for name, cells in rows]


class _Scale:
    """From seconds to columns."""

    def __init__(self, columns: int, end_s: float) -> None:
        self._columns = columns
        self._end_s = max(end_s, 1e-3)

    def blank(self) -> list[str]:
        return [" "] * self._columns

    def column(self, time_s: float) -> int:
        return min(self._columns - 1, max(0, int(time_s / self._end_s * self._columns)))

    def put(self, cells: list[str], time_s: float, mark: str) -> None:
        cells[self.column(time_s)] = mark

    def fill(self, cells: list[str], start_s: float, end_s: float, mark: str) -> None:
        for column in range(self.column(start_s), self.column(end_s) + 1):
            cells[column] = mark

    def axis(self) -> str:
        per_mark = self._end_s * _MIN_COLUMNS_PER_MARK / self._columns
        step_s = next((step for step in _STEPS_S if step >= per_mark), _STEPS_S[-1])
        cells = self.blank()
        for number in range(int(self._end_s / step_s) + 1):
            label = f"{number * step_s:g} s"
            start = self.column(number * step_s)
            if start + len(label) <= self._columns:
                cells[start : start + len(label)] = label
        return "".join(cells)
