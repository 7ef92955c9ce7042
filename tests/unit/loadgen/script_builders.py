"""Scripts for tests of what replays them."""

from __future__ import annotations

from collections.abc import Sequence

from streamfill.messages.common import StreamMode
from streamfill.traces.script import Content, Script, Step


def script(
    request_id: str = "q0",
    *,
    pieces: Sequence[Content] = ("a", "b", "c"),
    dues_s: Sequence[float] | None = None,
    commit_due_s: float | None = None,
    mode: StreamMode = StreamMode.APPEND,
    max_output_tokens: int = 3,
) -> Script:
    """By default a piece each second from the query on, the last one with the commit."""
    dues = [float(number) for number in range(len(pieces))] if dues_s is None else dues_s
    return Script(
        request_id=request_id,
        session_id=None,
        mode=mode,
        arrival_s=0.0,
        steps=tuple(Step(due_s=d, piece=p) for d, p in zip(dues, pieces, strict=True)),
        commit_due_s=dues[-1] if commit_due_s is None else commit_due_s,
        max_output_tokens=max_output_tokens,
    )
