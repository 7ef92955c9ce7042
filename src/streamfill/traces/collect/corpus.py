"""Corpora for a nearest-neighbour search: passages, and the headings to ask about."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.errors import TraceError
from streamfill.models.progress import Progress, no_progress
from streamfill.traces.collect.debian_tree import DocumentationTree
from streamfill.traces.collect.extraction import extract_page
from streamfill.traces.collect.passages import passages_of

MIN_PASSAGE_WORDS: Final = 15
"""Less says too little to be found or to answer anything."""
_MAX_PAGE_BYTES: Final = 1 << 20
"""Larger pages are indexes and change logs, and take seconds to extract."""
_MOST_HEADING_WORDS: Final = 12


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A document of the corpus."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """
    Attributes:
        topics: title and headings of each page, for questions.
        origin: what it is, for the header of a trace.
    """

    passages: tuple[Passage, ...]
    topics: tuple[tuple[str, tuple[str, ...]], ...]
    origin: str


@dataclass(frozen=True, kw_only=True)
class _Source:
    title: str
    headings: tuple[str, ...]
    text: str


def corpus_of_tree(
    tree: DocumentationTree, *, max_passages: int, seed: int, progress: Progress = no_progress
) -> Corpus:
    """Passages of a folder's pages, taken in a random order until there are enough."""
    files = sorted(tree.folder.rglob("*.html"))
    random.Random(f"corpus/{seed}").shuffle(files)
    pages = _pages(files)
    return _corpus(pages, max_passages=max_passages, origin=tree.origin, progress=progress)


def corpus_of_file(path: Path, *, max_passages: int, progress: Progress = no_progress) -> Corpus:
    """Passages of a file: ``.jsonl`` with ``text`` and, if known, ``title`` in each line; any
    other is plain text with an empty line between paragraphs.

    Raises:
        TraceError: it cannot be read; names the line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    if path.suffix == ".jsonl":
        sources: Iterable[_Source] = _json_lines(path, content)
    else:
        sources = _sections(path.stem, content)
    return _corpus(
        sources, max_passages=max_passages, origin=f"file {path.name}", progress=progress
    )


def _corpus(
    sources: Iterable[_Source], *, max_passages: int, origin: str, progress: Progress
) -> Corpus:
    passages: dict[str, Passage] = {}
    topics: list[tuple[str, tuple[str, ...]]] = []
    for source in sources:
        if len(passages) >= max_passages:
            break
        num_before = len(passages)
        for text in passages_of(source.text):
            if len(text.split()) >= MIN_PASSAGE_WORDS and len(passages) < max_passages:
                made = Passage(id=f"p{len(passages)}", title=source.title, text=text)
                passages.setdefault(text, made)
        if len(passages) > num_before:
            topics.append((source.title, source.headings))
        progress(len(passages), max_passages)
    if not passages:
        raise TraceError(f"{origin}: has no passage of at least {MIN_PASSAGE_WORDS} words")
    return Corpus(passages=tuple(passages.values()), topics=tuple(topics), origin=origin)


def _pages(files: Iterable[Path]) -> Iterator[_Source]:
    for file in files:
        if file.stat().st_size <= _MAX_PAGE_BYTES:
            page = extract_page(file.as_uri(), file.read_bytes())
            yield _Source(title=page.title, headings=page.headings, text=page.text)


def _json_lines(path: Path, content: str) -> Iterator[_Source]:
    # Not `splitlines`: a string of JSON may hold U+2028 and others that it cuts at.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TraceError(f"{path}, line {number}: no valid JSON: {error}") from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise TraceError(f"{path}, line {number}, text: must be a string")
        title = row.get("title", "")
        if not isinstance(title, str):
            raise TraceError(f"{path}, line {number}, title: must be a string")
        try:
            (title + text).encode()
        except UnicodeEncodeError as error:
            where = f"{path}, line {number}"
            raise TraceError(f"{where}: has half a surrogate pair, no UTF-8 form") from error
        yield _Source(title=title, headings=(title,) if title else (), text=text)


def _sections(name: str, content: str) -> Iterator[_Source]:
    """Cuts at headings: lines that begin with ``#``, or short paragraphs without a full stop."""
    title, parts = "", list[str]()
    for block in (each.strip() for each in content.split("\n\n")):
        if _is_heading(block):
            if parts:
                yield _Source(title=title or name, headings=(title,), text="\n".join(parts))
            title, parts = block.lstrip("# "), []
        elif block:
            parts.append(" ".join(block.split()))
    if parts:
        yield _Source(title=title or name, headings=(title,), text="\n".join(parts))


def _is_heading(block: str) -> bool:
    is_line = bool(block) and "\n" not in block and len(block.split()) <= _MOST_HEADING_WORDS
    return is_line and (block.startswith("#") or block[-1].isalnum() or block[-1] == "?")
