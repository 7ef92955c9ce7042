"""An invented encyclopedia: readable English about things that do not exist. Pure.

One entry is a text of any length, always the same for its seed and id. Entries are about places,
machines, people, measures, structures, species and institutions. An entry begins with what its
subject is and a few facts about it, for which it knows the questions; a long one goes on to
related subjects.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from streamfill.traces.prose_kinds import KINDS, EntryKind
from streamfill.traces.prose_words import (
    COMMON_SENTENCES,
    FAMILY_ENDS,
    FAMILY_STARTS,
    FIRST_NAMES,
    FREE_SLOTS,
    NAME_ENDS,
    NAME_MIDDLES,
    NAME_STARTS,
    NEUTRAL_SENTENCES,
)

_SLOT: Final = re.compile(r"\{([a-z_]+)(\d?)\}")
_ARTICLE: Final = re.compile(r"\b([Aa])\(n\) (\w)")
_YEARS: Final = (1412, 1968)
_SENTENCES_PER_PARAGRAPH: Final = (3, 6)
_PARAGRAPHS_PER_SUBJECT: Final = (3, 7)


@dataclass(frozen=True)
class Fact:
    """Something that an entry says about its subject.

    Attributes:
        sentence: as it stands in the text.
        answer: a part of it.
        question: to which ``answer`` is the answer.
    """

    sentence: str
    answer: str
    question: str


class Entry:
    """One entry of the encyclopedia.

    Attributes:
        subject: what it is about, as it is called inside a sentence.
        facts: what the first paragraph says.
    """

    def __init__(self, seed: int, entry_id: str) -> None:
        subject = _Subject(random.Random(f"{seed}/{entry_id}"))
        self.subject = subject.called
        self.facts = subject.facts
        self._paragraphs = _paragraphs(subject)
        self._text = next(self._paragraphs)

    def text(self, num_chars: int) -> str:
        """Whole paragraphs with together at least so many characters."""
        while len(self._text) < num_chars:
            self._text += "\n\n" + next(self._paragraphs)
        return self._text


class _Subject:
    """What one part of an entry is about; draws sentences about it."""

    def __init__(self, generator: random.Random, kind: EntryKind | None = None) -> None:
        self.generator = generator
        self.kind = generator.choice(KINDS) if kind is None else kind
        self._kept: dict[str, str] = {}
        self._keeps_all = True
        self.name = self.fill(generator.choice(self.kind.titles))
        self._kept["name"] = self.name
        lead = generator.choice(self.kind.leads)
        self.called = f"the {self.name}" if lead.startswith("The ") else self.name
        self.lead = self.fill(lead)
        patterns = list(self.kind.facts)
        generator.shuffle(patterns)
        self.facts = tuple(
            Fact(
                sentence=self.fill(generator.choice(pattern.sentences)),
                answer=self._kept[pattern.slot],
                question=self.fill(pattern.question),
            )
            for pattern in patterns
        )
        self._keeps_all = False

    def fill(self, pattern: str) -> str:
        """A sentence: a pattern with its slots filled."""
        used: set[str] = set()
        text = _SLOT.sub(functools.partial(self._value, used), pattern)
        text = _ARTICLE.sub(_with_article, text)
        return text[0].upper() + text[1:]

    def sentences(self) -> Iterator[str]:
        """Sentences about the subject, without an end; no pattern comes again before all came."""
        common = COMMON_SENTENCES if self.kind.is_thing else ()
        patterns = [*self.kind.sentences, *common, *NEUTRAL_SENTENCES]
        while True:
            self.generator.shuffle(patterns)
            for pattern in patterns:
                yield self.fill(pattern)

    def _value(self, used: set[str], match: re.Match[str]) -> str:
        slot, key = match[1], match[1] + match[2]
        if key in self._kept:
            return self._kept[key]
        value = self._draw(slot)
        while value in used:
            value = self._draw(slot)
        used.add(value)
        # What the lead and the facts say stays true throughout the entry.
        if self._keeps_all:
            self._kept[key] = value
        return value

    def _draw(self, slot: str) -> str:
        generator = self.generator
        match slot:
            case "town" | "place_name":
                middle = generator.choice(NAME_MIDDLES) if generator.random() < 0.5 else ""
                return generator.choice(NAME_STARTS) + middle + generator.choice(NAME_ENDS)
            case "river":
                return generator.choice(NAME_STARTS) + generator.choice(NAME_MIDDLES)
            case "family":
                name = generator.choice(FAMILY_STARTS) + generator.choice(FAMILY_ENDS)
                return name.replace("lll", "ll")
            case "person" | "person_name":
                return f"{generator.choice(FIRST_NAMES)} {self._draw('family')}"
            case "year":
                return str(generator.randint(*_YEARS))
            case "few":
                return str(generator.randint(2, 19))
            case "many":
                return str(generator.randint(20, 980))
            case _:
                return generator.choice(FREE_SLOTS[slot])


def _paragraphs(subject: _Subject) -> Iterator[str]:
    generator = subject.generator
    while True:
        yield " ".join([subject.lead, *(fact.sentence for fact in subject.facts)])
        sentences = subject.sentences()
        for _ in range(generator.randint(*_PARAGRAPHS_PER_SUBJECT)):
            num_sentences = generator.randint(*_SENTENCES_PER_PARAGRAPH)
            yield " ".join(next(sentences) for _ in range(num_sentences))
        subject = _Subject(generator)


def _with_article(match: re.Match[str]) -> str:
    return match[1] + ("n " if match[2].lower() in "aeiou" else " ") + match[2]
