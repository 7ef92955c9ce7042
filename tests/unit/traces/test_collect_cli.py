"""`streamfill traces collect` as a user calls it, and the errors that a user can make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamfill.cli.main import main
from streamfill.errors import ConfigError
from streamfill.models.home import HOME_VARIABLE
from streamfill.traces.collect.debian_tree import documentation_tree
from streamfill.traces.collect.delays import DrawnGaps, poisson_arrivals_ms
from streamfill.traces.files import TraceReader
from streamfill.traces.published import ANN, CRAWL, Workload
from tests.unit.traces.collect_site import make_site


def test_crawl_of_a_folder_ends_with_a_result_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is there, and the last line counts what is in it."""
    output = tmp_path / "trace.jsonl.gz"
    site = make_site(tmp_path / "site")
    words = ["traces", "collect", "crawl", "--output", str(output), "--tree", str(site)]
    assert main([*words, "--queries", "2", "--pages", "2", "--time-scale", "0.5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    facts = json.loads(printed[-1].removeprefix("RESULT "))
    with TraceReader(output) as reader:
        requests = list(reader)
        assert reader.header.time_scale == 0.5
        assert reader.header.source == "folder site"
    assert facts["num_requests"] == len(requests) == 2
    assert facts["num_segments"] == sum(len(request.segments) for request in requests)
    assert facts["num_pages"] == 16
    assert any(line.startswith("  drawn: segments.delay_ms: ") for line in printed)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["crawl", "--queries", "0"], "--queries"),
        (["crawl", "--token-scale", "2"], "--token-scale"),
        (["crawl", "--time-scale", "nan"], "--time-scale"),
        (["crawl", "--tree", "/nowhere"], "--tree"),
        (["crawl", "--package", "Not A Package"], "--package"),
        (["crawl", "--url", "ftp://orchard.example"], "--url"),
        (["crawl", "--pause", "-1"], "--pause"),
        (["ann", "--top-k", "0"], "--top-k"),
        (["ann", "--tree", "a", "--corpus", "b"], "--tree"),
    ],
)
def test_a_wrong_option_is_one_line(
    words: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line that names the option, and no file."""
    output = tmp_path / "trace.jsonl"
    assert main(["traces", "collect", *words, "--output", str(output)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {option} = ")
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_no_folder_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is collected for a file that cannot be written."""
    output = tmp_path / "missing" / "trace.jsonl"
    assert main(["traces", "collect", "crawl", "--output", str(output)]) == 2
    assert "--output" in capsys.readouterr().err


def test_without_apt_the_error_says_what_to_use_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No program is found on an empty path, and nothing is left in the home folder's cache."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"apt-get is not here; use --tree"):
        documentation_tree()
    assert not (tmp_path / "documentation" / "python3-doc").exists()


@pytest.mark.parametrize("workload", [CRAWL, ANN])
def test_drawn_gaps_have_the_published_quantiles(workload: Workload) -> None:
    """Quantiles of many draws are within 10 % of the published ones."""
    gaps = DrawnGaps(workload, seed=1)
    request = gaps.of_request(0)
    drawn = sorted(request.next_ms() for _ in range(20_000))
    for probability, value in workload.gap_ms.quantiles.items():
        if 0.2 < probability < 0.96:
            assert drawn[int(probability * len(drawn))] == pytest.approx(value, rel=0.1)
    assert gaps.of_request(3).next_ms() == DrawnGaps(workload, seed=1).of_request(3).next_ms()


def test_arrivals_have_the_wanted_rate() -> None:
    """The first request arrives at 0, and 5,000 of them at 4 per second take about 1,250 s."""
    arrivals_ms = poisson_arrivals_ms(5000, rate_per_s=4.0, seed=0)
    assert arrivals_ms[0] == 0.0
    assert arrivals_ms == sorted(arrivals_ms)
    assert arrivals_ms[-1] == pytest.approx(1_250_000, rel=0.06)
