"""Why a peer is left out of a comparison."""

from __future__ import annotations

from streamfill.errors import StreamfillError


class PeerUnavailable(StreamfillError):  # noqa: N818  a reason, not a fault: the comparison goes on
    """A peer cannot be installed or started here; the text is one line that says why."""
