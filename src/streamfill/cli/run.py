"""`streamfill run`: streams files into a running cluster and prints the answer as it comes."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.api import Answer, Client, Mode, Result, Stream
from streamfill.cli.cluster_options import add_target_options, target_client
from streamfill.cli.document import read_text
from streamfill.errors import ConfigError

_DEFAULT_MAX_TOKENS: Final = 128
_SEPARATOR: Final = "\n\n"
"""Between a document and the question about it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to send. `texts` is not empty."""

    mode: Mode
    texts: Sequence[str]
    question: str | None
    is_chat: bool
    delay_s: float
    max_tokens: int
    temperature: float
    priority: int = 0
    ttft_slo_ms: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--mode",
        choices=("append", "update"),
        default="append",
        help="each file goes behind the ones before (append, default) or replaces them (update)",
    )
    parser.add_argument("--question", help="sent last, behind the text, with the commit")
    parser.add_argument(
        "--delay", type=float, default=0.0, metavar="S", help="seconds between two files"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=_DEFAULT_MAX_TOKENS, metavar="N", help="of the answer"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    parser.add_argument(
        "--priority", type=int, default=0, metavar="N", help="larger is more urgent; default: 0"
    )
    parser.add_argument(
        "--ttft-slo-ms",
        type=float,
        metavar="MS",
        help="the time to the first token that is wanted, for scheduling policies that know "
        "deadlines; nothing fails when it is missed",
    )
    parser.add_argument(
        "--raw", action="store_true", help="send plain text, without the model's chat template"
    )
    add_target_options(parser)


def run(args: argparse.Namespace) -> int:
    """Reads all files before anything is sent, then streams them."""
    if not 0 <= args.delay < math.inf:
        raise ConfigError("--delay", args.delay, "must be a number of seconds, 0 or more")
    plan = Plan(
        mode=args.mode,
        texts=[read_text(path) for path in args.files],
        question=args.question,
        is_chat=not args.raw,
        delay_s=args.delay,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        priority=args.priority,
        ttft_slo_ms=args.ttft_slo_ms,
    )
    result = asyncio.run(_stream(target_client(args), plan))
    print(describe(result), file=sys.stderr)
    return 0


async def _stream(connection: Client, plan: Plan) -> Result:
    # In append mode the last message of a chat is open: text goes into it.
    opening = _user("") if plan.is_chat and plan.mode == "append" else None
    async with (
        connection as client,
        client.stream(
            mode=plan.mode,
            messages=opening,
            priority=plan.priority,
            ttft_slo_ms=plan.ttft_slo_ms,
        ) as stream,
    ):
        for number, text in enumerate(plan.texts):
            if number:
                await asyncio.sleep(plan.delay_s)
            await _send(stream, plan, text)
        answer = _commit(stream, plan)
        async for text in answer.texts():
            print(text, end="", flush=True)
        print()
        return answer.result


async def _send(stream: Stream, plan: Plan, text: str) -> None:
    if plan.mode == "append":
        await stream.append(text)
    elif plan.is_chat:
        await stream.update(messages=_user(text))
    else:
        await stream.update(text)


def _commit(stream: Stream, plan: Plan) -> Answer:
    """A final piece goes behind the context in append mode and takes its place in update mode."""
    if plan.question is None:
        return stream.commit(max_tokens=plan.max_tokens, temperature=plan.temperature)
    if plan.mode == "append":
        final = _SEPARATOR + plan.question
    else:
        final = plan.texts[-1] + _SEPARATOR + plan.question
        if plan.is_chat:
            return stream.commit(
                messages=_user(final), max_tokens=plan.max_tokens, temperature=plan.temperature
            )
    return stream.commit(final, max_tokens=plan.max_tokens, temperature=plan.temperature)


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def describe(result: Result) -> str:
    """One line about how the answer was made and how long it took."""
    usage, timing, made = result.usage, result.timing, result.metadata
    parts = [
        f"prompt {usage.num_prompt_tokens} tokens, "
        f"{usage.num_cached_tokens} of them computed before the commit"
    ]
    if timing.token_times_s:
        parts.append(f"first token {1000 * timing.token_times_s[0]:.0f} ms after the last piece")
    if len(timing.token_times_s) > 1:
        parts.append(f"second {1000 * timing.token_times_s[1]:.0f} ms")
    parts.append(f"{usage.num_output_tokens} tokens in {timing.total_s:.2f} s")
    if made.decoded_by_prefill:
        parts.append(f"all by {made.prefill_server}, without a decode server")
    else:
        decoded_by = f" -> {made.decode_server}" if made.decode_server else ""
        parts.append(f"{made.prefill_server}{decoded_by}, hand-off {made.handoff}")
    parts.append(f"ended by {result.finish_reason}")
    return "; ".join(parts)
