"""A request of a trace becomes what a client sends, and when."""

from __future__ import annotations

import pytest

from streamfill.messages.common import StreamMode
from streamfill.traces.format import ChatMessage, Request, Segment, TraceHeader
from streamfill.traces.script import FIRST_ORDINARY_TOKEN, Script, Scripts

HEADER = TraceHeader(schema=1, name="t", seed=3)
VOCAB_SIZE = 1000


def request(
    *segments: Segment,
    mode: StreamMode = StreamMode.APPEND,
    name: str = "q",
    prefix: str = "",
    suffix: str = "",
    commit_delay_ms: float = 0.0,
) -> Request:
    return Request(
        id=name,
        arrival_ms=500,
        mode=mode,
        segments=segments,
        prefix=prefix,
        suffix=suffix,
        commit_delay_ms=commit_delay_ms,
    )


def script(
    made: Request, *, header: TraceHeader = HEADER, documents: dict[str, str] | None = None
) -> Script:
    return Scripts(header, documents or {}, vocab_size=VOCAB_SIZE).script(made)


def tokens(made: Request, *, header: TraceHeader = HEADER) -> list[tuple[int, ...]]:
    pieces = [step.piece for step in script(made, header=header).steps]
    return [tuple(each for each in piece if isinstance(each, int)) for piece in pieces]


def test_due_times_add_up_and_scale() -> None:
    """Delays count from the segment before; one factor scales all times, arrivals too."""
    made = request(
        Segment(delay_ms=100, text="a"), Segment(delay_ms=50, text="b"), commit_delay_ms=25
    )
    scripts = Scripts(HEADER, {}, vocab_size=VOCAB_SIZE)
    plain, doubled = scripts.script(made), scripts.script(made, time_scale=2.0)
    assert [step.due_s for step in plain.steps] == pytest.approx([0.1, 0.15])
    assert plain.arrival_s == pytest.approx(0.5)
    assert plain.commit_due_s == pytest.approx(0.175)
    assert not plain.commits_with_last
    assert [step.due_s for step in doubled.steps] == pytest.approx([0.2, 0.3])
    assert doubled.arrival_s == pytest.approx(1.0)
    assert doubled.commit_due_s == pytest.approx(0.35)


def test_append_has_the_prefix_first_and_the_suffix_last() -> None:
    """In append mode the question comes with the last segment."""
    made = script(request(Segment(text="a"), Segment(text="b"), prefix="<", suffix=">"))
    assert [step.piece for step in made.steps] == ["<a", "b>"]
    assert made.prompt_after(1) == "<a"
    assert made.prompt == "<ab>"
    assert made.commits_with_last


def test_update_has_both_every_time() -> None:
    """In update mode each segment is the whole prompt, and replaces the one before."""
    documents = {"x": "X", "y": "Y"}
    made = script(
        request(
            Segment(document_ids=("x",)),
            Segment(document_ids=("y", "x")),
            mode=StreamMode.UPDATE,
            prefix="<",
            suffix=">",
        ),
        documents=documents,
    )
    assert [step.piece for step in made.steps] == ["<X\n\n>", "<Y\n\nX\n\n>"]
    assert made.prompt == "<Y\n\nX\n\n>"


def test_the_separator_is_the_header_s() -> None:
    """What stands behind each document is a property of the trace."""
    header = TraceHeader(schema=1, name="t", document_separator="|")
    made = script(request(Segment(document_ids=("x", "x"))), header=header, documents={"x": "X"})
    assert made.prompt == "X|X|"


@pytest.mark.parametrize("num_tokens", [0, 1, 511, 512, 513, 1300])
def test_lengths_are_exact(num_tokens: int) -> None:
    """As many tokens are made as the file says, with or without blocks, of ordinary ids."""
    alone = tokens(request(Segment(num_tokens=num_tokens)))[0]
    blocks = Segment(num_tokens=num_tokens, block_ids=(7, 8, 9))
    in_blocks = tokens(request(blocks))[0]
    assert len(alone) == len(in_blocks) == num_tokens
    assert all(FIRST_ORDINARY_TOKEN <= each < VOCAB_SIZE for each in (*alone, *in_blocks))


def test_blocks_are_the_same_everywhere() -> None:
    """One id means the same 512 tokens in every request; another id means others."""
    first = tokens(request(Segment(num_tokens=1024, block_ids=(1, 2)), name="a"))[0]
    second = tokens(request(Segment(num_tokens=700, block_ids=(2, 1)), name="b"))[0]
    assert first[512:] == second[:512]
    assert first[: 700 - 512] == second[512:]
    assert first[:512] != first[512:]


def test_made_tokens_depend_on_seed_request_and_segment() -> None:
    """The same file gives the same tokens; no two segments share any by chance."""
    made = request(Segment(num_tokens=50), Segment(num_tokens=50))
    assert tokens(made) == tokens(made)
    first, second = tokens(made)
    other_seed = tokens(made, header=TraceHeader(schema=1, name="t", seed=4))[0]
    other_request = tokens(request(Segment(num_tokens=50), name="r"))[0]
    assert len({first, second, other_seed, other_request}) == 4


def test_given_tokens_and_messages_pass_through() -> None:
    """Token ids and chat messages are sent as they stand, and appended one behind the other."""
    assert script(request(Segment(token_ids=(5, 6)), Segment(token_ids=(7,)))).prompt == (5, 6, 7)
    hello, bye = ChatMessage(role="user", content="Hello"), ChatMessage(role="user", content="Bye")
    made = script(request(Segment(messages=(hello,)), Segment(messages=(bye,))))
    assert made.prompt == (hello, bye)


def test_a_tiny_vocabulary_is_used_from_its_start() -> None:
    """Where a vocabulary has hardly more than control tokens, all of it is used."""
    scripts = Scripts(HEADER, {}, vocab_size=300)
    piece = scripts.script(request(Segment(num_tokens=2000))).prompt
    assert min(each for each in piece if isinstance(each, int)) < FIRST_ORDINARY_TOKEN
