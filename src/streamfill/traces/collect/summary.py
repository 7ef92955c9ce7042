"""Writes what a collector has gathered, and says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamfill.messages.common import StreamMode
from streamfill.traces.collect.passages import estimated_tokens
from streamfill.traces.files import TraceWriter
from streamfill.traces.format import Document, Request, TraceHeader


@dataclass(frozen=True, kw_only=True)
class CollectionSummary:
    """
    Attributes:
        num_updates: segments that replace one before them.
        num_sources: pages of the site, or passages of the corpus.
        num_prompt_chars, num_prompt_tokens: of all final prompts; tokens are estimated.
        left_out: what was not used and why, with its number.
        drawn: as in the header of the file.
    """

    num_requests: int
    num_segments: int
    num_updates: int
    num_sources: int
    num_prompt_chars: int
    num_prompt_tokens: int
    left_out: Mapping[str, int]
    drawn: Mapping[str, str]


def write_collection(
    output: Path,
    header: TraceHeader,
    requests: Sequence[Request],
    documents: Mapping[str, str],
    *,
    num_sources: int,
    left_out: Mapping[str, int],
) -> CollectionSummary:
    """Writes the file: documents before the request that first names them.

    Raises:
        TraceError: it cannot be written.
    """
    num_chars = num_tokens = 0
    with TraceWriter(output, header) as writer:
        for request in requests:
            for segment in request.segments:
                for document_id in segment.document_ids or ():
                    writer.add_document(Document(id=document_id, text=documents[document_id]))
            writer.add_request(request)
            prompt = _prompt(request, documents, header.document_separator)
            num_chars += len(prompt)
            num_tokens += estimated_tokens(prompt)
    num_segments = sum(len(request.segments) for request in requests)
    return CollectionSummary(
        num_requests=len(requests),
        num_segments=num_segments,
        num_updates=sum(
            len(request.segments) - 1 for request in requests if request.mode is StreamMode.UPDATE
        ),
        num_sources=num_sources,
        num_prompt_chars=num_chars,
        num_prompt_tokens=num_tokens,
        left_out=left_out,
        drawn=header.drawn,
    )


def _prompt(request: Request, documents: Mapping[str, str], separator: str) -> str:
    if request.mode is StreamMode.UPDATE:
        ids = request.segments[-1].document_ids or ()
        context = "".join(documents[each] + separator for each in ids)
    else:
        context = "".join(segment.text or "" for segment in request.segments)
    return request.prefix + context + request.suffix
