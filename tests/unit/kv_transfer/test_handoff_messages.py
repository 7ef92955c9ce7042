"""The messages of the KV transport on the wire."""

from __future__ import annotations

import msgspec
import pytest

from streamfill.errors import ProtocolError
from streamfill.kv_transfer.layout import KvLayout
from streamfill.messages.codec import FrameDecoder, encode, pack_ids
from streamfill.messages.handoff import (
    Abort,
    Accept,
    Ask,
    Complete,
    Held,
    Hello,
    LetGo,
    Offer,
    Ping,
    Pong,
    Refuse,
    Reject,
    Rendezvous,
    ToReceiver,
    ToSender,
    Welcome,
)

_LAYOUT = KvLayout(
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    v_head_dim=32,
    dtype="float32",
    item_bytes=4,
    page_size=16,
)

_GOLDEN: list[tuple[ToReceiver | ToSender, bytes]] = [
    (
        Hello(
            server_id="p0",
            rank=1,
            incarnation=7,
            attempt=2,
            layout=_LAYOUT,
            model_kv_heads=8,
            first_kv_head=5,
            backend="gloo",
            protocol_version=1,
        ),
        b"\x8a\xa4type\xa8kv_hello\xa9server_id\xa2p0\xa4rank\x01\xabincarnation\x07\xa7attempt"
        b"\x02\xa6layout\x87\xaanum_layers\x1e\xacnum_kv_heads\x03\xa8head_dim@\xaav_head_dim "
        b"\xa5dtype\xa7float32\xaaitem_bytes\x04\xa9page_size\x10\xaemodel_kv_heads\x08"
        b"\xadfirst_kv_head\x05\xa7backend\xa4gloo\xb0protocol_version\x01",
    ),
    (
        Welcome(server_id="d0", rank=1, incarnation=8, attempt=2, epoch=5),
        b"\x86\xa4type\xaakv_welcome\xa9server_id\xa2d0\xa4rank\x01\xabincarnation\x08\xa7attempt"
        b"\x02\xa5epoch\x05",
    ),
    (Reject(reason="no"), b"\x82\xa4type\xa9kv_reject\xa6reason\xa2no"),
    (
        Offer(
            transfer_id=9,
            epoch=5,
            stream_id=3,
            token_ids=pack_ids([1, 258]),
            first_token=1,
            num_tokens=1,
            num_bytes=34560,
            chunk_bytes=1024,
            cuts=(512, 34000),
            checksum=6,
            version=2,
            is_early=True,
            replaces=8,
            codec="float16",
            namespace="t",
        ),
        b"\xde\x00\x10\xa4type\xa8kv_offer\xabtransfer_id\t\xa5epoch\x05\xa9stream_id\x03\xa9token_ids"
        b"\xc4\x08\x01\x00\x00\x00\x02\x01\x00\x00\xabfirst_token\x01\xaanum_tokens\x01"
        b"\xa9num_bytes\xcd\x87\x00\xabchunk_bytes\xcd\x04\x00\xa4cuts\x92\xcd\x02\x00\xcd\x84\xd0"
        b"\xa8checksum\x06\xa5codec\xa7float16"
        b"\xa7version\x02\xa8is_early\xc3\xa8replaces\x08\xa9namespace\xa1t",
    ),
    (
        Accept(transfer_id=9, epoch=5),
        b"\x83\xa4type\xa9kv_accept\xabtransfer_id\t\xa5epoch\x05",
    ),
    (
        Refuse(transfer_id=9, epoch=5, reason="full"),
        b"\x84\xa4type\xa9kv_refuse\xabtransfer_id\t\xa5epoch\x05\xa6reason\xa4full",
    ),
    (
        Abort(transfer_id=9, epoch=5, reason="late"),
        b"\x84\xa4type\xa8kv_abort\xabtransfer_id\t\xa5epoch\x05\xa6reason\xa4late",
    ),
    (
        Rendezvous(epoch=5, key="0/1", value=b"\x00\xff"),
        b"\x84\xa4type\xadkv_rendezvous\xa5epoch\x05\xa3key\xa30/1\xa5value\xc4\x02\x00\xff",
    ),
    (
        Complete(transfer_id=9, epoch=5),
        b"\x83\xa4type\xabkv_complete\xabtransfer_id\t\xa5epoch\x05",
    ),
    (Ping(epoch=5), b"\x82\xa4type\xa7kv_ping\xa5epoch\x05"),
    (Pong(epoch=5), b"\x82\xa4type\xa7kv_pong\xa5epoch\x05"),
    (
        Ask(epoch=5, stream_id=3, version=2, token_ids=pack_ids([1, 258]), namespace="t"),
        b"\x86\xa4type\xa6kv_ask\xa5epoch\x05\xa9stream_id\x03\xa7version\x02\xa9token_ids"
        b"\xc4\x08\x01\x00\x00\x00\x02\x01\x00\x00\xa9namespace\xa1t",
    ),
    (
        Held(epoch=5, stream_id=3, version=2, num_tokens=1, is_loss=True, missed_transfer_id=9),
        b"\x87\xa4type\xa7kv_held\xa5epoch\x05\xa9stream_id\x03\xa7version\x02\xaanum_tokens"
        b"\x01\xa7is_loss\xc3\xb2missed_transfer_id\t",
    ),
    (
        LetGo(epoch=5, stream_id=3),
        b"\x83\xa4type\xa9kv_let_go\xa5epoch\x05\xa9stream_id\x03",
    ),
]

_DECODER: FrameDecoder[ToReceiver | ToSender] = FrameDecoder(ToReceiver | ToSender)


@pytest.mark.parametrize(("message", "frame"), _GOLDEN, ids=lambda value: type(value).__name__)
def test_golden_bytes(message: ToReceiver | ToSender, frame: bytes) -> None:
    """A change of these bytes is a change of the protocol, and needs another version."""
    assert encode(message) == frame
    assert _DECODER.decode(frame) == message


@pytest.mark.parametrize(("message", "frame"), _GOLDEN, ids=lambda value: type(value).__name__)
def test_a_truncated_frame_is_no_message(message: ToReceiver | ToSender, frame: bytes) -> None:
    """Wherever it is cut."""
    for length in range(len(frame)):
        with pytest.raises(ProtocolError):
            _DECODER.decode(frame[:length])


def test_unknown_fields_and_messages_of_the_other_direction_are_refused() -> None:
    """One decoder per socket: what does not belong there is no message."""
    with pytest.raises(ProtocolError):
        _DECODER.decode(msgspec.msgpack.encode({"type": "kv_ping", "epoch": 5, "more": 1}))
    with pytest.raises(ProtocolError):
        FrameDecoder[ToReceiver](ToReceiver).decode(encode(Pong(epoch=5)))
    with pytest.raises(ProtocolError):
        _DECODER.decode(msgspec.msgpack.encode({"type": "kv_ping", "epoch": "5"}))
