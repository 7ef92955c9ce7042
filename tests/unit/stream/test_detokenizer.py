"""Output text comes in whole characters and ends at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.errors import InvalidArgumentError
from streamfill.stream.detokenizer import IncrementalDetokenizer, StopMatcher
from streamfill.stream.self_check import SAMPLE
from streamfill.stream.text_decoder import MAX_HELD_BYTES
from streamfill.stream.tokenizer import TextTokenizer
from tests.unit.stream.test_incremental import KINDS, TEXTS, tokenizer_of
from tests.unit.stream.tokenizers_for_tests import sentencepiece_model

EXACT_KINDS = [kind for kind in KINDS if kind != "metaspace-unigram"]


def streamed(tokenizer: TextTokenizer, ids: Sequence[int], skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", EXACT_KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_make_up_the_decoded_whole(kind: str, data: st.DataObject, skip: bool) -> None:
    """Put together, the pieces of random ids, broken characters included, are their decoding."""
    tokenizer = tokenizer_of(kind)
    last = tokenizer.vocab_size - 1
    ids = data.draw(
        st.lists(
            st.one_of(st.integers(0, min(300, last)), st.integers(0, last)),
            max_size=MAX_HELD_BYTES,
        )
    )
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(
        ids, skip_special_tokens=skip
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_holds_half_a_character(kind: str) -> None:
    """Valid text never shows a replacement character on the way, however it is cut in tokens."""
    tokenizer = tokenizer_of(kind)
    text = SAMPLE.replace("\u3000", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.decode(ids, skip_special_tokens=False)
    shown = ""
    for piece in streamed(tokenizer, ids, skip=False):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected


@settings(max_examples=60)
@given(text=TEXTS)
def test_sentencepiece_text_is_that_of_the_library(text: str) -> None:
    """Our decoding of sentencepiece ids equals the library's for what the library encoded."""
    model = sentencepiece_model("bpe")
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(model)
    ids = [token_id for token_id in library.encode(text) if not library.is_unknown(token_id)]
    tokenizer = tokenizer_of("sentencepiece-bpe")
    assert tokenizer.decode(ids, skip_special_tokens=False) == library.decode(ids)


def test_context_keeps_the_space_before_the_first_word() -> None:
    """Behind a prompt the first token's space is text; without one it is the dummy prefix."""
    tokenizer = tokenizer_of("metaspace")
    prompt = tokenizer.encode("the", add_special_tokens=False)
    ids = tokenizer.encode("the thing", add_special_tokens=False)[len(prompt) :]
    assert IncrementalDetokenizer(tokenizer).push(ids) == "thing"
    assert IncrementalDetokenizer(tokenizer, context_ids=prompt).push(ids) == " thing"


def test_a_long_run_of_byte_tokens_is_not_held_back_for_ever() -> None:
    """Text in a script that the vocabulary lacks is shown before the run of its bytes ends."""
    tokenizer = tokenizer_of("metaspace")
    ids = tokenizer.encode("ཨོཾ" * 60, add_special_tokens=False)
    pieces = streamed(tokenizer, ids, skip=True)
    assert "".join(pieces) == "ཨོཾ" * 60
    assert sum(map(len, pieces[:-1])) > 100


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    """The error names the id and the size of the vocabulary."""
    for kind in ("byte-level", "sentencepiece-bpe", "metaspace-unigram"):
        tokenizer = tokenizer_of(kind)
        for token_id in (-1, tokenizer.vocab_size):
            with pytest.raises(InvalidArgumentError, match=f"{token_id} is outside"):
                IncrementalDetokenizer(tokenizer).push([token_id])


def test_nothing_comes_after_the_end() -> None:
    """A flushed output takes no more tokens."""
    detokenizer = IncrementalDetokenizer(tokenizer_of("byte-level"))
    detokenizer.flush()
    assert detokenizer.flush() == ""
    with pytest.raises(RuntimeError):
        detokenizer.push([5])


def test_text_ends_before_the_stop_string() -> None:
    """A stop string across several pieces is found, and nothing of it was shown before."""
    matcher = StopMatcher(["\n\nUser:"])
    shown = [matcher.push(piece).text for piece in ("Hi", "!\n", "\nUs", "er: more")]
    assert shown == ["Hi", "!", "", ""]
    assert matcher.matched == "\n\nUser:"
    assert matcher.flush() == ""
    assert matcher.push("later").text == ""


def test_text_ends_behind_the_stop_string_when_asked() -> None:
    """With `no_stop_trim` the stop string is shown, what follows is not."""
    matcher = StopMatcher(["END"], no_stop_trim=True)
    assert matcher.push("xEN").text == "x"
    assert matcher.push("Dy").text == "END"


def test_the_first_given_stop_string_of_a_step_wins() -> None:
    """Of two complete in the same piece SGLang reports the one that was given first."""
    matcher = StopMatcher(["b", "a"])
    matched = matcher.push("xaybz")
    assert (matched.text, matched.stop) == ("xay", "b")


def test_what_was_held_back_comes_with_the_flush() -> None:
    """The beginning of a stop string that never came is text after all."""
    matcher = StopMatcher(["stop", ""])
    assert matcher.push("st").text == ""
    assert matcher.push("a st").text == "sta "
    assert matcher.flush() == "st"


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_matching_is_the_naive_search_at_each_step(
    pieces: list[str], stops: list[str]
) -> None:
    """The shown text equals searching the whole text so far after each piece."""
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece).text for piece in pieces) + matcher.flush()
    whole = ""
    for piece in pieces:
        whole += piece
        found = next((stop for stop in stops if stop in whole), None)
        if found is not None:
            assert matcher.matched == found
            assert shown == whole[: whole.find(found)]
            return
    assert matcher.matched is None
    assert shown == whole
