"""Generates traces of the published workloads, of any length, scale and seed.

1. `draws` draws when requests come, in how many segments, with which delays and how many tokens.
2. `contents` gives them invented text of that length.
3. Here the two go into a trace file, request by request.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.models.progress import Progress, no_progress
from streamfill.stream.tokenizer import TextTokenizer
from streamfill.traces.contents import (
    NUM_RANKED,
    PAGE_ASSUMPTIONS,
    RANKING_ASSUMPTIONS,
    Contents,
    lengths_only,
    pages,
    rankings,
)
from streamfill.traces.draws import DrawnRequest, Draws, assumptions
from streamfill.traces.files import TraceWriter
from streamfill.traces.format import SCHEMA_VERSION, TraceHeader
from streamfill.traces.published import (
    PREFILL_TOKENS_PER_S,
    SOURCE,
    WORKLOADS,
    WorkloadName,
)

_PROGRESS_STEPS: Final = 200
_LENGTH_ASSUMPTIONS: Final = {"segments.num_tokens": "only lengths are given, no text"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be generated.

    Attributes:
        name: of the trace.
        token_scale: token counts are the published ones, times this.
        time_scale: times are the published ones, times this.
        max_output_tokens: of every request.
    """

    name: str
    workload: WorkloadName
    num_requests: int
    seed: int
    token_scale: float
    time_scale: float
    max_output_tokens: int


def matching_time_scale(token_scale: float, prefill_tokens_per_s: float) -> float:
    """The scale of all times that leaves the ratio of prefill time to gap as it was published.

    Args:
        prefill_tokens_per_s: how fast the machine prefills that is to replay the trace.
    """
    return token_scale * PREFILL_TOKENS_PER_S / prefill_tokens_per_s


def generate(
    plan: Plan,
    path: Path,
    tokenizer: TextTokenizer | None,
    progress: Progress = no_progress,
) -> None:
    """Writes a trace file.

    Args:
        tokenizer: by which lengths of texts are counted; None writes lengths without any text,
            which only append requests can have.

    Raises:
        TraceError: the file cannot be written.
        ValueError: lengths alone are asked for, of updates.
    """
    is_ann = plan.workload is WorkloadName.ANN
    if tokenizer is None and is_ann:
        raise ValueError("lengths alone cannot say what an update keeps")
    draws = Draws(
        WORKLOADS[plan.workload],
        seed=plan.seed,
        token_scale=plan.token_scale,
        time_scale=plan.time_scale,
        num_parts=NUM_RANKED if is_ann else None,
    )
    step = max(1, plan.num_requests // _PROGRESS_STEPS)
    with TraceWriter(path, header(plan, has_text=tokenizer is not None)) as writer:
        for drawn in itertools.islice(draws, plan.num_requests):
            contents = _contents(plan, draws, drawn, tokenizer)
            for document in contents.documents:
                writer.add_document(document)
            writer.add_request(contents.request)
            if drawn.number % step == 0:
                progress(drawn.number, plan.num_requests)
    progress(plan.num_requests, plan.num_requests)


def header(plan: Plan, *, has_text: bool) -> TraceHeader:
    """The header of a generated trace: what comes from where."""
    workload = WORKLOADS[plan.workload]
    if plan.workload is WorkloadName.ANN:
        content, description = RANKING_ASSUMPTIONS, "nearest-neighbour search with a better ranking"
    else:
        content = PAGE_ASSUMPTIONS if has_text else _LENGTH_ASSUMPTIONS
        description = "web crawler that appends pages"
    return TraceHeader(
        schema=SCHEMA_VERSION,
        name=plan.name,
        description=f"Generated in the shape of a published workload: a {description}.",
        source=f"Quantiles: {SOURCE}. Text: invented by `streamfill traces generate`.",
        drawn={**assumptions(workload), **content},
        token_scale=plan.token_scale,
        time_scale=plan.time_scale,
        seed=plan.seed,
    )


def _contents(
    plan: Plan, draws: Draws, drawn: DrawnRequest, tokenizer: TextTokenizer | None
) -> Contents:
    if tokenizer is None:
        return lengths_only(drawn, plan.max_output_tokens)
    if plan.workload is WorkloadName.CRAWL:
        return pages(drawn, plan.seed, tokenizer, plan.max_output_tokens)
    generator = draws.generator(f"rankings {drawn.number}")
    return rankings(drawn, plan.seed, tokenizer, plan.max_output_tokens, generator)
