"""The records of a log, put together to the streams that they tell of. Pure.

A log may end anywhere: what a dying router wrote last may be missing from its end, never from its
middle. So every beginning of a log makes sense, and is how things were at some moment.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import assert_never

from router.recovery import records as rec
from router.recovery.log_file import Row
from router.recovery.prompt_state import PromptReplay
from streamfill.errors import ProtocolError
from streamfill.messages.codec import unpack_ids
from streamfill.messages.common import TokenLogprob


@dataclass(slots=True)
class LoggedToken:
    """One token of an answer."""

    token_id: int
    logprob: TokenLogprob | None
    is_silent: bool


@dataclass(slots=True)
class LoggedStream:
    """A stream as the log knows it."""

    stream_id: int
    opened: rec.Opened
    prompt: PromptReplay = field(default_factory=PromptReplay)
    client_seq: int = 0
    """Newest operation that was applied."""
    refused: list[rec.Refused] = field(default_factory=list)
    committed: rec.Committed | None = None
    tokens: list[LoggedToken] = field(default_factory=list)
    ended: rec.Ended | None = None
    row_ids: array[int] = field(default_factory=lambda: array("q"))
    num_bytes: int = 0

    @property
    def newest_seq(self) -> int:
        """Newest operation that was applied or refused."""
        return max([self.client_seq, *(each.seq for each in self.refused)])


@dataclass(slots=True)
class Replay:
    """All streams of a log."""

    streams: dict[int, LoggedStream] = field(default_factory=dict)
    """By id, in the order of their opening."""
    bad_rows: list[int] = field(default_factory=list)
    """Row ids of records that no stream can be made of."""
    lost_streams: set[int] = field(default_factory=set)
    """Whose records they are."""


def replay(rows: Iterable[Row]) -> Replay:
    """All streams of a log. A record that cannot be read, or does not fit to those before it, costs
    its stream and no other."""
    found = Replay()
    for row in rows:
        try:
            _take(found, row)
        except ProtocolError:
            _lose(found, row)
    return found


def _take(found: Replay, row: Row) -> None:
    if row.stream_id in found.lost_streams:
        raise ProtocolError("an earlier record of the stream is bad")
    record = rec.decode_record(row.body)
    stream = found.streams.get(row.stream_id)
    if isinstance(record, rec.Opened):
        if stream is not None:
            raise ProtocolError("the stream is opened twice")
        stream = found.streams[row.stream_id] = LoggedStream(row.stream_id, record)
        if record.change is not None:
            stream.prompt.apply(record.change)
    elif stream is None:
        raise ProtocolError("the stream was never opened")
    else:
        _apply(stream, record)
    stream.row_ids.append(row.row_id)
    stream.num_bytes += len(row.body)


def _apply(stream: LoggedStream, record: rec.Record) -> None:
    if stream.ended is not None:
        raise ProtocolError("the stream had ended")
    match record:
        case rec.Changed():
            stream.prompt.apply(record.change)
            _applied(stream, record.seq)
        case rec.Refused():
            stream.refused.append(record)
        case rec.Committed():
            if stream.committed is not None:
                raise ProtocolError("the stream is committed twice")
            if record.change is not None:
                stream.prompt.apply(record.change)
            stream.committed = record
            _applied(stream, record.seq)
        case rec.Answered():
            _add_tokens(stream, record.tokens)
        case rec.Ended():
            if record.tokens is not None:
                _add_tokens(stream, record.tokens)
            stream.ended = record
        case rec.Opened():
            raise ProtocolError("the stream is opened twice")
        case _:
            assert_never(record)


def _applied(stream: LoggedStream, seq: int) -> None:
    stream.client_seq = seq
    stream.refused = [each for each in stream.refused if each.seq != seq]


def _add_tokens(stream: LoggedStream, tokens: rec.Tokens) -> None:
    if stream.committed is None or tokens.first_index != len(stream.tokens):
        raise ProtocolError("tokens that do not follow the ones before")
    ids = unpack_ids(tokens.ids)
    for place, token_id in enumerate(ids):
        logprob = tokens.logprobs[place] if place < len(tokens.logprobs) else None
        silent = tokens.last_is_silent and place == len(ids) - 1
        stream.tokens.append(LoggedToken(token_id, logprob, silent))


def _lose(found: Replay, row: Row) -> None:
    found.lost_streams.add(row.stream_id)
    found.bad_rows.append(row.row_id)
    stream = found.streams.pop(row.stream_id, None)
    if stream is not None:
        found.bad_rows.extend(stream.row_ids)
