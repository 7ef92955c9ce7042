"""The records of a trace file: JSON Lines, one header, then documents and requests.

::

    {"type":"trace","schema":1,"name":"crawl-small",...}
    {"type":"document","id":"d7","text":"..."}
    {"type":"request","id":"q0","arrival_ms":0,"mode":"append","segments":[...],...}

A document stands before the first request that names it. Requests stand in the order of their
arrival. Fields with their default value may be left out. All times are milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

from streamfill.messages.common import StreamMode

SCHEMA_VERSION: Final = 1
BLOCK_TOKENS: Final = 512
"""Tokens behind one of ``Segment.block_ids``, as in Mooncake's traces."""

NonNegativeMs: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
Scale: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
TokenCount: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Line(_Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class TraceHeader(_Line, frozen=True, kw_only=True, tag="trace", tag_field="type"):
    """The first line: what the file is and where its figures come from."""

    schema: int
    """``SCHEMA_VERSION``; a reader refuses any other."""
    name: str
    description: str = ""
    source: str = ""
    """Where content and times come from: a site, a corpus, a published file."""
    drawn: dict[str, str] = {}
    """What was not measured but drawn at random: by field, such as ``segments.delay_ms``, from what
    distribution."""
    token_scale: Scale = 1.0
    """Token counts are the source's, times this."""
    time_scale: Scale = 1.0
    """Times are the source's, times this."""
    seed: int = 0
    """Of everything that was drawn, and of the tokens behind ``num_tokens`` and ``block_ids``."""
    document_separator: str = "\n\n"
    """Behind each document of a context."""


class Document(_Line, frozen=True, kw_only=True, tag="document", tag_field="type"):
    """A text that requests name by its id."""

    id: str
    text: str


class ChatMessage(_Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of a chat."""

    role: str
    content: str


class Segment(_Line, frozen=True, kw_only=True):
    """A piece of context. Exactly one kind of content: ``text``, ``token_ids``, ``document_ids``,
    ``messages``, ``block_ids`` with ``num_tokens``, or ``num_tokens`` alone.

    In append mode it goes behind the ones before; in update mode it is the whole new context,
    between the request's ``prefix`` and ``suffix``.
    """

    delay_ms: NonNegativeMs = 0.0
    """Since the segment before it; of the first one since the arrival of the request."""
    text: str | None = None
    token_ids: tuple[TokenCount, ...] | None = None
    document_ids: tuple[str, ...] | None = None
    """Documents of this file, in their order in the context."""
    messages: tuple[ChatMessage, ...] | None = None
    num_tokens: TokenCount | None = None
    """Only the length is known: as many tokens are made, always the same ones for a trace."""
    block_ids: tuple[int, ...] | None = None
    """Blocks of ``BLOCK_TOKENS`` tokens, the last one cut so that there are ``num_tokens``. The
    same id means the same tokens, anywhere in the file."""


class Request(_Line, frozen=True, kw_only=True, tag="request", tag_field="type"):
    """One request, from the arrival of the query to the end of the answer."""

    id: str
    arrival_ms: NonNegativeMs
    """Since the start of the trace."""
    mode: StreamMode
    segments: tuple[Segment, ...]
    """At least one."""
    prefix: str = ""
    """Text before every context; not with token ids, lengths or chat messages."""
    suffix: str = ""
    """Text behind every context in update mode, and behind the last segment in append mode: it
    arrives with it."""
    commit_delay_ms: NonNegativeMs = 0.0
    """From the last segment to the commit. 0: the last segment is sent with the commit."""
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1)] = 1
    session_id: str | None = None
    """Requests of one conversation; their contexts share a prefix."""


TraceLine: TypeAlias = TraceHeader | Document | Request
