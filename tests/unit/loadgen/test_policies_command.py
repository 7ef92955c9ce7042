"""`streamfill bench policies` from the command line to its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfill.cli.main import main
from streamfill.loadgen.compare_modes import shipped_policies
from streamfill.messages.common import StreamMode
from tests.unit.loadgen.command_builders import result_of, running_fake, trace


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A fake router in a process of its own."""
    with running_fake() as address:
        yield address


def words_for(folder: Path, *words: str) -> list[str]:
    """Two traces at two loads."""
    paths = [
        str(trace(folder, mode, name=name))
        for name, mode in (("grows", StreamMode.APPEND), ("changes", StreamMode.UPDATE))
    ]
    command = ["bench", "policies", "--traces", ",".join(paths), "--loads", "slow,quick"]
    for name in ("grows", "changes"):
        command += ["--rate", f"{name}:slow=50", "--rate", f"{name}:quick=200"]
    return [*command, *words]


@pytest.mark.integration
def test_all_policies_in_all_cells(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each cell has every mode, ratios and verdicts; each run is a line; resuming makes none."""
    runs = tmp_path / "runs.jsonl"
    words = words_for(tmp_path, "--address", address, "--output-file", str(runs))
    assert main(words) == 0
    output = capsys.readouterr().out
    modes = {"oneshot", "warmup", *(f"stream@{name}" for name in shipped_policies())}
    num_runs = 4 * len(modes)
    assert output.startswith(f"{num_runs} runs, ")
    facts = result_of(output)
    assert (facts["identical"], facts["complete"]) == (True, True)
    for name in ("grows", "changes"):
        for load in ("slow", "quick"):
            cell = facts[name][load]
            assert modes <= set(cell)
            assert cell["oneshot"]["ratio_to_oneshot"] == {"p50": 1, "p95": 1, "p99": 1}
            assert cell["stream@fcfs"]["p50_ttft_ms"] >= 5
            assert cell["stream@fcfs"]["throughput_ratio_to_oneshot"] > 0
            assert set(cell["adaptive_to_best_other"]) == {"p50", "p95", "p99"}
            assert cell["request_rate"] == {"slow": 50, "quick": 200}[load]
    assert output.count("P95: stream@adaptive is ") == 4
    lines = [json.loads(line) for line in runs.read_text().splitlines()]
    assert len(lines) == num_runs
    assert {line["config"]["load"] for line in lines} == {"slow", "quick"}
    by_label = {line["label"]: line["policy"] for line in lines}
    assert by_label["warmup"] == "default"
    assert by_label["stream@lcas(order=newest)"] == "lcas(order=newest)"

    assert main([*words, "--resume"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"0 runs, less than a minute where servers keep up; {num_runs} more")
    assert result_of(output) == facts
    assert len(runs.read_text().splitlines()) == num_runs


@pytest.mark.integration
def test_resuming_makes_what_is_missing(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of one policy more, and runs at another rate, are made; the others count as they are."""
    runs = tmp_path / "runs.jsonl"
    words = words_for(tmp_path, "--address", address, "--output-file", str(runs), "--resume")
    assert main([*words, "--policies", "adaptive"]) == 0
    assert len(runs.read_text().splitlines()) == 12
    capsys.readouterr()
    more = ["--policies", "adaptive,fcfs", "--rate", "grows:slow=60"]
    assert main([*words, *more]) == 0
    lines = [json.loads(line) for line in runs.read_text().splitlines()][12:]
    made = [(line["trace"], line["request_rate"], line["label"]) for line in lines]
    assert made == [
        ("grows", 60, "oneshot"),
        ("grows", 60, "warmup"),
        ("grows", 60, "stream@adaptive"),
        ("grows", 60, "stream@fcfs"),
        ("grows", 200, "stream@fcfs"),
        ("changes", 50, "stream@fcfs"),
        ("changes", 200, "stream@fcfs"),
    ]
    output = capsys.readouterr().out
    assert "7 runs" in output
    assert "9 more are in the file already" in output
    assert set(result_of(output)["changes"]["quick"]) >= {"oneshot", "stream@fcfs"}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--policies", "fastest"], "--policies = 'fastest'"),
        (["--policies", ""], "--policies = ''"),
        (["--baseline-policy", "fastest"], "--baseline-policy = 'fastest'"),
        (["--runs", "0"], "--runs = 0"),
        (["--rate", "grows:steady=1"], "--rate = 'grows:steady'"),
        (["--loads", "steady"], "--rate = 'grows:slow'"),
        (["--limit", "0"], "--limit = 0"),
        (["--arrivals", "closed"], "--arrivals = 'closed'"),
        (["--resume"], "--resume = True: needs --output-file"),
        (["--goodput", "ttft"], "--goodput = 'ttft'"),
        (["--output-file", "/nowhere/x.jsonl"], "--output-file = '/nowhere/x.jsonl'"),
        (["--address", "localhost:1", "--prefill", "2"], "leave --prefill out"),
    ],
)
def test_wrong_usage(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the option and its value, exit code 2, before anything is started."""
    assert main(words_for(tmp_path, *words)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert part in captured.err
    assert captured.err.count("\n") == 1
