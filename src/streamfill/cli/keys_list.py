"""`streamfill keys list`: the API keys of a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Final

import msgspec

from streamfill.access.key_file import read_keys
from streamfill.access.keys import KeyEntry
from streamfill.cli.keys import FILE_OPTION, add_file_option, key_file
from streamfill.cli.tables import Table, show

_COLUMNS: Final = (
    *("name", "tenant", "id", "operator", "streams", "requests/s", "tokens/min"),
    *("cache", "weight", "created"),
)
_SECRET_FIELDS: Final = ("salt", "hash")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--json", action="store_true", help="the same, for programs")
    add_file_option(parser)


def run(args: argparse.Namespace) -> int:
    """Prints them."""
    path = key_file(args)
    entries = read_keys(path, FILE_OPTION) if path.exists() else ()
    if args.json:
        print(json.dumps([_as_data(entry) for entry in entries], indent=2))
    elif entries:
        show([_table(entries)])
    else:
        print(f"no keys in {path}; `streamfill keys add NAME` makes one")
    return 0


def _as_data(entry: KeyEntry) -> dict[str, object]:
    data: dict[str, object] = msgspec.to_builtins(entry)
    return {key: value for key, value in data.items() if key not in _SECRET_FIELDS}


def _table(entries: Sequence[KeyEntry]) -> Table:
    rows = [
        (
            *(entry.name, entry.tenant, entry.id, "yes" if entry.is_operator else "no"),
            *(
                "-" if value is None else f"{value:,}"
                for value in (
                    entry.limits.max_streams,
                    entry.limits.requests_per_s,
                    entry.limits.tokens_per_min,
                )
            ),
            "shared" if entry.shared_cache else "own",
            f"{entry.weight:g}",
            entry.created,
        )
        for entry in entries
    ]
    left = frozenset({"name", "tenant", "id", "operator", "cache", "created"})
    return Table(columns=_COLUMNS, rows=rows, left=left)
