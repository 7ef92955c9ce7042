"""A trace file as something to replay: one pass to know its arrivals, then scripts as needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from streamfill.errors import TraceError
from streamfill.messages.common import StreamMode
from streamfill.traces.files import TraceReader
from streamfill.traces.script import Script, Scripts


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A trace that was read once and found right.

    Attributes:
        name: as its header has it.
        arrivals_s: of each request, since the start of the trace, scaled.
        durations_s: from the arrival of each request until its prompt is complete, scaled.
        has_updates: some request replaces its context.
        num_pieces: of all requests together.
        time_scale: all times of the trace are multiplied by it.
    """

    path: Path
    name: str
    arrivals_s: tuple[float, ...]
    durations_s: tuple[float, ...]
    has_updates: bool
    num_pieces: int
    time_scale: float = 1.0

    @property
    def num_requests(self) -> int:
        """To be replayed."""
        return len(self.arrivals_s)

    def scripts(self, vocab_size: int) -> Iterator[Script]:
        """What the client does for each request, made while the file is read; any number of times.

        Args:
            vocab_size: of the model that is asked.

        Raises:
            TraceError: the file changed meanwhile.
        """
        with TraceReader(self.path) as reader:
            scripts = Scripts(reader.header, reader.documents, vocab_size=vocab_size)
            for request in islice(reader, self.num_requests):
                yield scripts.script(request, time_scale=self.time_scale)


def read_workload(path: Path, *, limit: int | None = None, time_scale: float = 1.0) -> Workload:
    """Reads a trace through.

    Args:
        limit: only so many requests from its start; None: all.
        time_scale: of all times, arrivals and delays.

    Raises:
        TraceError: it cannot be read, something in it is wrong, or it has no request.
    """
    arrivals_s: list[float] = []
    durations_s: list[float] = []
    has_updates, num_pieces = False, 0
    with TraceReader(path) as reader:
        for request in islice(reader, limit):
            arrivals_s.append(request.arrival_ms / 1000.0 * time_scale)
            delays_ms = sum(segment.delay_ms for segment in request.segments)
            durations_s.append((delays_ms + request.commit_delay_ms) / 1000.0 * time_scale)
            has_updates |= request.mode is StreamMode.UPDATE
            num_pieces += len(request.segments)
        name = reader.header.name
    if not arrivals_s:
        raise TraceError(f"{path}: has no request")
    return Workload(
        path=path,
        name=name,
        arrivals_s=tuple(arrivals_s),
        durations_s=tuple(durations_s),
        has_updates=has_updates,
        num_pieces=num_pieces,
        time_scale=time_scale,
    )
