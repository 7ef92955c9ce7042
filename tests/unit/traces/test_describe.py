"""The description of a trace: figures that can be checked by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from streamfill.cli import traces_describe
from streamfill.errors import ConfigError, TraceError
from streamfill.messages.common import StreamMode
from streamfill.traces.bench_read import main as bench_read
from streamfill.traces.describe import Describer, Description
from streamfill.traces.describe_view import bars, figure, lines_of
from streamfill.traces.files import TraceWriter
from streamfill.traces.format import ChatMessage, Document, Request, Segment, TraceHeader

HEADER = TraceHeader(
    schema=1, name="t", drawn={"arrival_ms": "by hand"}, time_scale=2.0, token_scale=0.5
)
APPEND, UPDATE = StreamMode.APPEND, StreamMode.UPDATE


def request(
    arrival_ms: float,
    *segments: Segment,
    mode: StreamMode = APPEND,
    commit_delay_ms: float = 0.0,
    session_id: str | None = None,
) -> Request:
    return Request(
        id=f"q{arrival_ms}",
        arrival_ms=arrival_ms,
        mode=mode,
        segments=segments,
        commit_delay_ms=commit_delay_ms,
        session_id=session_id,
    )


def described(
    *requests: Request,
    documents: dict[str, str] | None = None,
    has_tokens: bool = True,
    unscale: bool = False,
    prefill_rate: float | None = None,
) -> Description:
    describer = Describer(
        HEADER,
        documents or {},
        count_tokens=(lambda text: len(text.split())) if has_tokens else None,
        unscale=unscale,
    )
    for each in requests:
        describer.add(each)
    return describer.description(prefill_tokens_per_s=prefill_rate)


def test_times() -> None:
    """Gaps, first delays and retrievals are told apart; the duration ends with the last context."""
    found = described(
        request(1000, Segment(delay_ms=100, num_tokens=1), Segment(delay_ms=50, num_tokens=1)),
        request(1500, Segment(delay_ms=300, num_tokens=1), commit_delay_ms=200, session_id="s"),
    )
    assert found.summaries["first_delay_ms"].mean == 200
    assert found.summaries["gap_ms"].maximum == 50
    assert found.summaries["retrieval_ms"].minimum == 150
    assert found.summaries["commit_delay_ms"].num_values == 1
    assert found.summaries["inter_arrival_ms"].mean == 500
    assert found.summaries["segments"].mean == 1.5
    assert found.load.duration_s == 1.0
    assert found.num_requests == {"append": 2}
    assert (found.num_segments, found.num_sessions) == (3, 1)


def test_offered_load() -> None:
    """Two requests half a second apart are two per second, with the tokens that they have."""
    found = described(
        request(0, Segment(num_tokens=100), Segment(num_tokens=50)),
        request(500, Segment(num_tokens=50)),
        prefill_rate=400,
    )
    assert found.load.requests_per_s == 2
    assert found.load.prompt_tokens_per_s == 200
    assert found.load.prefill_utilisation == 0.5
    alone = described(request(0, Segment(num_tokens=100)), prefill_rate=400).load
    assert alone.requests_per_s is None
    assert alone.prefill_utilisation is None


def test_unscaled() -> None:
    """The source's own times and lengths come back on demand."""
    requests = (
        request(0, Segment(delay_ms=100, num_tokens=10)),
        request(1000, Segment(num_tokens=10)),
    )
    scaled, unscaled = described(*requests), described(*requests, unscale=True)
    assert scaled.summaries["prompt_tokens"].mean == 10
    assert unscaled.summaries["prompt_tokens"].mean == 20
    assert unscaled.summaries["first_delay_ms"].maximum == 50
    assert scaled.load.requests_per_s == 1
    assert unscaled.load.requests_per_s == 2


def test_what_updates_keep() -> None:
    """Of the old context, an update keeps what both begin with; the rest is computed again."""
    documents = {"a": "A" * 8, "b": "B" * 8, "c": "C" * 8}
    found = described(
        request(0, Segment(document_ids=("a", "b")), Segment(document_ids=("a", "c")), mode=UPDATE),
        request(1000, Segment(document_ids=("a",)), mode=UPDATE),
        documents=documents,
    )
    assert found.summaries["update_kept_share"].mean == pytest.approx(0.5)
    assert found.num_documents == 3
    # Two words each in the first request's contexts, one of which is kept; one word in the second.
    assert found.load.prompt_tokens_per_s == pytest.approx(1.5)
    assert found.load.streamed_tokens_per_s == pytest.approx(2.0)


def test_updates_in_blocks() -> None:
    """Blocks of known ids are compared without making any token."""
    found = described(
        request(
            0,
            Segment(num_tokens=1024, block_ids=(1, 2)),
            Segment(num_tokens=1024, block_ids=(1, 3)),
            mode=UPDATE,
        )
    )
    assert found.summaries["update_kept_share"].mean == 0.5
    assert found.summaries["prompt_tokens"].mean == 1024


def test_lengths_beside_ids() -> None:
    """Every segment counts, whatever says how long it is."""
    ids = Segment(token_ids=(1, 2, 3))
    known, blocks = Segment(num_tokens=100), Segment(num_tokens=512, block_ids=(1,))
    for segments, num_tokens in (((known, ids), 103), ((blocks, ids), 515), ((blocks, known), 612)):
        found = described(request(0, *segments))
        assert found.summaries["prompt_tokens"].mean == num_tokens


def test_sharing_between_requests() -> None:
    """The share of all prompts that began an earlier one; lengths alone share nothing."""
    text = "word " * 64
    twice = described(request(0, Segment(text=text)), request(1, Segment(text=text)))
    assert twice.prefix_shared == 0.5
    blocks = Segment(num_tokens=1024, block_ids=(1, 2))
    assert described(request(0, blocks), request(1, blocks)).prefix_shared == 0.5
    ids = Segment(token_ids=tuple(range(64)))
    assert described(request(0, ids), request(1, ids)).prefix_shared == 0.5
    lengths = Segment(num_tokens=1024)
    assert described(request(0, lengths), request(1, lengths)).prefix_shared == 0
    assert described().prefix_shared is None


def test_text_is_counted_in_tokens_or_characters() -> None:
    """Without a tokenizer there are no token figures, and the description says so."""
    messages = (ChatMessage(role="user", content="one two"),)
    with_tokens = described(request(0, Segment(messages=messages)))
    assert with_tokens.counted_in == "tokens"
    assert with_tokens.summaries["prompt_tokens"].mean == 3
    assert with_tokens.content == {"messages": 1}
    without = described(request(0, Segment(text="one two")), has_tokens=False)
    assert without.counted_in == "characters"
    assert without.summaries["prompt_chars"].mean == 7
    assert "prompt_tokens" not in without.summaries


def test_lines_for_people() -> None:
    """The picture has every figure that is there, and fits on a line of 100 characters."""
    rows = [
        request(250.0 * n, Segment(delay_ms=5.0 * n * n, text="a b " * n)) for n in range(1, 40)
    ]
    lines = list(lines_of(described(*rows, prefill_rate=1000)))
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 100
    for part in (
        "arrival_ms: by hand",
        "39 requests (39 append)",
        "P50",
        "retrieval, ms",
        "█",
        "Offered: 4 requests/s",
        "Prefill utilisation: 16%",
    ):
        assert part in text
    assert "\n".join(lines_of(described()))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.04321, "0.0432"),
        (12, "12"),
        (99.96, "100"),
        (123456.7, "123,457"),
        (1e9, "1e+09"),
    ],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    """Numbers are short and keep what matters."""
    assert figure(value) == text


def test_bars() -> None:
    """The greatest share is a full bar, any other a lower one, and nothing a blank."""
    assert bars((0.0, 0.01, 0.5, 1.0)) == " ▁▅█"
    assert bars((0.0, 0.0)) == "  "


def run_command(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    traces_describe.add_arguments(parser)
    return traces_describe.run(parser.parse_args([str(word) for word in words]))


def write_trace(path: Path) -> None:
    with TraceWriter(path, HEADER) as writer:
        writer.add_document(Document(id="a", text="Some text."))
        writer.add_request(request(0, Segment(document_ids=("a",)), mode=UPDATE))
        writer.add_request(request(5, Segment(num_tokens=7)))


def test_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Programs get one object, on a line of its own and with nothing else on stdout."""
    path = tmp_path / "t.jsonl"
    write_trace(path)
    assert run_command(path, "--json", "--characters", "--prefill-rate", "100") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_requests"] == {"update": 1, "append": 1}
    assert found["summaries"]["prompt_tokens"]["mean"] == 7
    assert found["header"]["name"] == "t"
    assert found["counted_in"] == "characters"


def test_command_prints_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People get lines; no progress is written where there is no terminal."""
    path = tmp_path / "t.jsonl"
    write_trace(path)
    assert run_command(path, "--characters") == 0
    shown = capsys.readouterr()
    assert "2 requests (1 update, 1 append)" in shown.out
    assert shown.err == ""


def test_command_refuses_what_is_wrong(tmp_path: Path) -> None:
    """Errors of the file name it and the line; a wrong rate names its option."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"type":"trace","schema":1,"name":"t"}\n{"type":"request"}\n')
    with pytest.raises(TraceError, match=r"t\.jsonl, line 2"):
        run_command(path, "--characters")
    with pytest.raises(ConfigError, match="--prefill-rate"):
        run_command(path, "--prefill-rate", "0")


def test_no_default_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the default model cannot be made, text is counted in characters, and this is said; a
    model that was asked for must be there."""

    def refuse(*_: object) -> Path:
        raise ConfigError("model", None, "is not here")

    path = tmp_path / "t.jsonl"
    write_trace(path)
    monkeypatch.setattr(traces_describe, "resolve_model", refuse)
    assert run_command(path) == 0
    shown = capsys.readouterr()
    assert "Text is counted in characters: model" in shown.err
    assert "text is counted in characters" in shown.out
    with pytest.raises(ConfigError):
        run_command(path, "--model", "elsewhere")


def test_reading_speed_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The measurement ends with a line for programs that has both rates."""
    assert bench_read(["--rows", "2000"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    facts = json.loads(last.removeprefix("RESULT "))
    assert facts["num_rows"] == 2000
    assert facts["single_segment_rows_per_s"] > 0
    assert facts["crawl_rows_per_s"] > 0
