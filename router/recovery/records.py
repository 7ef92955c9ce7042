"""What the log says about a stream: frozen structs in msgpack, as arrays, since keys cost bytes.

::

    Opened ─▶ (Changed | Refused)* ─▶ Committed ─▶ Answered* ─▶ Ended

Records of one stream are written in the order in which they happened. A prompt is logged as what
each operation changed of its ids and of its text, so nothing is tokenised when it is read again.
Fields are only added, at the end and with a default; anything else takes another
`log_file.SCHEMA_VERSION`.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from streamfill.errors import ProtocolError
from streamfill.messages.common import (
    NO_SHARE,
    SHARED_NAMESPACE,
    Sampling,
    Share,
    StreamMode,
    TokenLogprob,
)


class _Part(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    pass


class TextChange(_Part, frozen=True, kw_only=True):
    """Of a text: so many characters stay, then these follow."""

    keep_chars: int
    new: str = ""


class ChatChange(_Part, frozen=True, kw_only=True):
    """Of the messages of a chat: so many stay, then these follow."""

    keep_messages: int
    grown: TextChange | None = None
    """Of the content of the message behind those that stay, when nothing else of it changed. It
    counts as one more that stays."""
    new: tuple[bytes, ...] = ()
    """Each a message in msgpack: a template may look at any field."""


class Change(_Part, frozen=True, kw_only=True):
    """What an operation made of a prompt."""

    keep_tokens: int
    new_ids: bytes = b""
    """As `messages.codec.pack_ids`."""
    base_tokens: int = 0
    """Length of the closed beginning, afterwards."""
    has_tail: bool = False
    """Whether a text stands behind it, afterwards."""
    has_special: bool = False
    """Whether that text begins with the tokenizer's special tokens."""
    text: TextChange | None = None
    """None: the text of the tail is as it was."""
    is_chat: bool = False
    chat: ChatChange | None = None
    """None: the messages are as they were."""
    held: str | None = None


class Opened(_Part, frozen=True, kw_only=True, tag="opened"):
    """The stream exists."""

    mode: StreamMode
    opened_s: float
    """Of `time.monotonic`, which on Linux counts from the start of the machine."""
    priority: int = 0
    request_id: str = ""
    deadline_s: float | None = None
    ttft_slo_s: float | None = None
    tenant: str = ""
    namespace: str = SHARED_NAMESPACE
    share: Share = NO_SHARE
    needs_call: bool = False
    """It ends when the client's call does."""
    change: Change | None = None
    """By the messages that it was opened with."""


class Changed(_Part, frozen=True, kw_only=True, tag="changed"):
    """An append or update was applied, or, where the log was rewritten, all of them."""

    seq: int
    """The client's number."""
    change: Change


class Refused(_Part, frozen=True, kw_only=True, tag="refused"):
    """An operation was refused."""

    seq: int
    code: str
    message: str


class Committed(_Part, frozen=True, kw_only=True, tag="committed"):
    """The prompt is complete."""

    seq: int
    sampling: Sampling
    """As far as there was room for it."""
    stop: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    keep_s: float = 0.0
    change: Change | None = None
    """By the final segment, and what a chat's template puts behind it."""


class Tokens(_Part, frozen=True, kw_only=True):
    """Part of an answer."""

    first_index: int
    ids: bytes
    logprobs: tuple[TokenLogprob | None, ...] = ()
    """One for each token, or empty."""
    last_is_silent: bool = False
    """The last one is a stop token, which shows no text."""


class Answered(_Part, frozen=True, kw_only=True, tag="answered"):
    """These tokens may be given to the client."""

    tokens: Tokens


class Failure(_Part, frozen=True, kw_only=True):
    """How a stream ended badly."""

    code: str
    message: str
    details: dict[str, str | int | float] = {}


class LoggedUsage(_Part, frozen=True, kw_only=True):
    """As `interface.Usage`."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_invalidated_tokens: int
    num_computed_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_reused_tokens: int = 0


class Entry(_Part, frozen=True, kw_only=True):
    """As `lifetime.LifetimeEntry`."""

    event: str
    at_s: float
    segment: int | None = None
    num_tokens: int | None = None
    reason: str = ""
    predicted_s: float | None = None
    actual_s: float | None = None


class Finished(_Part, frozen=True, kw_only=True):
    """How an answer ended; as `interface.DoneEvent`."""

    finish_reason: str
    text_tail: str
    matched_stop: str | int | None
    usage: LoggedUsage
    prefill_server: str
    decode_server: str
    decoded_by_prefill: bool
    handoff: str
    num_attempts: int
    handoff_bytes: int | None = None
    handoff_s: float | None = None
    kv_codec: str = "none"
    lifetime: tuple[Entry, ...] = ()


class Ended(_Part, frozen=True, kw_only=True, tag="ended"):
    """The stream is over. Of a good end `finished` is there, of a bad one `failure`."""

    state: str
    """A `StreamState`."""
    tokens: Tokens | None = None
    """The last ones, in one record with the end: no crash can come between them."""
    finished: Finished | None = None
    failure: Failure | None = None


Record: TypeAlias = Opened | Changed | Refused | Committed | Answered | Ended

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


def encode_record(record: Record) -> bytes:
    """One record as the body of a row."""
    return _encoder.encode(record)


def decode_record(body: bytes) -> Record:
    """The record that `encode_record` wrote.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a record of {len(body)} bytes cannot be read: {error}") from error
