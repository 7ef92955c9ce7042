"""`streamfill keys`: API keys of clients: new ones, those there are, and fewer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from streamfill.cli.subcommands import add_subcommands, run_subcommand

COMMANDS: Final = {
    "add": "make an API key, show it once, and keep its hash",
    "list": "show the keys of a file, without their secrets",
    "remove": "take a key away; routers stop accepting it within seconds",
}
FILE_OPTION: Final = "--file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sub-commands."""
    parser.epilog = (
        "A router asks for keys when router.api_keys_file in the cluster file names a key file, "
        "and notices when the file changes. Clients send a key as `authorization: Bearer KEY`; the "
        "commands here and the Python client take it from STREAMFILL_API_KEY."
    )
    add_subcommands(parser, "keys", COMMANDS)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen one."""
    return run_subcommand(args, "keys")


def add_file_option(parser: argparse.ArgumentParser) -> None:
    """The option that all three have."""
    parser.add_argument(
        FILE_OPTION,
        type=Path,
        metavar="FILE",
        help="the key file; default: api_keys.jsonl in STREAMFILL_HOME",
    )


def key_file(args: argparse.Namespace) -> Path:
    """The file of `add_file_option`."""
    from streamfill.access.key_file import default_key_file

    named: Path | None = args.file
    return default_key_file() if named is None else named.expanduser().absolute()
