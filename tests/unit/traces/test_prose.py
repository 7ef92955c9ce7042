"""The invented encyclopedia is readable, varied, and always the same."""

from __future__ import annotations

import re

import pytest

from streamfill.traces.prose import Entry
from streamfill.traces.prose_kinds import KINDS, EntryKind

ENTRIES = [Entry(7, f"e{n}") for n in range(60)]


def test_entries_repeat_and_differ() -> None:
    """Seed and id make the text; another one of either makes another text."""
    assert Entry(1, "a").text(2000) == Entry(1, "a").text(2000)
    texts = {Entry(1, "a").text(500), Entry(1, "b").text(500), Entry(2, "a").text(500)}
    assert len(texts) == 3
    assert len({entry.text(200) for entry in ENTRIES}) == len(ENTRIES)


def test_longer_texts_begin_like_shorter_ones() -> None:
    """How much is asked for changes nothing but the end."""
    entry = Entry(1, "a")
    long = entry.text(5000)
    assert len(long) >= 5000
    assert long.startswith(Entry(1, "a").text(100))


def test_text_is_clean_english() -> None:
    """No slot is left open, sentences begin with a capital letter, articles are right."""
    for entry in ENTRIES:
        text = entry.text(3000)
        assert "{" not in text
        assert "(n)" not in text
        assert text.isascii()
        assert not re.search(r"\b[Aa] (?!unit )[aeiou]|\b[Aa]n [^aeiouAEIOU]", text)
        for paragraph in text.split("\n\n"):
            assert paragraph[0].isupper()
            assert paragraph[-1] in '.?"'
            assert not re.search(r"[.?] [a-z]", paragraph)


def test_sentences_vary() -> None:
    """In a page of some 700 words no sentence comes twice."""
    for entry in ENTRIES[:10]:
        sentences = re.findall(r"[^.\n]+\.", entry.text(4000))
        assert len(sentences) > 25
        assert len(set(sentences)) == len(sentences)


def test_facts_stand_in_the_first_paragraph() -> None:
    """What a question asks for is in the sentence that the entry begins with."""
    kinds = set()
    for entry in ENTRIES:
        first = entry.text(1).split("\n\n")[0]
        kinds.add(re.sub(r"[A-Z]\w+", "", first.split(".")[0]))
        assert len(entry.facts) == 3
        for fact in entry.facts:
            assert fact.sentence in first
            assert fact.answer in fact.sentence
            assert fact.question.endswith("?")
            assert entry.subject.removeprefix("the ") in fact.question
        assert entry.subject.removeprefix("the ") in first
    assert len(kinds) > len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.titles[0]))
def test_facts_have_a_place_for_their_value(kind: EntryKind) -> None:
    """Each way to say a fact has its value in it."""
    for fact in kind.facts:
        assert all(f"{{{fact.slot}}}" in sentence for sentence in fact.sentences)
        assert "{name}" in fact.question
