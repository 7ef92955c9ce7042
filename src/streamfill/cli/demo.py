"""`streamfill demo`: the same prompt streamed and in one shot, on a cluster of its own.

1. A cluster of one prefill and one decode server starts in a temporary folder, on free ports.
2. A request of another kind warms both servers up, so that neither run pays for first times.
3. All KV caches are emptied; the document is streamed, then the question with the commit.
4. All KV caches are emptied again; the same prompt is sent in one piece.
5. Both runs are drawn on one time axis; the last line of the output is for programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from streamfill.api import Client
from streamfill.api.cold_caches import empty_caches
from streamfill.cli.cluster_options import with_changes
from streamfill.cli.demo_runs import (
    DemoPrompt,
    DemoRun,
    run_one_shot,
    run_streamed,
    warm_up,
)
from streamfill.cli.document import demo_document, read_text, split_document
from streamfill.cli.process_view import process_view
from streamfill.cli.timeline import LABEL_WIDTH, draw_timeline
from streamfill.config import ClusterConfig
from streamfill.errors import ConfigError
from streamfill.launcher.cluster import StoppedError, running_cluster, unless_stopped
from streamfill.launcher.signals import StopRequest, stop_on_signal
from streamfill.models.progress import show_progress
from streamfill.models.resolve import resolve_model

_DEFAULT_QUESTION: Final = "What does the router keep for each stream?"
_EXIT_DIFFERENT: Final = 1
_EXIT_STOPPED: Final = 130  # 128 + SIGINT, as shells have it
_TEXT_WIDTH: Final = 100
"""Of the picture where there is no terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--model", metavar="PATH", help="Hugging Face model folder")
    parser.add_argument("--document", type=Path, metavar="FILE", help="UTF-8 text to stream")
    parser.add_argument("--segments", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--delay", type=float, default=1.0, metavar="S", help="seconds between them; default: 1"
    )
    parser.add_argument("--question", default=_DEFAULT_QUESTION, help="sent last")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the logs")


def run(args: argparse.Namespace) -> int:
    """Prints the demonstration. Exit code 1 when the two answers differ."""
    if not 0 <= args.delay < math.inf:
        raise ConfigError("--delay", args.delay, "must be a number of seconds, 0 or more")
    if args.max_tokens < 1:
        raise ConfigError("--max-tokens", args.max_tokens, "must be at least 1")
    document = demo_document() if args.document is None else read_text(args.document)
    prompt = DemoPrompt(
        segments=split_document(document, args.segments),
        question=f"\n\n{args.question}",
        max_tokens=args.max_tokens,
    )
    with show_progress("Converting the default model") as progress:
        model_path = resolve_model(args.model, progress)
    folder = Path(tempfile.mkdtemp(prefix="streamfill-demo-"))
    succeeded = False
    try:
        exit_code = asyncio.run(_demonstrate(prompt, args.delay, model_path, folder))
        succeeded = exit_code in (0, _EXIT_STOPPED)
        return exit_code
    finally:
        if succeeded and not args.keep:
            shutil.rmtree(folder)
        else:
            print(f"Logs are kept in {folder / 'logs'}.", file=sys.stderr)


async def _demonstrate(prompt: DemoPrompt, delay_s: float, model_path: Path, folder: Path) -> int:
    config = demo_cluster()
    with stop_on_signal() as stop:
        try:
            with process_view() as view:
                view.say("Starting router, controller, prefill server and decode server.")
                context = running_cluster(
                    config,
                    model_path=model_path,
                    state_dir=folder,
                    run_dir=folder,
                    stop=stop,
                    on_change=view.show,
                )
                async with context as cluster:
                    view.say(f"Ready after {cluster.startup_s:.1f} s.")
                    streamed, one_shot = await _both_runs(
                        cluster.own_address, prompt, delay_s, stop, say=view.say
                    )
        except StoppedError:
            return _EXIT_STOPPED
    facts = result_facts(streamed, one_shot, len(prompt.segments), cluster.startup_s)
    _print_report(streamed, one_shot, facts)
    return 0 if facts["identical"] else _EXIT_DIFFERENT


def demo_cluster() -> ClusterConfig:
    """One server of each kind, one thread each: a fair comparison on two cores."""
    changes = {
        "name": f"demo-{os.getpid()}",
        "router.grpc_port": 0,
        "router.http_port": "off",
        "prefill.threads": 1,
        "decode.threads": 1,
    }
    return with_changes(ClusterConfig(), changes)


async def _both_runs(
    address: str,
    prompt: DemoPrompt,
    delay_s: float,
    stop: StopRequest,
    *,
    say: Callable[[str], None],
) -> tuple[DemoRun, DemoRun]:
    num_pieces = len(prompt.segments)

    async def both() -> tuple[DemoRun, DemoRun]:
        async with Client(address) as client:
            say("Warming up.")
            await warm_up(client)
            await empty_caches(client)
            say(f"Streaming a document in {num_pieces} segments, one every {delay_s:g} s.")
            streamed = await run_streamed(
                client,
                prompt,
                delay_s,
                lambda number, tokens: say(f"  segment {number} sent, {tokens} tokens so far"),
            )
            await empty_caches(client)
            say("Sending the same prompt in one shot.")
            return streamed, await run_one_shot(client, prompt)

    return await unless_stopped(both(), stop)


def result_facts(
    streamed: DemoRun, one_shot: DemoRun, num_segments: int, startup_s: float
) -> dict[str, Any]:
    """What the ``RESULT`` line says; ``docs/benchmarks/demo.md`` explains each key."""

    def second_token_ms(run: DemoRun) -> float | None:
        return _ms(run.token_s[1] - run.commit_s) if len(run.token_s) > 1 else None

    return {
        "identical": streamed.result.token_ids == one_shot.result.token_ids,
        "ttft_oneshot_ms": _ms(one_shot.ttft_s),
        "ttft_streamed_ms": _ms(streamed.ttft_s),
        "speedup": round(one_shot.ttft_s / streamed.ttft_s, 2),
        "second_token_oneshot_ms": second_token_ms(one_shot),
        "second_token_streamed_ms": second_token_ms(streamed),
        "num_prompt_tokens": streamed.result.usage.num_prompt_tokens,
        "num_output_tokens": streamed.result.usage.num_output_tokens,
        "num_segments": num_segments,
        "num_cached_oneshot": one_shot.result.usage.num_cached_tokens,
        "num_cached_streamed": streamed.result.usage.num_cached_tokens,
        "handoff_oneshot": one_shot.result.metadata.handoff,
        "handoff_streamed": streamed.result.metadata.handoff,
        "decoded_by_prefill": streamed.result.metadata.decoded_by_prefill
        or one_shot.result.metadata.decoded_by_prefill,
        "startup_s": round(startup_s, 1),
    }


def _print_report(streamed: DemoRun, one_shot: DemoRun, facts: dict[str, Any]) -> None:
    commit_at_s = streamed.commit_s - min([p.sent_s for p in streamed.pieces], default=0.0)
    runs = [
        streamed.on_axis("streamed", commit_at_s),
        one_shot.on_axis("one shot", commit_at_s),
    ]
    is_terminal = sys.stdout.isatty()
    width = min(shutil.get_terminal_size().columns, 120) if is_terminal else _TEXT_WIDTH
    print()
    _print_picture(draw_timeline(runs, width), is_terminal)
    print(f"\n{'':{LABEL_WIDTH}}digit, ?  a segment, the question is sent    =  prompt is computed")
    print(f"{'':{LABEL_WIDTH}}1, 2      first, second token of the answer   |  last token\n")
    for name, run in (("streamed", streamed), ("one shot", one_shot)):
        print(f"{name}: first token {1000 * run.ttft_s:.0f} ms after the last piece was sent")
        print(f"  {run.result.text.strip()}")
    if not facts["identical"]:
        print(
            f"\nThe answers differ:\n  {streamed.result.token_ids}\n  {one_shot.result.token_ids}"
        )
    print()
    print(f"RESULT {json.dumps(facts)}", flush=True)


def _print_picture(lines: list[str], is_terminal: bool) -> None:
    if not is_terminal:
        print("\n".join(lines))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for line in lines:
        text = Text(line, no_wrap=True, overflow="crop")
        if line.startswith(" "):
            text.highlight_regex(r"=+", "cyan")
            text.highlight_regex(r"\?", "bold yellow")
            text.highlight_regex(r"1?2?-*\|$", "green")
        else:
            text.stylize("bold")
        console.print(text)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
