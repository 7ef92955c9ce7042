"""The options of `streamfill traces collect`, and what is wrong with them."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Final

from streamfill.errors import ConfigError
from streamfill.traces.collect.debian_tree import DEFAULT_PACKAGE

URL_PAUSE_S: Final = 1.0
"""Between two requests to a site of somebody else."""


def add_collectors(parser: argparse.ArgumentParser) -> None:
    """Declares the two collectors."""
    parser.epilog = "docs/traces_collect.md explains what is real in them and what is drawn."
    kinds = parser.add_subparsers(dest="collector", metavar="HOW", required=True)
    crawl = kinds.add_parser(
        "crawl",
        help="questions about a site, answered from pages that arrive one after the other",
        description="Crawls a site and records what an agent would read for questions about it.",
    )
    _add_crawl(crawl)
    ann = kinds.add_parser(
        "ann",
        help="questions about a corpus, answered from a ranking that gets better",
        description="Embeds a corpus and records each change of the top k while a search widens.",
    )
    _add_ann(ann)


def _add_crawl(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", help="site to crawl; by default --tree or --package, served on localhost")
    _add_common(parser, num_queries=32, request_rate=4.0)
    add("--pages", type=int, default=8, metavar="N", help="of a question, at most; default: 8")
    add("--passages-per-page", type=int, default=8, metavar="N", help="at most; default: 8")
    add("--site-pages", type=int, default=200, metavar="N", help="read at first; default: 200")
    add(
        "--concurrency",
        type=int,
        default=2,
        metavar="N",
        help="fetches at a time where latency is measured; default: 2",
    )
    latency = parser.add_mutually_exclusive_group()
    latency.add_argument(
        "--draw-latency",
        action="store_true",
        default=None,
        help="draw the network's time from published quantiles; the default without --url",
    )
    latency.add_argument(
        "--measured-times",
        dest="draw_latency",
        action="store_false",
        help="measure the network's time; the default with --url",
    )
    add(
        "--pause",
        type=float,
        metavar="S",
        help=f"between two fetches; default: {URL_PAUSE_S:g} with --url, else 0",
    )
    add("--max-page-kb", type=int, default=1024, metavar="N", help="default: 1024")
    add("--max-total-mb", type=int, default=1024, metavar="N", help="default: 1024")
    add("--max-minutes", type=float, default=30.0, metavar="N", help="default: 30")


def _add_ann(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--corpus", type=Path, metavar="PATH", help=".jsonl or text file, or folder of HTML pages")
    _add_common(parser, num_queries=64, request_rate=2.0)
    add("--top-k", type=int, default=10, metavar="K", help="documents in a ranking; default: 10")
    add("--index", choices=("ivf", "hnsw"), default="ivf", help="default: ivf")
    add("--max-passages", type=int, default=3000, metavar="N", help="default: 3000")
    add("--keep-unchanged", action="store_true", help="keep questions without any update too")
    add(
        "--measured-times",
        action="store_true",
        help="add no drawn disk latency to the times of the search in memory",
    )


def _add_common(parser: argparse.ArgumentParser, *, num_queries: int, request_rate: float) -> None:
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FILE", help="*.jsonl[.gz]")
    add("--tree", type=Path, metavar="DIR", help="folder of HTML pages to use")
    add(
        "--package",
        default=DEFAULT_PACKAGE,
        metavar="NAME",
        help=f"Debian package with HTML pages to download; default: {DEFAULT_PACKAGE}",
    )
    add("--queries", type=int, default=num_queries, metavar="N", help=f"default: {num_queries}")
    add("--seed", type=int, default=0, metavar="S", help="default: 0")
    add(
        "--request-rate",
        type=float,
        default=request_rate,
        metavar="R",
        help=f"Poisson arrivals per second, drawn; default: {request_rate:g}",
    )
    add("--token-scale", type=float, default=1.0, metavar="F", help="shorten passages; default: 1")
    add("--time-scale", type=float, default=1.0, metavar="F", help="multiply delays; default: 1")
    add("--max-tokens-per-segment", type=int, metavar="N", help="estimated; default: no limit")
    add("--output-tokens", type=int, default=16, metavar="N", help="of each answer; default: 16")


def check_options(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: names the option with a value that cannot work.
    """
    is_crawl = args.collector == "crawl"
    counts = ["queries", "output_tokens"]
    counts += ["pages", "passages_per_page", "site_pages", "concurrency"] if is_crawl else []
    counts += ["max_page_kb", "max_total_mb"] if is_crawl else ["top_k", "max_passages"]
    counts += [] if args.max_tokens_per_segment is None else ["max_tokens_per_segment"]
    for name in counts:
        if getattr(args, name) < 1:
            raise ConfigError(_option(name), getattr(args, name), "must be at least 1")
    positive = ["request_rate", "token_scale", "time_scale", *(["max_minutes"] if is_crawl else [])]
    for name in positive:
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(_option(name), value, "must be greater than 0")
    if args.token_scale > 1:
        raise ConfigError("--token-scale", args.token_scale, "must be at most 1: text is not made")
    if is_crawl and args.pause is not None and not 0 <= args.pause < math.inf:
        raise ConfigError("--pause", args.pause, "must not be negative")
    folder = args.output.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError("--output", str(args.output), "name a file in a folder to write to")
    other = args.url if is_crawl else args.corpus
    if args.tree is not None and other is not None:
        raise ConfigError("--tree", str(args.tree), "is not used beside --url or --corpus")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
