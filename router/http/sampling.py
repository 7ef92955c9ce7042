"""From the fields of a request to the options of a stream and of its commit."""

from __future__ import annotations

from dataclasses import replace

from router import request_checks as checks
from router.http.fields import OpeningFields, SamplingFields, given_sampling
from router.interface import CommitOptions, OpenOptions, Segment
from streamfill.messages.common import StreamMode

MAX_PRIORITY = 2**31 - 1
MAX_REQUEST_ID_CHARS = 256


def commit_options(
    fields: SamplingFields,
    *,
    vocab_size: int,
    num_logprobs: int | None = None,
    max_tokens: int | None = None,
    final_segment: Segment | None = None,
) -> CommitOptions:
    """How to commit.

    Args:
        fields: of the request.
        vocab_size: of the served model.
        num_logprobs: as ``Sampling.num_logprobs``.
        max_tokens: when the request says nothing; None: as gRPC's default.
        final_segment: applied in one step with the commit.

    Raises:
        InvalidArgumentError: names the field and its value.
    """
    given = given_sampling(fields, max_tokens)
    if num_logprobs is not None:
        given["logprobs"] = num_logprobs
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    return CommitOptions(
        sampling=checks.checked_sampling(
            given,
            ignore_eos=bool(fields.ignore_eos),
            stop_token_ids=fields.stop_token_ids or (),
            vocab_size=vocab_size,
        ),
        stop=checks.checked_stop(stop, "stop"),
        skip_special_tokens=fields.skip_special_tokens is not False,
        final_segment=final_segment,
        keep_s=0.0 if fields.keep_s is None else checks.checked_keep_s(fields.keep_s, "keep_s"),
    )


def open_options(
    fields: OpeningFields, request_id: str, mode: StreamMode = StreamMode.APPEND
) -> OpenOptions:
    """How to open.

    Args:
        fields: of the request.
        request_id: when the request has no name of its own.
        mode: how the context grows.

    Raises:
        InvalidArgumentError: names the field and its value.
    """
    priority = fields.priority or 0
    if abs(priority) > MAX_PRIORITY:
        raise checks.wrong("priority", priority, f"between -{MAX_PRIORITY} and {MAX_PRIORITY}")
    name = fields.request_id or request_id
    if len(name) > MAX_REQUEST_ID_CHARS:
        many = f"{len(name)} characters"
        raise checks.wrong("request_id", many, f"at most {MAX_REQUEST_ID_CHARS} characters")
    options = OpenOptions(mode=mode, priority=priority, request_id=name)
    if fields.deadline_s is not None:
        deadline_s = checks.checked_deadline_s(fields.deadline_s, "deadline_s")
        options = replace(options, deadline_s=deadline_s)
    if fields.ttft_slo_ms is not None:
        ttft_slo_s = checks.checked_ttft_slo_s(fields.ttft_slo_ms, "ttft_slo_ms")
        options = replace(options, ttft_slo_s=ttft_slo_s)
    return options
