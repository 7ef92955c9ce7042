"""The parser of every command: says what is wrong with an option where the command is explained."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

_CLOSE_MATCHES = 1


class CommandParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that refuses what it does not know itself. The library leaves
    that to the outermost parser, whose usage shows none of the command's options. Its sub-parsers
    are of this class, too."""

    # Overloaded in typeshed; the library's own sub-parsers call it with both arguments.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Nothing is left over.

        Raises:
            SystemExit: there are arguments that nobody declared.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown)}")
        return found, unknown

    def _hint(self, unknown: Sequence[str]) -> str:
        """Which option may be meant by the first of them that looks like one."""
        for word in unknown:
            if word.startswith("-"):
                name = word.partition("=")[0]
                known = list(self._option_string_actions)
                for match in difflib.get_close_matches(name, known, _CLOSE_MATCHES):
                    return f" (did you mean {match}?)"
        return ""
