"""`streamfill bench compare` from the command line to its files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfill.cli.main import main
from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.run_file import read_records
from streamfill.loadgen.targets.streamfill import StreamfillTarget
from streamfill.messages.common import StreamMode
from tests.unit.loadgen.command_builders import result_of, running_fake, trace


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A fake router in a process of its own."""
    with running_fake() as address:
        yield address


def policies_in_force(address: str, *, change_to: str = "") -> dict[str, str]:
    async def ask() -> dict[str, str]:
        target = StreamfillTarget(address)
        try:
            if change_to:
                assert await target.set_policy(change_to) == {}
            return await target.policies()
        finally:
            await target.close()

    return asyncio.run(ask())


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
    assert [line["policy"] for line in lines[:3]] == ["default", "default", "adaptive"]
    assert lines[0]["environment"]["trace"] == "small.jsonl"
    assert str(tmp_path) not in runs.read_text()
    saved = list(read_records(runs))
    assert [summarise(each.result).run for each in saved] == [line["run"] for line in lines]
    figures = summarise(saved[0].result, saved[0].goodput).figures
    assert figures["ttft_last_segment_ms"].p50 == pytest.approx(lines[0]["p50_ttft_ms"], abs=1e-3)


@pytest.mark.integration
def test_policies_are_set_and_put_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mode's label and policy are in its line; the running cluster ends as it began."""
    runs = tmp_path / "runs.jsonl"
    with running_fake() as address:
        assert policies_in_force(address, change_to="edf") == {"prefill-0": "edf"}
        words = ["bench", "compare", "--trace", str(trace(tmp_path)), "--address", address]
        words += ["--modes", "oneshot@laps,stream@lcas(order=newest)", "--output-file", str(runs)]
        assert main(words) == 0
        assert policies_in_force(address) == {"prefill-0": "edf"}
    facts = result_of(capsys.readouterr().out)
    assert facts["baseline"] == "oneshot@laps"
    assert set(facts["modes"]) == {"oneshot@laps", "stream@lcas(order=newest)"}
    lines = [json.loads(line) for line in runs.read_text().splitlines()]
    assert [line["policy"] for line in lines] == ["laps", "lcas(order=newest)"]


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
        (["--policy", "fastest"], "--policy = 'fastest'"),
        (["--baseline-policy", "fastest"], "--baseline-policy = 'fastest'"),
        (["--modes", "stream@fastest"], "--modes = 'fastest'"),
        (["--ttft-slo-ms", "0"], "--ttft-slo-ms = 0.0"),
        (["--goodput", "ttft"], "--goodput = 'ttft'"),
        (["--saturate", "0"], "--saturate = 0"),
        (["--saturate", "2", "--request-rate", "1"], "leave --request-rate out"),
        (["--saturate", "2", "--arrivals", "poisson"], "leave --arrivals out"),
        (["--save-records"], "needs --output-file"),
        (["--output-file", "/nowhere/x.jsonl"], "--output-file = '/nowhere/x.jsonl'"),
        (["--report", "/nowhere/x.html"], "--report = '/nowhere/x.html'"),
        (["--report", "/tmp"], "--report = '/tmp'"),
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
