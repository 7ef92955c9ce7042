"""Which servers one stream was on, for those who look at it and for its end."""

from __future__ import annotations

from dataclasses import dataclass

from streamfill.messages import server_to_router as s


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """As far as the stream has come."""

    prefill_server: str
    """The newest; empty: none yet."""
    decode_server: str
    """The newest; empty: none yet, or a prefill server made the answer."""
    decoded_by_prefill: bool
    """A prefill server makes more than the first token."""
    handoff: str
    """See `handoff.Handoff.outcome`."""
    handoff_report: s.HandoffReport | None
    """Of the newest hand-off, if it went well."""
    num_attempts: int
    """Without those that did not fail, but were begun elsewhere before much was sent."""
