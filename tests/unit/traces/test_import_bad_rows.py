"""What is wrong with a file: told exactly, or counted."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from streamfill.errors import TraceError
from streamfill.traces.importers.bad_rows import NUM_SHOWN, BadRowError, Problem
from streamfill.traces.importers.registry import FORMATS
from tests.unit.traces.import_builders import import_files, write_csv, write_json, write_lines

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
GOOD = "2023-11-16 18:15:46.6805900,374,44"
TIME = "2023-11-16 18:15:47"


@pytest.mark.parametrize(
    ("row", "problem", "text"),
    [
        (f"{TIME},many,4", Problem.WRONG_TYPE, "ContextTokens = 'many': must be a whole number"),
        (f"{TIME},3.0,4", Problem.WRONG_TYPE, "ContextTokens = '3.0': must be a whole number"),
        (f"{TIME},1_0,4", Problem.WRONG_TYPE, "ContextTokens = '1_0': must be a whole number"),
        (f"{TIME},,4", Problem.WRONG_TYPE, "ContextTokens = '': must be a whole number"),
        (f"{TIME},0,4", Problem.OUT_OF_RANGE, "ContextTokens = 0: must be at least 1"),
        (f"{TIME},5,-4", Problem.OUT_OF_RANGE, "GeneratedTokens = -4: must be at least 0"),
        (f"{TIME},5", Problem.MISSING, "GeneratedTokens: is missing; 3 values needed"),
        (f"{TIME},5,4,9", Problem.BAD_CSV, "value 4 = '9': is one too many"),
        (f'{TIME},"5"x,4', Problem.BAD_CSV, "row: no valid CSV"),
        ("yesterday,5,4", Problem.BAD_TIME, "TIMESTAMP = 'yesterday': must be a time such as"),
    ],
)
def test_a_bad_row_names_file_line_column_and_value(
    tmp_path: Path, row: str, problem: Problem, text: str
) -> None:
    """The first bad row ends the import with one line that says what is right."""
    path = write_lines(tmp_path / "azure.csv", AZURE, GOOD, row, GOOD)
    with pytest.raises(BadRowError) as caught:
        import_files("azure", path)
    assert caught.value.problem is problem
    assert str(caught.value).startswith(f"{path}, line 3, {text}")
    assert "\n" not in str(caught.value)


def test_bad_rows_are_counted_by_kind_when_they_are_skipped(tmp_path: Path) -> None:
    """The good rows around them are imported; the summary quotes the first few."""
    bad = [f"{TIME},{word},4" for word in "abcdefg"]
    path = write_lines(
        tmp_path / "azure.csv", AZURE, GOOD, *bad, f"{TIME},5", GOOD.replace("46", "59")
    )
    imported = import_files("azure", path, skip_bad=True)
    assert len(imported.requests) == 2
    assert imported.bad_rows.counts == {Problem.WRONG_TYPE: 7, Problem.MISSING: 1}
    summary = imported.bad_rows.summary()
    assert summary[0] == "Skipped 8 bad rows:"
    assert f"  7 x {Problem.WRONG_TYPE.value}" in summary
    assert len([line for line in summary if "azure.csv, line " in line]) == NUM_SHOWN


def test_a_missing_column_is_never_skipped(tmp_path: Path) -> None:
    """No row can be right without it, so the message shows the header that was found."""
    path = write_lines(tmp_path / "azure.csv", "TIMESTAMP,GeneratedTokens", f"{TIME},5")
    with pytest.raises(BadRowError, match=r"header = 'TIMESTAMP,GeneratedTokens': has no column"):
        import_files("azure", path, skip_bad=True)


def test_a_byte_that_is_not_utf8_spoils_its_row_alone(tmp_path: Path) -> None:
    """The row is told with its bytes; with --skip-bad the others are imported."""
    path = tmp_path / "burst.csv"
    rows = (b"1,a,5,1,6,x", b"2,\xff\xfe,5,1,6,x", b"3,a,\xe9,1,6,x", b"4,a,7,1,8,x")
    path.write_bytes(
        b"\n".join((b"Timestamp,Session ID,Request tokens,Response tokens,T,L", *rows))
    )
    with pytest.raises(BadRowError, match=r"line 3, Session ID = b'\\xff\\xfe': must be UTF-8"):
        import_files("burstgpt", path)
    imported = import_files("burstgpt", path, skip_bad=True)
    assert [len(script.prompt) for script in imported.scripts] == [5, 7]
    assert imported.bad_rows.counts == {Problem.NOT_UTF8: 2}


def test_json_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    """A broken byte in a message's text is found where it stands."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"messages":[{"role":"user","content":"caf\xe9"}],"timestamp":1}\n')
    with pytest.raises(BadRowError) as caught:
        import_files("openai-messages", path)
    assert caught.value.problem is Problem.NOT_UTF8
    assert "line 1" in str(caught.value)


def test_truncated_json_is_a_bad_row(tmp_path: Path) -> None:
    """A file that was cut off in its last line is told so, or keeps the lines before."""
    row = '{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": [0]}'
    path = write_lines(tmp_path / "trace.jsonl", row, row[:40])
    with pytest.raises(BadRowError, match=r"line 2, line = '.*': no valid JSON: .*truncated"):
        import_files("mooncake", path)
    assert len(import_files("mooncake", path, skip_bad=True).requests) == 1


def test_a_quote_that_never_ends_is_told(tmp_path: Path) -> None:
    """A CSV file that was cut off inside a quoted value is no valid CSV."""
    path = write_lines(tmp_path / "azure.csv", AZURE, GOOD, f'"{TIME},5,4', GOOD)
    with pytest.raises(BadRowError, match=r"line 3, row: no valid CSV: unexpected end of data"):
        import_files("azure", path)


def test_a_byte_order_mark_and_empty_lines_are_no_mistakes(tmp_path: Path) -> None:
    """Files that went through Excel or an editor are read."""
    path = tmp_path / "azure.csv"
    path.write_bytes(f"\ufeff{AZURE}\n\n{GOOD}\n\n".encode())
    assert len(import_files("azure", path).requests) == 1


def test_compressed_files_are_read(tmp_path: Path) -> None:
    """A name that ends in .gz means gzip; one that was cut off is told."""
    path = tmp_path / "azure.csv.gz"
    whole = gzip.compress(f"{AZURE}\n{GOOD}\n".encode())
    path.write_bytes(whole)
    assert len(import_files("azure", path).requests) == 1
    path.write_bytes(whole[:-12])
    with pytest.raises(TraceError, match=r"azure.csv.gz: cannot be read"):
        import_files("azure", path)


@pytest.mark.parametrize("name", [each.name for each in FORMATS])
def test_missing_files_are_told(tmp_path: Path, name: str) -> None:
    """Every importer names the file that is not there."""
    with pytest.raises(TraceError, match=r"gone: no such file"):
        import_files(name, tmp_path / "gone", skip_bad=True)


@pytest.mark.parametrize("name", ["mooncake", "burstgpt", "azure", "openai-messages"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_empty_files_are_told(tmp_path: Path, name: str, skip_bad: bool) -> None:
    """An empty file is an error even when bad rows are skipped, and leaves no trace behind."""
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(TraceError, match=r"empty.*(is empty|is missing)"):
        import_files(name, path, skip_bad=skip_bad)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_without_a_good_row_makes_no_trace(tmp_path: Path) -> None:
    """The error counts what was skipped, in one line."""
    path = write_lines(tmp_path / "azure.csv", AZURE, f"{TIME},x,4")
    with pytest.raises(TraceError, match=r"no request, so nothing is written. Skipped 1 bad row:"):
        import_files("azure", path, skip_bad=True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    """Files of a folder are read in the order of the numbers in their names."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, tokens in ((10, 30), (9, 20)):
        header = ("Timestamp", "Request tokens", "Response tokens")
        write_csv(folder / f"part_{number}.csv", (header, (number, tokens, 1)))
    imported = import_files("burstgpt", folder)
    assert [len(script.prompt) for script in imported.scripts] == [20, 30]
    assert not imported.was_sorted


def test_a_folder_without_such_files_is_told(tmp_path: Path) -> None:
    """The name that was looked for is part of the message."""
    write_json(tmp_path / "x.json", {})
    with pytest.raises(TraceError, match=r"has no file query_\*\.csv"):
        import_files("stream2llm-crawler", tmp_path)
