"""Mooncake: JSON Lines of lengths and of the blocks that prompts share.

Source: `FAST25-release/traces` of kvcache-ai/Mooncake, described in "Mooncake: Trading More Storage
for Less Computation" (FAST 2025). Each of ``hash_ids`` stands for 512 tokens, the last one for the
rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec

from streamfill.traces.format import BLOCK_TOKENS, Request, Segment
from streamfill.traces.importers.bad_rows import BadRows, Problem, each_made
from streamfill.traces.importers.interface import ImportFormat, ImportOptions, OptionName, Record
from streamfill.traces.importers.json_lines import JsonLine, read_json_lines
from streamfill.traces.importers.lengths import LengthRequests
from streamfill.traces.importers.source_files import ReadProgress, find_files

_NAME: Final = "mooncake"
_NonNegative = Annotated[int, msgspec.Meta(ge=0)]


class _Row(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    """Milliseconds."""
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: _NonNegative
    hash_ids: tuple[_NonNegative, ...]


def read_mooncake(
    paths: tuple[Path, ...], options: ImportOptions, bad_rows: BadRows, progress: ReadProgress
) -> Iterator[Record]:
    """One request per line; see `interface.ReadRecords`."""
    files = find_files(paths, "*.jsonl")
    progress.expect(files)
    requests = LengthRequests(_NAME, options, bad_rows)

    def make(line: JsonLine[_Row]) -> Request | None:
        row = line.record
        num_blocks = -(-row.input_length // BLOCK_TOKENS)
        if len(row.hash_ids) != num_blocks:
            raise line.error(
                Problem.WRONG_BLOCKS,
                "hash_ids",
                row.hash_ids,
                f"has {len(row.hash_ids)} blocks; {row.input_length} tokens are {num_blocks}",
            )
        return requests.request(
            line,
            arrival_ms=row.timestamp,
            segment=Segment(num_tokens=row.input_length, block_ids=row.hash_ids),
            num_output_tokens=row.output_length,
            output_column="output_length",
        )

    for path in files:
        yield from each_made(read_json_lines(path, _Row, bad_rows, progress), make, bad_rows)


FORMAT: Final = ImportFormat(
    name=_NAME,
    summary="Mooncake's JSON Lines: lengths and shared blocks of 512 tokens",
    source="Mooncake traces, github.com/kvcache-ai/Mooncake, FAST25-release",
    read=read_mooncake,
    options=frozenset({OptionName.NO_ANSWER}),
)
