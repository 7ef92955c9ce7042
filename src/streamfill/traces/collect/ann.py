"""Collects an ANN trace: searches an index wider and wider, and records each better ranking.

1. The passages of the corpus are embedded and put into an index.
2. A question is embedded and searched with more cells or candidates at each step.
3. A step that changes the top k is an update: the new context is the new ranking.
4. Steps behind the last change delay the commit: only then is the ranking known to be final.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.errors import TraceError
from streamfill.messages.common import StreamMode
from streamfill.models.progress import no_progress
from streamfill.traces.collect.corpus import Corpus
from streamfill.traces.collect.crawl import ShowProgress
from streamfill.traces.collect.delays import DrawnGaps, RequestGaps, poisson_arrivals_ms
from streamfill.traces.collect.embedding import Embedder, cached_embeddings
from streamfill.traces.collect.index_search import IndexKind, Step, StepwiseIndex
from streamfill.traces.collect.passages import first_words, scaled, words_of_tokens
from streamfill.traces.collect.questions import Question, questions_of
from streamfill.traces.collect.summary import CollectionSummary, write_collection
from streamfill.traces.format import SCHEMA_VERSION, Request, Segment, TraceHeader
from streamfill.traces.published import ANN

PREFIX: Final = "Answer the question at the end from these documents, the best one first.\n\n"
SUFFIX: Final = "Question: {question}\nAnswer:"
_QUESTIONS_PER_QUERY: Final = 4
"""So many questions are tried for each that is wanted: some rankings are final at once."""
_ROUND_MS: Final = 3
"""Digits of a millisecond that are kept."""


@dataclass(frozen=True, kw_only=True)
class AnnPlan:
    """
    Attributes:
        keeps_unchanged: whether questions whose first ranking is the last are kept too.
        draws_latency: whether a drawn time to read the index from a disk is added.
        max_segment_tokens: estimated, of a whole ranking; None: no limit.
        time_scale: delays are multiplied by this; arrivals are not.
    """

    name: str
    num_queries: int
    top_k: int
    index: IndexKind
    seed: int
    keeps_unchanged: bool
    draws_latency: bool
    request_rate: float
    token_scale: float
    time_scale: float
    max_segment_tokens: int | None
    max_output_tokens: int
    num_threads: int


def collect_ann(
    plan: AnnPlan, corpus: Corpus, embedder: Embedder, output: Path, show: ShowProgress
) -> CollectionSummary:
    """Writes the trace.

    Raises:
        TraceError: the corpus has too few passages or no headings, no ranking ever changes, or
        the file cannot be written.
    """
    if len(corpus.passages) <= plan.top_k:
        num_passages = len(corpus.passages)
        raise TraceError(
            f"{corpus.origin}: has {num_passages} passages; --top-k {plan.top_k} needs more"
        )
    questions = _questions(corpus, plan)
    with show("Embedding the corpus") as progress:
        texts = [f"{each.title}\n{each.text}" for each in corpus.passages]
        vectors = cached_embeddings(embedder, texts, progress)
    index = StepwiseIndex(plan.index, vectors, seed=plan.seed, num_threads=plan.num_threads)
    gaps = DrawnGaps(ANN, seed=plan.seed) if plan.draws_latency else None
    arrivals_ms = poisson_arrivals_ms(
        plan.num_queries, rate_per_s=plan.request_rate, seed=plan.seed
    )
    requests: list[Request] = []
    num_unchanged = 0
    with show("Searching") as progress:
        for number, question in enumerate(questions):
            if len(requests) == plan.num_queries:
                break
            started_s = time.monotonic()
            query = embedder.embed([question.text], no_progress)
            embed_ms = 1000.0 * (time.monotonic() - started_s)
            steps = index.steps(query, plan.top_k)
            request_gaps = gaps.of_request(number) if gaps else None
            segments, rest_ms = _segments(steps, corpus, request_gaps, plan.time_scale, embed_ms)
            if len(segments) < 2 and not plan.keeps_unchanged:
                num_unchanged += 1
                continue
            requests.append(
                Request(
                    id=f"q{number}",
                    arrival_ms=arrivals_ms[len(requests)],
                    mode=StreamMode.UPDATE,
                    segments=segments,
                    prefix=PREFIX,
                    suffix=SUFFIX.format(question=question.text),
                    commit_delay_ms=rest_ms,
                    max_output_tokens=plan.max_output_tokens,
                )
            )
            progress(len(requests), plan.num_queries)
    if not requests:
        raise TraceError(f"{corpus.origin}: no search changed its ranking; use more passages")
    left_out = {"questions whose ranking never changed": num_unchanged} if num_unchanged else {}
    return write_collection(
        output,
        _header(plan, corpus, embedder, gaps),
        requests,
        _documents(corpus, plan),
        num_sources=len(corpus.passages),
        left_out=left_out,
    )


def _questions(corpus: Corpus, plan: AnnPlan) -> list[Question]:
    """Questions that are not passages themselves.

    Raises:
        TraceError: there are none.
    """
    texts = {passage.text for passage in corpus.passages}
    questions = questions_of(
        corpus.topics, seed=plan.seed, num_questions=_QUESTIONS_PER_QUERY * plan.num_queries
    )
    kept = [question for question in questions if question.text not in texts]
    if not kept:
        raise TraceError(
            f"{corpus.origin}: has no headings to ask about; give each line of a .jsonl file a "
            '"title", or put headings into the text'
        )
    return kept


def _segments(
    steps: Iterable[Step],
    corpus: Corpus,
    gaps: RequestGaps | None,
    time_scale: float,
    embed_ms: float,
) -> tuple[tuple[Segment, ...], float]:
    """One segment per change of the ranking, and the time from the last one to the end (ms).

    Args:
        embed_ms: how long the question's vector took, before the first step.
    """
    segments: list[Segment] = []
    ranking: tuple[int, ...] | None = None
    waited_ms = embed_ms
    for step in steps:
        waited_ms += step.search_ms
        if step.found != ranking:
            ranking = step.found
            waited_ms += gaps.next_ms() if gaps else 0.0
            segments.append(
                Segment(
                    delay_ms=round(waited_ms * time_scale, _ROUND_MS),
                    document_ids=tuple(corpus.passages[number].id for number in ranking),
                )
            )
            waited_ms = 0.0
    return tuple(segments), round(waited_ms * time_scale, _ROUND_MS)


def _documents(corpus: Corpus, plan: AnnPlan) -> dict[str, str]:
    """Text by id, with the title and shortened as the plan says."""
    documents = {}
    for passage in corpus.passages:
        text = scaled(passage.text, plan.token_scale)
        if plan.max_segment_tokens is not None:
            text = first_words(text, words_of_tokens(plan.max_segment_tokens // plan.top_k))
        documents[passage.id] = f"{passage.title}\n{text}" if passage.title else text
    return documents


def _header(
    plan: AnnPlan, corpus: Corpus, embedder: Embedder, gaps: DrawnGaps | None
) -> TraceHeader:
    drawn = {"arrival_ms": f"Poisson, {plan.request_rate:g} per second; not scaled"}
    if gaps:
        drawn["segments.delay_ms"] = (
            "the disk's share only: one draw for each segment (a step that changes nothing adds "
            f"its measured time only), from the {gaps.description}; embedding and search times are "
            "measured with an index in memory and added"
        )
    widened = "probes" if plan.index is IndexKind.IVF else "candidates"
    return TraceHeader(
        schema=SCHEMA_VERSION,
        name=plan.name,
        description=f"Collected: an index ({plan.index}) over {len(corpus.passages)} passages, "
        f"embedded by {embedder.name}, searched with twice as many {widened} at each step; each "
        f"change of the top {plan.top_k} is an update.",
        source=corpus.origin,
        drawn=drawn,
        token_scale=plan.token_scale,
        time_scale=plan.time_scale,
        seed=plan.seed,
    )
