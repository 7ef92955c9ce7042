"""The entry of `streamfill`: finds the sub-command, runs it, and turns errors into one line.

Exit codes: 0 success; 1 the command ran and the answer is no; 2 wrong usage or an error that is
explained; 130, 141 and 143 ended by Ctrl-C, by the output having no reader any more, by SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final, Protocol, cast

from streamfill.cli.parser import CommandParser
from streamfill.errors import StreamfillError

COMMANDS: Final = {
    "up": "start a cluster and keep it running",
    "down": "stop a cluster",
    "status": "show the servers and streams of a cluster",
    "top": "watch the servers, streams, memory and decisions of a cluster, live",
    "servers": "list, add, drain and remove the servers of a running cluster",
    "policy": "show and change how prefill servers schedule streams",
    "keys": "make, list and remove the API keys of clients",
    "zmq-keys": "make the keys with which the processes of a cluster know each other",
    "run": "stream files into a cluster and print the answer",
    "demo": "start a cluster, stream a document into it, compare with one shot",
    "traces": "describe, import, generate and collect traces",
    "bench": "replay traces and compare streaming with what else a client could do",
    "profile": "measure what recomputing and swapping cost on this machine",
    "model": "make the default model ready",
    "doctor": "show versions and what is missing",
}
"""Name of each module of this package that is a sub-command, and what it does."""

EXIT_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it
EXIT_NO_READER: Final = 141  # 128 + SIGPIPE, likewise


class Command(Protocol):
    """What the module of a sub-command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the options."""

    def run(self, args: argparse.Namespace) -> int:
        """Does the work; returns the exit code. A `StreamfillError` is shown by `main`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    if sys.stdout is None:  # closed by who started us, so nobody reads
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            # Here, not at the interpreter's end, where it would fail with a message of Python's.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NO_READER


def _run(words: list[str]) -> int:
    try:
        args = _parser(words).parse_args(words)
        args.words = words
        return _load(args.command).run(args)
    except StreamfillError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="streamfill",
        description="LLM serving that starts prefill while the prompt is still arriving.",
        epilog="`streamfill COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in words if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        described = f"{text[0].upper()}{text[1:]}."
        subparser = subparsers.add_parser(name, help=text, description=described)
        if name == wanted:
            _load(name).add_arguments(subparser)
    return parser


def _load(name: str) -> Command:
    return cast(Command, importlib.import_module(f"streamfill.cli.{module_of(name)}"))


def module_of(name: str) -> str:
    """Of this package, for the words of a command."""
    return name.replace("-", "_")


class _Version(argparse.Action):
    """``--version``, which reads the package's metadata only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from importlib.metadata import version

        print(f"streamfill {version('streamfill')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
