"""Extraction, passages, ranking and questions: what collectors do with text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamfill.traces.collect.extraction import extract_page
from streamfill.traces.collect.passages import (
    estimated_tokens,
    first_words,
    passages_of,
    scaled,
    words_of_tokens,
)
from streamfill.traces.collect.questions import questions_of
from streamfill.traces.collect.ranking import TextRanker, filtered_passages

PAGE = b"""<html><head><title>Gardens of the north</title></head><body>
<nav><a href="/">Home</a></nav>
<main><article><h1>1.2. Growing apples<a href="#growing">&para;</a></h1>
<p>Apples want a cold winter, a mild spring and a soil that does not dry out in summer at all.</p>
<h2>Pruning old trees</h2>
<p>Cut in late winter, when the tree is asleep, and leave the strongest three branches alone.</p>
<p>See <a href="pears.html#top">pears</a> and <a href="pears.html">pears again</a>
<a href="http://[broken">x</a>.</p>
</article></main></body></html>"""


def test_a_page_gives_title_headings_text_and_links() -> None:
    """Numbering, anchor signs and fragments are gone, each link is there once."""
    page = extract_page("http://garden.example/fruit/apples.html", PAGE)
    assert page.title == "Growing apples"
    assert page.headings == ("Growing apples", "Pruning old trees")
    assert "leave the strongest three branches" in page.text
    assert not page.text.startswith("Growing apples")
    assert page.links.count("http://garden.example/fruit/pears.html") == 1


def test_bytes_that_are_no_page_give_no_text() -> None:
    """Garbage is an empty page, not an error."""
    assert extract_page("http://garden.example/x", b"").text == ""


@given(st.lists(st.integers(1, 300), max_size=20))
def test_passages_keep_every_word_in_order(lengths: list[int]) -> None:
    """Passages together are the text, and none is longer than the limit."""
    lines = [" ".join(f"w{n}.{m}" for m in range(length)) for n, length in enumerate(lengths)]
    passages = passages_of("\n".join(lines))
    assert " ".join(passages).split() == " ".join(lines).split()
    assert all(len(passage.split()) <= 120 for passage in passages)


@given(st.text(alphabet="ab \n", max_size=60), st.integers(0, 12))
def test_first_words_is_the_beginning(text: str, num_words: int) -> None:
    """At most so many words are kept, and they are the first ones."""
    assert first_words(text, num_words).split() == text.split()[:num_words]


def test_scaling_leaves_at_least_one_word() -> None:
    """A small scale keeps the first word; scale 1 changes nothing."""
    assert scaled("one two three", 0.01) == "one"
    assert scaled("one two  three\n", 1.0) == "one two  three\n"
    assert estimated_tokens("one two three") == 4
    assert words_of_tokens(4) == 3


def test_filter_keeps_matching_passages_in_their_order() -> None:
    """The passages that match are kept as they stand in the page, the others are left out."""
    passages = ["pruning apple trees", "the history of stamps", "apple trees in winter: pruning"]
    kept = filtered_passages(passages, "pruning trees", most=2, floor=0.1)
    assert kept == [passages[0], passages[2]]
    assert filtered_passages(passages, "submarine", most=2, floor=0.1) == []


def test_ranker_scores_nothing_without_a_known_term() -> None:
    """Unknown terms, only common words, or empty texts give zeros and no finds."""
    assert TextRanker(["red apples"]).best("blue submarine", 3) == []
    assert TextRanker(["", "the"]).scores("the").tolist() == [0.0, 0.0]


def test_questions_come_from_headings_of_one_page_only() -> None:
    """A heading of several pages is no topic; a question stays as it is; seeds repeat."""
    pages = [
        ("Apples", ["Apples", "See also", "How to prune apple trees"]),
        ("Pears", ["Pears", "See also", "Why do pears rot?"]),
    ]
    questions = questions_of(pages, seed=3, num_questions=10)
    texts = {question.text for question in questions}
    assert "Why do pears rot?" in texts
    assert "How do I prune apple trees?" in texts
    assert not any("See also" in text for text in texts)
    assert questions == questions_of(pages, seed=3, num_questions=10)
    assert len(questions_of(pages, seed=3, num_questions=1)) == 1
