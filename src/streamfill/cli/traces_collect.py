"""`streamfill traces collect`: makes a real trace anew, by crawling or by searching."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from streamfill.cli.collect_options import URL_PAUSE_S, add_collectors, check_options
from streamfill.models.progress import show_progress
from streamfill.traces.collect.debian_tree import (
    DocumentationTree,
    documentation_tree,
    folder_as_tree,
)
from streamfill.traces.collect.summary import CollectionSummary

_MAX_THREADS: Final = 2
"""Of embedding and searching: a collector runs beside other work."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the two collectors."""
    add_collectors(parser)


def run(args: argparse.Namespace) -> int:
    """Collects, writes the file, and says what is in it."""
    check_options(args)
    started_s = time.monotonic()
    summary = _collect_crawl(args) if args.collector == "crawl" else _collect_ann(args)
    _print_summary(args, summary, wall_s=time.monotonic() - started_s)
    return 0


def _trace_name(output: Path) -> str:
    return output.name.removesuffix(".gz").removesuffix(".jsonl")


def _tree(args: argparse.Namespace) -> DocumentationTree:
    return folder_as_tree(args.tree) if args.tree is not None else documentation_tree(args.package)


def _collect_crawl(args: argparse.Namespace) -> CollectionSummary:
    from streamfill.traces.collect.crawl import CrawlPlan, collect_crawl
    from streamfill.traces.collect.fetcher import FetchLimits
    from streamfill.traces.collect.reading import ReadingPlan
    from streamfill.traces.collect.tree_server import served_tree

    is_foreign = args.url is not None
    draws_latency = not is_foreign if args.draw_latency is None else args.draw_latency
    default_pause_s = URL_PAUSE_S if is_foreign else 0.0
    with ExitStack() as stack:
        if is_foreign:
            start_url, origin = args.url, args.url
        else:
            tree = _tree(args)
            start_url, origin = stack.enter_context(served_tree(tree.folder)), tree.origin
        plan = CrawlPlan(
            name=_trace_name(args.output),
            start_url=start_url,
            origin=origin,
            num_queries=args.queries,
            max_site_pages=args.site_pages,
            seed=args.seed,
            draws_latency=draws_latency,
            request_rate=args.request_rate,
            time_scale=args.time_scale,
            max_output_tokens=args.output_tokens,
            reading=ReadingPlan(
                max_pages=args.pages,
                passages_per_page=args.passages_per_page,
                # The published gaps already hold whatever that crawler did at the same time.
                concurrency=1 if draws_latency else args.concurrency,
                token_scale=args.token_scale,
                max_segment_tokens=args.max_tokens_per_segment,
            ),
            limits=FetchLimits(
                pause_s=default_pause_s if args.pause is None else args.pause,
                page_bytes=args.max_page_kb << 10,
                total_bytes=args.max_total_mb << 20,
                duration_s=60.0 * args.max_minutes,
            ),
        )
        return asyncio.run(collect_crawl(plan, args.output, show_progress))


def _collect_ann(args: argparse.Namespace) -> CollectionSummary:
    from streamfill.traces.collect.ann import AnnPlan, collect_ann
    from streamfill.traces.collect.corpus import corpus_of_file, corpus_of_tree
    from streamfill.traces.collect.embedding import MiniLmEmbedder
    from streamfill.traces.collect.index_search import IndexKind

    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    # First: a missing package is said before the work on the corpus.
    embedder = MiniLmEmbedder(num_threads=num_threads)
    path: Path | None = args.corpus
    with show_progress("Reading the corpus") as progress:
        if path is not None and not path.is_dir():
            corpus = corpus_of_file(path, max_passages=args.max_passages, progress=progress)
        else:
            tree = _tree(args) if path is None else folder_as_tree(path)
            corpus = corpus_of_tree(
                tree, max_passages=args.max_passages, seed=args.seed, progress=progress
            )
    plan = AnnPlan(
        name=_trace_name(args.output),
        num_queries=args.queries,
        top_k=args.top_k,
        index=IndexKind(args.index),
        seed=args.seed,
        keeps_unchanged=args.keep_unchanged,
        draws_latency=not args.measured_times,
        request_rate=args.request_rate,
        token_scale=args.token_scale,
        time_scale=args.time_scale,
        max_segment_tokens=args.max_tokens_per_segment,
        max_output_tokens=args.output_tokens,
        num_threads=num_threads,
    )
    return collect_ann(plan, corpus, embedder, args.output, show_progress)


def _print_summary(args: argparse.Namespace, summary: CollectionSummary, *, wall_s: float) -> None:
    sources = "num_pages" if args.collector == "crawl" else "num_documents"
    print(
        f"{args.output}: {summary.num_requests} requests, {summary.num_segments} segments", end=""
    )
    print(f", {summary.num_updates} of them updates" if summary.num_updates else "")
    print(
        f"  from {summary.num_sources} {'pages' if sources == 'num_pages' else 'passages'}; "
        f"prompts have {summary.num_prompt_chars:,} characters, about "
        f"{summary.num_prompt_tokens:,} tokens"
    )
    for reason, count in sorted(summary.left_out.items()):
        print(f"  {reason}: {count}")
    for field, how in summary.drawn.items():
        print(f"  drawn: {field}: {how}")
    facts = {
        "num_requests": summary.num_requests,
        "num_segments": summary.num_segments,
        "num_updates": summary.num_updates,
        sources: summary.num_sources,
        "num_prompt_tokens": summary.num_prompt_tokens,
        "wall_s": round(wall_s, 1),
    }
    print(f"RESULT {json.dumps(facts)}", flush=True)
