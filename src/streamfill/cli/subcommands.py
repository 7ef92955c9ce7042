"""A second level of commands: `streamfill traces WHAT`, `streamfill bench WHAT`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import cast

from streamfill.cli.main import Command, module_of


def add_subcommands(
    parser: argparse.ArgumentParser, group: str, commands: Mapping[str, str]
) -> None:
    """Declares the commands of a group; each is a module ``GROUP_NAME`` of this package."""
    subparsers = parser.add_subparsers(dest="subcommand", metavar="WHAT", required=True)
    for name, text in commands.items():
        described = f"{text[0].upper()}{text[1:]}."
        subparser = subparsers.add_parser(name, help=text, description=described)
        _load(group, name).add_arguments(subparser)


def run_subcommand(args: argparse.Namespace, group: str) -> int:
    """Runs the command of the group that was chosen."""
    return _load(group, args.subcommand).run(args)


def _load(group: str, name: str) -> Command:
    return cast(Command, importlib.import_module(f"streamfill.cli.{module_of(group)}_{name}"))
