"""A made-up schedule that sends pieces at a steady rate, to measure the generator itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamfill.messages.common import StreamMode
from streamfill.traces.script import Script, Step


@dataclass(frozen=True, kw_only=True)
class SteadySchedule:
    """Many streams that take turns, so that pieces are due at the same distance all the time.

    Attributes:
        num_streams: open at the same time, but for the first and the last round.
        appends_per_s: of all streams together.
        duration_s: from the first piece to about the last.
        piece_bytes: of text.
    """

    num_streams: int
    appends_per_s: float
    duration_s: float
    piece_bytes: int

    @property
    def num_rounds(self) -> int:
        """Pieces of each stream; the last one with the commit."""
        return max(1, round(self.duration_s * self.appends_per_s / self.num_streams))

    @property
    def starts_s(self) -> list[float]:
        """Of each stream."""
        return [number / self.appends_per_s for number in range(self.num_streams)]

    def scripts(self) -> Iterator[Script]:
        """What each stream sends."""
        period_s = self.num_streams / self.appends_per_s
        for number, start_s in enumerate(self.starts_s):
            word = f"{number:06d} "
            text = (word * (1 + self.piece_bytes // len(word)))[: self.piece_bytes]
            steps = [Step(due_s=turn * period_s, piece=text) for turn in range(self.num_rounds)]
            yield Script(
                request_id=f"s{number}",
                session_id=None,
                mode=StreamMode.APPEND,
                arrival_s=start_s,
                steps=tuple(steps),
                commit_due_s=steps[-1].due_s,
                max_output_tokens=1,
            )
