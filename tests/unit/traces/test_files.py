"""Trace files are read line by line, written whole, and wrong ones are explained."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import TraceError
from streamfill.messages.common import StreamMode
from streamfill.traces.files import TraceReader, TraceWriter, read_requests
from streamfill.traces.format import ChatMessage, Document, Request, Segment, TraceHeader

HEADER = TraceHeader(schema=1, name="t")
HEADER_LINE = '{"type":"trace","schema":1,"name":"t"}'


def request_line(segments: str, *, arrival_ms: float = 0, more: str = "") -> str:
    return (
        f'{{"type":"request","id":"q","arrival_ms":{arrival_ms},"mode":"append",'
        f'"segments":{segments}{more}}}'
    )


def written(folder: Path, *lines: str, name: str = "t.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def token_request(name: str, arrival_ms: float) -> Request:
    return Request(
        id=name, arrival_ms=arrival_ms, mode=StreamMode.APPEND, segments=(Segment(num_tokens=1),)
    )


def raise_after_writing(writer: TraceWriter) -> None:
    writer.add_request(token_request("q", 0))
    raise TraceError("twice")


@pytest.mark.parametrize("name", [".", "folder.jsonl"])
def test_a_folder_is_not_written_to(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is said before all the work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(TraceError, match="it is a folder"):
        TraceWriter(Path(name), TraceHeader(schema=1, name="t"))


@pytest.mark.parametrize("scale", ["token_scale", "time_scale"])
def test_a_scale_is_above_0(tmp_path: Path, scale: str) -> None:
    """Figures of the source are what stands there, divided by it."""
    header = f'{{"type":"trace","schema":1,"name":"t","{scale}":0}}'
    with pytest.raises(TraceError, match=f"line 1, {scale}: Expected"):
        TraceReader(written(tmp_path, header))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"type":"request"', "line 3, line: no valid JSON"),
        ('{"type":"segment"}', "line 3, type: "),
        (HEADER_LINE, "line 3, type: a second header"),
        (request_line("[]"), r"line 3: segments: there must be at least one"),
        (request_line("[{}]"), r"line 3: segments\[0\]: has no content"),
        (
            request_line('[{"text":"a"},{"text":"b","num_tokens":1,"token_ids":[1]}]'),
            r"segments\[1\]: has several kinds of content",
        ),
        (
            request_line('[{"text":"a","num_tokens":1}]'),
            r"segments\[0\]: has several kinds of content",
        ),
        (request_line('[{"text":"a"},{"num_tokens":1}]'), "segments: text and tokens are mixed"),
        (request_line('[{"block_ids":[1]}]'), r"segments\[0\].num_tokens: is missing"),
        (
            request_line('[{"block_ids":[1],"num_tokens":513}]'),
            r"segments\[0\].block_ids: 1 of 2 blocks are there",
        ),
        (
            request_line('[{"document_ids":["d"]}]'),
            r"segments\[0\].document_ids: no document 'd' stands above",
        ),
        (
            request_line('[{"num_tokens":1}]', more=',"prefix":"p"'),
            "prefix and suffix are only for text",
        ),
        (request_line('[{"num_tokens":"1"}]'), r"line 3, segments\[0\].num_tokens: Expected"),
        (request_line('[{"num_tokens":1}]', arrival_ms=-2), "line 3, arrival_ms: Expected"),
        (
            request_line('[{"messages":[]}]').replace("append", "update"),
            r"segments\[0\].messages: is empty",
        ),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    """A reader can go to the place of the error without any search."""
    path = written(tmp_path, HEADER_LINE, request_line('[{"num_tokens":1}]'), line)
    with pytest.raises(TraceError, match=message) as caught, TraceReader(path) as reader:
        list(reader)
    assert str(path) in str(caught.value)


def test_arrivals_are_in_order(tmp_path: Path) -> None:
    """A request that arrives before the one above it is an error at its own line."""
    rows = [request_line('[{"num_tokens":1}]', arrival_ms=each) for each in (2, 2, 1)]
    with pytest.raises(TraceError, match="line 4, arrival_ms: 1 is before 2 of the request above"):
        list(read_requests(written(tmp_path, HEADER_LINE, *rows)))


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("", "line 1"),
        ('{"type":"document","id":"d","text":""}', 'the first line must have "type": "trace"'),
        ('{"type":"trace","schema":2,"name":"t"}', "line 1, schema: 2 is not supported"),
        ('{"type":"trace","name":"t"}', "line 1, line: .*`schema`"),
    ],
)
def test_a_file_begins_with_its_header(tmp_path: Path, first: str, message: str) -> None:
    """Another first line, and a schema of the future, are refused before any request."""
    with pytest.raises(TraceError, match=message):
        TraceReader(written(tmp_path, first))


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is an error of ours that names it."""
    with pytest.raises(TraceError, match=r"no\.jsonl: cannot be read"):
        TraceReader(tmp_path / "no.jsonl")


def test_broken_compression(tmp_path: Path) -> None:
    """A file that only claims to be compressed, and one that is cut off, are explained."""
    with pytest.raises(TraceError, match="cannot be read"):
        TraceReader(written(tmp_path, HEADER_LINE, name="t.jsonl.gz"))
    whole = gzip.compress((HEADER_LINE + "\n" + "x" * 4_000_000).encode())
    for name, data in (("cut", whole[:-20]), ("torn", whole[:90] + b"?????" + whole[95:])):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(TraceError, match=rf"{name}\.jsonl\.gz"):
            list(read_requests(path))


def test_documents_stand_above_their_requests(tmp_path: Path) -> None:
    """A document below the request that names it comes too late."""
    document = '{"type":"document","id":"d","text":"D"}'
    request = request_line('[{"document_ids":["d"]}]')
    with TraceReader(written(tmp_path, HEADER_LINE, document, request)) as reader:
        assert len(list(reader)) == 1
        assert reader.documents == {"d": "D"}
    with pytest.raises(TraceError, match="line 2"):
        list(read_requests(written(tmp_path, HEADER_LINE, request, document)))


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    """Blank lines do no harm, and line numbers stay those of an editor."""
    path = written(tmp_path, HEADER_LINE, "", "   ", request_line("[]"))
    with pytest.raises(TraceError, match="line 4"):
        list(read_requests(path))


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_progress_reaches_the_size_of_the_file(tmp_path: Path, name: str) -> None:
    """At the end of the file all of its bytes are read, compressed or not."""
    path = tmp_path / name
    with TraceWriter(path, HEADER) as writer:
        writer.add_request(token_request("q", 0))
    with TraceReader(path) as reader:
        list(reader)
        assert reader.num_bytes_read == reader.num_bytes == path.stat().st_size


def test_compressed_files_are_reproducible(tmp_path: Path) -> None:
    """The same trace is the same file, byte by byte, whenever it is written."""
    contents = []
    for _ in range(2):
        path = tmp_path / "t.jsonl.gz"
        with TraceWriter(path, HEADER) as writer:
            writer.add_request(token_request("q", 0))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert contents[0][:2] == b"\x1f\x8b"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """The old file stays until the new one is whole; a broken-off one disappears."""
    path = written(tmp_path, "old")
    with pytest.raises(TraceError, match="twice"), TraceWriter(path, HEADER) as writer:
        raise_after_writing(writer)
    assert path.read_text() == "old\n"
    assert [each.name for each in tmp_path.iterdir()] == ["t.jsonl"]
    with TraceWriter(path, HEADER):
        assert path.read_text() == "old\n"
    assert path.read_text().startswith('{"type":"trace"')


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    """The writer refuses requests out of order, unknown documents and two texts for one id."""
    with TraceWriter(tmp_path / "t.jsonl", HEADER) as writer:
        writer.add_request(token_request("q0", 5))
        with pytest.raises(TraceError, match="'q1' arrives before"):
            writer.add_request(token_request("q1", 4))
        unknown = Request(
            id="q2",
            arrival_ms=6,
            mode=StreamMode.UPDATE,
            segments=(Segment(document_ids=("d",)),),
        )
        with pytest.raises(TraceError, match="no document 'd'"):
            writer.add_request(unknown)
        writer.add_document(Document(id="d", text="D"))
        writer.add_document(Document(id="d", text="D"))
        with pytest.raises(TraceError, match="two documents have the id 'd'"):
            writer.add_document(Document(id="d", text="E"))
        writer.add_request(unknown)
    assert [each.id for each in read_requests(tmp_path / "t.jsonl")] == ["q0", "q2"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """A file that cannot be written is an error that names it."""
    with pytest.raises(TraceError, match="cannot be written"):
        TraceWriter(tmp_path / "no" / "t.jsonl", HEADER)


MS = st.floats(0, 1e6, allow_nan=False).map(lambda value: round(value, 3))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MESSAGE = st.builds(ChatMessage, role=st.sampled_from(["user", "assistant"]), content=TEXT)
IDS = st.lists(st.integers(0, 50_000), max_size=5).map(tuple)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """One request that is right in itself."""
    kind = draw(st.sampled_from(["text", "document_ids", "token_ids", "messages", "lengths"]))
    segments = []
    for _ in range(draw(st.integers(1, 4))):
        delay_ms = draw(MS)
        match kind:
            case "text":
                segment = Segment(delay_ms=delay_ms, text=draw(TEXT))
            case "document_ids":
                segment = Segment(delay_ms=delay_ms, document_ids=("a", "b"))
            case "token_ids":
                segment = Segment(delay_ms=delay_ms, token_ids=draw(IDS))
            case "messages":
                messages = draw(st.lists(MESSAGE, min_size=1, max_size=3).map(tuple))
                segment = Segment(delay_ms=delay_ms, messages=messages)
            case _:
                num_tokens = draw(st.integers(0, 2000))
                blocks = tuple(range(-(-num_tokens // 512)))
                segment = Segment(delay_ms=delay_ms, num_tokens=num_tokens, block_ids=blocks)
        segments.append(segment)
    has_affixes = kind in ("text", "document_ids")
    return Request(
        id=draw(TEXT),
        arrival_ms=0,
        mode=draw(st.sampled_from(StreamMode)),
        segments=tuple(segments),
        prefix=draw(TEXT) if has_affixes else "",
        suffix=draw(TEXT) if has_affixes else "",
        commit_delay_ms=draw(MS),
        max_output_tokens=draw(st.integers(1, 4096)),
        session_id=draw(st.none() | TEXT),
    )


@given(
    expected=st.lists(requests(), max_size=4),
    drawn=st.dictionaries(TEXT, TEXT, max_size=3),
    name=st.sampled_from(["t.jsonl", "t.jsonl.gz"]),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    expected: list[Request],
    drawn: dict[str, str],
    name: str,
) -> None:
    """Header, documents and requests come back as they were, whatever is in them."""
    header = TraceHeader(schema=1, name="t", drawn=drawn, token_scale=0.5)
    path = tmp_path_factory.mktemp("traces") / name
    with TraceWriter(path, header) as writer:
        for document_id in "ab":
            writer.add_document(Document(id=document_id, text=f"text of {document_id}\n"))
        for request in expected:
            writer.add_request(request)
    with TraceReader(path) as reader:
        assert reader.header == header
        assert list(reader) == expected
        assert reader.documents == {"a": "text of a\n", "b": "text of b\n"}
