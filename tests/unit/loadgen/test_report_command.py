"""`streamfill bench report` draws the page of saved runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec
import pytest

from streamfill.cli import bench_report
from streamfill.errors import ConfigError
from streamfill.loadgen.environment import Environment, LoadAverage
from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.run_file import RunFile, SavedRun
from tests.unit.loadgen.report_builders import comparison

ENVIRONMENT = Environment(
    cpu="abacus", num_cores=2, memory_bytes=2**30, platform="Linux", versions={"python": "3.11"}
)


def saved(path: Path, environment: Environment = ENVIRONMENT) -> Path:
    """A file of figures with its records beside it."""
    file = RunFile(path, saves_records=True)
    for each in comparison(num_runs=1, num_requests=5):
        load = LoadAverage(start=0.0, end=1.0)
        run = SavedRun(result=each, environment=environment, load=load, config={"seed": 3})
        file.add(run, summarise(each))
    return path


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    bench_report.add_arguments(parser)
    return bench_report.run(parser.parse_args(words))


def test_report_of_saved_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that are named together are repetitions of one comparison."""
    files = [str(saved(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    output = tmp_path / "page.html"
    assert call(*files, "--output", str(output)) == 0
    text = output.read_text(encoding="utf-8")
    assert "2 runs of each mode" in text
    assert "abacus" in text
    last = capsys.readouterr().out.splitlines()[-1]
    facts = json.loads(last.removeprefix("RESULT "))
    assert facts == {
        "output": "page.html",
        "num_runs": 6,
        "labels": ["oneshot", "warmup", "stream"],
    }


def test_other_machines_are_a_warning(tmp_path: Path) -> None:
    """Runs of different environments may not be compared without a word."""
    other = msgspec.structs.replace(ENVIRONMENT, cpu="slide rule")
    files = [str(saved(tmp_path / "a.jsonl")), str(saved(tmp_path / "b.jsonl", other))]
    output = tmp_path / "page.html"
    call(*files, "--output", str(output))
    assert "different environments" in output.read_text(encoding="utf-8")


def test_file_without_records(tmp_path: Path) -> None:
    """The error says how to have records."""
    with pytest.raises(ConfigError, match="--save-records"):
        call(str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "page.html"))


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    """The error names the option of this command."""
    file = saved(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="--output"):
        call(str(file), "--output", str(tmp_path / "missing" / "page.html"))
