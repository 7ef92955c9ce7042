"""The openings and endings of streams in the router's log, as they are written.

The log is the one witness that knows of every stream, also of those whose client has gone; and it
would show one that ended twice.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

from streamfill.stream.state import StreamState

_LINE = re.compile(
    r"\S+ \w+ \S+ (?P<event>stream_opened|stream_ended) stream=\d+ request_id=(?P<request_id>\S+)"
    r"(?: outcome=(?P<outcome>\w+))?"
)


class RouterLog:
    """Reads a log that grows.

    Attributes:
        openings: by request id, of streams whose request id begins with the prefix.
        endings: likewise.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        self.openings: Counter[str] = Counter()
        self.endings: defaultdict[str, list[StreamState]] = defaultdict(list)
        self._path = path
        self._prefix = prefix
        self._position = 0
        self._rest = b""

    def read_on(self) -> None:
        """Take in what was written since the last time."""
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take_in(line.decode("utf-8", errors="replace"))

    @property
    def num_opened(self) -> int:
        """All openings."""
        return self.openings.total()

    @property
    def outcomes(self) -> Counter[str]:
        """All endings, by state."""
        return Counter(str(state) for states in self.endings.values() for state in states)

    def _take_in(self, line: str) -> None:
        match = _LINE.match(line)
        if match is None or not match["request_id"].startswith(self._prefix):
            return
        if match["event"] == "stream_opened":
            self.openings[match["request_id"]] += 1
        elif match["outcome"] is not None:
            self.endings[match["request_id"]].append(StreamState(match["outcome"]))


def error_lines(folder: Path) -> list[str]:
    """Lines of level ERROR and above in all logs of a cluster, but for SGLang's own."""
    pattern = re.compile(r"\S+ (ERROR|CRITICAL) \S+ (?!log )|Traceback \(most recent")
    return [
        f"{path.name}: {line}"
        for path in sorted(folder.glob("*.log"))
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if pattern.match(line)
    ]
