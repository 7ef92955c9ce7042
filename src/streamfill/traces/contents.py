"""What the requests of generated traces contain: invented pages, documents and questions."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from streamfill.messages.common import StreamMode
from streamfill.stream.tokenizer import TextTokenizer
from streamfill.traces.distribution import normal_score
from streamfill.traces.draws import DrawnRequest, divide_tokens
from streamfill.traces.fitting import count_tokens, fitted
from streamfill.traces.format import Document, Request, Segment
from streamfill.traces.prose import Entry

NUM_RANKED: Final = 10
"""Documents in each ranking."""
PAGE_END: Final = "\n\n"
"""Behind each page and each document."""
TEMPLATE: Final = "Answer the question from these documents. The best ones come first.\n\n"
"""Before the documents of a ranking."""

_ANOTHER_CHANGE: Final = 0.5
_FALLEN_SPREAD: Final = 0.7
"""Standard deviation of the logarithm of the length of a document that falls out."""
_TIME_DIGITS: Final = 3

RANKING_ASSUMPTIONS: Final = {
    "segments.document_ids": f"{NUM_RANKED} documents. Each update puts better ones in and lets as "
    "many fall out at the end; no document is shared between requests. Assumptions: the rank of "
    "the first change is uniform; below it there is one more change with a chance of "
    f"{_ANOTHER_CHANGE:g}, and so on",
    "documents": "invented text of the drawn length",
}
PAGE_ASSUMPTIONS: Final = {"segments.text": "invented text of the drawn length"}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A request and the documents that must stand above it."""

    request: Request
    documents: tuple[Document, ...] = ()


def lengths_only(drawn: DrawnRequest, max_output_tokens: int) -> Contents:
    """An append request that says how many tokens come when, not which."""
    sizes = divide_tokens(drawn.prompt_tokens, drawn.weights)
    segments = tuple(
        Segment(delay_ms=_rounded(delay_ms), num_tokens=size)
        for delay_ms, size in zip(drawn.delays_ms, sizes, strict=True)
    )
    return Contents(request=_request(drawn, StreamMode.APPEND, segments, max_output_tokens))


def pages(
    drawn: DrawnRequest, seed: int, tokenizer: TextTokenizer, max_output_tokens: int
) -> Contents:
    """An append request: one page after the other, and a question about the longest one."""
    entries = [Entry(seed, f"q{drawn.number}/{n}") for n in range(len(drawn.weights))]
    longest = max(range(len(entries)), key=lambda n: drawn.weights[n])
    suffix = _question(tokenizer, entries[longest], drawn, longest, overhead_tokens=0)
    sizes = divide_tokens(drawn.prompt_tokens - count_tokens(tokenizer, suffix), drawn.weights)
    segments = tuple(
        Segment(
            delay_ms=_rounded(delay_ms),
            text=fitted(tokenizer, entry.text, size, tail=PAGE_END) + PAGE_END,
        )
        for delay_ms, entry, size in zip(drawn.delays_ms, entries, sizes, strict=True)
    )
    return Contents(
        request=_request(drawn, StreamMode.APPEND, segments, max_output_tokens, suffix=suffix)
    )


def rankings(
    drawn: DrawnRequest,
    seed: int,
    tokenizer: TextTokenizer,
    max_output_tokens: int,
    generator: random.Random,
) -> Contents:
    """An update request: a ranking of documents that gets better with each update.

    Args:
        drawn: with ``NUM_RANKED`` weights, for the documents of the last ranking.
        generator: of what is drawn here: which ranks change, how long the documents are that fall
            out.
    """
    best = max(range(NUM_RANKED), key=lambda n: drawn.weights[n])
    entries = {n: Entry(seed, f"q{drawn.number}/{n}") for n in range(NUM_RANKED)}
    template_tokens = count_tokens(tokenizer, TEMPLATE, goes_on=True)
    suffix = _question(tokenizer, entries[best], drawn, best, overhead_tokens=template_tokens)
    num_tokens = drawn.prompt_tokens - template_tokens - count_tokens(tokenizer, suffix)
    sizes = dict(enumerate(divide_tokens(num_tokens, drawn.weights)))
    history = ranking_history(len(drawn.delays_ms), generator)
    mean_tokens = max(num_tokens, 0) / NUM_RANKED
    for number in sorted({each for ranking in history for each in ranking} - set(sizes)):
        spread = _FALLEN_SPREAD * normal_score(max(generator.random(), 1e-9))
        wanted = mean_tokens * math.exp(spread - _FALLEN_SPREAD**2 / 2)
        sizes[number] = max(round(wanted), min(sizes.values()))
        entries[number] = Entry(seed, f"q{drawn.number}/{number}")
    documents = tuple(
        Document(
            id=_document_id(drawn, n),
            text=fitted(tokenizer, entries[n].text, size, tail=PAGE_END),
        )
        for n, size in sorted(sizes.items())
    )
    segments = tuple(
        Segment(
            delay_ms=_rounded(delay_ms),
            document_ids=tuple(_document_id(drawn, n) for n in ranking),
        )
        for delay_ms, ranking in zip(drawn.delays_ms, history, strict=True)
    )
    request = _request(
        drawn, StreamMode.UPDATE, segments, max_output_tokens, prefix=TEMPLATE, suffix=suffix
    )
    return Contents(request=request, documents=documents)


def ranking_history(num_updates: int, generator: random.Random) -> list[list[int]]:
    """Rankings of document numbers, one for each update; the last one is 0, 1, 2, …

    Made backwards: what an update put in is taken out again, and what fell out at the end of the
    ranking comes back there. So each ranking differs from the one before.
    """
    ranking = list(range(NUM_RANKED))
    next_number = NUM_RANKED
    history = [ranking]
    for _ in range(num_updates - 1):
        ranks = [generator.randrange(NUM_RANKED)]
        while generator.random() < _ANOTHER_CHANGE and ranks[-1] + 1 < NUM_RANKED:
            ranks.append(generator.randrange(ranks[-1] + 1, NUM_RANKED))
        kept = [number for rank, number in enumerate(ranking) if rank not in ranks]
        ranking = [*kept, *range(next_number, next_number + len(ranks))]
        next_number += len(ranks)
        history.append(ranking)
    return history[::-1]


def _question(
    tokenizer: TextTokenizer,
    entry: Entry,
    drawn: DrawnRequest,
    part: int,
    *,
    overhead_tokens: int,
) -> str:
    """A question that part ``part`` of the prompt answers, if it is long enough for any fact."""
    suffix = ""
    for fact in entry.facts:
        suffix = f"Question: {fact.question}\nAnswer:"
        num_tokens = drawn.prompt_tokens - overhead_tokens - count_tokens(tokenizer, suffix)
        size = divide_tokens(num_tokens, drawn.weights)[part]
        text = entry.text(1)
        needed = text[: text.index(fact.sentence) + len(fact.sentence)] + PAGE_END
        if count_tokens(tokenizer, needed, goes_on=True) <= size:
            return suffix
    return f"Question: What is said about {entry.subject}?\nAnswer:"


def _request(
    drawn: DrawnRequest,
    mode: StreamMode,
    segments: tuple[Segment, ...],
    max_output_tokens: int,
    *,
    prefix: str = "",
    suffix: str = "",
) -> Request:
    return Request(
        id=f"q{drawn.number}",
        arrival_ms=_rounded(drawn.arrival_ms),
        mode=mode,
        segments=segments,
        prefix=prefix,
        suffix=suffix,
        max_output_tokens=max_output_tokens,
    )


def _document_id(drawn: DrawnRequest, number: int) -> str:
    return f"q{drawn.number}-d{number}"


def _rounded(time_ms: float) -> float:
    """To the microsecond, so that files are short and the same on every machine."""
    return round(time_ms, _TIME_DIGITS)
