"""What a client is told on a WebSocket, as JSON. Its own messages are in ``socket_messages``."""

from __future__ import annotations

import msgspec

from router.call_messages import CallEvent, Failed, Opened, Refused
from router.http.errors import ErrorObject, error_object
from router.interface import Acknowledged, DoneEvent, TokenEvent


class ErrorMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """An operation was refused; the stream goes on."""

    seq: int
    error: ErrorObject


class FailedMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="failed"):
    """The stream ended badly. The last message."""

    error: ErrorObject


def server_message(event: CallEvent, stream_id: int) -> bytes:
    """What the client is told, as JSON.

    Args:
        stream_id: of the call's stream; of no meaning before it is open.
    """
    match event:
        case Refused():
            return msgspec.json.encode(ErrorMessage(seq=event.seq, error=error_object(event.error)))
        case Failed():
            return msgspec.json.encode(FailedMessage(error=error_object(event.error)))
        case Opened():
            return msgspec.json.encode(_opened(event))
        case Acknowledged():
            return msgspec.json.encode(_acknowledged(event))
        case TokenEvent():
            return msgspec.json.encode(_token(event))
        case DoneEvent():
            return msgspec.json.encode(_done(event, stream_id))


def _opened(event: Opened) -> dict[str, object]:
    told: dict[str, object] = {
        "type": "opened",
        "stream_id": str(event.stream_id),
        "is_resumable": event.is_resumable,
    }
    if event.resumed is not None:
        acknowledged = _acknowledged(event.resumed.acknowledged)
        del acknowledged["type"]
        refused = [{"seq": seq, "error": error_object(e)} for seq, e in event.resumed.refused]
        told |= {
            "acknowledged": acknowledged,
            "is_committed": event.resumed.is_committed,
            "refused": refused,
        }
    return told


def _acknowledged(event: Acknowledged) -> dict[str, object]:
    return {
        "type": "acknowledged",
        "seq": event.client_seq,
        "num_received_tokens": event.num_received_tokens,
        "num_computed_tokens": event.num_computed_tokens,
        "num_invalidated_tokens": event.num_invalidated_tokens,
    }


def _token(event: TokenEvent) -> dict[str, object]:
    told: dict[str, object] = {
        "type": "token",
        "index": event.index,
        "token_id": event.token_id,
        "text": event.text,
    }
    if event.logprob is not None:
        top = [{"token_id": token_id, "logprob": value} for token_id, value in event.logprob.top]
        told |= {"logprob": event.logprob.logprob, "top_logprobs": top}
    return told


def _done(event: DoneEvent, stream_id: int) -> dict[str, object]:
    usage = event.usage
    return {
        "type": "done",
        "finish_reason": event.finish_reason,
        "matched_stop": event.matched_stop,
        "text_tail": event.text_tail,
        "usage": {
            "num_prompt_tokens": usage.num_prompt_tokens,
            "num_output_tokens": usage.num_output_tokens,
            "num_cached_tokens": usage.num_cached_tokens,
            "num_computed_tokens": usage.num_computed_tokens,
            "num_recomputed_tokens": usage.num_recomputed_tokens,
            "num_reused_tokens": usage.num_reused_tokens,
            "num_invalidated_tokens": usage.num_invalidated_tokens,
        },
        "metadata": {
            "stream_id": str(stream_id),
            "prefill_server": event.prefill_server,
            "decode_server": event.decode_server,
            "decoded_by_prefill": event.decoded_by_prefill,
            "handoff": event.handoff,
            "num_attempts": event.num_attempts,
        },
    }
