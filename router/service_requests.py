"""Requests of clients, as the plain data of ``router.interface``, every value checked.

Names in messages are those of ``streamfill.proto``, since the client knows no others. All functions
raise ``InvalidArgumentError``, which names the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from router.interface import CommitOptions, OpenOptions, Segment
from router.service_decode import not_utf8
from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import InvalidArgumentError
from streamfill.messages.common import Sampling, StreamMode

MAX_LOGPROBS = 20
"""As in the OpenAI API."""
MAX_STOP_STRINGS = 16
"""Each is searched for in every piece of text."""
MAX_STOP_TOKEN_IDS = 128
MAX_STOP_STRING_BYTES = 1024
"""Text is held back while a stop string may be beginning in it."""

DEFAULT_SERVER_TIMEOUT_S = 10.0
"""A server answers, and empties its cache, between two forward passes."""
MAX_SERVER_TIMEOUT_S = 60.0

_MODES: Mapping[int, StreamMode] = {
    pb.STREAM_MODE_UNSPECIFIED: StreamMode.APPEND,
    pb.STREAM_MODE_APPEND: StreamMode.APPEND,
    pb.STREAM_MODE_UPDATE: StreamMode.UPDATE,
}

_RANGES: Sequence[tuple[str, Callable[[float], bool], str]] = (
    ("temperature", lambda value: 0 <= value < math.inf, "0 or more"),
    ("top_p", lambda value: 0 < value <= 1, "in (0, 1]"),
    ("top_k", lambda value: value == -1 or value >= 1, "1 or more, or -1 for all"),
    ("min_p", lambda value: 0 <= value <= 1, "in [0, 1]"),
    ("frequency_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]"),
    ("presence_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]"),
    ("repetition_penalty", lambda value: 0 < value <= 2, "in (0, 2]"),
    ("max_tokens", lambda value: value >= 1, "1 or more"),
    ("min_tokens", lambda value: value >= 0, "0 or more"),
    ("seed", lambda value: value >= 0, "0 or more"),
    ("logprobs", lambda value: 0 <= value <= MAX_LOGPROBS, f"in 0 .. {MAX_LOGPROBS}"),
)

_INTERNAL_NAMES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "logprobs": "num_logprobs",
}


MAX_KEEP_S = 3600.0
"""Longer nobody can say when they come back."""


def open_options(message: pb.Open) -> OpenOptions:
    """How to open a stream."""
    mode = _MODES.get(message.mode)
    if mode is None:
        raise wrong("open.mode", message.mode, "a value of StreamMode")
    return OpenOptions(
        mode=mode,
        priority=message.priority,
        request_id=message.request_id,
        deadline_s=_deadline_s(message, "open"),
        ttft_slo_s=_ttft_slo_s(message, "open"),
        messages=_chat(message.messages, "open.messages") if message.messages else None,
    )


def segment(message: pb.Segment, vocab_size: int, name: str = "segment") -> Segment:
    """A piece of context.

    Args:
        vocab_size: of the served model; token ids are below it.
        name: the path of the field, for the message.
    """
    content = _content(message, vocab_size, name)
    if not message.HasField("next_in_s"):
        return content
    if not 0 <= message.next_in_s < math.inf:
        raise wrong(f"{name}.next_in_s", message.next_in_s, "0 or more")
    return replace(content, next_in_s=message.next_in_s)


def _content(message: pb.Segment, vocab_size: int, name: str) -> Segment:
    match message.WhichOneof("content"):
        case "text":
            return Segment(text=message.text)
        case "text_utf8":
            try:
                return Segment(text=message.text_utf8.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise not_utf8(f"{name}.text_utf8", error) from error
        case "token_ids":
            ids = list(message.token_ids.ids)
            _check_token_ids(ids, vocab_size, f"{name}.token_ids")
            return Segment(token_ids=ids)
        case "messages":
            return Segment(messages=_chat(message.messages.messages, f"{name}.messages"))
    raise InvalidArgumentError(
        f"{name} has no content: one of text, text_utf8, token_ids, messages is needed",
        details={"field": name},
    )


def commit_options(message: pb.Commit, vocab_size: int) -> CommitOptions:
    """How to commit a stream."""
    final = None
    if message.HasField("final_segment"):
        final = segment(message.final_segment, vocab_size, "final_segment")
    options = _commit(message.sampling, final, vocab_size)
    if not message.HasField("keep_s"):
        return options
    if not 0 <= message.keep_s <= MAX_KEEP_S:
        raise wrong("commit.keep_s", message.keep_s, f"between 0 and {MAX_KEEP_S:g}")
    return replace(options, keep_s=message.keep_s)


def generate_options(
    message: pb.GenerateRequest, vocab_size: int
) -> tuple[OpenOptions, CommitOptions]:
    """How to open and to commit the stream of a one-shot request."""
    opening = OpenOptions(
        priority=message.priority,
        request_id=message.request_id,
        deadline_s=_deadline_s(message, "generate"),
        ttft_slo_s=_ttft_slo_s(message, "generate"),
    )
    prompt = segment(message.prompt, vocab_size, "prompt")
    return opening, _commit(message.sampling, prompt, vocab_size)


def server_timeout_s(
    message: pb.FlushCachesRequest | pb.SetPolicyRequest | pb.DescribeStreamsRequest,
) -> float:
    """How long to wait for the servers."""
    if not message.HasField("timeout_s"):
        return DEFAULT_SERVER_TIMEOUT_S
    if not 0 < message.timeout_s <= MAX_SERVER_TIMEOUT_S:
        raise wrong("timeout_s", message.timeout_s, f"in (0, {MAX_SERVER_TIMEOUT_S:g}]")
    return message.timeout_s


def _commit(message: pb.Sampling, final: Segment | None, vocab_size: int) -> CommitOptions:
    skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
    return CommitOptions(
        sampling=_sampling(message, vocab_size),
        stop=_stop_strings(message.stop),
        skip_special_tokens=skip,
        final_segment=final,
    )


def _sampling(message: pb.Sampling, vocab_size: int) -> Sampling:
    given: dict[str, float] = {}
    for name, fits, expected in _RANGES:
        if message.HasField(name):
            value = getattr(message, name)
            if not fits(value):
                raise wrong(f"sampling.{name}", value, expected)
            given[_INTERNAL_NAMES.get(name, name)] = value
    if message.HasField("ignore_eos"):
        given["ignore_eos"] = message.ignore_eos
    stop_token_ids = tuple(message.stop_token_ids)
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        many = f"{len(stop_token_ids)} ids"
        raise wrong("sampling.stop_token_ids", many, f"at most {MAX_STOP_TOKEN_IDS}")
    _check_token_ids(stop_token_ids, vocab_size, "sampling.stop_token_ids")
    sampling = Sampling(**given, stop_token_ids=stop_token_ids)  # type: ignore[arg-type]
    if sampling.min_new_tokens > sampling.max_new_tokens:
        most = f"at most max_tokens, which is {sampling.max_new_tokens}"
        raise wrong("sampling.min_tokens", sampling.min_new_tokens, most)
    return sampling


def _stop_strings(stop: Sequence[str]) -> tuple[str, ...]:
    if len(stop) > MAX_STOP_STRINGS:
        raise wrong("sampling.stop", f"{len(stop)} strings", f"at most {MAX_STOP_STRINGS}")
    for number, text in enumerate(stop):
        if not text:
            raise wrong(f"sampling.stop[{number}]", text, "a string that is not empty")
        num_bytes = len(text.encode("utf-8"))
        if num_bytes > MAX_STOP_STRING_BYTES:
            name = f"sampling.stop[{number}]"
            raise wrong(name, f"{num_bytes} bytes", f"at most {MAX_STOP_STRING_BYTES} bytes")
    return tuple(stop)


def _check_token_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    place, bad = next(pair for pair in enumerate(ids) if not 0 <= pair[1] < vocab_size)
    raise InvalidArgumentError(
        f"{name}[{place}] is {bad}, outside the vocabulary of {vocab_size} tokens",
        details={"field": f"{name}[{place}]", "token_id": bad, "vocab_size": vocab_size},
    )


def _chat(messages: Iterable[pb.ChatMessage], name: str) -> list[dict[str, str]]:
    chat = [{"role": one.role, "content": one.content} for one in messages]
    if not chat:
        raise wrong(name, "empty", "at least one message")
    for number, one in enumerate(chat):
        if not one["role"]:
            raise wrong(f"{name}[{number}].role", "", "a role such as user")
    return chat


def _deadline_s(message: pb.Open | pb.GenerateRequest, name: str) -> float | None:
    if not message.HasField("deadline_s"):
        return None
    if not 0 < message.deadline_s < math.inf:
        raise wrong(f"{name}.deadline_s", message.deadline_s, "greater than 0")
    return message.deadline_s


def _ttft_slo_s(message: pb.Open | pb.GenerateRequest, name: str) -> float | None:
    if not message.HasField("ttft_slo_ms"):
        return None
    if not 0 < message.ttft_slo_ms < math.inf:
        raise wrong(f"{name}.ttft_slo_ms", message.ttft_slo_ms, "greater than 0")
    return message.ttft_slo_ms / 1000


def wrong(name: str, value: object, expected: str) -> InvalidArgumentError:
    """The error for a field with a value that it cannot have."""
    shown = repr(value) if value == "" else value
    return InvalidArgumentError(
        f"{name} is {shown}; it must be {expected}", details={"field": name}
    )
