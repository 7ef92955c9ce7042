"""Between the two endpoints of the KV transport, `KvSender` and `KvReceiver`, over ZeroMQ.

A session: the sender says ``Hello`` and gets ``Welcome`` with an epoch, or ``Reject``. Within it,
one transfer at a time: ``Offer`` → ``Accept`` or ``Refuse``; after ``Accept`` all chunks travel
over the pair's data path, which is shared memory or a torch.distributed group; then ``Complete``,
or ``Abort`` if the data cannot be used. The sender may say ``Abort`` in between: the chunks still
travel, their content is thrown away, and the answer is ``Abort``. Whatever breaks the data path
ends the session; the next ``Hello`` opens one with a new epoch. ``Ping`` is answered with ``Pong``;
anything outside a session with ``Reject``.

Where the sender's server has another number of ranks, ``Hello`` says which KV heads this rank
sends, and a transfer reaches a receiver rank in parts: the same ``transfer_id`` is offered in the
session of each sender rank. Each part is answered on its own; one that fails gives up all.

Beside transfers, at any time: the sender may ``Ask`` how much of a stream's prompt the receiver's
tree holds, and is told by ``Held``, then and whenever that changes, until it says ``LetGo``. So
only what is missing is sent, and nothing depends on it: what was evicted meanwhile is missed when
the transfer is put into the tree, and said by another ``Held``.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.slices import HeadRange
from streamfill.messages.common import SHARED_NAMESPACE, Namespace

PROTOCOL_VERSION = 8
"""Raised by every change of a message here; the two sides must agree."""

_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Hello(_Message, frozen=True, kw_only=True, tag="kv_hello"):
    """Sender to receiver: asks for a session in place of the one it had. May be repeated."""

    server_id: str
    rank: int
    incarnation: int
    """Differs with each start of the sending process."""
    attempt: int
    """1, 2, 3, … for each session that this incarnation asks this receiver for."""
    layout: KvLayout
    """Of what is sent: its KV heads are those that this rank holds and the receiver wants."""
    model_kv_heads: _Count
    """KV heads of the whole model."""
    first_kv_head: _Count
    """The first of those that are sent, counted in the whole model."""
    backend: str
    """What carries the chunks between machines: ``gloo`` or ``nccl``; must be the same on both
    sides."""
    protocol_version: int

    @property
    def heads(self) -> HeadRange:
        """KV heads that are sent, counted in the whole model."""
        return HeadRange(self.first_kv_head, self.layout.num_kv_heads)


class Welcome(_Message, frozen=True, kw_only=True, tag="kv_welcome"):
    """Receiver to sender: the session is open."""

    server_id: str
    rank: int
    incarnation: int
    attempt: int
    """Of the ``Hello`` that this answers."""
    epoch: int
    """Names this session in all that follows; never used twice by this receiver."""


class Reject(_Message, frozen=True, kw_only=True, tag="kv_reject"):
    """Receiver to sender: there is no session. The sender may say ``Hello`` again."""

    reason: str


class Offer(_Message, frozen=True, kw_only=True, tag="kv_offer"):
    """Sender to receiver: KV is ready to be sent."""

    transfer_id: int
    """Minted by the router, never used twice for the same KV heads."""
    epoch: int
    stream_id: int
    token_ids: bytes
    """The whole sequence from its beginning (`codec.pack_ids`), the prefix not carried included."""
    first_token: _Count
    """Offset of the first token whose KV is carried; what is before it the receiver has already."""
    num_tokens: _Count
    """Tokens whose KV is carried."""
    num_bytes: _Count
    """As they travel."""
    chunk_bytes: Annotated[int, msgspec.Meta(gt=0)]
    """Bytes of every chunk but the last."""
    cuts: tuple[_Count, ...] = ()
    """Offsets at which a chunk goes on with another message of torch.distributed, ascending: the
    sender has what lies between in one piece. Shared memory knows no messages."""
    checksum: int | None = None
    """CRC-32 of all bytes, as they travel."""
    codec: str = "none"
    """How the KV is written; a name of ``kv_transfer.codecs``."""
    version: _Count = 0
    """Of the stream's prompt; see ``Ask``."""
    is_early: bool = False
    """The prompt is not committed yet. There is less room for such KV, and more of it follows."""
    replaces: int | None = None
    """A transfer that missed what it goes on behind, and that this one is in place of."""
    namespace: Namespace = SHARED_NAMESPACE
    """In which the receiver's tree is to hold it."""


class Accept(_Message, frozen=True, kw_only=True, tag="kv_accept"):
    """Receiver to sender: memory is reserved, send the chunks."""

    transfer_id: int
    epoch: int


class Refuse(_Message, frozen=True, kw_only=True, tag="kv_refuse"):
    """Receiver to sender: not this transfer. Nothing is reserved; the session goes on."""

    transfer_id: int
    epoch: int
    reason: str


class Abort(_Message, frozen=True, kw_only=True, tag="kv_abort"):
    """Either way: the data of this transfer is not wanted, or not usable."""

    transfer_id: int
    epoch: int
    reason: str


class Rendezvous(_Message, frozen=True, kw_only=True, tag="kv_rendezvous"):
    """Either way, after the first ``Accept``: an entry of the store that sets the pair up."""

    epoch: int
    key: str
    value: bytes
    """Opaque; written and read by ``kv_transfer.shared_memory`` and torch.distributed."""


class Complete(_Message, frozen=True, kw_only=True, tag="kv_complete"):
    """Receiver to sender: all bytes are here and will be handed to the server, as soon as the parts
    of its other ranks are."""

    transfer_id: int
    epoch: int


class Ping(_Message, frozen=True, kw_only=True, tag="kv_ping"):
    """Sender to receiver: the session is still wanted."""

    epoch: int


class Pong(_Message, frozen=True, kw_only=True, tag="kv_pong"):
    """Receiver to sender: the session is still open."""

    epoch: int


class Ask(_Message, frozen=True, kw_only=True, tag="kv_ask"):
    """Sender to receiver: how much of this prompt do you hold? Answered with ``Held``."""

    epoch: int
    stream_id: int
    version: _Count
    """Of the prompt: counts how often tokens of it were replaced. News about an older version say
    nothing about what replaced them."""
    token_ids: bytes
    """All that is known of it (`codec.pack_ids`)."""
    namespace: Namespace = SHARED_NAMESPACE
    """Where it is looked for. Only what this one holds is told."""


class Held(_Message, frozen=True, kw_only=True, tag="kv_held"):
    """Receiver to sender: what its tree holds of a stream's prompt now."""

    epoch: int
    stream_id: int
    version: _Count
    """The newest that it was told."""
    num_tokens: _Count
    """Leading tokens, of those that it was told."""
    is_loss: bool = False
    """It held more before, or was sent more: not just the answer to what it was told last."""
    missed_transfer_id: int | None = None
    """A transfer whose KV goes on behind tokens that are not there, and was of no use."""


class LetGo(_Message, frozen=True, kw_only=True, tag="kv_let_go"):
    """Sender to receiver: it needs to know no more about this stream."""

    epoch: int
    stream_id: int


ToReceiver: TypeAlias = Hello | Offer | Abort | Rendezvous | Ping | Ask | LetGo
ToSender: TypeAlias = (
    Welcome | Reject | Accept | Refuse | Abort | Rendezvous | Complete | Pong | Held
)
