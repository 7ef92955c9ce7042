"""`streamfill traces import` as a user types it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from streamfill.cli import traces_import
from streamfill.errors import StreamfillError
from streamfill.traces.files import TraceReader
from streamfill.traces.importers.registry import FORMATS
from tests.unit.traces.import_builders import write_json, write_lines

ROWS = ("Timestamp,Request tokens,Response tokens", "5,3,1", "x,3,1", "4,9,1", "6,9,0")


def run(*words: str | Path) -> int:
    """What `streamfill traces import` does with these words."""
    parser = argparse.ArgumentParser()
    traces_import.add_arguments(parser)
    return traces_import.run(parser.parse_args([str(word) for word in words]))


def test_an_import_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests on the standard output; what was skipped, left out or sorted on the other one."""
    source = write_lines(tmp_path / "burst.csv", *ROWS)
    output = tmp_path / "out.jsonl.gz"
    assert run("burstgpt", source, "--output", output, "--skip-bad", "--seed", "9") == 0
    out, err = capsys.readouterr()
    assert out == f"Wrote 2 requests to {output}.\n"
    assert "reading again to sort them" in err
    assert "Left out: 1 x rows without an answer" in err
    assert "Skipped 1 bad row:" in err
    assert f"{source}, line 3, Timestamp = 'x': must be a number" in err
    with TraceReader(output) as reader:
        assert [request.arrival_ms for request in reader] == [0.0, 1000.0]
        assert (reader.header.name, reader.header.seed) == ("out", 9)


def test_a_bad_row_ends_the_import_and_leaves_no_file(tmp_path: Path) -> None:
    """`main` shows the error as one line, exit code 2; an older output stays as it was."""
    source = write_lines(tmp_path / "burst.csv", *ROWS)
    output = write_lines(tmp_path / "out.jsonl", "older")
    with pytest.raises(StreamfillError, match=r"line 3, Timestamp = 'x'"):
        run("burstgpt", source, "--output", output)
    assert output.read_text() == "older"
    assert sorted(tmp_path.iterdir()) == [source, output]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--limit", "0"], "--limit = 0: must be at least 1"),
        (["--output-tokens", "0"], "--output-tokens = 0: must be at least 1"),
        (["--request-rate", "0"], "--request-rate = 0.0: must be above 0"),
        (["--request-rate", "nan"], "--request-rate = nan: must be above 0"),
        (["--output", "/nowhere/x.jsonl"], "there is no folder /nowhere"),
        (["--output", "x.csv"], "must be a file, .jsonl or .jsonl.gz"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, words: list[str], text: str) -> None:
    """Option, value and remedy, before anything is read."""
    source = write_json(tmp_path / "log.jsonl", {})
    with pytest.raises(StreamfillError) as caught:
        run("openai-messages", source, "--output", tmp_path / "out.jsonl", *words)
    assert text in str(caught.value)


def test_the_question_must_have_a_place_in_its_text(tmp_path: Path) -> None:
    """A question text without {query} would send every request without its question."""
    output = tmp_path / "o.jsonl"
    with pytest.raises(StreamfillError, match=r"--question = '\?': must contain \{query\}"):
        run("stream2llm-crawler", tmp_path, "--output", output, "--question", "?")


def test_the_output_must_not_be_an_input(tmp_path: Path) -> None:
    """An import never overwrites what it reads."""
    source = write_json(tmp_path / "log.jsonl", {})
    with pytest.raises(StreamfillError, match=r"is a file that is imported"):
        run("openai-messages", source, "--output", source)


def test_help_lists_the_formats_and_only_the_options_that_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each format is described; an option that it ignores is not offered."""
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert all(each.name in text for each in FORMATS)
    for each in FORMATS:
        with pytest.raises(SystemExit):
            run(each.name, "--help")
        text = capsys.readouterr().out
        assert all(option.value in text for option in each.options)
        assert ("--request-rate" in text) == ("--request-rate" in {o.value for o in each.options})


def test_an_option_of_another_format_is_refused(tmp_path: Path) -> None:
    """A silent option would look as if it worked."""
    with pytest.raises(SystemExit) as caught:
        run("azure", tmp_path, "--output", "o.jsonl", "--request-rate", "2")
    assert caught.value.code == 2


def test_progress_grows_to_the_size_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar counts bytes of all files, never goes back even when they are read twice to be
    sorted, and ends full."""
    rows = [f"{n},3,1" for n in range(9000)]
    paths = [write_lines(tmp_path / f"{name}.csv", ROWS[0], *rows) for name in "ab"]
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(traces_import, "no_progress", lambda *at: seen.append(at))
    assert run("burstgpt", *paths, "--output", tmp_path / "out.jsonl") == 0
    done = [at for at, _ in seen]
    assert done == sorted(done)
    assert len(done) > 8
    assert seen[-1][0] == seen[-1][1] > sum(path.stat().st_size for path in paths)
