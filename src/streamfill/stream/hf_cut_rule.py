"""Where texts of a `tokenizer.json` may be cut, from its description.

A text passes the search for added tokens, the normaliser, the pre-tokenisers and the model. The
two characters of a cut are followed through these stages. A stage either *passes* the cut (cutting
there changes nothing elsewhere), or *splits* there by itself (so that both sides are apart from
then on), or forbids it. When no stage splits, the model has to: a BPE model never merges across a
pair of characters that stands inside no piece of its vocabulary.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, TypeAlias

from streamfill.stream.byte_alphabet import CHAR_OF_BYTE
from streamfill.stream.cut_rule import (
    METASPACE,
    AddedToken,
    AddedTokenPairs,
    CachedPairs,
    CutRule,
    UnprovableError,
    inner_pairs,
)
from streamfill.stream.regex_pairs import PatternPairs
from streamfill.stream.regex_syntax import UnsupportedPatternError
from streamfill.stream.unicode_cut import is_plain, is_stable

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the `ByteLevel` pre-tokeniser splits with when `use_regex` is set."""

Spec: TypeAlias = Mapping[str, Any]
_CharMap: TypeAlias = Callable[[str], str | None]


class _Verdict(Enum):
    FORBIDS = auto()
    PASSES = auto()
    SPLITS = auto()


_Stage: TypeAlias = Callable[[str, str], tuple[_Verdict, str, str]]


def hf_cut_rule(spec: Spec, normalize: Callable[[str], str]) -> CutRule:
    """The rule for a parsed `tokenizer.json`.

    Args:
        spec: the parsed file.
        normalize: what its normaliser makes of a text; used to check the reading of `spec`.

    Raises:
        UnprovableError: nothing can be proved about one of its parts, which is named.
    """
    char_map, normalizer_effects = _normalizer(spec.get("normalizer"))
    stages, stage_effects = _pre_tokenizers(spec.get("pre_tokenizer"))
    model_splits = _model(spec["model"])
    added = AddedTokenPairs(
        (_added_token(token) for token in spec.get("added_tokens") or ()),
        section_effects=normalizer_effects or stage_effects,
        normalize=normalize,
    )

    def decide(raw_before: str, raw_after: str) -> bool:
        if not (is_plain(raw_before) and is_plain(raw_after)):
            return False
        if not added.can_cut(raw_before, raw_after):
            return False
        before, after = char_map(raw_before), char_map(raw_after)
        if before is None or after is None or not added.can_cut(before, after):
            return False
        for raw, mapped in ((raw_before, before), (raw_after, after)):
            if not normalize(f"x{raw}x").endswith(f"x{mapped}x"):
                return False
        for stage in stages:
            verdict, before, after = stage(before, after)
            if verdict is not _Verdict.PASSES:
                return verdict is _Verdict.SPLITS
        return model_splits(before, after)

    return CachedPairs(decide)


def _added_token(token: Spec) -> AddedToken:
    return AddedToken(
        content=token["content"],
        normalized=bool(token.get("normalized")),
        lstrip=bool(token.get("lstrip")),
        rstrip=bool(token.get("rstrip")),
        single_word=bool(token.get("single_word")),
    )


# Normalisers: each maps a character that it handles on its own, and refuses (None) every other.


def _normalizer(spec: Spec | None) -> tuple[_CharMap, bool]:
    """(the map of single characters, whether a section's ends are treated specially)."""
    parts = _flatten(spec, "normalizers")
    maps = [_normalizer_part(part) for part in parts]

    def char_map(char: str) -> str | None:
        current: str | None = char
        for each in maps:
            current = each(current) if current is not None else None
        return current

    return char_map, any(part["type"] in ("Prepend", "Strip") for part in parts)


def _normalizer_part(part: Spec) -> _CharMap:
    kind = part["type"]
    match kind:
        case "NFC" | "NFD" | "NFKC" | "NFKD":
            return lambda char: char if is_stable(char, kind) else None
        case "Lowercase":
            return lambda char: char if char.lower() == char else None
        case "Prepend" | "StripAccents":
            return lambda char: char
        case "Strip":
            # It removes white space where a text begins and ends, so no part may do either.
            return lambda char: None if char.isspace() else char
        case "Precompiled":
            # It maps whole grapheme clusters, and no plain cut lies inside one. That the
            # character is a fixed point is seen when the normaliser itself is asked.
            return lambda char: char if unicodedata.normalize("NFKC", char) == char else None
        case "Replace":
            return _replacement(part["pattern"], part["content"])
    raise UnprovableError(f"normaliser {kind}")


def _replacement(pattern: Spec, content: str) -> _CharMap:
    literal = pattern.get("String")
    if isinstance(literal, str) and len(literal) == 1 and len(content) == 1:
        return lambda char: content if char == literal else char
    if isinstance(literal, str) and literal:
        # No occurrence touches a cut between characters that are not in it.
        return lambda char: None if char in literal else char
    raise UnprovableError(f"normaliser Replace of {pattern}")


# Pre-tokenisers.


def _pre_tokenizers(spec: Spec | None) -> tuple[list[_Stage], bool]:
    parts = _flatten(spec, "pretokenizers")
    effects = any(
        (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        or (part["type"] == "ByteLevel" and part.get("add_prefix_space", True))
        for part in parts
    )
    return [stage for part in parts for stage in _pre_tokenizer_part(part)], effects


def _pre_tokenizer_part(part: Spec) -> Sequence[_Stage]:
    match part["type"]:
        case "ByteLevel":
            return (*([_pattern(GPT2_PATTERN)] if part.get("use_regex", True) else []), _to_bytes)
        case "Split":
            pattern = part["pattern"]
            splits = part.get("behavior") in ("Isolated", "Removed")
            if "Regex" in pattern:
                return (_pattern(pattern["Regex"], splits=splits),)
            return (_matches(PatternPairs.of_literal(pattern["String"]), splits=splits),)
        case "Digits":
            return (_digits,)
        case "Punctuation" | "WhitespaceSplit":
            # Both look at single characters: a cut adds a split where it lies and none elsewhere.
            return (lambda before, after: (_Verdict.PASSES, before, after),)
        case "Metaspace":
            return (_metaspace(part.get("replacement", METASPACE), bool(part.get("split", True))),)
    raise UnprovableError(f"pre-tokeniser {part['type']}")


def _pattern(pattern: str, *, splits: bool = True) -> _Stage:
    try:
        return _matches(PatternPairs(pattern), splits=splits)
    except UnsupportedPatternError as error:
        raise UnprovableError(f"pattern: {error}") from error


def _matches(pairs: PatternPairs, *, splits: bool) -> _Stage:
    def stage(before: str, after: str) -> tuple[_Verdict, str, str]:
        if not pairs.can_cut(before, after):
            return _Verdict.FORBIDS, before, after
        # What no match takes stays together, so one of the two must belong to a match.
        sure = splits and (pairs.always_matches(before) or pairs.always_matches(after))
        return _Verdict.SPLITS if sure else _Verdict.PASSES, before, after

    return stage


def _digits(before: str, after: str) -> tuple[_Verdict, str, str]:
    seam = before.isascii() and after.isascii() and before.isdecimal() != after.isdecimal()
    return _Verdict.SPLITS if seam else _Verdict.PASSES, before, after


def _to_bytes(before: str, after: str) -> tuple[_Verdict, str, str]:
    last, first = before.encode("utf-8")[-1], after.encode("utf-8")[0]
    return _Verdict.PASSES, CHAR_OF_BYTE[last], CHAR_OF_BYTE[first]


def _metaspace(replacement: str, split: bool) -> _Stage:
    def stage(before: str, after: str) -> tuple[_Verdict, str, str]:
        before = replacement if before == " " else before
        after = replacement if after == " " else after
        splits = split and after == replacement
        return _Verdict.SPLITS if splits else _Verdict.PASSES, before, after

    return stage


def _model(model: Spec) -> Callable[[str, str], bool]:
    """Whether the model itself never joins two characters, within one piece of text."""
    kind = model.get("type", "BPE")
    if kind == "BPE" and model.get("dropout"):
        raise UnprovableError("BPE with dropout")
    # Unigram compares sums of scores from the start of the piece, and rounding depends on what
    # stands before. With `ignore_merges` the whole piece is looked up first. Word models see
    # the whole piece. All these are right only where a pre-tokeniser splits.
    whole_piece = kind != "BPE" or any(
        model.get(key)
        for key in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if whole_piece:
        return lambda before, after: False
    vocab = model["vocab"]
    joined: list[set[str]] = []

    def splits(before: str, after: str) -> bool:
        if not joined:
            joined.append(inner_pairs(vocab))
        # Both are pieces by themselves, so neither is written in bytes or fused with its
        # neighbour into one unknown token.
        return before in vocab and after in vocab and before + after not in joined[0]

    return splits


def _flatten(spec: Spec | None, key: str) -> list[Spec]:
    if spec is None:
        return []
    if spec["type"] != "Sequence":
        return [spec]
    return [part for inner in spec[key] for part in _flatten(inner, key)]
