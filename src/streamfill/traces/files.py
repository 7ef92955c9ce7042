"""Reads and writes trace files, one line at a time: a million requests need no memory.

Errors name the file, the line and the field. A file whose name ends in ``.gz`` is compressed.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import msgspec

from streamfill.errors import TraceError
from streamfill.messages.common import StreamMode
from streamfill.traces.format import (
    BLOCK_TOKENS,
    SCHEMA_VERSION,
    Document,
    Request,
    Segment,
    TraceHeader,
    TraceLine,
)

_decode = msgspec.json.Decoder(TraceLine).decode
_READ_BUFFER_BYTES = 1 << 20
_READ_ERRORS = (OSError, EOFError, zlib.error)
"""Of a file that goes away, and of a compressed one that ends too early or is damaged."""


class TraceReader:
    """One pass over a trace file. Use it inside ``with``; iterating gives the requests in order.

    Documents are kept in ``documents`` as they come by; requests are not kept.

    Attributes:
        num_bytes: size of the file.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            TraceError: the file cannot be read, or its first line is no header of this schema.
        """
        self.path = path
        self.documents: dict[str, str] = {}
        self._line = 1
        self._last_arrival_ms = 0.0
        try:
            self.num_bytes = path.stat().st_size
            self._raw = path.open("rb", _READ_BUFFER_BYTES)
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            raise TraceError(f"{path}: cannot be read: {reason}") from error
        self._file = _decompressed(path, self._raw)
        try:
            self.header = self._read_header()
        except TraceError:
            self._close()
            raise

    @property
    def num_bytes_read(self) -> int:
        """How far the file is read, of ``num_bytes``."""
        return self._raw.tell()

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def __iter__(self) -> Iterator[Request]:
        """
        Raises:
            TraceError: names the line and the field that are wrong.
        """
        lines = iter(self._file)
        while True:
            try:
                line = next(lines, b"")
            except _READ_ERRORS as error:
                raise TraceError(f"{self.path}, line {self._line + 1}: {error}") from error
            if not line:
                return
            self._line += 1
            if line.isspace():
                continue
            record = self._parse(line)
            match record:
                case Request():
                    self._check(record)
                    yield record
                case Document():
                    self.documents[record.id] = record.text
                case TraceHeader():
                    raise self._error("type", "a second header")

    def _read_header(self) -> TraceHeader:
        try:
            first = self._file.readline()
        except _READ_ERRORS as error:
            raise TraceError(f"{self.path}: cannot be read: {error}") from error
        header = self._parse(first)
        if not isinstance(header, TraceHeader):
            raise self._error("type", 'the first line must have "type": "trace"')
        return header

    def _close(self) -> None:
        self._file.close()
        self._raw.close()

    def _parse(self, line: bytes) -> TraceLine:
        try:
            record: TraceLine = _decode(line)
        except msgspec.ValidationError as error:
            text, _, where = str(error).partition(" - at `$")
            raise self._error(where.strip("`.") or "line", text) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._error("line", f"no valid JSON: {error}") from error
        if isinstance(record, TraceHeader) and record.schema != SCHEMA_VERSION:
            raise self._error(
                "schema", f"{record.schema} is not supported; this version reads {SCHEMA_VERSION}"
            )
        return record

    def _check(self, request: Request) -> None:
        if request.arrival_ms < self._last_arrival_ms:
            before = self._last_arrival_ms
            raise self._error(
                "arrival_ms", f"{request.arrival_ms:g} is before {before:g} of the request above"
            )
        self._last_arrival_ms = request.arrival_ms
        try:
            check_request(request, self.documents)
        except TraceError as error:
            raise TraceError(f"{self.path}, line {self._line}: {error}") from error

    def _error(self, field: str, text: str) -> TraceError:
        return TraceError(f"{self.path}, line {self._line}, {field}: {text}")


class TraceWriter:
    """Writes a trace file. Use it inside ``with``; a half-written file never has the final name."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """
        Raises:
            TraceError: the file cannot be written.
        """
        if path.is_dir():
            raise TraceError(f"{path}: cannot be written: it is a folder")
        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        self._documents: dict[str, str] = {}
        self._last_arrival_ms = 0.0
        self._encode = msgspec.json.Encoder().encode
        try:
            self._file = _open_to_write(self._part, path.suffix == ".gz")
        except OSError as error:
            raise TraceError(f"{path}: cannot be written: {error}") from error
        self._write(header)

    def add_document(self, document: Document) -> None:
        """Put a document before the requests that name it; one that is there already is left out.

        Raises:
            TraceError: another document has this id.
        """
        known = self._documents.get(document.id)
        if known is None:
            self._documents[document.id] = document.text
            self._write(document)
        elif known != document.text:
            raise TraceError(f"two documents have the id {document.id!r}")

    def add_request(self, request: Request) -> None:
        """Put a request behind the others.

        Raises:
            TraceError: it contradicts itself, arrives before the last one or names an unknown
            document.
        """
        if request.arrival_ms < self._last_arrival_ms:
            raise TraceError(f"request {request.id!r} arrives before the one above it")
        self._last_arrival_ms = request.arrival_ms
        check_request(request, self._documents)
        self._write(request)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)

    def _write(self, record: TraceLine) -> None:
        self._file.write(self._encode(record) + b"\n")


def check_request(request: Request, documents: dict[str, str]) -> None:
    """
    Raises:
        TraceError: names the field of the request that contradicts another one.
    """
    if not request.segments:
        raise TraceError("segments: there must be at least one")
    for number, segment in enumerate(request.segments):
        problem = _problem(request, segment, documents)
        if problem is not None:
            raise TraceError(f"segments[{number}]{problem}")
    kinds = {_kind(segment) for segment in request.segments}
    if len(kinds) > 1:
        raise TraceError(f"segments: {' and '.join(sorted(kinds))} are mixed in one request")


def _problem(request: Request, segment: Segment, documents: dict[str, str]) -> str | None:
    contents = (
        segment.text,
        segment.token_ids,
        segment.document_ids,
        segment.messages,
        segment.block_ids,
    )
    num_contents = 5 - contents.count(None)
    if num_contents == 0 and segment.num_tokens is None:
        return ": has no content; give text, token_ids, document_ids, messages or num_tokens"
    if num_contents > (segment.num_tokens is None or segment.block_ids is not None):
        return ": has several kinds of content; give exactly one"
    if segment.block_ids is not None:
        if segment.num_tokens is None:
            return ".num_tokens: is missing beside block_ids"
        num_needed = -(-segment.num_tokens // BLOCK_TOKENS)
        if len(segment.block_ids) < num_needed:
            return f".block_ids: {len(segment.block_ids)} of {num_needed} blocks are there"
    if segment.document_ids is not None:
        for document_id in segment.document_ids:
            if document_id not in documents:
                return f".document_ids: no document {document_id!r} stands above"
    if (request.prefix or request.suffix) and _kind(segment) != "text":
        return ": prefix and suffix are only for text and documents"
    if request.mode is StreamMode.UPDATE and segment.messages is not None and not segment.messages:
        return ".messages: is empty"
    return None


def _kind(segment: Segment) -> str:
    if segment.messages is not None:
        return "messages"
    if segment.text is not None or segment.document_ids is not None:
        return "text"
    return "tokens"


def read_requests(path: Path) -> Iterable[Request]:
    """All requests of a file, as they are read.

    Raises:
        TraceError: as ``TraceReader``.
    """
    with TraceReader(path) as reader:
        yield from reader


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        unpacked = gzip.GzipFile(fileobj=raw, mode="rb")
        return cast(IO[bytes], io.BufferedReader(unpacked, _READ_BUFFER_BYTES))
    return raw


def _open_to_write(path: Path, is_compressed: bool) -> IO[bytes]:
    if is_compressed:
        # No time stamp: the same trace is the same file.
        return cast(IO[bytes], gzip.GzipFile(path, "wb", mtime=0))
    return path.open("wb")
