"""What tests of `streamfill bench` commands share: a fake router, a trace, the RESULT line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamfill.messages.common import StreamMode
from streamfill.traces.files import TraceWriter
from streamfill.traces.format import Request, Segment, TraceHeader

START_TIMEOUT_S = 30


@contextmanager
def running_fake() -> Iterator[str]:
    """Its address; in a process of its own, and 5 ms to the first token."""
    command = [sys.executable, "-m", "streamfill.loadgen.fake_router", "--ttft-ms", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready.startswith("READY "), ready
            yield f"127.0.0.1:{json.loads(ready.removeprefix('READY '))['port']}"
        finally:
            process.terminate()
            process.wait(START_TIMEOUT_S)


def trace(
    folder: Path, mode: StreamMode = StreamMode.APPEND, num: int = 4, name: str = "small"
) -> Path:
    """Requests 10 ms apart, each with three pieces 20 ms apart."""
    path = folder / f"{name}.jsonl"
    with TraceWriter(path, TraceHeader(schema=1, name=name)) as writer:
        for n in range(num):
            writer.add_request(
                Request(
                    id=f"q{n}",
                    arrival_ms=10.0 * n,
                    mode=mode,
                    segments=tuple(
                        Segment(delay_ms=20, text=f"Piece {part} of query {n}. ")
                        for part in range(3)
                    ),
                    max_output_tokens=3,
                )
            )
    return path


def result_of(output: str) -> dict[str, Any]:
    """The facts of the last line."""
    last = output.splitlines()[-1]
    assert last.startswith("RESULT ")
    facts: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return facts
