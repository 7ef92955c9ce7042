"""`streamfill bench run` and `streamfill bench self`, against a fake router in its own process."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from streamfill.cli import bench_run, bench_self
from streamfill.errors import ConfigError, TraceError, UnavailableError
from streamfill.launcher.ready_line import parse_ready_line
from streamfill.loadgen.arrivals import make_arrivals
from streamfill.loadgen.records import ModeName
from streamfill.loadgen.run_file import read_records
from streamfill.loadgen.runner import RunProgress
from streamfill.messages.common import StreamMode
from streamfill.traces.files import TraceWriter
from streamfill.traces.format import SCHEMA_VERSION, Request, Segment, TraceHeader

NUM_REQUESTS = 4


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a fake router that takes 10 ms to the first token."""
    command = [sys.executable, "-m", "streamfill.loadgen.fake_router", "--ttft-ms", "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        facts = parse_ready_line(process.stdout.readline())
        assert facts is not None
        yield f"127.0.0.1:{facts['port']}"
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Four requests 100 ms apart, of three pieces 50 ms apart; every other one replaces."""
    return write_trace(tmp_path / "trace.jsonl", delay_ms=50.0)


def write_trace(path: Path, *, delay_ms: float) -> Path:
    with TraceWriter(path, TraceHeader(schema=SCHEMA_VERSION, name="tiny")) as writer:
        for number in range(NUM_REQUESTS):
            segments = [
                Segment(delay_ms=delay_ms if turn else 0.0, text=f"piece {turn} of {number}. ")
                for turn in range(3)
            ]
            writer.add_request(
                Request(
                    id=f"q{number}",
                    arrival_ms=100.0 * number,
                    mode=list(StreamMode)[number % 2],
                    segments=tuple(segments),
                    max_output_tokens=2,
                )
            )
    return path


def parsed(command: Any, words: Sequence[object]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def run(*words: object) -> int:
    return bench_run.run(parsed(bench_run, words))


def facts_of(output: str) -> dict[str, Any]:
    """The RESULT line, which is the last one."""
    found = re.match(r"RESULT (\{.*\})$", output.rstrip().splitlines()[-1])
    assert found is not None
    facts: dict[str, Any] = json.loads(found[1])
    return facts


@pytest.mark.parametrize("mode", list(ModeName))
def test_a_run_shows_its_figures(
    address: str, trace: Path, mode: ModeName, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first token comes 10 ms after the last piece in all modes; it pays for warm-ups."""
    assert run("--trace", trace, "--mode", mode.value, "--address", address) == 0
    output = capsys.readouterr().out
    assert f"{NUM_REQUESTS} of {NUM_REQUESTS} requests completed" in output
    facts = facts_of(output)
    assert facts["label"] == mode.value
    assert facts["num_completed"] == NUM_REQUESTS
    assert facts["num_failed"] == 0
    assert facts["p50_ttft_ms"] >= 10.0
    assert facts["num_output_tokens"] == 2 * NUM_REQUESTS
    assert (facts["num_computed_tokens"] > facts["num_prompt_tokens"]) == (mode is ModeName.WARMUP)


def test_runs_are_appended_to_a_file(address: str, trace: Path, tmp_path: Path) -> None:
    """With the records beside it, and without folders of this machine."""
    path = tmp_path / "runs.jsonl"
    for mode in ("oneshot", "stream"):
        words = ["--mode", mode, "--output-file", path, "--save-records"]
        assert run("--trace", trace, "--address", address, *words) == 0
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["mode"] for line in lines] == ["oneshot", "stream"]
    assert lines[0]["environment"]["trace"] == "trace.jsonl"
    assert str(tmp_path) not in text
    saved = list(read_records(path))
    one_shot, streamed = ([record.token_ids for record in each.result.records] for each in saved)
    assert one_shot == streamed


def test_arrivals_are_drawn_once_and_used_again(
    address: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run would be of other arrivals without the file of the first."""
    path = tmp_path / "arrivals.json"
    words = ["--trace", trace, "--address", address, "--arrivals-file", path]
    assert run(*words, "--arrivals", "poisson", "--request-rate", "40", "--seed", "1") == 0
    before = path.read_bytes()
    assert run(*words, "--arrivals", "poisson", "--request-rate", "0.04", "--seed", "2") == 0
    assert path.read_bytes() == before
    facts = facts_of(capsys.readouterr().out)
    assert facts["wall_s"] < make_arrivals("poisson", NUM_REQUESTS, rate=0.04, seed=2)[-1]
    assert facts["request_rate"] == 40


def test_limit_warm_up_and_time_scale(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of the four requests, one of them left out of the figures, a thousand times faster."""
    trace = write_trace(tmp_path / "long.jsonl", delay_ms=20_000.0)
    words = ["--limit", "3", "--warm-up", "1", "--time-scale", "0.001"]
    assert run("--trace", trace, "--address", address, *words) == 0
    facts = facts_of(capsys.readouterr().out)
    assert facts["num_requests"] == 2
    assert facts["wall_s"] < 20.0


def test_failed_requests_are_shown(
    address: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With their error, and exit code 1."""
    assert run("--trace", trace, "--address", address, "--timeout-s", "0.001") == 1
    output = capsys.readouterr().out
    assert "q0: DEADLINE_EXCEEDED" in output
    assert facts_of(output)["failures"] == {"DEADLINE_EXCEEDED": NUM_REQUESTS}


def test_ctrl_c_ends_a_run_early(
    address: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was running counts as cancelled, the figures so far are shown, nothing is saved."""
    trace = write_trace(tmp_path / "long.jsonl", delay_ms=60_000.0)

    def interrupt(progress: RunProgress) -> None:
        if progress.num_in_flight == NUM_REQUESTS:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(bench_run, "run_progress", lambda title: nullcontext(interrupt))
    path = tmp_path / "runs.jsonl"
    assert run("--trace", trace, "--address", address, "--output-file", path) == 130
    assert path.read_bytes() == b""
    facts = facts_of(capsys.readouterr().out)
    assert facts["failures"] == {"CANCELLED": NUM_REQUESTS}


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--limit", "0"], "--limit"),
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--time-scale", "0"], "--time-scale"),
        (["--time-scale", "nan"], "--time-scale"),
        (["--timeout-s", "-1"], "--timeout-s"),
        (["--warm-up", "-1"], "--warm-up"),
        (["--warm-up", "4"], "--warm-up"),
        (["--arrivals", "poisson", "--request-rate", "1", "--seed", "-1"], "--seed"),
        (["--arrivals", "closed"], "--arrivals"),
        (["--arrivals", "poisson"], "--arrivals"),
        (["--request-rate", "0"], "--request-rate"),
        (["--save-records"], "--save-records"),
        (["--goodput", "ttft"], "--goodput"),
        (["--address", "127.0.0.1:1", "--prefill", "2"], "--address"),
        (["--address", "127.0.0.1:1", "--http-port", "8001"], "--address"),
        (["--address", "127.0.0.1:1", "--set", "prefill.threads=2"], "--address"),
        (["--address", "127.0.0.1:1", "--openai", "http://x", "--mode", "oneshot"], "--address"),
        (["--openai", "http://x"], "--mode"),
        (["--openai", "http://x", "--mode", "oneshot", "--decode", "1"], "--openai"),
        (["--model", "/missing"], "model"),
    ],
)
def test_options_that_cannot_work(trace: Path, words: list[str], option: str) -> None:
    """Nothing is started, and the error names the option."""
    with pytest.raises(ConfigError) as raised:
        run("--trace", trace, *words)
    assert raised.value.key == option


def test_a_trace_that_is_missing_or_empty(tmp_path: Path) -> None:
    """The error names the file."""
    path = tmp_path / "none.jsonl"
    with pytest.raises(TraceError, match=r"none\.jsonl"):
        run("--trace", path)
    with TraceWriter(path, TraceHeader(schema=SCHEMA_VERSION, name="empty")):
        pass
    with pytest.raises(TraceError, match="has no request"):
        run("--trace", path)


def test_a_file_that_cannot_be_written_is_known_before_the_run(trace: Path, tmp_path: Path) -> None:
    """So that no measurement is lost."""
    with pytest.raises(ConfigError, match="cannot be written"):
        run("--trace", trace, "--output-file", tmp_path / "missing" / "runs.jsonl")


def test_the_generator_measures_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """All pieces of the schedule are sent, at its rate."""
    words = ["--appends-per-second", "100", "--duration-s", "0.6", "--streams", "10"]
    assert bench_self.run(parsed(bench_self, words)) == 0
    facts = facts_of(capsys.readouterr().out)
    assert facts["num_streams"] == 10
    assert facts["num_appends"] == 60
    assert facts["num_failed"] == 0
    assert 0.0 <= facts["lag_p50_ms"] <= facts["lag_p99_ms"] <= facts["lag_max_ms"]
    assert facts["appends_per_s"] > 10.0
    assert facts["cpu_cores"] > 0.0


@pytest.mark.parametrize(
    "words",
    [
        ["--streams", "0"],
        ["--duration-s", "0"],
        ["--duration-s", "inf"],
        ["--appends-per-second", "-1"],
        ["--appends-per-second", "inf"],
    ],
)
def test_schedules_that_cannot_be(words: list[str]) -> None:
    """The error names the option."""
    with pytest.raises(ConfigError) as raised:
        bench_self.run(parsed(bench_self, words))
    assert raised.value.key == words[0]


def test_a_router_that_is_not_there(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in one line, after the time that a start may take."""
    monkeypatch.setattr("streamfill.loadgen.targets.streamfill.READY_TIMEOUT_S", 0.2)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 is not ready"):
        run("--trace", trace, "--address", "127.0.0.1:1")
