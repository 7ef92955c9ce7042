"""Ends of streams as records, and back."""

from __future__ import annotations

from collections.abc import Mapping

from router.interface import DoneEvent, Usage
from router.recovery import records as rec
from streamfill.errors import ErrorCode, StreamError
from streamfill.observability.lifetime import Lifetime, LifetimeEvent

_USAGE = tuple(rec.LoggedUsage.__struct_fields__)


def finished_of(done: DoneEvent) -> rec.Finished:
    """A good end as part of a record."""
    return rec.Finished(
        finish_reason=done.finish_reason,
        text_tail=done.text_tail,
        matched_stop=done.matched_stop,
        usage=rec.LoggedUsage(**{name: getattr(done.usage, name) for name in _USAGE}),
        prefill_server=done.prefill_server,
        decode_server=done.decode_server,
        decoded_by_prefill=done.decoded_by_prefill,
        handoff=done.handoff,
        num_attempts=done.num_attempts,
        handoff_bytes=done.handoff_bytes,
        handoff_s=done.handoff_s,
        kv_codec=done.kv_codec,
        lifetime=tuple(
            rec.Entry(
                event=str(entry.event),
                at_s=entry.at_s,
                segment=entry.segment,
                num_tokens=entry.num_tokens,
                reason=entry.reason,
                predicted_s=entry.predicted_s,
                actual_s=entry.actual_s,
            )
            for entry in done.lifetime.entries
        ),
    )


def done_of(finished: rec.Finished) -> DoneEvent:
    """The event that `finished_of` was given."""
    lifetime = Lifetime()
    for entry in finished.lifetime:
        if entry.event in LifetimeEvent.__members__:  # a later router may have known more
            lifetime.record(
                LifetimeEvent(entry.event),
                at_s=entry.at_s,
                segment=entry.segment,
                num_tokens=entry.num_tokens,
                reason=entry.reason,
                predicted_s=entry.predicted_s,
                actual_s=entry.actual_s,
            )
    return DoneEvent(
        finish_reason=finished.finish_reason,
        text_tail=finished.text_tail,
        matched_stop=finished.matched_stop,
        usage=Usage(**{name: getattr(finished.usage, name) for name in _USAGE}),
        prefill_server=finished.prefill_server,
        decode_server=finished.decode_server,
        decoded_by_prefill=finished.decoded_by_prefill,
        handoff=finished.handoff,
        num_attempts=finished.num_attempts,
        lifetime=lifetime,
        handoff_bytes=finished.handoff_bytes,
        handoff_s=finished.handoff_s,
        kv_codec=finished.kv_codec,
    )


def end_of(ended: rec.Ended) -> DoneEvent | StreamError | None:
    """How a stream ended that is in the log; None: the log does not say."""
    if ended.finished is not None:
        return done_of(ended.finished)
    if ended.failure is not None:
        failure = ended.failure
        return error_of(failure.code, failure.message, failure.details)
    return None


def failure_of(error: StreamError) -> rec.Failure:
    """A bad end as part of a record."""
    return rec.Failure(code=str(error.code), message=error.message, details=dict(error.details))


def error_of(code: str, message: str, details: Mapping[str, str | int | float]) -> StreamError:
    """The error that was logged."""
    try:
        known = ErrorCode(code)
    except ValueError:
        known = ErrorCode.UNKNOWN
    return StreamError.from_code(known, message, details=details)
