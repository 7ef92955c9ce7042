"""Requests of clients, as the plain data of ``router.interface``, every value checked.

Names in messages are those of ``streamfill.proto``, since the client knows no others. All functions
raise ``InvalidArgumentError``, which names the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from router import request_checks as checks
from router.interface import CommitOptions, OpenOptions, ResumePoint, Segment
from router.request_checks import wrong
from router.service_decode import not_utf8
from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import InvalidArgumentError
from streamfill.messages.common import Sampling, StreamMode

DEFAULT_SERVER_TIMEOUT_S = 10.0
"""A server answers, and empties its cache, between two forward passes."""
MAX_SERVER_TIMEOUT_S = 60.0

_MODES: Mapping[int, StreamMode] = {
    pb.STREAM_MODE_UNSPECIFIED: StreamMode.APPEND,
    pb.STREAM_MODE_APPEND: StreamMode.APPEND,
    pb.STREAM_MODE_UPDATE: StreamMode.UPDATE,
}


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


def resume_point(message: pb.Resume) -> tuple[int, ResumePoint]:
    """Which stream to go on with, and from where."""
    return message.stream_id, ResumePoint(
        next_token_index=message.next_token_index,
        next_seq=message.next_seq if message.HasField("next_seq") else None,
        refused_seqs=tuple(message.refused_seqs),
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
    next_in_s = checks.checked_next_in_s(message.next_in_s, f"{name}.next_in_s")
    return replace(content, next_in_s=next_in_s)


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
            checks.check_token_ids(ids, vocab_size, f"{name}.token_ids")
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
    return replace(options, keep_s=checks.checked_keep_s(message.keep_s, "commit.keep_s"))


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
        stop=checks.checked_stop(message.stop, "sampling.stop"),
        skip_special_tokens=skip,
        final_segment=final,
    )


def _sampling(message: pb.Sampling, vocab_size: int) -> Sampling:
    names = [name for name, _, _ in checks.SAMPLING_RANGES if message.HasField(name)]
    return checks.checked_sampling(
        {name: getattr(message, name) for name in names},
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        vocab_size=vocab_size,
        prefix="sampling.",
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
    return checks.checked_deadline_s(message.deadline_s, f"{name}.deadline_s")


def _ttft_slo_s(message: pb.Open | pb.GenerateRequest, name: str) -> float | None:
    if not message.HasField("ttft_slo_ms"):
        return None
    return checks.checked_ttft_slo_s(message.ttft_slo_ms, f"{name}.ttft_slo_ms")
