"""`streamfill servers drain ID`: a server is emptied while its clients stream on."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from typing import Final

from streamfill.cli.cluster_options import add_target_options, target_client
from streamfill.cli.draining import DrainResult, drain_and_wait
from streamfill.errors import ConfigError

DEFAULT_TIMEOUT_S: Final = 60.0
_EPILOG: Final = """\
From now on the server gets nothing new. What is there:

  streams without a commit   move to other servers at once: the router sends them from its token
                             log, and clients notice nothing but that some context is computed
                             once more
  answers                    are finished there; those that have not ended after --timeout go on
                             at another server, without a missing or doubled token

The command says how many streams are left and returns when there are none. If it is interrupted,
the drain goes on; `streamfill servers resume ID` takes it back. It lasts for this id, a crash
included, until then, until the server ends in order, or until a router without a log (router.log)
is started again.

  streamfill servers drain prefill-0
  streamfill servers drain decode-0 --timeout 0       # answers move at once
  streamfill servers drain prefill-1 --timeout inf    # answers take as long as they take

Exit codes: 0 the server is empty; 1 some streams can go nowhere else; 2 there is no such server,
or it is the last prefill server that takes streams (--force drains it all the same: then no new
request is served, and what is there stays until it is done).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add_drain_options(parser)
    add_target_options(parser)


def add_drain_options(parser: argparse.ArgumentParser) -> None:
    """Those that `remove` has as well."""
    parser.add_argument(
        "server_id", metavar="ID", help="such as prefill-0; `streamfill servers list` shows all"
    )
    parser.add_argument(
        "--timeout",
        default=f"{DEFAULT_TIMEOUT_S:g}",
        metavar="S",
        help="seconds after which answers are moved too; inf: never; default: %(default)s",
    )
    parser.add_argument("--force", action="store_true", help="also the last prefill server")


def run(args: argparse.Namespace) -> int:
    """Drains it and waits. Exit code 1 when something is left."""
    timeout_s = timeout_of(args)
    try:
        result = asyncio.run(
            drain_and_wait(
                target_client(args), args.server_id, timeout_s, force=args.force, tell=say
            )
        )
    except KeyboardInterrupt:
        undo = f"`streamfill servers resume {args.server_id}` takes it back"
        print(f"The drain goes on; {undo}.", file=sys.stderr)
        raise
    return exit_code(result)


def timeout_of(args: argparse.Namespace) -> float:
    """The seconds of ``--timeout``.

    Raises:
        ConfigError: it is no time.
    """
    try:
        timeout_s = float(args.timeout)
    except ValueError:
        timeout_s = math.nan
    if not timeout_s >= 0:
        raise ConfigError("--timeout", args.timeout, "must be seconds, 0 or more, or inf")
    return timeout_s


def exit_code(result: DrainResult) -> int:
    """0: it is empty."""
    return 0 if result.is_empty else 1


def say(text: str) -> None:
    """One more line about how far it is."""
    print(text, flush=True)
