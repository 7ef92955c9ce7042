"""Incremental tokenisation gives the ids of tokenising the whole text."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamfill.errors import InvalidArgumentError
from streamfill.stream import incremental
from streamfill.stream.hf_tokenizer import HfTokenizer
from streamfill.stream.incremental import IncrementalTokenizer
from streamfill.stream.sentencepiece_tokenizer import SentencePieceTokenizer
from streamfill.stream.splice import apply_splice, token_array
from streamfill.stream.tokenizer import TextTokenizer
from tests.unit.stream.tokenizers_for_tests import (
    all_tokenizers,
    byte_level_bpe,
    llama3_bpe,
    metaspace_bpe,
    sentencepiece_model,
)

KINDS = [
    "byte-level",
    "llama3",
    "o200k",
    "smollm-like",
    "deepseek",
    "metaspace",
    "metaspace-split",
    "prepend",
    "metaspace-unigram",
    "sentencepiece-bpe",
    "sentencepiece-bpe-nfkc",
    "sentencepiece-unigram",
    "smollm2",
]
WHOLE_ONLY_KINDS = {"sentencepiece-unigram"}

# Texts in which tokenizers have been seen to look around: seams of scripts, of white space, of
# digits, of clusters and of special tokens.
ATOMS = [
    *("the", "The", "ing", "e", "a", "s", "xyz", "aaaa", "foo(bar)", "x" * 40, "don't"),
    *(" ", " ", " ", "  ", "   ", "    ", "\n", "\n\n", "\r\n", "\t", "\r", "\x0b", "\xa0"),
    *("'s", "'re", "'LL", "'", "’s", "1", "12", "123", "1234567", "٣", "½", "²", "Ⅷ"),
    *(".", ",", "!", "...", "。", "、", '"', "-", "_", "/", "\\", "<", "|", ">"),
    *("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<mask>", " <mask>", "<right> ", "word"),
    *("<tool>", "<|im_st", "art|>", "<|", "<0x0A>", "<0x", "▁", "▁▁", "Ġ", "Ċ", "\x00"),
    *("今天", "天气", "很好", "世界", "界", "龘", "ひらがな", "カタカナ", "ガ", "\uff9e"),
    *("한국어", "각", "\u1100", "\u1161", "\u11a8", "नमस्ते", "कैसे", "\u094d", "\u093f"),
    *("สวัสดี", "\u0e33", "\u0e4d", "مرحبا", "\u064e", "שלום", "Привет", "Größe", "İ", "ς"),
    *("e\u0301", "\u0301", "\u0323", "é", "Å", "ﬁ", "ß", "\u1e9b", "\u0345", "\u0340"),
    *("👩‍👩‍👧‍👦", "\u200d", "👍🏽", "🏽", "🇩", "🇪", "☺\ufe0f", "\ufe0f", "\u3000", "\u2028"),
    *("\x85", "\x1c", "\ufeff", "\u200b", "\ufffd", "𝒳", "\U00010330", "\U000e0041"),
]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(ATOMS),
        st.sampled_from(ATOMS),
        st.sampled_from(ATOMS),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=2),
    ),
    max_size=25,
).map("".join)


@lru_cache
def tokenizers() -> dict[str, TextTokenizer]:
    return all_tokenizers()


def tokenizer_of(kind: str) -> TextTokenizer:
    tokenizer = tokenizers().get(kind)
    if tokenizer is None:
        pytest.skip("the default model is not on this machine")
    return tokenizer


@st.composite
def cut_texts(draw: st.DrawFn) -> list[str]:
    """A text, cut at random code points, inside clusters and special tokens as well."""
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]


@st.composite
def edits(draw: st.DrawFn) -> list[Callable[[str], str]]:
    """Changes of a text: a place in it, how much to take out there, and what to put in."""
    found: list[Callable[[str], str]] = []
    for _ in range(draw(st.integers(1, 4))):
        place, num_out, new = draw(st.tuples(st.floats(0, 1), st.integers(0, 6), TEXTS))

        def edit(text: str, place: float = place, num_out: int = num_out, new: str = new) -> str:
            at = round(place * len(text))
            return text[:at] + new + text[at + num_out :]

        found.append(edit)
    return found


def hard(max_examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(
        max_examples=max_examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.mark.parametrize("kind", KINDS)
@hard(60)
@given(
    parts=cut_texts(),
    changes=edits(),
    chunk_chars=st.sampled_from([1, 7, 512]),
    add_special_tokens=st.booleans(),
)
def test_ids_are_those_of_the_whole_text(
    kind: str,
    parts: list[str],
    changes: list[Callable[[str], str]],
    chunk_chars: int,
    add_special_tokens: bool,
) -> None:
    """After every append and every edit the ids, and the splices applied, are those of the text."""
    tokenizer = tokenizer_of(kind)
    with mock.patch.object(incremental, "CHUNK_CHARS", chunk_chars):
        stream = IncrementalTokenizer(tokenizer, add_special_tokens=add_special_tokens)
        assert stream.is_incremental is (kind not in WHOLE_ONLY_KINDS)
        mirror = token_array(stream.ids)
        expected_text = ""

        def check() -> None:
            assert stream.text == expected_text
            expected = tokenizer.encode(expected_text, add_special_tokens=add_special_tokens)
            assert list(stream.ids) == expected
            assert mirror == stream.ids

        for part in parts:
            expected_text += part
            apply_splice(mirror, stream.append(part))
            check()
        for change in changes:
            expected_text = change(expected_text)
            apply_splice(mirror, stream.replace(expected_text))
            check()
        assert stream.is_incremental is (kind not in WHOLE_ONLY_KINDS)


@pytest.mark.parametrize("kind", sorted({"byte-level", "llama3", "sentencepiece-bpe", "metaspace"}))
def test_a_long_run_without_a_safe_point_stays_correct(kind: str) -> None:
    """Thousands of letters without a space, appended in pieces, give the ids of the whole."""
    tokenizer = tokenizer_of(kind)
    text = "nothing " + "the" * 1500 + " end\n" + "1234567890" * 100 + "." * 700 + " done"
    stream = IncrementalTokenizer(tokenizer)
    for begin in range(0, len(text), 613):
        stream.append(text[begin : begin + 613])
    assert list(stream.ids) == tokenizer.encode(text, add_special_tokens=False)


class CountingHf(HfTokenizer):
    """Counts the characters that it is given to encode."""

    num_chars = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.num_chars += len(text)
        return super().encode(text, add_special_tokens=add_special_tokens)


class CountingSp(SentencePieceTokenizer):
    """Counts the characters that it is given to encode."""

    num_chars = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.num_chars += len(text)
        return super().encode(text, add_special_tokens=add_special_tokens)


def counting_tokenizers() -> list[CountingHf | CountingSp]:
    return [
        CountingHf(byte_level_bpe()),
        CountingHf(llama3_bpe()),
        CountingHf(metaspace_bpe()),
        CountingSp(sentencepiece_model("bpe")),
    ]


@pytest.mark.parametrize("number", range(4))
def test_an_append_costs_what_is_appended(number: int) -> None:
    """However long the prompt is, an append encodes little more than its own characters."""
    tokenizer = counting_tokenizers()[number]
    stream = IncrementalTokenizer(tokenizer, add_special_tokens=True)
    stream.append("The quick brown fox, 12345 things.\nAnd so on. " * 2000)
    for _ in range(20):
        before = tokenizer.num_chars
        stream.append("Another piece of context. " * 10)
        assert tokenizer.num_chars - before < 260 + 40


@pytest.mark.parametrize("number", range(4))
def test_an_update_costs_what_is_behind_the_first_difference(number: int) -> None:
    """An edit near the end encodes at most about one chunk more than what follows it."""
    tokenizer = counting_tokenizers()[number]
    stream = IncrementalTokenizer(tokenizer)
    text = "The quick brown fox, 12345 things.\nAnd so on. " * 2000
    stream.append(text)
    before = tokenizer.num_chars
    stream.replace(text[:-1000] + "something else" + text[-900:])
    assert tokenizer.num_chars - before < 1000 + incremental.CHUNK_CHARS + 60


def test_a_lone_surrogate_is_refused_by_name() -> None:
    """Text that is no valid Unicode is refused with its place, and nothing changes."""
    stream = IncrementalTokenizer(tokenizer_of("byte-level"))
    stream.append("before")
    for change in (stream.append, stream.replace):
        with pytest.raises(InvalidArgumentError, match=r"U\+D800 at character 2"):
            change("ab\ud800")
    assert stream.text == "before"


def test_nothing_new_is_a_splice_of_nothing() -> None:
    """An empty append and a replacement by the same text keep all tokens."""
    stream = IncrementalTokenizer(tokenizer_of("byte-level"), add_special_tokens=True)
    stream.append("some text")
    num_tokens = len(stream.ids)
    for splice in (stream.append(""), stream.replace("some text")):
        assert splice.is_noop_on(num_tokens)


def test_a_refuted_rule_falls_back_to_the_whole_text() -> None:
    """A rule that lets a text be cut anywhere is found out, and the ids are right all the same."""

    class Anywhere:
        def can_cut(self, before: str, after: str) -> bool:
            return True

    class Lying(HfTokenizer):
        @property
        def cut_rule(self) -> Anywhere:
            return Anywhere()

    tokenizer = Lying(byte_level_bpe())
    stream = IncrementalTokenizer(tokenizer)
    stream.append("the the")
    stream.append("re")
    stream.append(" nothing")
    assert not stream.is_incremental
    assert list(stream.ids) == tokenizer.encode("the there nothing", add_special_tokens=False)
