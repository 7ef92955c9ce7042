"""`streamfill policy set NAME`: another scheduling policy on running prefill servers."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

from streamfill.api import Client, PolicyResult
from streamfill.cli.cluster_options import add_target_options, target_client
from streamfill.errors import ConfigError

_EPILOG: Final = """\
Streams go on; the next step is decided by the new policy. Servers that start later get it too, as
long as the router runs; for good, write it to the cluster file as prefill.policy.

  streamfill policy set lcas
  streamfill policy set lcas --option order=newest
  streamfill policy set fcfs --server prefill-1

Exit codes: 0 every server that was asked has it; 1 one of them kept its policy, and says why; 2 no
server has a policy of this name, an option it does not know, or there is no such server.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("policy", metavar="POLICY", help="as `streamfill policy list` shows it")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the policy; may be repeated; what is left out gets its default",
    )
    parser.add_argument(
        "--server", metavar="ID", help="only this prefill server, such as prefill-0; default: all"
    )
    add_target_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what is in force then. Exit code 1 when a server kept its policy."""
    options = parse_options(args.option)
    results = asyncio.run(_set(target_client(args), args.policy, options, args.server))
    print("\n".join(result_lines(results)))
    return 0 if all(result.ok for result in results.values()) else 1


def parse_options(settings: Sequence[str]) -> dict[str, str]:
    """The values of ``--option KEY=VALUE``, as they were written.

    Raises:
        ConfigError: one has no equals sign or no key, or a key is there twice.
    """
    options: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError("--option", setting, "write KEY=VALUE, such as order=newest")
        if key in options:
            raise ConfigError("--option", setting, f"{key} is given twice; give it once")
        options[key] = value.strip()
    return options


def result_lines(results: Mapping[str, PolicyResult]) -> list[str]:
    """A line for each server: what is in force, and why it is not what was wanted."""
    return [
        f"{name}: {result.policy}"
        if result.ok
        else f"{name}: still {result.policy or 'its old policy'}: {result.reason}"
        for name, result in sorted(results.items())
    ]


async def _set(
    connection: Client, policy: str, options: Mapping[str, str], server_id: str | None
) -> Mapping[str, PolicyResult]:
    async with connection as client:
        return await client.set_policy(policy, options, server_id=server_id)
