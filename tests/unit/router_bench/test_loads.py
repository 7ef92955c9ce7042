"""The loads of the router's benchmark, against a real router with its fake server, for a moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamfill.errors import StreamfillError
from streamfill.models.describe import describe_model
from streamfill.models.tiny import make_tiny_model
from streamfill.router_bench import measure
from streamfill.router_bench.measure import Bench
from streamfill.router_bench.processes import Cores, cpu_s, rss_bytes, run_to_result, thread_cpu_s
from streamfill.stream.tokenizer import load_tokenizer


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Small enough for a busy machine."""
    model = make_tiny_model(tmp_path / "model")
    return Bench(
        model_path=model,
        vocab_size=describe_model(model).vocab_size,
        folder=tmp_path,
        streams=20,
        connections=3,
        segment_tokens=16,
        segments_per_stream=5,
        seconds=1.0,
        cores=Cores.here(),
        say=print,
    )


@pytest.mark.slow
async def test_every_part_measures_what_it_says(bench: Bench) -> None:
    """Segments are computed and streams end, at the wanted rate too; idle streams take memory;
    ordinary requests are answered."""
    async with measure.router_process(bench) as router:
        most = await measure.throughput(bench, router)
        assert most["num_segments"] > 50
        assert most["num_streams_ended"] >= most["num_segments"] // 5 - 20
        assert most["router_cpu_us"] > 10
        text = await measure.text_throughput(bench, router, "One word, and another one. ")
        assert text["num_segments"] > 50
        paced = await measure.latency(bench, router, 40.0)
        assert 10 <= paced["segments_per_s"] <= 120
        assert 0 < paced["under_way_p50_ms"] <= paced["computed_p99_ms"]
        shared = await measure.throughput(bench, router, lanes=True)
        assert shared["num_segments"] > 50
        assert shared["num_streams_ended"] >= shared["num_segments"] // 5 - 20
        paced = await measure.latency(bench, router, 40.0, lanes=True)
        assert 10 <= paced["segments_per_s"] <= 120
        found = await measure.idle(bench, router, (20, 200), 64)
        assert [row["num_streams"] for row in found["steps"]] == [20, 200]
        assert found["steps"][1]["rss_bytes"] > found["steps"][0]["rss_bytes"] > 10e6
        body = {"model": "default", "prompt": "a b c", "max_tokens": 3}
        port = router.ready["http_port"]
        asked = await measure.http_requests(bench, port, router.pid, body, 4)
        assert asked["requests_per_s"] > 1
        assert 0 < asked["p50_ms"] <= asked["p99_ms"]


def test_a_piece_of_prose_of_so_many_tokens(tmp_path: Path) -> None:
    """No word less than it needs, and from the beginning again when the prose is too short."""
    tokenizer = load_tokenizer(make_tiny_model(tmp_path / "model"))
    text = measure.beginning("one two\nthree", tokenizer, 30)
    assert text.startswith("one two three one ")
    assert len(tokenizer.encode(text, add_special_tokens=False)) >= 30
    shorter = text[: text.rstrip().rindex(" ") + 1]
    assert len(tokenizer.encode(shorter, add_special_tokens=False)) < 30


async def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    """With the last words of its log."""
    arguments = (
        *("-m", "streamfill.router_bench.stream_load", "paced", "--address", "127.0.0.1:1"),
        *("--router-pid", str(os.getpid()), "--vocab-size", "300"),
    )
    with pytest.raises(StreamfillError, match=r"no connection to 127\.0\.0\.1:1"):
        await run_to_result(arguments, Cores.here().load, log=tmp_path / "log", timeout_s=60)


def test_a_process_is_watched_through_proc() -> None:
    """This one has used time and memory, and its main thread no more time than all together."""
    pid = os.getpid()
    assert rss_bytes(pid) > 1e6
    assert 0 < thread_cpu_s(pid)["main"] <= cpu_s(pid)
