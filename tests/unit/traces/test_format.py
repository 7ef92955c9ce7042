"""The records of a trace file are what the documentation says."""

from __future__ import annotations

import msgspec
import pytest

from streamfill.messages.common import StreamMode
from streamfill.traces.format import Document, Request, Segment, TraceHeader, TraceLine

DECODE = msgspec.json.Decoder(TraceLine).decode


def test_records_of_a_hand_written_file() -> None:
    """Each kind of record is found by its type, and what is left out has its default value."""
    header = DECODE(b'{"type":"trace","schema":1,"name":"mine"}')
    assert header == TraceHeader(schema=1, name="mine")
    assert DECODE(b'{"type":"document","id":"d","text":"t"}') == Document(id="d", text="t")
    request = DECODE(
        b'{"type":"request","id":"q","arrival_ms":5,"mode":"update",'
        b'"segments":[{"document_ids":["d"]},{"delay_ms":2.5,"document_ids":[]}]}'
    )
    assert isinstance(request, Request)
    assert request.mode is StreamMode.UPDATE
    assert request.segments[1] == Segment(delay_ms=2.5, document_ids=())
    assert request.max_output_tokens == 1
    assert request.commit_delay_ms == 0


def test_defaults_are_not_written() -> None:
    """A row has only what differs from the defaults, so files of lengths stay short."""
    request = Request(
        id="q", arrival_ms=0, mode=StreamMode.APPEND, segments=(Segment(num_tokens=3),)
    )
    assert msgspec.json.encode(request) == (
        b'{"type":"request","id":"q","arrival_ms":0,"mode":"append","segments":[{"num_tokens":3}]}'
    )


@pytest.mark.parametrize(
    ("line", "where"),
    [
        (b'{"type":"document","id":"d"}', "text"),
        (b'{"type":"trace","schema":1,"name":"x","nmae":1}', "nmae"),
        (
            b'{"type":"request","id":"q","arrival_ms":-1,"mode":"append","segments":[]}',
            "arrival_ms",
        ),
        (b'{"type":"request","id":"q","arrival_ms":0,"mode":"prepend","segments":[]}', "mode"),
        (
            b'{"type":"request","id":"q","arrival_ms":0,"mode":"append",'
            b'"segments":[{"num_tokens":-1}]}',
            "num_tokens",
        ),
        (
            b'{"type":"request","id":"q","arrival_ms":0,"mode":"append","segments":[],'
            b'"max_output_tokens":0}',
            "max_output_tokens",
        ),
    ],
)
def test_wrong_values_are_refused(line: bytes, where: str) -> None:
    """A missing field, an unknown one and one out of its range are errors that name it."""
    with pytest.raises(msgspec.ValidationError, match=where):
        DECODE(line)
