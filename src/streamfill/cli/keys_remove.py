"""`streamfill keys remove`: an API key less."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from streamfill.access.key_file import change_keys
from streamfill.access.keys import KeyEntry
from streamfill.cli.keys import FILE_OPTION, add_file_option, key_file
from streamfill.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = (
        "A router notices within seconds. Answers that are being generated come to their end; "
        "nothing else can be done with the key."
    )
    parser.add_argument("key_name", metavar="NAME", help="as `streamfill keys list` shows it")
    add_file_option(parser)


def run(args: argparse.Namespace) -> int:
    """Takes it out of the file."""

    def without_it(entries: tuple[KeyEntry, ...]) -> Sequence[KeyEntry]:
        left = [entry for entry in entries if entry.name != args.key_name]
        if len(left) == len(entries):
            known = ", ".join(entry.name for entry in entries) or "none"
            raise ConfigError("NAME", args.key_name, f"no key has this name; there are: {known}")
        return left

    path = key_file(args)
    change_keys(path, without_it, FILE_OPTION)
    print(f"removed {args.key_name} from {path}")
    return 0
