"""Facts of streams for tests."""

from __future__ import annotations

from typing import Any

import msgspec

from router.watch.frames import StreamFacts

_PLAIN = StreamFacts(
    id="1",
    request_id="",
    tenant="",
    mode="append",
    state="OPEN",
    priority=0,
    num_known_tokens=10,
    num_computed_tokens=10,
    num_invalidated_tokens=0,
    num_output_tokens=0,
    num_attempts=1,
    prefill_server="prefill-0",
    decode_server="",
    handoff="none",
    error="",
    opened_ms=0,
    ended_ms=None,
)


def facts(number: int, **fields: Any) -> StreamFacts:
    """Of an open stream, all computed, opened at `number` ms."""
    return msgspec.structs.replace(_PLAIN, id=str(number), opened_ms=number, **fields)
