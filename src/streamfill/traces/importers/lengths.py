"""Requests of which only lengths are known: what the importers of such formats share."""

from __future__ import annotations

import itertools

from streamfill.messages.common import StreamMode
from streamfill.traces.format import Request, Segment
from streamfill.traces.importers.bad_rows import BadRows, Problem, Row
from streamfill.traces.importers.interface import ImportOptions, NoAnswer

LEFT_OUT_NO_ANSWER = "rows without an answer (--no-answer keep takes them)"


class LengthRequests:
    """Makes the requests of one pass; each is one segment that is there at once."""

    def __init__(self, name: str, options: ImportOptions, bad_rows: BadRows) -> None:
        """
        Args:
            name: of the format; the requests are called after it and numbered from 0.
        """
        self._name = name
        self._no_answer = options.no_answer
        self._bad_rows = bad_rows
        self._numbers = itertools.count()

    def request(
        self,
        row: Row,
        *,
        arrival_ms: float,
        segment: Segment,
        num_output_tokens: int,
        output_column: str,
        session_id: str | None = None,
    ) -> Request | None:
        """The request of a row; None when it has no answer and is to be left out.

        Raises:
            BadRowError: it has no answer, and that is to be an error.
        """
        if num_output_tokens == 0:
            if self._no_answer is NoAnswer.ERROR:
                raise row.error(
                    Problem.NO_ANSWER,
                    output_column,
                    num_output_tokens,
                    "must be at least 1; --no-answer skip leaves such rows out",
                )
            if self._no_answer is NoAnswer.SKIP:
                self._bad_rows.leave_out(LEFT_OUT_NO_ANSWER)
                return None
        return Request(
            id=f"{self._name}-{next(self._numbers)}",
            arrival_ms=arrival_ms,
            mode=StreamMode.APPEND,
            segments=(segment,),
            max_output_tokens=max(1, num_output_tokens),
            session_id=session_id,
        )
