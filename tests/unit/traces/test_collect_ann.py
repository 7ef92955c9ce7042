"""Collecting an ANN trace with a fake embedder, and once with the real model."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamfill.errors import TraceError
from streamfill.messages.common import StreamMode
from streamfill.models.home import HOME_VARIABLE
from streamfill.models.progress import Progress, no_progress
from streamfill.traces.collect.ann import AnnPlan, collect_ann
from streamfill.traces.collect.corpus import corpus_of_file, corpus_of_tree
from streamfill.traces.collect.debian_tree import folder_as_tree
from streamfill.traces.collect.embedding import MiniLmEmbedder, Vectors, cached_embeddings
from streamfill.traces.collect.index_search import IndexKind, StepwiseIndex
from streamfill.traces.files import TraceReader
from tests.unit.traces.collect_site import make_site

PLAN = AnnPlan(
    name="tiny",
    num_queries=6,
    top_k=3,
    index=IndexKind.IVF,
    seed=2,
    keeps_unchanged=False,
    draws_latency=True,
    request_rate=2.0,
    token_scale=1.0,
    time_scale=1.0,
    max_segment_tokens=None,
    max_output_tokens=4,
    num_threads=1,
)


class WordEmbedder:
    """Adds up one fixed random vector per word."""

    def __init__(self) -> None:
        self.num_texts = 0

    @property
    def name(self) -> str:
        """Of no real model."""
        return "words"

    def embed(self, texts: Sequence[str], progress: Progress = no_progress) -> Vectors:
        """One vector per text, 24 numbers."""
        self.num_texts += len(texts)
        rows = np.stack(
            [sum((_of_word(w) for w in t.lower().split()), _of_word("")) for t in texts]
        )
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / lengths, dtype=np.float32)


def _of_word(word: str) -> np.ndarray:
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(24)


@contextmanager
def silent(title: str) -> Iterator[Progress]:
    """Shows nothing."""
    yield no_progress


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))


@pytest.mark.parametrize("kind", list(IndexKind))
def test_each_change_of_the_ranking_is_an_update(tmp_path: Path, kind: IndexKind) -> None:
    """Neighbouring segments differ, every ranking has k documents, and the file can be read."""
    tree = folder_as_tree(make_site(tmp_path / "site"))
    corpus = corpus_of_tree(tree, max_passages=200, seed=0)
    plan = replace(PLAN, index=kind, keeps_unchanged=kind is IndexKind.HNSW)
    output = tmp_path / "trace.jsonl"
    summary = collect_ann(plan, corpus, WordEmbedder(), output, silent)
    with TraceReader(output) as reader:
        requests = list(reader)
    assert summary.num_requests == len(requests) > 0
    assert summary.num_updates == sum(len(request.segments) - 1 for request in requests)
    for request in requests:
        rankings = [segment.document_ids or () for segment in request.segments]
        assert request.mode is StreamMode.UPDATE
        assert len(rankings) >= (1 if plan.keeps_unchanged else 2)
        assert all(before != after for before, after in itertools.pairwise(rankings))
        assert len(rankings[-1]) == 3
        assert all(segment.delay_ms >= 1.4 for segment in request.segments)


def test_a_seed_repeats_everything_but_measured_times(tmp_path: Path) -> None:
    """Two collections have the same questions, rankings and arrivals."""
    corpus = corpus_of_tree(folder_as_tree(make_site(tmp_path / "site")), max_passages=99, seed=0)
    kept = []
    for number in range(2):
        output = tmp_path / f"{number}.jsonl"
        collect_ann(PLAN, corpus, WordEmbedder(), output, silent)
        with TraceReader(output) as reader:
            kept.append(
                [(r.arrival_ms, r.suffix, [s.document_ids for s in r.segments]) for r in reader]
            )
    assert kept[0] == kept[1]


def test_the_widest_step_of_ivf_is_the_exact_answer() -> None:
    """With all cells probed the ranking is that of brute force."""
    vectors = WordEmbedder().embed([f"text {n} of {n % 7}" for n in range(200)])
    query = WordEmbedder().embed(["text 11 of 4"])
    index = StepwiseIndex(IndexKind.IVF, vectors, seed=0, num_threads=1)
    steps = list(index.steps(query, 5))
    exact = np.argsort(-(vectors @ query[0]), kind="stable")[:5]
    assert [step.breadth for step in steps[:3]] == [1, 2, 4]
    assert set(steps[-1].found) == set(exact.tolist())
    assert all(step.search_ms >= 0 for step in steps)


def test_embeddings_are_made_once(tmp_path: Path) -> None:
    """The second call reads them from the home folder; another text is embedded again."""
    embedder = WordEmbedder()
    first = cached_embeddings(embedder, ["a b", "c"])
    again = cached_embeddings(embedder, ["a b", "c"])
    assert embedder.num_texts == 2
    assert np.array_equal(first, again)
    cached_embeddings(embedder, ["a", "b c"])
    assert embedder.num_texts == 4


def test_corpora_of_json_lines_and_text(tmp_path: Path) -> None:
    """Titles and headings are topics, short passages are left out."""
    words = "an orchard is a garden of trees that bear fruit in summer and rest in winter"
    lines = tmp_path / "corpus.jsonl"
    lines.write_text(
        json.dumps({"title": "Orchards", "text": words}) + "\n" + '{"text": "short"}\n'
    )
    corpus = corpus_of_file(lines, max_passages=9)
    assert [(each.title, each.text) for each in corpus.passages] == [("Orchards", words)]
    assert corpus.topics == (("Orchards", ("Orchards",)),)
    text = tmp_path / "corpus.txt"
    text.write_text(f"Orchards\n\n{words}.\n\n# Rest\n\n{words} too.\n")
    assert [topic for topic, _ in corpus_of_file(text, max_passages=9).topics] == [
        "Orchards",
        "Rest",
    ]


def test_a_line_of_a_corpus_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    """JSON allows characters in a string at which Python would end a line."""
    words = "an orchard is a garden of trees that bear fruit in summer\u2028and rest in winter\x85"
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": words}, ensure_ascii=False) + "\n", encoding="utf-8")
    (passage,) = corpus_of_file(path, max_passages=9).passages
    assert passage.text.split() == words.split()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: no valid JSON"),
        ('{"text": 3}', "line 1, text"),
        ('{"text": "\\ud800"}', "line 1: has half a surrogate pair"),
        ("", "no passage"),
    ],
)
def test_a_bad_corpus_is_one_error(tmp_path: Path, line: str, message: str) -> None:
    """The error names the file, and the line and field where one is wrong."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(line)
    with pytest.raises(TraceError, match=message) as caught:
        corpus_of_file(path, max_passages=9)
    assert "corpus.jsonl" in str(caught.value)


@pytest.mark.slow
def test_the_real_model_finds_what_is_meant() -> None:
    """A question in other words is nearest to the sentence that answers it."""
    subjects = ("apples", "trains", "whales", "violins", "volcanoes", "clouds")
    sentences = [
        text.format(subject)
        for subject in subjects
        for text in ("{} are old.", "People like {}.", "{} cost money.", "A book about {}.")
    ]
    sentences.append("Bake the dough for forty minutes in a hot oven.")
    embedder = MiniLmEmbedder(num_threads=1)
    vectors = embedder.embed(sentences)
    assert vectors.shape == (25, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    query = embedder.embed(["How long does a loaf stay in the stove?"])
    assert int(np.argmax(vectors @ query[0])) == 24
    alone = embedder.embed([sentences[3]])
    assert np.allclose(alone[0], vectors[3], atol=1e-5)
