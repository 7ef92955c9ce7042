"""What belongs to Stream2LLM's ANNS traces besides the traces: the corpus and the query map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from streamfill.errors import ConfigError, TraceError
from streamfill.traces.importers.bad_rows import ABSENT, BadRows, Place, Problem
from streamfill.traces.importers.interface import ImportOptions, OptionName
from streamfill.traces.importers.source_files import ReadProgress, check_is_file, open_source

_CORPUS_PATTERN: Final = "retrieved_corpus_content*.json"
_QUERIES_PATTERN: Final = "query_trace_map*.json"
_TRACE_FOLDER: Final = "res"
JsonT = TypeVar("JsonT")


class _QueryEntry(msgspec.Struct):
    query: str
    trace_file: str


@dataclass(frozen=True, kw_only=True)
class AnnsInputs:
    """All files of one import.

    Attributes:
        folders: where the trace files that the query map names are looked for.
        named: trace files that the user named one by one, by their name; empty: all of the map.
    """

    folders: tuple[Path, ...]
    named: dict[str, Path]
    corpus: tuple[Path, ...]
    queries: Path


@dataclass(frozen=True, kw_only=True)
class AnnsQuery:
    """One query, and the trace of its search."""

    id: str
    text: str
    trace: Path


def find_inputs(paths: tuple[Path, ...], options: ImportOptions) -> AnnsInputs:
    """The files that were named, and the corpus and map beside them in Stream2LLM's own layout.

    Raises:
        TraceError: a file is missing.
        ConfigError: the corpus or the map is neither given nor found.
    """
    folders: list[Path] = []
    named: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            folders += [path / _TRACE_FOLDER, path]
        else:
            check_is_file(path)
            named[path.name] = path
    near = [path if path.is_dir() else path.parent for path in paths]
    near += [folder.parent for folder in near]
    corpus = options.corpus or _first_match(near, _CORPUS_PATTERN)
    queries = (options.queries,) if options.queries else _first_match(near, _QUERIES_PATTERN)
    if not corpus:
        raise ConfigError(
            OptionName.CORPUS.value, None, f"name the corpus; no {_CORPUS_PATTERN} is beside FILE"
        )
    if len(queries) != 1:
        found = [str(path) for path in queries] or None
        raise ConfigError(
            OptionName.QUERIES.value, found, f"name one map from query id to query and {_PAIR}"
        )
    for path in (*corpus, *queries):
        check_is_file(path)
    return AnnsInputs(folders=tuple(folders), named=named, corpus=tuple(corpus), queries=queries[0])


_PAIR: Final = "trace_file, such as query_trace_map_5k.json"


def read_queries(inputs: AnnsInputs, bad_rows: BadRows) -> list[AnnsQuery]:
    """The queries whose traces are wanted, in the order of their ids.

    Raises:
        TraceError: the map cannot be read.
        BadRowError: by ``bad_rows``: a trace file is missing, or named and not in the map.
    """
    entries = _read_json(inputs.queries, dict[str, _QueryEntry])
    queries: list[AnnsQuery] = []
    unused = dict(inputs.named)
    for query_id in sorted(entries, key=_by_number):
        entry = entries[query_id]
        name = Path(entry.trace_file).name
        unused.pop(name, None)
        trace = inputs.named.get(name) or _find(inputs.folders, entry.trace_file)
        if trace is not None:
            queries.append(AnnsQuery(id=query_id, text=entry.query, trace=trace))
        elif inputs.folders:
            bad_rows.add(
                Place(inputs.queries).error(
                    Problem.UNKNOWN_TRACE,
                    f"{query_id}.trace_file",
                    entry.trace_file,
                    f"is not in {inputs.folders[-1]}",
                )
            )
    for path in unused.values():
        bad_rows.add(
            Place(path).error(
                Problem.UNKNOWN_TRACE, "name", path.name, f"is not in {inputs.queries}"
            )
        )
    return queries


def read_corpus(paths: tuple[Path, ...], progress: ReadProgress) -> dict[str, str]:
    """Document id → text, of all parts.

    Raises:
        TraceError: a part cannot be read, or two parts differ about a document.
    """
    corpus: dict[str, str] = {}
    for path in paths:
        for document_id, text in _read_json(path, dict[str, str]).items():
            if corpus.setdefault(document_id, text) != text:
                raise TraceError(f"{path}, {document_id}: another part has another text for it")
        progress.finished(path.stat().st_size)
    return corpus


def _read_json(path: Path, kind: type[JsonT]) -> JsonT:
    with open_source(path) as (content, _):
        raw = content.read()
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$")
        raise Place(path).error(
            Problem.WRONG_TYPE, where.strip("`.") or "content", ABSENT, text
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: no valid JSON: {error}") from error


def _first_match(folders: list[Path], pattern: str) -> tuple[Path, ...]:
    for folder in folders:
        found = tuple(sorted(folder.glob(pattern)))
        if found:
            return found
    return ()


def _find(folders: tuple[Path, ...], name: str) -> Path | None:
    candidates: Iterator[Path] = (folder / name for folder in folders)
    return next((path for path in candidates if path.is_file()), None)


def _by_number(query_id: str) -> tuple[int, str]:
    return (int(query_id) if query_id.isdecimal() else 0), query_id
