"""Which two neighbouring characters can one match of a pre-tokeniser's pattern contain?

A byte-level tokenizer splits its text with a regular expression, scanning from left to right, and
merges inside the pieces only. If no match can hold `a` directly followed by `b`, and no look-ahead
is asked right behind `a`, then the pieces left of a|b are those of the left text alone, and the
scan starts afresh at `b`: the matcher, whichever way it backtracks, sees at the seam either a
character that it cannot use or the end of the text, and both stop it alike.

The pairs are read off Glushkov's automaton of the pattern (Glushkov 1961): a pair can stand inside
a match iff some position takes `a`, one that may follow it takes `b`. Repeat counts and look-aheads
are ignored there, so that the answer errs towards "can be inside".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from streamfill.stream.regex_syntax import (
    Alt,
    Assertion,
    CharSet,
    Node,
    Repeat,
    Seq,
    UnsupportedPatternError,
    parse,
)


@dataclass(slots=True)
class _Automaton:
    """Positions of a pattern; an `Assertion` is a position that takes no character."""

    leaves: list[CharSet | Assertion] = field(default_factory=list)
    follow: list[set[int]] = field(default_factory=list)

    def add(self, leaf: CharSet | Assertion) -> int:
        self.leaves.append(leaf)
        self.follow.append(set())
        return len(self.leaves) - 1

    def connect(self, lasts: set[int], firsts: set[int]) -> None:
        for last in lasts:
            self.follow[last] |= firsts


@dataclass(frozen=True, slots=True)
class _Part:
    nullable: bool
    first: set[int]
    last: set[int]


class PatternPairs:
    """What is certain about the matches of one pattern.

    Raises:
        UnsupportedPatternError: the pattern uses something whose reach is not understood, such as
            a look-behind, or can match nothing.
    """

    def __init__(self, pattern: str) -> None:
        self._init_from(parse(pattern))

    @classmethod
    def of_literal(cls, text: str) -> PatternPairs:
        """The same for a fixed text instead of a pattern."""
        pairs = cls.__new__(cls)
        pairs._init_from(Seq(tuple(CharSet.of_char(char) for char in text)))
        return pairs

    def _init_from(self, root: Node) -> None:
        self._root = root
        self._automaton = _Automaton()
        if _build(root, self._automaton).nullable:
            raise UnsupportedPatternError("the pattern can match nothing")

    def can_cut(self, before: str, after: str) -> bool:
        """No match holds `before` + `after`, nor asks what stands behind `before`."""
        for index, leaf in enumerate(self._automaton.leaves):
            if isinstance(leaf, Assertion) or leaf.contains(before) is False:
                continue
            for next_index in self._automaton.follow[index]:
                next_leaf = self._automaton.leaves[next_index]
                if isinstance(next_leaf, Assertion) or next_leaf.contains(after) is not False:
                    return False
        return True

    def always_matches(self, char: str) -> bool:
        """`char` is part of some match wherever it stands."""
        return _alone(self._root, char)[1]


def _build(node: Node, automaton: _Automaton) -> _Part:
    match node:
        case CharSet():
            index = automaton.add(node)
            return _Part(False, {index}, {index})
        case Assertion():
            index = automaton.add(node)
            return _Part(True, {index}, {index})
        case Alt(options):
            parts = [_build(option, automaton) for option in options]
            return _Part(
                any(part.nullable for part in parts),
                set[int]().union(*(part.first for part in parts)),
                set[int]().union(*(part.last for part in parts)),
            )
        case Repeat(inner, at_least, at_most, _):
            part = _build(inner, automaton)
            if at_most is None or at_most > 1:
                automaton.connect(part.last, part.first)
            return _Part(part.nullable or at_least == 0, part.first, part.last)
        case Seq(items):
            whole = _Part(True, set(), set())
            for item in items:
                part = _build(item, automaton)
                automaton.connect(whole.last, part.first)
                whole = _Part(
                    whole.nullable and part.nullable,
                    whole.first | part.first if whole.nullable else whole.first,
                    whole.last | part.last if part.nullable else part.last,
                )
            return whole


def _alone(node: Node, char: str) -> tuple[bool, bool]:
    """(can surely match nothing where `char` stands, can surely match just `char`)."""
    match node:
        case CharSet():
            return False, node.contains(char) is True
        case Assertion():
            return False, False
        case Alt(options):
            results = [_alone(option, char) for option in options]
            return any(empty for empty, _ in results), any(single for _, single in results)
        case Repeat(inner, at_least, at_most, possessive):
            _, single = _alone(inner, char)
            # A possessive part gives back nothing: it is empty only if it cannot take `char`.
            skippable = at_least == 0 and not (possessive and _may_take(inner, char))
            return skippable, single and at_least <= 1 and at_most != 0
        case Seq(items):
            results = [_alone(item, char) for item in items]
            num_solid = sum(not empty for empty, _ in results)
            single = any(alone and num_solid == (0 if empty else 1) for empty, alone in results)
            return num_solid == 0, single


def _may_take(node: Node, char: str) -> bool:
    match node:
        case CharSet():
            return node.contains(char) is not False
        case Assertion():
            return True
        case Alt(items) | Seq(items):
            return any(_may_take(item, char) for item in items)
        case Repeat(inner, _, _, _):
            return _may_take(inner, char)
