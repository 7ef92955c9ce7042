"""`streamfill policy list`: the scheduling policies that are installed here."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from streamfill.scheduling.registry import PolicyFacts

_OWN: Final = "streamfill"
_WIDTH: Final = 100
"""Columns; terminals are seldom narrower than a line of code."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = (
        "Looks at the packages installed here, not at a cluster; plug-ins of other packages are "
        "listed with the package's name. A server elsewhere may know others."
    )
    parser.add_argument("--json", action="store_true", help="the same, for programs")


def run(args: argparse.Namespace) -> int:
    """Prints them."""
    # Late: it loads the plug-ins of other packages, which `--help` must not wait for.
    from streamfill.scheduling.registry import describe_policies

    policies = describe_policies()
    if args.json:
        print(json.dumps([_as_data(one) for one in policies], indent=2))
    else:
        print("\n".join(policy_lines(policies)))
    return 0


def policy_lines(policies: Sequence[PolicyFacts]) -> list[str]:
    """Each policy's name, what it does, and below it its options."""
    name_width = max((len(one.name) for one in policies), default=0) + 2
    option_width = max((len(option) for one in policies for option in one.options), default=0) + 2
    lines: list[str] = []
    for one in policies:
        origin = "" if one.source == _OWN else f" (from the package {one.source})"
        lines += _hanging(one.name.ljust(name_width), f"{one.summary}{origin}")
        for option, text in one.options.items():
            lines += _hanging(" " * name_width + option.ljust(option_width), text)
    return lines


def _as_data(one: PolicyFacts) -> dict[str, object]:
    return {
        "name": one.name,
        "summary": one.summary,
        "options": dict(one.options),
        "source": one.source,
    }


def _hanging(label: str, text: str) -> list[str]:
    """The text behind its label, further lines below its beginning."""
    indent = " " * len(label)
    wrapped = textwrap.wrap(text, _WIDTH, initial_indent=label, subsequent_indent=indent)
    return wrapped or [label.rstrip()]
