"""What is in a trace: counts, distributions, sharing and load, in one pass and little memory. Pure.

Lengths of text are tokens where a tokenizer is given, else characters; what prompts share is
measured in characters for text and in tokens for everything else, each as a share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from streamfill.messages.common import StreamMode
from streamfill.traces.format import Request, Segment, TraceHeader
from streamfill.traces.sample import Histogram, Sample, Summary
from streamfill.traces.script import Content, Scripts
from streamfill.traces.sharing import PrefixIndex, common_block_tokens, common_prefix

_ANY_VOCABULARY: Final = 1 << 15
"""Only texts and given ids are read here; made tokens are not looked at."""


class Quantity(StrEnum):
    """What a distribution is given of."""

    INTER_ARRIVAL_MS = "inter_arrival_ms"
    FIRST_DELAY_MS = "first_delay_ms"
    GAP_MS = "gap_ms"
    RETRIEVAL_MS = "retrieval_ms"
    COMMIT_DELAY_MS = "commit_delay_ms"
    SEGMENTS = "segments"
    PROMPT_TOKENS = "prompt_tokens"
    PROMPT_CHARS = "prompt_chars"
    OUTPUT_TOKENS = "output_tokens"
    UPDATE_KEPT_SHARE = "update_kept_share"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the arrivals ask of a server.

    Attributes:
        duration_s: from the first arrival to the last end of a retrieval.
        requests_per_s: between the first arrival and the last one.
        prompt_tokens_per_s: of final prompts.
        streamed_tokens_per_s: the same with every update computed to its end: all that stands
            behind what it keeps. Less is computed where an update is replaced before that.
        prefill_utilisation: share of the prefill rate that the final prompts need.
        streamed_utilisation: the same of what streaming computes.

    Rates are None with fewer than two arrivals, token figures where tokens cannot be counted, and
    utilisations without a prefill rate.
    """

    duration_s: float
    requests_per_s: float | None
    prompt_tokens_per_s: float | None
    streamed_tokens_per_s: float | None
    prefill_utilisation: float | None
    streamed_utilisation: float | None


@dataclass(frozen=True, kw_only=True)
class Description:
    """All facts about a trace.

    Attributes:
        num_requests: by mode.
        content: segments by kind of content.
        counted_in: what the length of text is counted in, "tokens" or "characters".
        prefix_shared: share of all prompts that an earlier request began with; None without any
            prompt whose content is known.
        prefix_is_lower_bound: whether there were too many prompts to remember all.
    """

    header: TraceHeader
    num_requests: dict[str, int]
    num_sessions: int
    num_segments: int
    num_documents: int
    content: dict[str, int]
    counted_in: str
    summaries: dict[str, Summary]
    histograms: dict[str, Histogram]
    prefix_shared: float | None
    prefix_is_lower_bound: bool
    load: Load


class Describer:
    """Takes the requests of one trace in, in their order."""

    def __init__(
        self,
        header: TraceHeader,
        documents: Mapping[str, str],
        *,
        count_tokens: Callable[[str], int] | None,
        unscale: bool = False,
    ) -> None:
        """
        Args:
            documents: of the file; may grow while it is read.
            count_tokens: of a text; None counts characters.
            unscale: divides times and tokens by the scales of the header.
        """
        self._header = header
        self._documents = documents
        self._count_tokens = count_tokens
        self._per_time = 1 / header.time_scale if unscale else 1.0
        self._per_token = 1 / header.token_scale if unscale else 1.0
        self._scripts = Scripts(header, documents, vocab_size=_ANY_VOCABULARY)
        self._samples = {quantity: Sample() for quantity in Quantity}
        self._prefixes = PrefixIndex()
        self._num_requests: dict[str, int] = {}
        self._content: dict[str, int] = {}
        self._sessions: set[str] = set()
        self._first_arrival_ms: float | None = None
        self._last_arrival_ms = 0.0
        self._end_ms = 0.0
        self._known_units = 0.0
        self._shared_units = 0.0
        self._streamed_tokens = 0.0

    def add(self, request: Request) -> None:
        """Takes a request in."""
        self._num_requests[request.mode.value] = self._num_requests.get(request.mode.value, 0) + 1
        if request.session_id is not None:
            self._sessions.add(request.session_id)
        self._add_times(request)
        for segment in request.segments:
            kind = content_kind(segment)
            self._content[kind] = self._content.get(kind, 0) + 1
        self._note(Quantity.SEGMENTS, len(request.segments))
        self._note(Quantity.OUTPUT_TOKENS, request.max_output_tokens)
        kinds = {content_kind(segment) for segment in request.segments}
        if kinds in ({"block_ids"}, {"num_tokens"}):
            self._add_lengths(request)
        else:
            self._add_content(request)

    def description(self, *, prefill_tokens_per_s: float | None = None) -> Description:
        """What came out."""
        summaries = {name: sample.summary() for name, sample in self._samples.items()}
        histograms = {name: sample.histogram() for name, sample in self._samples.items()}
        shared = self._shared_units / self._known_units if self._known_units else None
        return Description(
            header=self._header,
            num_requests=dict(self._num_requests),
            num_sessions=len(self._sessions),
            num_segments=sum(self._content.values()),
            num_documents=len(self._documents),
            content=dict(self._content),
            counted_in="characters" if self._count_tokens is None else "tokens",
            summaries={name.value: each for name, each in summaries.items() if each is not None},
            histograms={name.value: each for name, each in histograms.items() if each is not None},
            prefix_shared=shared,
            prefix_is_lower_bound=self._prefixes.is_full,
            load=self._load(prefill_tokens_per_s),
        )

    def _add_times(self, request: Request) -> None:
        if self._first_arrival_ms is None:
            self._first_arrival_ms = request.arrival_ms
        else:
            self._note_time(Quantity.INTER_ARRIVAL_MS, request.arrival_ms - self._last_arrival_ms)
        self._last_arrival_ms = request.arrival_ms
        retrieval_ms = 0.0
        for number, segment in enumerate(request.segments):
            retrieval_ms += segment.delay_ms
            self._note_time(
                Quantity.GAP_MS if number else Quantity.FIRST_DELAY_MS, segment.delay_ms
            )
        self._note_time(Quantity.RETRIEVAL_MS, retrieval_ms)
        if request.commit_delay_ms:
            self._note_time(Quantity.COMMIT_DELAY_MS, request.commit_delay_ms)
        end_ms = request.arrival_ms + retrieval_ms + request.commit_delay_ms
        self._end_ms = max(self._end_ms, end_ms)

    def _add_lengths(self, request: Request) -> None:
        """A request of which only lengths and ids of blocks are known."""
        segments = request.segments
        is_update = request.mode is StreamMode.UPDATE
        lengths = [segment.num_tokens or 0 for segment in segments]
        self._add_prompt(lengths[-1] if is_update else sum(lengths))
        self._streamed_tokens += sum(lengths)
        if segments[0].block_ids is not None:
            final = segments[-1:] if is_update else segments
            self._shared_units += self._prefixes.blocks(final)
        self._known_units += lengths[-1] if is_update else sum(lengths)
        if is_update:
            for old, new in itertools.pairwise(segments):
                self._add_update(old.num_tokens or 0, common_block_tokens(old, new))

    def _add_content(self, request: Request) -> None:
        script = self._scripts.script(request)
        pieces = [_flat(step.piece) for step in script.steps]
        prompt = _flat(script.prompt)
        num_units = len(prompt)
        if isinstance(prompt, str):
            shared = self._prefixes.text(prompt)
            num_tokens = None if self._count_tokens is None else self._count_tokens(prompt)
            self._note(Quantity.PROMPT_CHARS, num_units)
        else:
            shared = self._prefixes.tokens(prompt)
            num_tokens = num_units
        self._known_units += num_units
        self._shared_units += shared
        computed_units = len(pieces[0])
        if request.mode is StreamMode.UPDATE:
            for old, new in itertools.pairwise(pieces):
                num_kept = common_prefix(old, new)
                computed_units += len(new) - num_kept
                self._add_update(len(old), num_kept)
        else:
            computed_units = num_units
        if num_tokens is not None:
            self._add_prompt(num_tokens)
            self._streamed_tokens += num_tokens * computed_units / max(num_units, 1)

    def _add_prompt(self, num_tokens: int) -> None:
        self._note(Quantity.PROMPT_TOKENS, num_tokens * self._per_token)

    def _add_update(self, num_old: int, num_kept: int) -> None:
        """In tokens where they are known, else in characters."""
        if num_old:
            self._note(Quantity.UPDATE_KEPT_SHARE, num_kept / num_old)

    def _note(self, quantity: Quantity, value: float) -> None:
        self._samples[quantity].add(value)

    def _note_time(self, quantity: Quantity, value_ms: float) -> None:
        self._samples[quantity].add(value_ms * self._per_time)

    def _load(self, prefill_tokens_per_s: float | None) -> Load:
        first_ms = self._first_arrival_ms or 0.0
        num_requests = sum(self._num_requests.values())
        span_s = (self._last_arrival_ms - first_ms) * self._per_time / 1000.0
        rate = (num_requests - 1) / span_s if num_requests > 1 and span_s > 0 else None
        prompts = self._samples[Quantity.PROMPT_TOKENS]
        prompt_rate = streamed_rate = None
        if rate is not None and prompts.total:
            prompt_rate = rate * prompts.total / num_requests
            streamed_rate = rate * self._streamed_tokens * self._per_token / num_requests

        def utilisation(tokens_per_s: float | None) -> float | None:
            if tokens_per_s is None or prefill_tokens_per_s is None:
                return None
            return tokens_per_s / prefill_tokens_per_s

        return Load(
            duration_s=(self._end_ms - first_ms) * self._per_time / 1000.0,
            requests_per_s=rate,
            prompt_tokens_per_s=prompt_rate,
            streamed_tokens_per_s=streamed_rate,
            prefill_utilisation=utilisation(prompt_rate),
            streamed_utilisation=utilisation(streamed_rate),
        )


def content_kind(segment: Segment) -> str:
    """The field of a segment that says what its content is."""
    for kind in ("text", "token_ids", "document_ids", "messages", "block_ids"):
        if getattr(segment, kind) is not None:
            return kind
    return "num_tokens"


def _flat(content: Content) -> str | tuple[int, ...]:
    """Chat messages as text, without any chat template."""
    if isinstance(content, str):
        return content
    ids: list[int] = []
    lines: list[str] = []
    for part in content:
        if isinstance(part, int):
            ids.append(part)
        else:
            lines.append(f"{part.role}: {part.content}\n")
    return "".join(lines) if lines else tuple(ids)
