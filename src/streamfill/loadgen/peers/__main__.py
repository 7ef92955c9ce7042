"""`python -m streamfill.loadgen.peers install NAME`: makes a peer ready, so that nothing waits for
it later."""

from __future__ import annotations

import argparse
import sys

from streamfill.errors import StreamfillError
from streamfill.loadgen.peers.installer import install, is_installed
from streamfill.loadgen.peers.recipes import recipe_of
from streamfill.loadgen.peers.running import ERROR_PREFIX, PEER_NAMES

_EXIT_STOPPED = 130  # 128 + SIGINT, as shells have it


def main(argv: list[str] | None = None) -> int:
    """The exit code: 2 when the peer cannot be installed here."""
    parser = argparse.ArgumentParser(prog="python -m streamfill.loadgen.peers")
    commands = parser.add_subparsers(dest="command", required=True)
    installing = commands.add_parser("install", help="make the environment of a peer")
    installing.add_argument("name", choices=PEER_NAMES)
    args = parser.parse_args(argv)
    try:
        recipe = recipe_of(args.name)
        if is_installed(recipe):
            _say(f"{args.name} is installed in {recipe.folder}")
            return 0
        install(recipe, _say)
    except StreamfillError as error:
        _say(f"{ERROR_PREFIX}{error}")
        return 2
    except KeyboardInterrupt:
        return _EXIT_STOPPED
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
