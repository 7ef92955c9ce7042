"""`streamfill bench handoff`: the speed of KV hand-offs, each figure beside its baseline.

1. The transport between two processes of this machine, over Gloo and through shared memory, beside
   a bare send and a plain copy.
2. SGLang's own TCP backend, Mooncake, with the same page tables, where it can be installed.
3. A cluster with the real model: how many decode steps after the last prefill step the first token
   is at the client, and how many after that the second, with KV sent ahead of the commit and
   without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from streamfill.api import Client
from streamfill.cli.cluster_options import with_changes
from streamfill.cli.process_view import process_view
from streamfill.config import ClusterConfig
from streamfill.errors import ConfigError, StreamfillError
from streamfill.launcher.cluster import StoppedError, running_cluster, unless_stopped
from streamfill.launcher.signals import StopRequest, stop_on_signal
from streamfill.loadgen.handoff_probe import (
    LAST_PIECE_TOKENS,
    NUM_PIECES,
    Probe,
    median_of,
    probe,
)
from streamfill.models.describe import describe_model
from streamfill.models.progress import show_progress
from streamfill.models.resolve import resolve_model

_EXIT_STOPPED: Final = 130
_RESULT: Final = "RESULT "
_TRANSPORT: Final = "streamfill.kv_transfer.bench"
_MOONCAKE: Final = "streamfill.kv_transfer.bench_mooncake"
_FEWEST_TOKENS: Final = 10 * LAST_PIECE_TOKENS
_LARGE_TOKENS: Final = 2048
"""From here on a transfer's fixed cost hardly shows; the figures at the top of the line are of
these sizes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = "docs/benchmarks/handoff.md explains each key of the RESULT line."
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[128, 512, 2048, 8192],
        metavar="N",
        help="tokens of the transport's transfers; default: 128 512 2048 8192",
    )
    parser.add_argument(
        "--page-size", type=int, nargs="+", default=[1, 16, 64], metavar="N", help="of the KV pools"
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="default: 9")
    parser.add_argument(
        "--prompt-tokens", type=int, default=2000, metavar="N", help="of the answers; default: 2000"
    )
    parser.add_argument(
        "--only",
        choices=("transport", "mooncake", "cluster"),
        nargs="+",
        default=["transport", "mooncake", "cluster"],
        help="leave the other parts out",
    )
    parser.add_argument("--model", metavar="PATH", help="default: SmolLM2-135M-Instruct")


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    for name in ("sizes", "page_size"):
        if min(getattr(args, name)) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, getattr(args, name), "must be at least 1")
    if args.repeats < 2:
        raise ConfigError("--repeats", args.repeats, "must be at least 2, the first one is apart")
    if args.prompt_tokens < _FEWEST_TOKENS:
        raise ConfigError(
            "--prompt-tokens", args.prompt_tokens, f"must be {_FEWEST_TOKENS} or more"
        )
    return asyncio.run(_measure(args))


async def _measure(args: argparse.Namespace) -> int:
    facts: dict[str, Any] = {}
    with stop_on_signal() as stop:
        try:
            if "transport" in args.only:
                facts |= transport_facts(await _transport(args, stop))
            if "mooncake" in args.only:
                facts |= mooncake_facts(await _mooncake(args, stop), facts.get("transfers", ()))
            if "cluster" in args.only:
                facts |= await _clusters(args, stop)
        except StoppedError:
            return _EXIT_STOPPED
    facts["load_average"] = round(os.getloadavg()[0], 2)
    print(_RESULT + json.dumps(facts), flush=True)
    return 0


async def _transport(args: argparse.Namespace, stop: StopRequest) -> list[dict[str, Any]]:
    print("The transport between two processes.", flush=True)
    options = [f"--repeats={args.repeats}", "--tokens", *map(str, args.sizes)]
    result = await _child(_TRANSPORT, [*options, "--page-size", *map(str, args.page_size)], stop)
    if result is None:
        raise StreamfillError("the transport could not be measured; the reason is above")
    rows: list[dict[str, Any]] = result["sizes"]
    for row in rows:
        copied, sent = row["ratio_to_memcpy"], row["ratio_to_bare_send"]
        print(
            f"  {row['tokens']:>5} tokens, {row['pages']:<9} pages of {row['page_size']:>2}: "
            f"shared memory {row['same_host_median']:>5.2f} GB/s, {copied:.2f} of a copy; "
            f"Gloo {row['transport_median']:.2f}, {sent:.2f} of a bare send",
            flush=True,
        )
    return rows


async def _mooncake(args: argparse.Namespace, stop: StopRequest) -> list[dict[str, Any]]:
    print("SGLang's TCP backend with the same page tables.", flush=True)
    sizes = [str(size) for size in args.sizes if size <= _LARGE_TOKENS]
    pages = [str(size) for size in args.page_size if size in (1, 16)]
    if not sizes or not pages:
        return []
    options = ["--tokens", *sizes, "--page-size", *pages, "--repeats", str(min(5, args.repeats))]
    result = await _child(_MOONCAKE, options, stop)
    rows: list[dict[str, Any]] = [] if result is None else result["transfers"]
    return rows


async def _child(module: str, options: Sequence[str], stop: StopRequest) -> dict[str, Any] | None:
    """The ``RESULT`` line of another program; None where it has none. What else it says is
    shown."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *options), stdout=asyncio.subprocess.PIPE
    )
    result: dict[str, Any] | None = None

    async def read() -> None:
        nonlocal result
        assert process.stdout is not None
        async for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            if line.startswith(_RESULT):
                result = json.loads(line.removeprefix(_RESULT))
            elif line:
                print(f"  {line}", flush=True)
        await process.wait()

    try:
        await unless_stopped(read(), stop)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    return result


async def _clusters(args: argparse.Namespace, stop: StopRequest) -> dict[str, Any]:
    with show_progress("Converting the default model") as progress:
        model_path = resolve_model(args.model, progress)
    vocab_size = describe_model(model_path).vocab_size
    facts: dict[str, Any] = {"prompt_tokens": args.prompt_tokens}
    for early_push in ("auto", "off"):
        folder = Path(tempfile.mkdtemp(prefix="streamfill-handoff-"))
        changes = {
            "name": f"handoff-{os.getpid()}",
            "router.grpc_port": 0,
            "prefill.threads": 1,
            "decode.threads": 1,
            "prefill.early_push": early_push,
        }
        with process_view() as view:
            view.say(f"A cluster with early_push={early_push}.")
            async with running_cluster(
                with_changes(ClusterConfig(), changes),
                model_path=model_path,
                state_dir=folder,
                run_dir=folder,
                stop=stop,
                on_change=view.show,
            ) as cluster:
                probes = await unless_stopped(
                    _probes(cluster.own_address, args, vocab_size, view.say), stop
                )
        shutil.rmtree(folder)
        prefix = "" if early_push == "auto" else "without_early_push."
        facts |= {f"{prefix}{key}": value for key, value in median_of(probes).items()}
    return facts


async def _probes(address: str, args: argparse.Namespace, vocab_size: int, say: Any) -> list[Probe]:
    probes: list[Probe] = []
    async with Client(address) as client:
        for number in range(args.repeats + 1):
            made = await probe(client, args.prompt_tokens, vocab_size, seed=number)
            if number == 0:
                continue  # the first hand-off of a cluster sets the pair up
            probes.append(made)
            say(
                f"  {NUM_PIECES} pieces and the commit: first token after "
                f"{made.first_steps:.2f} decode steps, the second {made.second_steps:.2f} later "
                f"({1000 * made.step_s:.0f} ms each)"
            )
    return probes


def transport_facts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The transport's part of the ``RESULT`` line: medians over the large transfers, and all
    rows."""
    large = [row for row in rows if row["tokens"] >= _LARGE_TOKENS] or list(rows)
    return {
        "gloo.ratio_to_bare_send": _median(large, "ratio_to_bare_send"),
        "same_host.ratio_to_memcpy": _median(large, "ratio_to_memcpy"),
        "transfers": list(rows),
    }


def mooncake_facts(
    theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Our bandwidth divided by theirs, with the same sizes and page tables; the worst case of each
    kind of pages. Empty where they were not measured."""
    by_case = {(row["tokens"], row["page_size"], row["pages"]): row for row in ours}
    facts: dict[str, Any] = {"sglang_tcp": list(theirs)} if theirs else {}
    for pages in ("adjacent", "scattered"):
        for key, what in (
            (f"ratio_to_sglang_tcp.{pages}", "transport_median"),
            (f"same_host.ratio_to_sglang_tcp.{pages}", "same_host_median"),
        ):
            ratios = [
                by_case[case][what] / row["gb_per_s"]
                for row in theirs
                if row["pages"] == pages
                and (case := (row["tokens"], row["page_size"], pages)) in by_case
            ]
            if ratios:
                facts[key] = round(min(ratios), 2)
    return facts


def _median(rows: Sequence[dict[str, Any]], key: str) -> float:
    return round(float(statistics.median(row[key] for row in rows)), 2)
