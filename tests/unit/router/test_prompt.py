"""Segments in, splices out, and nothing in between when a segment is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.interface import Segment
from router.prompt import Prompt, PromptLimits
from streamfill.errors import FailedPreconditionError, InvalidArgumentError
from streamfill.messages.common import StreamMode
from streamfill.stream.chat import ChatTemplate
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer

APPEND, UPDATE = StreamMode.APPEND, StreamMode.UPDATE
WIDE = PromptLimits(vocab_size=1024, context_tokens=8192, pool_tokens=None)


@pytest.fixture(scope="session", params=["bpe", "spm"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tiny_sentencepiece_model: Path) -> Path:
    return tiny_model if request.param == "bpe" else tiny_sentencepiece_model


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> TextTokenizer:
    return load_tokenizer(model)


@pytest.fixture(scope="session")
def template(model: Path) -> ChatTemplate:
    found = ChatTemplate.load(model)
    assert found is not None
    return found


def put(prompt: Prompt, mode: StreamMode, limits: PromptLimits = WIDE, **segment: object) -> None:
    prompt.record(prompt.draft(mode, Segment(**segment), limits))  # type: ignore[arg-type]


def test_appended_text_is_tokenised_as_a_whole(tokenizer: TextTokenizer) -> None:
    """Wherever it was cut; with what the tokenizer puts before a text."""
    prompt = Prompt(tokenizer, None)
    for piece in ("Hel", "lo wo", "", "rld, h", "ow are you?"):
        put(prompt, APPEND, text=piece)
    expected = tokenizer.encode("Hello world, how are you?", add_special_tokens=True)
    assert prompt.log.ids.tolist() == expected


def test_token_ids_close_the_text(tokenizer: TextTokenizer) -> None:
    """Text behind ids is tokenised by itself, without special tokens at its start."""
    prompt = Prompt(tokenizer, None)
    put(prompt, APPEND, text="one tw")
    put(prompt, APPEND, token_ids=[50, 51])
    put(prompt, APPEND, text="o thr")
    put(prompt, APPEND, text="ee")
    expected = [
        *tokenizer.encode("one tw", add_special_tokens=True),
        50,
        51,
        *tokenizer.encode("o three", add_special_tokens=False),
    ]
    assert prompt.log.ids.tolist() == expected


def test_update_sends_what_differs(tokenizer: TextTokenizer) -> None:
    """Text to text, text to ids, ids to text: always the whole new context, and a short splice."""
    prompt = Prompt(tokenizer, None)
    long = "the same beginning of a long text, "
    put(prompt, UPDATE, text=long + "old")
    put(prompt, UPDATE, text=long + "new end")
    ids = tokenizer.encode(long + "new end", add_special_tokens=True)
    assert prompt.log.ids.tolist() == ids
    (splice,) = prompt.draft(UPDATE, Segment(token_ids=[*ids, 60]), WIDE)
    assert (splice.keep_tokens, list(splice.new_token_ids)) == (len(ids), [60])
    prompt.record([splice])
    put(prompt, UPDATE, text=long)
    assert prompt.log.ids.tolist() == tokenizer.encode(long, add_special_tokens=True)
    put(prompt, UPDATE, text="")
    assert prompt.is_empty
    assert prompt.log.num_tokens == 0


def test_unchanged_context_sends_nothing(tokenizer: TextTokenizer) -> None:
    """An empty append and an update to the same are not recorded."""
    prompt = Prompt(tokenizer, None)
    put(prompt, UPDATE, text="abc")
    last_seq = prompt.log.last_seq
    put(prompt, UPDATE, text="abc")
    put(prompt, APPEND, text="")
    put(prompt, APPEND, token_ids=[])
    assert prompt.log.last_seq == last_seq


def test_refused_segment_leaves_no_trace(tokenizer: TextTokenizer) -> None:
    """After a segment that is too long, what follows is as if it had never been there."""
    narrow = PromptLimits(vocab_size=1024, context_tokens=30, pool_tokens=None)
    prompt, untouched = Prompt(tokenizer, None), Prompt(tokenizer, None)
    for each in (prompt, untouched):
        put(each, APPEND, narrow, text="some wor")
    for bad in (
        Segment(text="ds and many, many more " * 9),
        Segment(token_ids=[20] * 40),
        Segment(token_ids=[1024]),
        Segment(text="\udfff"),
        Segment(),
        Segment(text="a", token_ids=[20]),
    ):
        with pytest.raises(InvalidArgumentError):
            prompt.draft(APPEND, bad, narrow)
        with pytest.raises(InvalidArgumentError):
            prompt.draft(UPDATE, bad, narrow)
    for each in (prompt, untouched):
        put(each, APPEND, narrow, text="ds.")
    assert prompt.log.ids == untouched.log.ids


@pytest.mark.parametrize("mode", [APPEND, UPDATE])
def test_draft_that_is_taken_back_leaves_no_trace(
    tokenizer: TextTokenizer, template: ChatTemplate, mode: StreamMode
) -> None:
    """Text, ids and chat are as before, also for what comes next; a recorded draft stays."""
    ids = tokenizer.encode("id", add_special_tokens=False)
    chat = [{"role": "user", "content": "Hi"}]
    starts: list[dict[str, object]] = [{"text": "one two"}, {"token_ids": ids}, {"messages": chat}]
    for first, then in itertools.product(starts, [{"text": " three"}, *starts]):
        taken_back, never = Prompt(tokenizer, template), Prompt(tokenizer, template)
        for prompt in (taken_back, never):
            put(prompt, mode, WIDE, **first)
        before = taken_back.log.ids.tolist()
        try:
            taken_back.draft(mode, Segment(**then), WIDE)  # type: ignore[arg-type]
        except (FailedPreconditionError, InvalidArgumentError):
            continue
        taken_back.undo_draft()
        taken_back.undo_draft()
        assert taken_back.log.ids.tolist() == before
        put(taken_back, mode, text=" four")
        taken_back.undo_draft()
        put(never, mode, text=" four")
        for prompt in (taken_back, never):
            prompt.record(prompt.draft_commit(mode, None, WIDE))
        assert taken_back.log.ids == never.log.ids


def test_limit_names_both_numbers(tokenizer: TextTokenizer) -> None:
    """The pool counts as well as the context."""
    limits = PromptLimits(vocab_size=1024, context_tokens=100, pool_tokens=64)
    with pytest.raises(InvalidArgumentError, match=r"64 tokens.*KV pool.*64"):
        Prompt(tokenizer, None).draft(APPEND, Segment(token_ids=[20] * 64), limits)


def test_empty_prompt_cannot_be_committed(tokenizer: TextTokenizer) -> None:
    """Neither a new one nor one of empty segments; a final segment makes it valid."""
    prompt = Prompt(tokenizer, None)
    put(prompt, APPEND, text="")
    with pytest.raises(InvalidArgumentError, match="empty"):
        prompt.draft_commit(APPEND, None, WIDE)
    prompt.record(prompt.draft_commit(APPEND, Segment(text="x"), WIDE))
    assert prompt.log.num_tokens


def test_chat_grows_and_is_closed(tokenizer: TextTokenizer, template: ChatTemplate) -> None:
    """While it grows, what is sent is a beginning of the end; only white space may be held back."""
    prompt = Prompt(tokenizer, template)
    system = {"role": "system", "content": "Be brief."}
    put(prompt, APPEND, messages=[system, {"role": "user", "content": ""}])
    for piece in ("  What is", " tea", " \n", "made", " of?"):
        put(prompt, APPEND, text=piece)
    before = prompt.log.ids[:]
    prompt.record(prompt.draft_commit(APPEND, None, WIDE))
    complete = [system, {"role": "user", "content": "  What is tea \nmade of?"}]
    whole = template.render(complete)
    assert prompt.log.ids.tolist() == tokenizer.encode(whole, add_special_tokens=False)
    assert prompt.log.ids[: len(before) - 2] == before[:-2]


def test_chat_takes_further_messages(tokenizer: TextTokenizer, template: ChatTemplate) -> None:
    """The last message is closed by the next one."""
    prompt = Prompt(tokenizer, template)
    first, second = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    third = {"role": "user", "content": "c"}
    put(prompt, APPEND, messages=[first])
    put(prompt, APPEND, messages=[second, third])
    prompt.record(prompt.draft_commit(APPEND, None, WIDE))
    whole = template.render([first, second, third])
    assert prompt.log.ids.tolist() == tokenizer.encode(whole, add_special_tokens=False)


def test_chat_in_update_mode(tokenizer: TextTokenizer, template: ChatTemplate) -> None:
    """Text replaces the content of the last message, messages replace all of them."""
    prompt = Prompt(tokenizer, template)
    put(prompt, UPDATE, text="plain at first")
    put(prompt, UPDATE, messages=[{"role": "user", "content": "old"}])
    put(prompt, UPDATE, text="new")
    prompt.record(prompt.draft_commit(UPDATE, None, WIDE))
    whole = template.render([{"role": "user", "content": "new"}])
    assert prompt.log.ids.tolist() == tokenizer.encode(whole, add_special_tokens=False)


def test_chat_and_plain_context_do_not_mix(
    tokenizer: TextTokenizer, template: ChatTemplate
) -> None:
    """Ids in a chat, messages behind text, and chats without a template are refused."""
    chat = Prompt(tokenizer, template)
    put(chat, APPEND, messages=[{"role": "user", "content": "a"}])
    with pytest.raises(InvalidArgumentError, match="no token ids"):
        put(chat, APPEND, token_ids=[20])
    plain = Prompt(tokenizer, template)
    put(plain, APPEND, text="a")
    with pytest.raises(FailedPreconditionError):
        put(plain, APPEND, messages=[{"role": "user", "content": "a"}])
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        put(Prompt(tokenizer, None), APPEND, messages=[{"role": "user", "content": "a"}])


PIECES = st.one_of(
    st.text(alphabet="ab é\n世<", max_size=8).map(lambda text: Segment(text=text)),
    st.lists(st.integers(10, 200), max_size=4).map(lambda ids: Segment(token_ids=ids)),
)


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.tuples(st.sampled_from([APPEND, UPDATE]), PIECES), max_size=8))
def test_any_mixture_equals_its_parts_tokenised_one_by_one(
    tokenizer: TextTokenizer, pieces: list[tuple[StreamMode, Segment]]
) -> None:
    """The ids are those of the runs of text and of the ids between them."""
    prompt = Prompt(tokenizer, None)
    parts: list[str | list[int]] = []
    for mode, segment in pieces:
        prompt.record(prompt.draft(mode, segment, WIDE))
        if mode is UPDATE:
            parts = []
        if segment.token_ids:
            parts.append(list(segment.token_ids))
        elif segment.text and parts and isinstance(parts[-1], str):
            parts[-1] += segment.text
        elif segment.text:
            parts.append(segment.text)
        expected: list[int] = []
        for number, part in enumerate(parts):
            if isinstance(part, str):
                expected += tokenizer.encode(part, add_special_tokens=number == 0)
            else:
                expected += part
        assert prompt.log.ids.tolist() == expected
