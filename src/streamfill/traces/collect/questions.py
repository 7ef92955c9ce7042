"""Turns headings into questions. Pure.

A heading that occurs on several pages ("See also", "Navigation") says nothing about one of them
and is left out.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_LEAST_LETTERS: Final = 6
_MOST_WORDS: Final = 14
_CODE_SIGNS: Final = re.compile(r"[_=<>{}\[\]\\()]|\w\.\w")
_FORMS: Final = (
    "What is said about {topic}?",
    "What should I know about {topic}?",
    "Please explain {topic}. What are the important points?",
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """
    Attributes:
        text: what is asked.
        terms: what an agent would type into a search: heading and title.
    """

    text: str
    terms: str


def questions_of(
    pages: Sequence[tuple[str, Iterable[str]]], *, seed: int, num_questions: int
) -> list[Question]:
    """At most so many questions, drawn from all pages, the same ones for the same seed.

    Args:
        pages: title and headings of each.
    """
    seen = Counter(heading for _, headings in pages for heading in set(headings))
    generator = random.Random(f"questions/{seed}")
    candidates = [
        (heading, title)
        for title, headings in pages
        for heading in dict.fromkeys(headings)
        if seen[heading] == 1 and _is_topic(heading, is_title=heading == title)
    ]
    generator.shuffle(candidates)
    drawn = (_question(heading, title, generator) for heading, title in candidates)
    return list(dict.fromkeys(drawn))[:num_questions]


def _is_topic(heading: str, *, is_title: bool) -> bool:
    words = heading.split()
    if sum(sign.isalpha() for sign in heading) < _LEAST_LETTERS or len(words) > _MOST_WORDS:
        return False
    return heading.endswith("?") or is_title or (len(words) > 1 and not _CODE_SIGNS.search(heading))


def _question(heading: str, title: str, generator: random.Random) -> Question:
    terms = heading if heading == title else f"{heading} {title}"
    if heading.endswith("?"):
        return Question(text=heading, terms=heading)
    name, dash, explanation = heading.partition(" — ")
    topic = f"{name} ({explanation})" if dash else heading
    how_to = re.fullmatch(r"how to (.+)", topic, re.IGNORECASE)
    if how_to:
        return Question(text=f"How do I {how_to.group(1)}?", terms=terms)
    quoted = f"“{topic}”" if heading == title else f"“{topic}” in “{title}”"
    return Question(text=generator.choice(_FORMS).format(topic=quoted), terms=terms)
