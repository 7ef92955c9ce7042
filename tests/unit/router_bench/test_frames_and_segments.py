"""What the load of the router's benchmark writes is what gRPC and protobuf read."""

from __future__ import annotations

import time

import pytest

from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import ConfigError, StreamfillError
from streamfill.router_bench import grpc_frames as h2
from streamfill.router_bench.fake_backend import request_end
from streamfill.router_bench.http_load import answer_end, request_bytes
from streamfill.router_bench.segments import (
    STAMP_TOKENS,
    SegmentMaker,
    TextMaker,
    age_us,
    commit_message,
    open_message,
)

GRPC_PREFIX_BYTES = 5


def test_a_segment_is_the_message_that_it_stands_for() -> None:
    """With its number, so many ids of the vocabulary, and the moment of its making."""
    maker = SegmentMaker(64, 300)
    for seq in (1, 127, 128, 40_000):
        data = maker.segment(seq)
        assert data[:1] == b"\0"
        assert int.from_bytes(data[1:GRPC_PREFIX_BYTES], "big") == len(data) - GRPC_PREFIX_BYTES
        request = pb.StreamRequest.FromString(data[GRPC_PREFIX_BYTES:])
        ids = list(request.append.segment.token_ids.ids)
        assert request.seq == seq
        assert len(ids) == 64
        assert max(ids) < 300
        assert 0 <= age_us(ids[:STAMP_TOKENS]) < 60_000_000


def test_a_segment_of_text() -> None:
    """With its number."""
    data = TextMaker("déjà vu ").segment(300)
    request = pb.StreamRequest.FromString(data[GRPC_PREFIX_BYTES:])
    assert request == pb.StreamRequest(
        seq=300, append=pb.Append(segment=pb.Segment(text="déjà vu "))
    )


def test_a_segment_grows_old() -> None:
    """Its age is the time since it was made."""
    request = pb.StreamRequest.FromString(SegmentMaker(8, 256).segment(1)[GRPC_PREFIX_BYTES:])
    time.sleep(0.02)
    assert age_us(list(request.append.segment.token_ids.ids)) >= 20_000


def test_a_segment_needs_room_for_the_moment() -> None:
    """Too few ids, or too small a vocabulary, are refused with the value."""
    with pytest.raises(ConfigError, match="6"):
        SegmentMaker(STAMP_TOKENS, 300)
    with pytest.raises(ConfigError, match="255 tokens"):
        SegmentMaker(64, 255)


def test_opening_and_commit_are_messages() -> None:
    """Of one token each answer."""
    opened = pb.StreamRequest.FromString(open_message("x")[GRPC_PREFIX_BYTES:])
    assert opened.open.request_id == "x"
    commit = pb.StreamRequest.FromString(commit_message(7)[GRPC_PREFIX_BYTES:])
    assert (commit.seq, commit.commit.sampling.max_tokens) == (7, 1)


def test_frames_have_their_length_kind_and_stream() -> None:
    """As RFC 9113 has them."""
    made = h2.frame(h2.DATA, h2.END_STREAM, 5, b"abc")
    assert made == b"\0\0\x03\0\x01\0\0\0\x05abc"
    assert h2.settings_of(b"\0\x04\0\x01\0\0") == {h2.SETTING_WINDOW: 65_536}


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_an_answer_ends_where_its_head_says(cut: int) -> None:
    """Whatever is behind it, and not before all of it is there."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n" + b"x" * 21
    assert answer_end(answer + b"HTTP/1.1") == len(answer)
    assert answer_end(answer[:-cut]) is None
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert answer_end(chunked) == len(chunked)
    assert answer_end(chunked[:-cut]) is None


def test_an_answer_that_is_no_success_ends_the_measurement() -> None:
    """With what was said."""
    with pytest.raises(StreamfillError, match="429"):
        answer_end(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")


def test_a_request_ends_where_its_head_says() -> None:
    """For the backend that reads it."""
    request = request_bytes("h:1", "/v1/completions", b'{"a": 1}')
    assert request_end(request) == len(request)
    assert request_end(request[:-1]) is None
    assert request_end(b"GET /health HTTP/1.1\r\n\r\nrest") == 24
