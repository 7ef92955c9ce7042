"""`streamfill keys add`: a new API key."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from streamfill.access.key_file import change_keys
from streamfill.access.keys import (
    DEFAULT_WEIGHT,
    NAME_PATTERN,
    NAME_RULE,
    KeyEntry,
    KeyLimits,
    new_key,
    problem_of,
)
from streamfill.cli.keys import FILE_OPTION, add_file_option, key_file
from streamfill.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = (
        "The key goes to stdout, once; nobody can show it again. Streams belong to the tenant: "
        "keys of one tenant share them, others do not see them. Limits are those of each key."
    )
    parser.add_argument("key_name", metavar="NAME", help="of the key, such as the client's name")
    parser.add_argument("--tenant", help="who owns the streams; default: NAME")
    parser.add_argument(
        "--operator",
        action="store_true",
        help="may change policies, empty caches, and see the streams of all tenants",
    )
    parser.add_argument("--max-streams", type=int, metavar="N", help="open at the same time")
    parser.add_argument(
        "--requests-per-s", type=float, metavar="R", help="calls and HTTP requests a second"
    )
    parser.add_argument(
        "--tokens-per-min", type=int, metavar="N", help="tokens of prompts and answers a minute"
    )
    parser.add_argument(
        "--shared-cache",
        action="store_true",
        help="use the KV of everybody's prompts who says the same, and let them use this one's: "
        "each can then find out by timing what the others sent; default: of the tenant's own only",
    )
    parser.add_argument(
        "--weight",
        type=float,
        default=DEFAULT_WEIGHT,
        metavar="W",
        help="of its streams, where tenants want more tokens than there are; default: "
        f"{DEFAULT_WEIGHT:g}",
    )
    add_file_option(parser)


def run(args: argparse.Namespace) -> int:
    """Makes it, keeps its hash, and prints it."""
    for option, name in (("NAME", args.key_name), ("--tenant", args.tenant)):
        if name is not None and not NAME_PATTERN.fullmatch(name):
            raise ConfigError(option, name, NAME_RULE)
    limits = KeyLimits(
        max_streams=args.max_streams,
        requests_per_s=args.requests_per_s,
        tokens_per_min=args.tokens_per_min,
    )
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    key, entry = new_key(
        args.key_name,
        tenant=args.tenant,
        is_operator=args.operator,
        limits=limits,
        created=created,
        shared_cache=args.shared_cache,
        weight=args.weight,
    )
    problem = problem_of(entry)
    if problem is not None:  # only a limit or the weight can be wrong here
        raise ConfigError("keys add", args.key_name, problem)

    def with_it(entries: tuple[KeyEntry, ...]) -> Sequence[KeyEntry]:
        if any(each.name == entry.name for each in entries):
            remedy = "is there already; choose another name, or remove it first"
            raise ConfigError("NAME", entry.name, remedy)
        return (*entries, entry)

    path = key_file(args)
    change_keys(path, with_it, FILE_OPTION)
    print(key)
    said = f"The key of {entry.name}, tenant {entry.tenant}; it is not shown again. Its hash is in"
    print(f"{said} {path}, which router.api_keys_file has to name.", file=sys.stderr)
    return 0
