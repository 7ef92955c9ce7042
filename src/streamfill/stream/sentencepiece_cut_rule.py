"""Where texts of a sentencepiece BPE model may be cut.

Such a model sees a text as one piece. It merges neighbours while the result is in its vocabulary,
so it never merges across a pair of characters that stands inside no piece. The normaliser maps
characters and composes sequences; its known rule sets (Unicode's NFKC and relatives) compose only
inside grapheme clusters, so a plain cut between two characters that map to themselves stays a cut.
White space is added, stripped and squeezed only at the ends of a text and behind other white space.

A unigram model chooses by sums of 32-bit scores from the beginning of the text; which of two equal
segmentations wins depends on rounding, that is, on everything before. For it nothing is proved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from streamfill.stream.cut_rule import (
    METASPACE,
    AddedToken,
    AddedTokenPairs,
    CachedPairs,
    CutRule,
    UnprovableError,
    inner_pairs,
)
from streamfill.stream.unicode_cut import is_plain, is_stable

_KNOWN_NORMALIZERS = frozenset({"identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"})


@dataclass(frozen=True, slots=True)
class SentencePieceSpec:
    """What a model file says about itself.

    Attributes:
        is_bpe: a BPE model; otherwise unigram, word or character.
        pieces: the vocabulary's texts, mapped to their ids.
        normalizer_name: name of the rule set in it.
        has_char_map: whether there are rules at all.
        whitespace_is_suffix: the dummy space goes behind the text instead of before it.
    """

    is_bpe: bool
    pieces: Mapping[str, int]
    normalizer_name: str
    has_char_map: bool
    whitespace_is_suffix: bool


def sentencepiece_cut_rule(
    spec: SentencePieceSpec,
    normalize: Callable[[str], str],
    added_tokens: Iterable[AddedToken],
) -> CutRule:
    """The rule for a model.

    Args:
        spec: the model.
        normalize: what its normaliser makes of a text.
        added_tokens: texts that are cut out before the model sees the rest.

    Raises:
        UnprovableError: nothing can be proved; the text says why.
    """
    if not spec.is_bpe:
        raise UnprovableError("a sentencepiece model that is not BPE depends on the whole text")
    if spec.has_char_map and spec.normalizer_name not in _KNOWN_NORMALIZERS:
        raise UnprovableError(f"sentencepiece normalisation rules {spec.normalizer_name!r}")
    if spec.whitespace_is_suffix:
        raise UnprovableError("sentencepiece with white space as suffix")
    added = AddedTokenPairs(added_tokens, section_effects=True, normalize=normalize)
    joined = inner_pairs(spec.pieces)
    joined |= {pair.replace(METASPACE, " ") for pair in joined}

    def decide(before: str, after: str) -> bool:
        if not (is_plain(before) and is_plain(after)) or before == " ":
            return False
        if not (is_stable(before, "NFKC") and is_stable(after, "NFKC")):
            return False
        if not added.can_cut(before, after) or before + after in joined:
            return False
        normal = normalize(f"x{before}{after}x")
        for mapped in {after, after.replace(" ", METASPACE)}:
            if normal.endswith(f"x{before}{mapped}x"):
                # Both are pieces by themselves, so neither is written in bytes or fused with
                # its neighbour into one unknown token.
                known = before in spec.pieces and mapped in spec.pieces
                return known and before + mapped not in joined
        return False

    return CachedPairs(decide)
