"""What the router sends to a server.

``Splice`` and ``Commit`` change a stream: they carry ``seq`` = 1, 2, 3, … within one
``attempt``, a server applies each exactly once and in order, acknowledges with ``Received``,
and answers a gap with ``ResyncRequest``. An attempt is one placement of a stream on one server;
a message of an older attempt than the newest seen is dropped.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from streamfill.messages.common import (
    NO_SHARE,
    SHARED_NAMESPACE,
    HandoffTarget,
    KvPeer,
    Namespace,
    Sampling,
    Share,
    StreamMode,
)


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Registered(_Message, frozen=True, kw_only=True, tag="registered"):
    """Answer to ``Register``: the server may be given streams."""

    router_incarnation: int
    """A router with another incarnation knows nothing of older streams: the server drops them."""
    heartbeat_interval_s: float


class RegistrationRefused(_Message, frozen=True, kw_only=True, tag="registration_refused"):
    """The server cannot take part. It logs the reason and stops."""

    reason: str


class RouterHeartbeat(_Message, frozen=True, kw_only=True, tag="router_heartbeat"):
    """The router lives. A server that hears none for long registers again."""

    router_incarnation: int


class OpenStream(_Message, frozen=True, kw_only=True, tag="open_stream"):
    """A stream was placed here. Sent again it changes nothing. The splices follow with ``seq`` from
    1."""

    stream_id: int
    attempt: int
    mode: StreamMode
    priority: int = 0
    ttft_slo_s: float | None = None
    """Time to first token that the client wants, from the commit. None: it did not say."""
    namespace: Namespace = SHARED_NAMESPACE
    """Where its KV is looked for and kept."""
    share: Share = NO_SHARE


class Splice(_Message, frozen=True, kw_only=True, tag="splice"):
    """Keep the first ``keep_tokens`` tokens, drop the rest, put ``token_ids`` behind."""

    stream_id: int
    attempt: int
    seq: int
    keep_tokens: int
    token_ids: bytes
    """``codec.pack_ids``."""
    commit_follows: bool = False
    """A ``Commit`` is right behind: wait for it, and compute the rest and the first token in one
    step."""
    next_in_s: float | None = None
    """The client's hint when its next piece comes, from now."""


class PushTo(_Message, frozen=True, kw_only=True, tag="push_to"):
    """To this decode server the stream will be handed over, in all likelihood: KV may go there
    ahead of the commit. Neither acknowledged nor repeated: nothing depends on it."""

    stream_id: int
    attempt: int
    peer: KvPeer


class Commit(_Message, frozen=True, kw_only=True, tag="commit"):
    """The prompt is complete: compute what is left and sample the first token."""

    stream_id: int
    attempt: int
    seq: int
    num_prompt_tokens: int
    """Must equal what the server has; a difference is a bug and fails the attempt."""
    sampling: Sampling
    handoff: HandoffTarget | None
    """None: no decode server is alive, this server generates the whole answer."""
    keep_s: float = 0.0
    """For so long after the answer a prompt that begins with this one is to be expected."""


class Generate(_Message, frozen=True, kw_only=True, tag="generate"):
    """Go on with an answer: the next token behind ``prompt_ids + output_ids``. Any server can do
    it."""

    stream_id: int
    attempt: int
    prompt_ids: bytes
    output_ids: bytes
    """Answer tokens that the client already has; output indices go on behind them. May be empty."""
    sampling: Sampling
    transfer_id: int | None
    """KV transfer to wait for. None: recompute at once."""
    namespace: Namespace = SHARED_NAMESPACE
    """As in ``OpenStream``."""
    share: Share = NO_SHARE


class HandOff(_Message, frozen=True, kw_only=True, tag="hand_off"):
    """The decode server of an answer is gone, and this one goes on with it: send it the prompt's KV
    too, as far as it is here. Answered with ``HandoffReport``, always; not repeated, since the
    decode server does not wait for long."""

    stream_id: int
    attempt: int
    """Of the prompt."""
    target: HandoffTarget


class HandoffFailed(_Message, frozen=True, kw_only=True, tag="handoff_failed"):
    """The KV transfer that a ``Generate`` waits for will not come: recompute."""

    stream_id: int
    attempt: int
    transfer_id: int


class Cancel(_Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop all work on the stream, on any attempt up to this one, and forget it. Answered with
    ``Closed``, always."""

    stream_id: int
    attempt: int


class ResendOutput(_Message, frozen=True, kw_only=True, tag="resend_output"):
    """The router misses output tokens from ``from_index`` on."""

    stream_id: int
    attempt: int
    from_index: int


class Forget(_Message, frozen=True, kw_only=True, tag="forget"):
    """The router has the whole answer: the server stops what it still does for it, and drops the
    stream's record; its KV stays for ``Commit.keep_s``. Answered with ``Closed``, always."""

    stream_id: int
    attempt: int


class FlushCache(_Message, frozen=True, kw_only=True, tag="flush_cache"):
    """Empty the radix tree, and forget what was learned for scheduling. Answered with
    ``CacheFlushed``; refused while a stream is open."""

    request_id: int


class SetPolicy(_Message, frozen=True, kw_only=True, tag="set_policy"):
    """Schedule by this policy from now on. Answered with ``PolicySet``; a policy that cannot be had
    changes nothing."""

    request_id: int
    policy: str
    options: dict[str, str] = {}
    """By the names that the policy knows."""


class DescribeStreams(_Message, frozen=True, kw_only=True, tag="describe_streams"):
    """What the scheduler thinks of each stream. Answered with ``StreamsDescribed``."""

    request_id: int


class WatchResidency(_Message, frozen=True, kw_only=True, tag="watch_residency"):
    """Report which blocks of prompts are in the radix tree: at once all of them, then every change,
    with ``Residency``. Sent again, it asks for all of them anew: a report was lost. A server that
    was never asked keeps no record."""

    block_tokens: int
    """Tokens of a block (``stream.prefix_blocks``). 0: report nothing any more."""


class Malformed(_Message, frozen=True, kw_only=True, tag="malformed"):
    """The router could not read a frame of this server."""

    reason: str


RouterToServer: TypeAlias = (
    Registered
    | RegistrationRefused
    | RouterHeartbeat
    | OpenStream
    | Splice
    | PushTo
    | Commit
    | Generate
    | HandOff
    | HandoffFailed
    | Cancel
    | ResendOutput
    | Forget
    | FlushCache
    | SetPolicy
    | DescribeStreams
    | WatchResidency
    | Malformed
)
