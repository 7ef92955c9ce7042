"""Bad frames on the router's socket: counted, answered, survived."""

from __future__ import annotations

import os
from pathlib import Path

import zmq.asyncio

from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import MAX_FRAME_BYTES, FrameDecoder, encode
from tests.unit.router.cluster_for_tests import TestCluster, answer_of, commit_of, ids, until
from tests.unit.router.fake_server import expected_answer


async def test_garbage_is_counted_and_answered_and_streams_go_on(tiny_model: Path) -> None:
    """Random, truncated, misrouted and oversized frames hurt nobody but their sender."""
    async with TestCluster(tiny_model) as cluster:
        prefill = await cluster.prefill()
        handle = await cluster.open()
        await handle.append(ids(20))
        valid = encode(s.Received(stream_id=1, attempt=1, seq=1))
        context = zmq.asyncio.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.linger = 0
        stranger.connect(f"tcp://127.0.0.1:{cluster.manager.zmq_port}")
        try:
            bad = (
                [b""],
                [os.urandom(200)],
                [valid[:-1]],
                [valid, b"one too many"],
                [encode(r.Cancel(stream_id=1, attempt=1))],
                [bytes(MAX_FRAME_BYTES + 1)],
            )
            decoder: FrameDecoder[r.RouterToServer] = FrameDecoder(r.RouterToServer)
            for frames in bad:
                await stranger.send_multipart(frames)
                answer = decoder.decode((await stranger.recv_multipart())[0])
                assert isinstance(answer, r.Malformed)
            assert cluster.manager.info().num_malformed_frames == len(bad)
        finally:
            stranger.close()
            context.term()
        await handle.commit(commit_of(3))
        tokens, _ = await answer_of(handle)
        expected = expected_answer([20], 3, cluster.vocab_size)
        assert [token.token_id for token in tokens] == expected
        assert cluster.state_of(prefill) == "alive"


async def test_bad_frame_of_a_server_does_not_end_it(tiny_model: Path) -> None:
    """A registered server that sends garbage once is told so and keeps its streams."""
    async with TestCluster(tiny_model) as cluster:
        prefill = await cluster.prefill()
        await prefill.send_raw(b"\xc1")
        await until(lambda: prefill.of_type(r.Malformed))
        await cluster.open()
        await until(lambda: prefill.streams)


async def test_bad_tokens_end_only_their_stream(tiny_model: Path) -> None:
    """Ids that no vocabulary has are an internal error of that stream."""
    async with TestCluster(tiny_model) as cluster:
        prefill = await cluster.prefill()
        prefill.output_limit = 0
        handle = await cluster.open()
        await handle.append(ids(20))
        await handle.commit(commit_of(3))
        await until(lambda: prefill.streams)
        bad = s.Output(stream_id=handle.stream_id, attempt=1, first_index=0, token_ids=b"\0")
        await prefill.send(bad)
        await until(lambda: cluster.outcomes() == {"FAILED": 1})
        await until(lambda: not prefill.streams)


async def test_message_of_a_stranger_about_a_stream_is_dropped(tiny_model: Path) -> None:
    """Who is not registered cannot speak for a stream."""
    async with TestCluster(tiny_model) as cluster:
        await cluster.prefill()
        handle = await cluster.open()
        stranger = await cluster.serve_unregistered()
        await stranger.send(
            s.StreamFailed(
                stream_id=handle.stream_id, attempt=1, code="INVALID_ARGUMENT", message="ha"
            )
        )
        await until(lambda: cluster.manager._cluster.num_stale_messages == 1)
        assert cluster.outcomes() == {}
