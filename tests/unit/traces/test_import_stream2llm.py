"""The importers of Stream2LLM's two kinds of traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamfill.errors import ConfigError, TraceError
from streamfill.messages.common import StreamMode
from streamfill.traces.importers.bad_rows import BadRowError, Problem
from streamfill.traces.importers.interface import ImportOptions, RankingTime
from tests.unit.traces.import_builders import import_files, write_csv, write_lines

CRAWLER = ("type", "query", "content", "startTime", "endTime")
ANNS = "StartTime_us,EndTime_us,StartIteration,EndIteration,PipelinePool"
OPTIONS = ImportOptions(prefix="P:", question="Q:{query}", output_tokens=3)


def crawl(folder: Path, number: int, *rows: tuple[object, ...]) -> Path:
    return write_csv(folder / f"query_{number}.csv", (CRAWLER, *rows))


def test_pages_arrive_in_the_order_of_their_end_and_the_question_last(tmp_path: Path) -> None:
    """Times count from the start of the search; content may hold commas, quotes and line breaks."""
    path = crawl(
        tmp_path,
        7,
        ("tavily_search", "Who?", "", 0.25, 1.5),
        ("page_scrape", "", 'late, "quoted"\nline', 1.5, 3.75),
        ("page_scrape", "", "early", 1.5, 2.0),
    )
    imported = import_files("stream2llm-crawler", path, options=OPTIONS)
    (request,), (script,) = imported.requests, imported.scripts
    assert request.id == "query_7"
    assert request.mode is StreamMode.APPEND
    assert [step.due_s for step in script.steps] == [1.75, 3.5]
    assert [step.piece for step in script.steps] == [
        "P:early\n",
        'late, "quoted"\nline\nQ:Who?',
    ]
    assert script.commits_with_last
    assert request.max_output_tokens == 3


def test_rows_without_content_take_time_but_send_nothing(tmp_path: Path) -> None:
    """An empty page in between is part of the next gap; at the end it brings the question. One that
    never ended counts for nothing."""
    path = crawl(
        tmp_path,
        1,
        ("tavily_search", "Who?", "", 0, 1),
        ("page_scrape", "", " ", 1, 1.5),
        ("page_scrape", "", "", 1, ""),
        ("page_scrape", "", "a", 1, 2),
        ("page_scrape", "", "", 1, 5),
    )
    (script,) = import_files("stream2llm-crawler", path, options=OPTIONS).scripts
    assert [(step.due_s, step.piece) for step in script.steps] == [(2.0, "P:a\n"), (5.0, "Q:Who?")]


def test_queries_of_a_folder_arrive_as_a_poisson_process(tmp_path: Path) -> None:
    """They keep the order of their numbers; the header says that arrivals were drawn, and the same
    seed draws the same ones."""
    for number in range(200):
        crawl(tmp_path, number, ("tavily_search", "q", "", 0, 1), ("page_scrape", "", "a", 1, 2))
    options = ImportOptions(request_rate=4.0)
    imported = import_files("stream2llm-crawler", tmp_path, options=options, seed=5)
    arrivals = [request.arrival_ms for request in imported.requests]
    assert [request.id for request in imported.requests] == [f"query_{n}" for n in range(200)]
    assert arrivals[0] == 0.0
    assert arrivals[-1] / 199 == pytest.approx(250, rel=0.2)
    assert imported.header.drawn == {"arrival_ms": "Poisson process, 4 per second"}
    assert imported.header.seed == 5
    again = import_files("stream2llm-crawler", tmp_path, options=options, seed=5)
    other = import_files("stream2llm-crawler", tmp_path, options=options, seed=6)
    assert again.requests == imported.requests
    assert other.requests != imported.requests


@pytest.mark.parametrize(
    ("rows", "problem", "text"),
    [
        ([("page_scrape", "", "a", 0, 1)], Problem.MISSING, ", query: no row has one"),
        ([("tavily_search", "q", "", 0, 1)], Problem.NO_CONTENT, ", content: is empty in all"),
        ([("pdf", "q", "a", 0, 1)], Problem.WRONG_TYPE, ", line 2, type = 'pdf': must be one of"),
        ([("page_scrape", "q", "a", "x", 1)], Problem.WRONG_TYPE, ", line 2, startTime = 'x'"),
        ([("page_scrape", "q", "a", 1, "nan")], Problem.WRONG_TYPE, ", line 2, endTime = 'nan'"),
        ([("page_scrape", "q", "a", 2, 1)], Problem.BAD_TIME, ", line 2, endTime = 1.0: is before"),
        ([], Problem.MISSING, ", query: no row has one"),
    ],
)
def test_a_query_that_cannot_be_replayed_is_one_bad_row(
    tmp_path: Path, rows: list[tuple[object, ...]], problem: Problem, text: str
) -> None:
    """The rows of a query belong together; with --skip-bad the other queries are imported."""
    crawl(tmp_path, 1, ("tavily_search", "q", "", 0, 1), ("page_scrape", "", "a", 1, 2))
    path = crawl(tmp_path, 2, *rows)
    with pytest.raises(BadRowError) as caught:
        import_files("stream2llm-crawler", tmp_path)
    assert caught.value.problem is problem
    assert str(caught.value).startswith(f"{path}{text}")
    imported = import_files("stream2llm-crawler", tmp_path, skip_bad=True)
    assert [request.id for request in imported.requests] == ["query_1"]
    assert imported.bad_rows.counts == {problem: 1}


def test_a_crawl_that_scraped_nothing_has_no_content_column(tmp_path: Path) -> None:
    """The published data has such files; they are bad rows, like an empty file."""
    crawl(tmp_path, 1, ("tavily_search", "q", "", 0, 1), ("page_scrape", "", "a", 1, 2))
    write_lines(tmp_path / "query_2.csv", "type,query,startTime,endTime", "tavily_search,q,0,1")
    (tmp_path / "query_3.csv").touch()
    with pytest.raises(BadRowError, match=r"query_2.csv, line 1, header = .* no column 'content'"):
        import_files("stream2llm-crawler", tmp_path)
    imported = import_files("stream2llm-crawler", tmp_path, skip_bad=True)
    assert imported.bad_rows.counts == {Problem.MISSING: 2}


def anns(folder: Path, *windows: str, corpus: dict[str, str] | None = None) -> Path:
    """The layout of the published data set, with one query."""
    (folder / "res").mkdir()
    write_lines(folder / "res" / "q3_pipeline_trace.csv", ANNS, *windows)
    documents = {"11": "eleven", "22": "twenty-two", "33": "thirty-three", "99": "unused"}
    parts = list((corpus or documents).items())
    for number in range(2):
        path = folder / f"retrieved_corpus_content.part.{number}.json"
        path.write_text(json.dumps(dict(parts[number::2])))
    queries = {"3": {"query": "Who?", "trace_file": "q3_pipeline_trace.csv"}}
    (folder / "query_trace_map_5k.json").write_text(json.dumps(queries))
    return folder


WINDOWS = (
    '1000,3000,0,4,"(11,22)"',
    '3000,3500,4,5,"(22,11,33)"',
    '3500,4000,5,6,"(22,11,33)"',
    '4000,9000,6,9,"(33)"',
)


def test_each_new_ranking_is_an_update_of_the_whole_context(tmp_path: Path) -> None:
    """Template, documents in their order, question; a ranking that stays the same is no update."""
    imported = import_files("stream2llm-anns", anns(tmp_path, *WINDOWS), options=OPTIONS)
    (request,), (script,) = imported.requests, imported.scripts
    assert request.id == "3"
    assert request.mode is StreamMode.UPDATE
    assert [segment.document_ids for segment in request.segments] == [
        ("11", "22"),
        ("22", "11", "33"),
        ("33",),
    ]
    assert [round(1000 * step.due_s, 3) for step in script.steps] == [2.0, 2.5, 8.0]
    assert script.steps[0].piece == "P:eleven\n\ntwenty-two\n\nQ:Who?"
    assert script.prompt == "P:thirty-three\n\nQ:Who?"
    assert script.commits_with_last
    assert set(imported.documents) == {"11", "22", "33"}


def test_rankings_may_count_from_the_start_of_their_window(tmp_path: Path) -> None:
    """Then the commit waits for the end of the search."""
    options = ImportOptions(ranking_time=RankingTime.START)
    (script,) = import_files(
        "stream2llm-anns", anns(tmp_path, *reversed(WINDOWS)), options=options
    ).scripts
    assert [round(1000 * step.due_s, 3) for step in script.steps] == [0.0, 2.0, 3.0]
    assert round(1000 * script.commit_due_s, 3) == 8.0


@pytest.mark.parametrize(
    ("window", "problem", "text"),
    [
        ('0,1,0,1,"(11,)"', Problem.BAD_RANKING, "PipelinePool = '(11,)': must be document ids"),
        ('0,1,0,1,"(11,a)"', Problem.BAD_RANKING, "PipelinePool = '(11,a)': must be document ids"),
        ('0,1,0,1,"11,22"', Problem.BAD_RANKING, "PipelinePool = '11,22': must be document ids"),
        ('0,1,0,1,"(11,44)"', Problem.UNKNOWN_DOCUMENT, "PipelinePool = '44': is no document"),
        ('x,1,0,1,"(11)"', Problem.WRONG_TYPE, "StartTime_us = 'x': must be a number"),
        ('5,1,0,1,"(11)"', Problem.BAD_TIME, "EndTime_us = 1.0: is before StartTime_us, 5"),
    ],
)
def test_anns_names_what_is_wrong(tmp_path: Path, window: str, problem: Problem, text: str) -> None:
    """File, line, column, value and what is right, for each kind of mistake."""
    folder = anns(tmp_path, WINDOWS[0], window)
    with pytest.raises(BadRowError) as caught:
        import_files("stream2llm-anns", folder)
    assert caught.value.problem is problem
    assert f"q3_pipeline_trace.csv, line 3, {text}" in str(caught.value)


def test_a_search_that_found_nothing_is_a_bad_row(tmp_path: Path) -> None:
    """Empty rankings send nothing, so a trace of nothing else cannot be replayed."""
    with pytest.raises(BadRowError, match=r"PipelinePool: names no document in any row"):
        import_files("stream2llm-anns", anns(tmp_path, '0,1,0,1,"()"'))


def test_a_trace_file_that_is_missing_is_a_bad_row(tmp_path: Path) -> None:
    """The map names more files than are there: told by query, or counted."""
    folder = anns(tmp_path, *WINDOWS)
    queries = {
        "3": {"query": "Who?", "trace_file": "q3_pipeline_trace.csv"},
        "4": {"query": "What?", "trace_file": "gone.csv"},
    }
    (folder / "query_trace_map_5k.json").write_text(json.dumps(queries))
    with pytest.raises(BadRowError, match=r"4.trace_file = 'gone.csv': is not in"):
        import_files("stream2llm-anns", folder)
    imported = import_files("stream2llm-anns", folder, skip_bad=True)
    assert imported.bad_rows.counts == {Problem.UNKNOWN_TRACE: 1}


def test_single_trace_files_take_their_queries_from_the_map(tmp_path: Path) -> None:
    """Other queries of the map are left alone; a file that the map does not know is a bad row."""
    folder = anns(tmp_path, *WINDOWS)
    known = folder / "res" / "q3_pipeline_trace.csv"
    assert len(import_files("stream2llm-anns", known).requests) == 1
    other = write_lines(folder / "res" / "other.csv", ANNS, *WINDOWS)
    with pytest.raises(BadRowError, match=r"other.csv, name = 'other.csv': is not in"):
        import_files("stream2llm-anns", other)


def test_the_corpus_and_the_map_can_be_named(tmp_path: Path) -> None:
    """Without them beside the traces, the missing option is named."""
    folder = anns(tmp_path, *WINDOWS)
    elsewhere = tmp_path / "away"
    elsewhere.mkdir()
    corpus = tuple(
        path.rename(elsewhere / path.name) for path in sorted(folder.glob("retrieved_*.json"))
    )
    queries = next(iter(folder.glob("query_*.json"))).rename(elsewhere / "map.json")
    with pytest.raises(ConfigError, match=r"--corpus"):
        import_files("stream2llm-anns", folder)
    with pytest.raises(ConfigError, match=r"--queries"):
        import_files("stream2llm-anns", folder, options=ImportOptions(corpus=corpus))
    options = ImportOptions(corpus=corpus, queries=queries)
    assert len(import_files("stream2llm-anns", folder, options=options).requests) == 1


def test_a_corpus_that_is_no_json_is_told(tmp_path: Path) -> None:
    """The part that was cut off is named."""
    folder = anns(tmp_path, *WINDOWS)
    part = folder / "retrieved_corpus_content.part.0.json"
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(TraceError, match=r"part.0.json: no valid JSON"):
        import_files("stream2llm-anns", folder)
    part.write_text('{"11": 5}')
    with pytest.raises(TraceError, match=r"part.0.json, .*Expected `str`, got `int`"):
        import_files("stream2llm-anns", folder)
