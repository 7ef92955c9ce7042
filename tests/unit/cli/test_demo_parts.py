"""The demo's document, picture and figures; the lines of `run` and `status`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.api import ClusterInfo, Metadata, Result, Server, Timing, Token, Usage
from streamfill.cli.demo import demo_cluster, result_facts
from streamfill.cli.demo_runs import DemoRun
from streamfill.cli.document import demo_document, split_document
from streamfill.cli.run import describe
from streamfill.cli.status import server_table, summary
from streamfill.cli.tables import table_lines
from streamfill.cli.timeline import Piece, TimelineRun, draw_timeline
from streamfill.errors import ConfigError


@given(text=st.text(min_size=1, max_size=300), num_pieces=st.integers(1, 12))
def test_pieces_give_the_text_back(text: str, num_pieces: int) -> None:
    """However a text is cut, the pieces joined are the text, and none is empty."""
    if num_pieces > len(text):
        with pytest.raises(ConfigError, match="--segments"):
            split_document(text, num_pieces)
        return
    pieces = split_document(text, num_pieces)
    assert "".join(pieces) == text
    assert len(pieces) == num_pieces
    assert all(pieces)


def test_demo_document_is_cut_at_its_headings() -> None:
    """The demo's eight segments are its eight sections."""
    pieces = split_document(demo_document(), 8)
    assert [piece[:4] for piece in pieces] == [f"# {n}." for n in range(1, 9)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("one two three four", ["one two ", "three four"]),
        ("a b c\nd e f g h", ["a b c\n", "d e f g h"]),
        ("aaaa\n\nbb\ncc", ["aaaa\n\n", "bb\ncc"]),
        ("abcdef", ["abc", "def"]),
    ],
)
def test_best_seams(text: str, pieces: list[str]) -> None:
    """Paragraphs go before lines, lines before words, words before anything."""
    assert split_document(text, 2) == pieces


def test_picture() -> None:
    """Pieces, computing and tokens stand below their times."""
    streamed = TimelineRun(
        title="streamed",
        pieces=[Piece(sent_s=0.0, computed_s=0.5), Piece(sent_s=1.0, computed_s=1.5)],
        commit_s=2.0,
        token_s=[2.2, 2.4, 3.0],
    )
    one_shot = TimelineRun(title="one shot", pieces=[], commit_s=2.0, token_s=[3.0, 3.4, 4.0])
    assert draw_timeline([streamed, one_shot], width=52) == [
        "            0 s       1 s       2 s       3 s",
        "streamed",
        "  sent      1         2         ?",
        "  computed  ======    ======    ===",
        "  answer                          1-2-----|",
        "one shot",
        "  sent                          ?",
        "  computed                      ===========",
        "  answer                                  1---2----|",
    ]


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.0], [1e-9], [5000.0]])
def test_picture_of_odd_times(times: list[float]) -> None:
    """A single token, equal times and very long runs can be drawn in a narrow terminal."""
    run = TimelineRun(title="r", pieces=[], commit_s=0.0, token_s=times)
    lines = draw_timeline([run], width=10)
    assert len(lines) == 5
    assert "1" in lines[-1]


def result(*token_ids: int, by_prefill: bool = False) -> Result:
    """An answer of these tokens."""
    return Result(
        text="text",
        text_tail="",
        tokens=tuple(Token(index=i, token_id=t, text="") for i, t in enumerate(token_ids)),
        finish_reason="length",
        matched_stop=None,
        usage=Usage(
            num_prompt_tokens=1800,
            num_output_tokens=len(token_ids),
            num_cached_tokens=1700,
            num_invalidated_tokens=0,
        ),
        metadata=Metadata(
            stream_id=1,
            prefill_server="prefill-0",
            decode_server="" if by_prefill else "decode-0",
            decoded_by_prefill=by_prefill,
            handoff="none" if by_prefill else "done",
            num_attempts=1,
        ),
        timing=Timing(
            ttft_s=0.25,
            ttft_from_last_segment_s=0.25,
            total_s=1.5,
            token_times_s=tuple(0.25 * (i + 1) for i in range(len(token_ids))),
            lifetime=(),
        ),
    )


def demo_run(made: Result, commit_s: float, *token_s: float) -> DemoRun:
    """A measured run with the given times."""
    return DemoRun(result=made, pieces=[], commit_s=commit_s, token_s=token_s)


def test_facts_of_equal_answers() -> None:
    """Times run from the last piece; the speed-up is their ratio."""
    streamed = demo_run(result(1, 2), 10.0, 10.2, 10.5)
    one_shot = demo_run(result(1, 2), 20.0, 22.0, 22.1)
    facts = result_facts(streamed, one_shot, 8, 12.34)
    assert facts["identical"] is True
    assert (facts["ttft_oneshot_ms"], facts["ttft_streamed_ms"]) == (2000.0, 200.0)
    assert facts["speedup"] == 10.0
    assert facts["second_token_streamed_ms"] == 500.0
    assert (facts["handoff_streamed"], facts["decoded_by_prefill"]) == ("done", False)
    assert (facts["num_segments"], facts["startup_s"]) == (8, 12.3)


def test_facts_of_different_answers() -> None:
    """One differing token id is enough to be not identical."""
    streamed = demo_run(result(1, 2, 3), 0.0, 1.0, 2.0, 3.0)
    one_shot = demo_run(result(1, 9, 3, by_prefill=True), 0.0, 1.0, 2.0, 3.0)
    facts = result_facts(streamed, one_shot, 1, 0.0)
    assert facts["identical"] is False
    assert facts["decoded_by_prefill"] is True


def test_single_token_has_no_second() -> None:
    """An answer of one token has no time of a second one."""
    run = demo_run(result(1), 0.0, 1.0)
    assert result_facts(run, run, 1, 0.0)["second_token_streamed_ms"] is None


def test_demo_cluster_is_its_own() -> None:
    """The demo takes free ports and one thread for each server."""
    config = demo_cluster()
    assert config.router.grpc_port == 0
    assert (config.prefill.threads, config.decode.threads) == (1, 1)
    assert config.name != "local"


def test_line_of_timings() -> None:
    """`run` says how much was computed early, the times, and who made the answer."""
    line = describe(result(1, 2))
    assert line == (
        "prompt 1800 tokens, 1700 of them computed before the commit; "
        "first token 250 ms after the last piece; second 500 ms; 2 tokens in 1.50 s; "
        "prefill-0 -> decode-0, hand-off done; ended by length"
    )
    assert "all by prefill-0, without a decode server" in describe(result(1, by_prefill=True))


def info(*, decode: bool, prefill: bool = True, controller: bool = True) -> ClusterInfo:
    """A cluster with some of its parts alive."""
    server = Server(
        server_id="prefill-0",
        role="prefill",
        state="alive" if prefill else "dead",
        pid=42,
        num_assigned_streams=3,
        heartbeat_age_s=0.1,
        loop_age_s=0.1,
        controller_alive=controller,
        counters={"num_running": 1, "num_used_tokens": 1234, "num_free_tokens": 30_000},
        policy="fcfs",
    )
    return ClusterInfo(
        model="SmolLM2",
        vocab_size=1,
        context_tokens=8192,
        pool_tokens=1,
        ready=prefill,
        decode_available=decode,
        num_open_streams=3,
        num_streams_by_outcome={"DONE": 5, "FAILED": 0},
        num_malformed_frames=0,
        servers=(server,),
    )


def test_status_of_a_whole_cluster() -> None:
    """A cluster that has everything gets no warning."""
    assert summary(info(decode=True), "h:1") == [
        "h:1 serves SmolLM2, context 8192 tokens",
        "streams: 3 open; ended: 5 DONE",
    ]
    header, row = table_lines(server_table(info(decode=True).servers))
    assert header.split()[:5] == ["server", "role", "state", "pid", "streams"]
    expected = ["prefill-0", "prefill", "alive", "42", "3", "1", "1,234", "0", "30,000", "alive"]
    assert row.split() == [*expected, "fcfs"]


@pytest.mark.parametrize(
    ("cluster", "sentence"),
    [
        (info(decode=False), "no decode server is alive: answers come from the prefill server"),
        (info(decode=True, prefill=False), "NOT READY: no prefill server is alive"),
        (info(decode=True, controller=False), "no preemption controller is alive"),
    ],
)
def test_status_says_what_is_missing(cluster: ClusterInfo, sentence: str) -> None:
    """Each part that is missing is said in plain words."""
    assert any(line.startswith(sentence) for line in summary(cluster, "h:1"))
