r"""Parser for the regular expressions that tokenizers split with (Oniguruma's syntax, a part).

Understood: literals, ``.``, sets with ranges and classes, ``\s \S \d \D \w \W \r \n \t``,
``\p{L}`` with a general category, groups, ``(?:…)``, ``(?i:…)``, alternatives, quantifiers
(greedy, lazy, possessive), ``$`` and look-aheads of one character. Anything else is refused.

Whether a set contains a character has three answers: True, False, or None where engines and
Unicode versions may differ. Callers take None for the answer that is worse for them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Contains: TypeAlias = Callable[[str], bool | None]


class UnsupportedPatternError(ValueError):
    """Nothing can be proved about the pattern."""


@dataclass(frozen=True, slots=True)
class CharSet:
    """One position that takes one character."""

    contains: Contains

    @classmethod
    def of_char(cls, char: str) -> CharSet:
        """The set of one character."""
        return cls(lambda other: other == char)


@dataclass(frozen=True, slots=True)
class Assertion:
    """A question about the next character that takes none."""


@dataclass(frozen=True, slots=True)
class Seq:
    """One after the other."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of several."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`at_most` is None without a bound."""

    inner: Node
    at_least: int
    at_most: int | None
    possessive: bool


Node: TypeAlias = CharSet | Assertion | Seq | Alt | Repeat


def parse(pattern: str) -> Node:
    """The syntax tree of `pattern`.

    Raises:
        UnsupportedPatternError: it uses something that is not understood.
    """
    parser = _Parser(pattern)
    node = parser.alternatives(ignore_case=False)
    if not parser.at_end:
        raise parser.refuse("unbalanced parenthesis")
    return node


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at >= len(self._pattern)

    def refuse(self, what: str) -> UnsupportedPatternError:
        return UnsupportedPatternError(f"{what} at {self._at} of {self._pattern!r}")

    def alternatives(self, *, ignore_case: bool) -> Node:
        options = [self._sequence(ignore_case)]
        while self._take("|"):
            options.append(self._sequence(ignore_case))
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def _sequence(self, ignore_case: bool) -> Node:
        items: list[Node] = []
        while not self.at_end and self._pattern[self._at] not in "|)":
            items.append(self._quantified(self._atom(ignore_case)))
        return Seq(tuple(items))

    def _quantified(self, atom: Node) -> Node:
        bounds = self._bounds()
        while bounds is not None:
            possessive = self._take("+")
            if not possessive:
                self._take("?")
            atom = Repeat(atom, bounds[0], bounds[1], possessive)
            bounds = self._bounds()
        return atom

    def _bounds(self) -> tuple[int, int | None] | None:
        if self._take("?"):
            return 0, 1
        if self._take("*"):
            return 0, None
        if self._take("+"):
            return 1, None
        if not self._take("{"):
            return None
        low, comma, high = self._until("}").partition(",")
        if not low.isdecimal() or (high and not high.isdecimal()):
            raise self.refuse("repeat count")
        if not comma:
            return int(low), int(low)
        return int(low), int(high) if high else None

    def _atom(self, ignore_case: bool) -> Node:
        if self._take("("):
            return self._group(ignore_case)
        if self._take("["):
            return CharSet(self._set(ignore_case))
        if self._take("$"):
            return Assertion()
        char = self._next()
        if char == ".":
            return CharSet(lambda other: None if other in "\n\r" else True)
        if char == "\\":
            return CharSet(self._escape())
        if char in "^*+?{":
            raise self.refuse(f"{char!r}")
        return CharSet(_either_case(char) if ignore_case else _exactly(char))

    def _group(self, ignore_case: bool) -> Node:
        if self._take("?!") or self._take("?="):
            inner = self._closed(ignore_case)
            if isinstance(inner, Seq) and len(inner.items) == 1:
                inner = inner.items[0]
            if not isinstance(inner, CharSet):
                raise self.refuse("look-ahead of more than one character")
            return Assertion()
        if self._take("?i:"):
            return self._closed(ignore_case=True)
        if not self._take("?:") and self._peek() == "?":
            raise self.refuse("group extension")
        return self._closed(ignore_case)

    def _closed(self, ignore_case: bool) -> Node:
        node = self.alternatives(ignore_case=ignore_case)
        if not self._take(")"):
            raise self.refuse("unclosed group")
        return node

    def _set(self, ignore_case: bool) -> Contains:
        negated = self._take("^")
        members: list[Contains] = []
        while not self._take("]") or not members:
            if self._peek() == "[" or self._pattern.startswith("&&", self._at):
                raise self.refuse("set operation")
            members.append(self._member(ignore_case))
        return _negation(_union(members)) if negated else _union(members)

    def _member(self, ignore_case: bool) -> Contains:
        char = self._next()
        if char == "\\":
            literal = _ESCAPED_CHARS.get(self._peek(), self._peek())
            if self._peek().isalnum() and self._peek() not in _ESCAPED_CHARS:
                return self._escape()
            self._next()
            char = literal
        if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
            self._next()
            high = self._next()
            if high == "\\":
                high = _ESCAPED_CHARS.get(self._peek(), self._peek())
                if self._next().isalnum() and high.isalnum():
                    raise self.refuse("range")
            low = char
            if ignore_case:
                return lambda other: low <= other <= high or (None if other.isalpha() else False)
            return lambda other: low <= other <= high
        return _either_case(char) if ignore_case else _exactly(char)

    def _escape(self) -> Contains:
        char = self._next()
        if char in _ESCAPED_CLASSES:
            return _ESCAPED_CLASSES[char]
        if char in "pP":
            if not self._take("{"):
                raise self.refuse("property")
            name = self._until("}")
            inner = _category(name.removeprefix("^"))
            return _negation(inner) if (char == "P") != name.startswith("^") else inner
        if char in _ESCAPED_CHARS:
            return _exactly(_ESCAPED_CHARS[char])
        if char.isalnum():
            raise self.refuse(f"\\{char}")
        return _exactly(char)

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _next(self) -> str:
        if self.at_end:
            raise self.refuse("early end")
        self._at += 1
        return self._pattern[self._at - 1]

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _until(self, end: str) -> str:
        stop = self._pattern.find(end, self._at)
        if stop < 0:
            raise self.refuse(f"no {end!r}")
        text, self._at = self._pattern[self._at : stop], stop + 1
        return text


def _exactly(char: str) -> Contains:
    return lambda other: other == char


def _either_case(char: str) -> Contains:
    """Case folding beyond ASCII differs between engines: not answered."""

    def contains(other: str) -> bool | None:
        if other.isascii() and char.isascii():
            return other.lower() == char.lower()
        return None if other.isalpha() else other == char

    return contains


def _union(members: list[Contains]) -> Contains:
    def contains(other: str) -> bool | None:
        answers = [member(other) for member in members]
        return True if True in answers else (None if None in answers else False)

    return contains


def _negation(inner: Contains) -> Contains:
    def contains(other: str) -> bool | None:
        answer = inner(other)
        return None if answer is None else not answer

    return contains


def _category(name: str) -> Contains:
    """A general category by its short name; other properties are not answered."""
    if len(name) > 2 or name[:1] not in "LMNPSZC":
        return lambda other: None
    return lambda other: unicodedata.category(other).startswith(name)


def _space(char: str) -> bool | None:
    if char.isascii():
        return char in " \t\n\r\x0b\x0c"
    return None if unicodedata.category(char)[0] in "ZC" else False


def _digit(char: str) -> bool | None:
    return char.isdecimal() if char.isascii() else (None if char.isnumeric() else False)


def _word(char: str) -> bool | None:
    return (char.isalnum() or char == "_") if char.isascii() else None


_ESCAPED_CHARS = {"n": "\n", "r": "\r", "t": "\t"}
_ESCAPED_CLASSES: dict[str, Contains] = {
    "s": _space,
    "S": _negation(_space),
    "d": _digit,
    "D": _negation(_digit),
    "w": _word,
    "W": _negation(_word),
}
