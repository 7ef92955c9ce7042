"""Cut rules: what is proved, what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers import pre_tokenizers as pre

from streamfill.errors import ModelError
from streamfill.stream.cut_rule import CutRule
from streamfill.stream.hf_cut_rule import GPT2_PATTERN
from streamfill.stream.hf_tokenizer import HfTokenizer
from streamfill.stream.incremental import IncrementalTokenizer
from streamfill.stream.regex_pairs import PatternPairs
from streamfill.stream.regex_syntax import UnsupportedPatternError
from streamfill.stream.self_check import SAMPLE, without_wrong_cuts, wrong_cut
from streamfill.stream.tokenizer import load_tokenizer
from streamfill.stream.unicode_cut import is_plain
from tests.unit.stream.tokenizers_for_tests import (
    LLAMA3_PATTERN,
    O200K_PATTERN,
    all_tokenizers,
    byte_level_bpe,
    metaspace_bpe,
    sentencepiece_model,
)


def rule_of(tokenizer: HfTokenizer) -> CutRule:
    assert tokenizer.cut_rule is not None
    return tokenizer.cut_rule


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, LLAMA3_PATTERN, O200K_PATTERN])
@pytest.mark.parametrize(
    ("pair", "answer"),
    [
        *((pair, True) for pair in ("a ", "a\n", "天。", "1a", "a.", ". ")),
        *((pair, False) for pair in ("ab", "12", "\n\n", "  ", " a")),
    ],
)
def test_pairs_of_known_patterns(pattern: str, pair: str, answer: bool) -> None:
    """Words end at spaces; spaces, digits and letters of one run stay together."""
    assert PatternPairs(pattern).can_cut(*pair) is answer


def test_contractions_hang_on_the_word_only_where_the_pattern_says_so() -> None:
    """GPT-2 cuts before an apostrophe, GPT-4o's pattern does not."""
    assert PatternPairs(GPT2_PATTERN).can_cut("n", "'")
    assert not PatternPairs(O200K_PATTERN).can_cut("n", "'")


@pytest.mark.parametrize(
    "pattern", [r"(?<=a)b", r"\bword\b", r"a(?=bc)", r"[a&&b]", r"(a)\1", r"x*", r"^a", r"(a"]
)
def test_patterns_with_unknown_reach_are_refused(pattern: str) -> None:
    """Look-behinds, word boundaries, long look-aheads and empty matches are not argued about."""
    with pytest.raises(UnsupportedPatternError):
        PatternPairs(pattern)


def test_possessive_parts_may_refuse_a_single_character() -> None:
    """`a?+a` does not match one `a`, although its letters would allow it."""
    assert not PatternPairs(r"a?+a").always_matches("a")
    assert PatternPairs(r"a?a").always_matches("a")


@pytest.mark.parametrize(
    "char", ["\u0301", "\u200d", "🏽", "🇩", "\u1161", "\u0e33", "\uff9e", "\r"]
)
def test_parts_of_clusters_are_never_beside_a_cut(char: str) -> None:
    """Marks, joiners, modifiers, jamo and their like attach to their neighbours."""
    assert not is_plain(char)


def test_no_cut_touches_a_special_token_of_a_tokenizer_that_treats_sections() -> None:
    """Behind ``>`` a new section may begin, before which a dummy space goes."""
    tokenizer = metaspace_bpe()
    rule = rule_of(HfTokenizer(tokenizer))
    assert rule.can_cut("x", " ")
    assert not rule.can_cut(">", " ")


def test_every_tokenizer_passes_its_own_check() -> None:
    """The cuts of all known kinds hold on the built-in sample."""
    for name, tokenizer in all_tokenizers().items():
        if tokenizer.cut_rule is not None:
            assert wrong_cut(tokenizer) == "", name


@pytest.mark.parametrize(
    ("normalizer", "splitter", "named"),
    [
        (normalizers.BertNormalizer(), pre.ByteLevel(), "BertNormalizer"),
        (None, pre.UnicodeScripts(), "UnicodeScripts"),
        (None, pre.Split(Regex(r"(?<=a)b"), "isolated"), "pattern"),
    ],
)
def test_unknown_parts_mean_whole_texts(
    normalizer: normalizers.Normalizer | None,
    splitter: pre.PreTokenizer,
    named: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A tokenizer about which nothing is proved is right and slow, and one warning says why."""
    tokenizer = Tokenizer.from_str(byte_level_bpe().to_str())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    with caplog.at_level(logging.WARNING):
        loaded = without_wrong_cuts(HfTokenizer(tokenizer))
    assert loaded.cut_rule is None
    assert [named in record.getMessage() for record in caplog.records] == [True]
    stream = IncrementalTokenizer(loaded)
    for part in ("some te", "xt and m", "ore"):
        stream.append(part)
    assert not stream.is_incremental
    assert list(stream.ids) == loaded.encode("some text and more", add_special_tokens=False)


def test_a_lying_rule_is_found_at_load() -> None:
    """The self-check sees wrong cuts and takes the rule away."""

    class Lying(HfTokenizer):
        @property
        def cut_rule(self) -> CutRule:
            class Anywhere:
                def can_cut(self, before: str, after: str) -> bool:
                    return True

            return Anywhere()

    checked = without_wrong_cuts(Lying(byte_level_bpe()))
    assert checked.cut_rule is None
    assert "not constant" in checked.whole_only_reason or "cuts" in checked.whole_only_reason


def test_merges_across_unknown_pieces_are_not_cut() -> None:
    """In a vocabulary without bytes, unknown neighbours may be fused into one token."""
    vocab = {"<unk>": 0, "a": 1, " ": 2}
    rule = rule_of(HfTokenizer(Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True))))
    assert rule.can_cut("a", " ")
    assert not rule.can_cut("a", "z")
    assert not rule.can_cut("y", "z")


def test_a_folder_is_loaded_by_what_it_holds(tmp_path: Path) -> None:
    """`tokenizer.json` is preferred; `tokenizer.model` does; a folder with neither is refused."""
    with pytest.raises(ModelError, match="neither"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    ids = load_tokenizer(tmp_path).encode(SAMPLE, add_special_tokens=True)
    assert ids[0] == 1
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    assert (
        load_tokenizer(tmp_path).encode("a", add_special_tokens=False)
        == byte_level_bpe().encode("a", add_special_tokens=False).ids
    )
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)
