"""`streamfill bench compare` from the command line to its files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamfill.cli.main import main
from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.run_file import read_records
from streamfill.messages.common import StreamMode
from streamfill.traces.files import TraceWriter
from streamfill.traces.format import Request, Segment, TraceHeader

START_TIMEOUT_S = 30


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A fake router in a process of its own."""
    command = [sys.executable, "-m", "streamfill.loadgen.fake_router", "--ttft-ms", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready.startswith("READY "), ready
            yield f"127.0.0.1:{json.loads(ready.removeprefix('READY '))['port']}"
        finally:
            process.terminate()
            process.wait(START_TIMEOUT_S)


def trace(folder: Path, mode: StreamMode = StreamMode.APPEND, num: int = 4) -> Path:
    path = folder / "small.jsonl"
    with TraceWriter(path, TraceHeader(schema=1, name="small")) as writer:
        for n in range(num):
            writer.add_request(
                Request(
                    id=f"q{n}",
                    arrival_ms=10.0 * n,
                    mode=mode,
                    segments=tuple(
                        Segment(delay_ms=20, text=f"Piece {part} of query {n}. ")
                        for part in range(3)
                    ),
                    max_output_tokens=3,
                )
            )
    return path


def result_of(output: str) -> dict[str, Any]:
    last = output.splitlines()[-1]
    assert last.startswith("RESULT ")
    facts: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return facts


@pytest.mark.integration
@pytest.mark.parametrize("mode", list(StreamMode))
def test_comparison_against_a_fake_router(
    address: str, mode: StreamMode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three modes, twice: identical answers, all figures, a line and the records of each run."""
    runs = tmp_path / "runs.jsonl"
    words = ["bench", "compare", "--trace", str(trace(tmp_path, mode)), "--address", address]
    words += ["--runs", "2", "--goodput", "ttft:5000", "--warm-up", "1"]
    words += ["--output-file", str(runs), "--save-records"]
    assert main(words) == 0
    output = capsys.readouterr().out
    facts = result_of(output)
    assert facts["identical"] is True
    assert (facts["num_compared"], facts["num_different"]) == (3, 0)
    for label in ("oneshot", "warmup", "stream"):
        for figure in ("ttft_last_segment_ms", "ttft_query_ms"):
            assert set(facts["ratio_to_oneshot"][label][figure]) == {"p50", "p95", "p99"}
        assert facts["throughput_ratio_to_oneshot"][label] > 0
        assert facts["modes"][label]["ttft_last_segment_ms"]["p50"] >= 5
        assert facts["modes"][label]["goodput_ratio"] == 1
    assert facts["failures"] == {"oneshot": {}, "warmup": {}, "stream": {}}
    assert "same answers" in output

    lines = [json.loads(line) for line in runs.read_text().splitlines()]
    assert [(line["label"], line["run"]) for line in lines] == [
        ("oneshot", 0),
        ("warmup", 0),
        ("stream", 0),
        ("stream", 1),
        ("warmup", 1),
        ("oneshot", 1),
    ]
    assert lines[2]["policy"] == "fcfs"
    assert lines[0]["policy"] == ""
    assert lines[0]["environment"]["trace"] == "small.jsonl"
    assert str(tmp_path) not in runs.read_text()
    saved = list(read_records(runs))
    assert [summarise(each.result).run for each in saved] == [line["run"] for line in lines]
    figures = summarise(saved[0].result, saved[0].goodput).figures
    assert figures["ttft_last_segment_ms"].p50 == pytest.approx(lines[0]["p50_ttft_ms"], abs=1e-3)


@pytest.mark.integration
def test_saturation_and_report(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A closed loop has at most N requests at a time; the page is written."""
    report = tmp_path / "report.html"
    words = ["bench", "compare", "--trace", str(trace(tmp_path)), "--address", address]
    words += ["--saturate", "2", "--modes", "oneshot,stream", "--report", str(report)]
    assert main(words) == 0
    facts = result_of(capsys.readouterr().out)
    assert set(facts["throughput_ratio_to_oneshot"]) == {"oneshot", "stream"}
    assert report.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--modes", "oneshoot"], "--modes = 'oneshoot': there is no mode"),
        (["--modes", "vllm:stream"], "vllm:stream"),
        (["--runs", "0"], "--runs = 0"),
        (["--policy", "mcps"], "--policy = 'mcps'"),
        (["--goodput", "ttft"], "--goodput = 'ttft'"),
        (["--saturate", "0"], "--saturate = 0"),
        (["--saturate", "2", "--request-rate", "1"], "leave --request-rate out"),
        (["--save-records"], "needs --output-file"),
        (["--output-file", "/nowhere/x.jsonl"], "--output-file = '/nowhere/x.jsonl'"),
        (["--report", "/nowhere/x.html"], "--report = '/nowhere/x.html'"),
        (["--modes", "stream,vllm:oneshot", "--address", "localhost:1"], "--address"),
    ],
)
def test_wrong_usage(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the option and its value, exit code 2, before anything is started."""
    path = trace(tmp_path, StreamMode.UPDATE)
    assert main(["bench", "compare", "--trace", str(path), *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert part in captured.err
    assert captured.err.count("\n") == 1


def test_missing_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace that is not there is named."""
    path = tmp_path / "none.jsonl"
    assert main(["bench", "compare", "--trace", str(path)]) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
