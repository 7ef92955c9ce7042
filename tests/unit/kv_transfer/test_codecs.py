"""KV that is made smaller on its way."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as replace_layout

from streamfill.config import KV_CODECS
from streamfill.errors import ConfigError
from streamfill.kv_transfer.codecs import (
    CODECS,
    NAMES,
    CodecCost,
    codec_for,
    measure_codec,
    relative_error,
)
from streamfill.kv_transfer.interface import OutgoingTransfer
from streamfill.kv_transfer.source import StagedKv
from streamfill.messages.handoff import Refuse
from tests.unit.kv_transfer.builders import (
    LAYOUT,
    RawSender,
    address_of,
    arrivals_of,
    hello,
    offer,
    outcomes_of,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender

HALF = replace_layout(LAYOUT, dtype="bfloat16", item_bytes=2)
ERRORS = {"float16": 3e-4, "bfloat16": 3e-3, "float8_e4m3fn": 4e-2}
"""Half a unit in the last place of each type, as a share of the number, and some more."""


def _kv(num_tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    num_elements = num_tokens * LAYOUT.bytes_per_token // 4
    return torch.randn(num_elements, generator=generator)


@pytest.mark.parametrize("name", CODECS)
def test_the_error_is_that_of_the_type(name: str) -> None:
    """Of numbers as they come, and of those beyond the type's range, which stay finite."""
    codec, exact = CODECS[name], _kv(50)
    error = relative_error(codec, exact, LAYOUT)
    assert 0 < error < ERRORS[name]
    huge = torch.tensor([3e38, -3e38, 0.0, 1.0])
    encoded = codec.encode(StagedKv(huge.view(torch.uint8)), LAYOUT)
    content = torch.empty(encoded.num_bytes, dtype=torch.uint8)
    encoded.read(0, content)
    again = torch.empty_like(huge)
    codec.decode(content, again.view(torch.uint8), LAYOUT)
    assert torch.isfinite(again).all()
    assert again[2:].tolist() == [0.0, 1.0]


@settings(deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(CODECS)))
def test_pieces_are_those_of_the_whole(data: st.DataObject, name: str) -> None:
    """Also pieces that cut a number in two."""
    codec = CODECS[name]
    encoded = codec.encode(StagedKv(_kv(3).view(torch.uint8)), LAYOUT)
    whole = torch.empty(encoded.num_bytes, dtype=torch.uint8)
    encoded.read(0, whole)
    begin = data.draw(st.integers(0, encoded.num_bytes - 1))
    end = data.draw(st.integers(begin + 1, encoded.num_bytes))
    piece = torch.empty(end - begin, dtype=torch.uint8)
    encoded.read(begin, piece)
    assert torch.equal(piece, whole[begin:end])


def test_a_codec_that_makes_nothing_smaller_is_refused() -> None:
    """And one that nobody knows; both with what would be right."""
    with pytest.raises(ConfigError, match="would not become smaller"):
        codec_for("float16", HALF)
    with pytest.raises(ConfigError, match="must be one of none, float16"):
        codec_for("zip", LAYOUT)
    assert codec_for("none", HALF) is None
    assert NAMES == KV_CODECS


def test_it_pays_on_a_slow_link_only() -> None:
    """Half the bytes, for what encoding and decoding cost."""
    codec = CODECS["float16"]
    cost = CodecCost(encode_s=1e-10, decode_s=2e-10)
    assert cost.pays(codec, LAYOUT, link_s=1e-9)
    assert not cost.pays(codec, LAYOUT, link_s=3e-10)
    assert not cost.pays(codec, LAYOUT, link_s=1e-10)
    measured = measure_codec(codec, LAYOUT, torch.device("cpu"))
    assert 0 < measured.encode_s < 1e-6
    assert 0 < measured.decode_s < 1e-6


@pytest.mark.parametrize("name", CODECS)
def test_kv_arrives_as_its_codec_writes_it(
    make_receiver: MakeReceiver,
    make_sender: MakeSender,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The first transfer, whose link is not known yet, exact; both sides know the codec, the
    checksum is of what travels, and no staging stays behind."""
    monkeypatch.setattr(CodecCost, "pays", lambda *args, **kwargs: True)
    receiver = make_receiver()
    sender = make_sender(codec=name, chunk_bytes=1000, with_checksum=True)
    for number in (1, 2, 3):
        exact = _kv(40, seed=number)
        sent = OutgoingTransfer(
            transfer_id=number,
            stream_id=1,
            token_ids=range(40),
            first_token=0,
            kv=StagedKv(exact.view(torch.uint8)),
        )
        sender.submit(address_of(receiver), sent)
        outcome = outcomes_of(sender)[number]
        assert outcome.ok, outcome.reason
        incoming = arrivals_of(receiver)[number]
        assert outcome.codec == incoming.codec == ("none" if number == 1 else name)
        assert outcome.num_bytes == exact.numel() * 4
        got = incoming.staging.view(torch.float32)
        if number == 1:
            assert torch.equal(got, exact)
        else:
            assert 0 < float((got - exact).norm() / exact.norm()) < ERRORS[name]
        receiver.release(incoming)
        assert receiver.stats().staging_used_bytes == 0


@pytest.mark.parametrize(
    ("codec", "num_bytes", "reason"),
    [("zip", 100, "not known here"), ("float16", 100, "are not 100 bytes of float16")],
)
def test_an_offer_that_makes_no_sense_is_refused(
    make_receiver: MakeReceiver, codec: str, num_bytes: int, reason: str
) -> None:
    """An unknown codec, or sizes that are not its own."""
    receiver = make_receiver()
    with RawSender(receiver.port) as raw:
        epoch = raw.open(hello()).epoch
        bad = msgspec.structs.replace(offer(1, epoch=epoch), codec=codec, num_bytes=num_bytes)
        raw.send(bad)
        refusal = raw.receive_reply()
        assert isinstance(refusal, Refuse)
        assert reason in refusal.reason
    assert receiver.stats().staging_used_bytes == 0
