"""The importers of formats that tell lengths: Mooncake, BurstGPT, Azure."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.messages.common import StreamMode
from streamfill.traces.importers.bad_rows import BadRowError, Problem
from streamfill.traces.importers.interface import ImportOptions, NoAnswer
from streamfill.traces.importers.timestamps import TimestampParser
from tests.unit.traces.import_builders import import_files, write_json, write_lines

BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
BURSTGPT_3 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
)
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def mooncake_row(**changes: object) -> dict[str, object]:
    return {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]} | {
        **changes
    }


def test_mooncake_rows_keep_exact_lengths_and_shared_blocks(tmp_path: Path) -> None:
    """A prompt has exactly input_length tokens, and equal block ids give equal tokens."""
    path = write_json(
        tmp_path / "trace.jsonl",
        mooncake_row(timestamp=27482, input_length=6955, hash_ids=list(range(46, 60))),
        mooncake_row(timestamp=30535, input_length=1024, output_length=26, hash_ids=[46, 47]),
    )
    imported = import_files("mooncake", path)
    first, second = (script.prompt for script in imported.scripts)
    assert (len(first), len(second)) == (6955, 1024)
    assert first[:1024] == second
    assert first[1024:1536] != first[512:1024]
    assert [request.arrival_ms for request in imported.requests] == [0.0, 3053.0]
    assert [request.max_output_tokens for request in imported.requests] == [5, 26]
    assert imported.requests[0].mode is StreamMode.APPEND
    assert imported.requests[0].segments[0].delay_ms == 0.0


@pytest.mark.parametrize(
    ("changes", "problem", "text"),
    [
        ({"hash_ids": [0, 1]}, Problem.WRONG_BLOCKS, "hash_ids = (0, 1): has 2 blocks; 1100"),
        ({"hash_ids": [0, "x", 2]}, Problem.WRONG_TYPE, "hash_ids[1] = 'x': Expected `int`"),
        ({"input_length": 0, "hash_ids": []}, Problem.OUT_OF_RANGE, "input_length = 0: "),
        ({"output_length": 2.5}, Problem.WRONG_TYPE, "output_length = 2.5: Expected `int`"),
        ({"timestamp": -1}, Problem.OUT_OF_RANGE, "timestamp = -1: "),
    ],
)
def test_mooncake_names_the_field_that_is_wrong(
    tmp_path: Path, changes: dict[str, object], problem: Problem, text: str
) -> None:
    """A bad row is told by file, line, field, value and what is right."""
    path = write_json(tmp_path / "trace.jsonl", mooncake_row(), mooncake_row(**changes))
    with pytest.raises(BadRowError) as caught:
        import_files("mooncake", path)
    assert caught.value.problem is problem
    assert str(caught.value).startswith(f"{path}, line 2, {text}")


def test_mooncake_tells_a_missing_field(tmp_path: Path) -> None:
    """A field that is not there is named, without a value."""
    path = write_json(tmp_path / "trace.jsonl", {"timestamp": 0, "input_length": 3})
    with pytest.raises(BadRowError, match=r"line 1, output_length: is missing"):
        import_files("mooncake", path)


def test_burstgpt_reads_the_six_columns_of_the_first_release(tmp_path: Path) -> None:
    """Arrivals count from the first row, lengths are exact, failed requests are left out."""
    path = write_lines(
        tmp_path / "BurstGPT_1.csv",
        BURSTGPT,
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,230,1317,Conversation log",
        "118,GPT-4,417,0,417,Conversation log",
        "120.5,GPT-4,9,1,10,API log",
    )
    imported = import_files("burstgpt", path)
    assert [len(script.prompt) for script in imported.scripts] == [472, 1087, 9]
    assert [request.arrival_ms for request in imported.requests] == [0.0, 40000.0, 115500.0]
    assert [request.max_output_tokens for request in imported.requests] == [18, 230, 1]
    assert imported.bad_rows.left_out.total() == 1
    assert imported.bad_rows.num_bad == 0


def test_burstgpt_reads_the_sessions_of_the_third_file(tmp_path: Path) -> None:
    """Columns are found by their names, and Session ID becomes the session."""
    path = write_lines(
        tmp_path / "BurstGPT_3.csv",
        BURSTGPT_3,
        "19440110.0,1722ac82-0a46-4bf0-aa08-89794e7a2b3f,43,GPT-4,906,446,1352,Conversation log",
        "19440161.0,,2,ChatGPT,36,29,65,API log",
    )
    first, second = import_files("burstgpt", path).requests
    assert first.session_id == "1722ac82-0a46-4bf0-aa08-89794e7a2b3f"
    assert second.session_id is None
    assert (first.arrival_ms, second.arrival_ms) == (0.0, 51000.0)


@pytest.mark.parametrize(("no_answer", "num_requests"), [(NoAnswer.SKIP, 1), (NoAnswer.KEEP, 2)])
def test_rows_without_an_answer_are_left_out_or_kept(
    tmp_path: Path, no_answer: NoAnswer, num_requests: int
) -> None:
    """Kept ones generate one token, since a request of none does not exist."""
    path = write_lines(tmp_path / "b.csv", BURSTGPT, "1,m,7,0,7,x", "2,m,7,3,10,x")
    imported = import_files("burstgpt", path, options=ImportOptions(no_answer=no_answer))
    assert len(imported.requests) == num_requests
    assert min(request.max_output_tokens for request in imported.requests) >= 1


def test_rows_without_an_answer_can_be_bad_rows(tmp_path: Path) -> None:
    """--no-answer error treats them as mistakes of the file."""
    path = write_lines(tmp_path / "b.csv", BURSTGPT, "1,m,7,0,7,x")
    with pytest.raises(BadRowError, match=r"line 2, Response tokens = 0: must be at least 1"):
        import_files("burstgpt", path, options=ImportOptions(no_answer=NoAnswer.ERROR))


def test_azure_2023_keeps_all_seven_digits_of_a_second(tmp_path: Path) -> None:
    """Arrivals are exact to 100 ns, in a file with Windows line ends and no last one."""
    path = write_lines(
        tmp_path / "AzureLLMInferenceTrace_conv.csv",
        AZURE,
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951691,396,109",
        "2023-11-16 18:16:00.0000000,879,55",
        end="\r\n",
    )
    imported = import_files("azure", path)
    assert [request.arrival_ms for request in imported.requests] == [0.0, 4314.5791, 13319.41]
    assert [len(script.prompt) for script in imported.scripts] == [374, 396, 879]
    assert [request.max_output_tokens for request in imported.requests] == [44, 109, 55]


def test_azure_2024_times_have_a_zone(tmp_path: Path) -> None:
    """Times with and without a fraction, in any zone, lie on one axis."""
    path = write_lines(
        tmp_path / "code.csv",
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens",
        "2024-05-10 00:00:00.009930+00:00,0,2162,5",
        "2024-05-10 00:00:01+00:00,1,2399,6",
        "2024-05-10 02:00:02+02:00,1,76,15",
    )
    arrivals = [request.arrival_ms for request in import_files("azure", path).requests]
    assert arrivals == [0.0, 990.07, 1990.07]


def test_azure_refuses_what_is_no_time(tmp_path: Path) -> None:
    """A date that does not exist is told with an example of a right one."""
    path = write_lines(tmp_path / "a.csv", AZURE, "2023-13-16 18:15:46.68,374,44")
    with pytest.raises(BadRowError, match=r"TIMESTAMP = '2023-13-16 .*': must be a time such as"):
        import_files("azure", path)


@given(st.integers(0, 10**9 - 1), st.datetimes())
def test_timestamps_keep_every_nanosecond(fraction_ns: int, second: object) -> None:
    """The fraction is added to the second as it is written, to the last digit."""
    text = str(second)[:19]
    parser = TimestampParser()
    whole = parser.parse_ns(text)
    assert parser.parse_ns(f"{text}.{fraction_ns:09d}") - whole == fraction_ns
    assert TimestampParser().parse_ns(f"{text.replace(' ', 'T')}Z") == whole


def test_unsorted_rows_are_sorted(tmp_path: Path) -> None:
    """The trace starts with the earliest arrival, wherever it stands in the file."""
    path = write_lines(
        tmp_path / "b.csv", BURSTGPT, "9,m,900,1,1,x", "2,m,200,1,1,x", "4,m,400,1,1,x"
    )
    imported = import_files("burstgpt", path)
    assert imported.was_sorted
    assert [len(script.prompt) for script in imported.scripts] == [200, 400, 900]
    assert [request.arrival_ms for request in imported.requests] == [0.0, 2000.0, 7000.0]


def test_several_files_make_one_trace(tmp_path: Path) -> None:
    """Files are read one after the other, and ids stay unique; a sorted trace is not read twice."""
    first = write_lines(tmp_path / "b_1.csv", BURSTGPT, "5,m,10,1,1,x")
    second = write_lines(tmp_path / "b_2.csv", BURSTGPT, "7,m,20,1,1,x")
    imported = import_files("burstgpt", first, second)
    assert [request.id for request in imported.requests] == ["burstgpt-0", "burstgpt-1"]
    assert not imported.was_sorted


def test_a_limit_takes_the_first_requests(tmp_path: Path) -> None:
    """Rows behind the limit are not even read, so that a bad one there does no harm."""
    path = write_lines(tmp_path / "b.csv", BURSTGPT, "1,m,1,1,2,x", "2,m,2,1,3,x", "x,y")
    assert len(import_files("burstgpt", path, limit=2).requests) == 2
