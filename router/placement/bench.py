"""What a placement policy costs and brings: ``python -m router.placement.bench``.

1. *Cost*: one decision at ``--servers`` servers (50), in CPU time: the question with the keys of
   its prompt, and the answer.
2. *Effect*: a trace of growing contexts, each read by several streams, on a few servers in virtual
   time (``simulation``): tokens computed, balance, time to first token.

The last line is ``RESULT {json}``. docs/benchmarks/placement.md explains it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from router.placement.interface import BlockNews
from router.placement.loads import ServerLoad, ServerState
from router.placement.placer import Placer, StreamPlacing
from router.placement.registry import format_placement, make_placement
from router.placement.simulation import Outcome, Reader, Simulation
from streamfill.messages.common import Role
from streamfill.scheduling.registry import parse_policy_spec
from streamfill.stream.ids import ServerId, StreamId
from streamfill.stream.prefix_blocks import block_keys
from streamfill.traces.files import TraceReader
from streamfill.traces.script import Scripts

POLICIES: Final = (
    "round-robin",
    "power-of-two",
    "least-loaded",
    "pull",
    "dualmap",
    "cache-aware",
)
CHARS_PER_TOKEN: Final = 4
"""The trace is text; no tokenizer is needed to count about as many tokens as one would make."""
PROMPT_TOKENS: Final = 2000
DOCUMENT_BLOCKS: Final = 1000
"""Cached on each server while decisions are timed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and the result."""
    args = _parser().parse_args(arguments)
    result: dict[str, object] = {"servers": args.servers, "sim_servers": args.sim_servers}
    readers = shared_readers(args)
    print(f"{'policy':<14} {'us/decision':>11} {'P99':>7} | {'computed':>8} {'of least':>8} "
          f"{'imbalance':>9} {'TTFT P50':>9} {'P95':>7} {'moved':>6}")  # fmt: skip
    for spec in args.policies:
        name, options = parse_policy_spec(spec)
        cost_us = decision_us(make_placer(name, options), args.servers, args.decisions)
        simulation = Simulation(
            make_placer(name, options),
            num_servers=args.sim_servers,
            tokens_per_s=args.rate,
            cache_tokens=args.cache_tokens,
        )
        figures = figures_of(simulation.run(readers), cost_us)
        result[spec] = figures
        print(f"{spec:<14} {figures['decision_us']:>11.1f} {figures['decision_p99_us']:>7.1f} | "
              f"{figures['computed_tokens']:>8.0f} {figures['of_least']:>8.2f} "
              f"{figures['imbalance']:>9.2f} {figures['ttft_p50_ms']:>9.1f} "
              f"{figures['ttft_p95_ms']:>7.0f} {figures['moved']:>6.0f}")  # fmt: skip
    print("RESULT", json.dumps(result))


def figures_of(outcome: Outcome, cost_us: Sequence[float]) -> dict[str, float]:
    """What is told of one policy."""
    ttft_ms = sorted(1000 * each for each in outcome.ttft_s)
    return {
        "decision_us": round(statistics.median(cost_us), 1),
        "decision_p99_us": round(_quantile(sorted(cost_us), 0.99), 1),
        "computed_tokens": outcome.num_computed_tokens,
        "of_least": round(outcome.num_computed_tokens / outcome.least_computed_tokens, 3),
        "imbalance": round(outcome.imbalance, 3),
        "ttft_p50_ms": round(_quantile(ttft_ms, 0.5), 1),
        "ttft_p95_ms": round(_quantile(ttft_ms, 0.95), 1),
        "moved": outcome.num_moved,
    }


def shared_readers(args: argparse.Namespace) -> list[Reader]:
    """The requests of a trace, each read by ``--readers`` streams that begin within ``--spread-s``,
    behind so many tokens of instructions that are the same for all."""
    generator = random.Random(args.seed)
    num_instructions = args.instructions
    instructions = array("i", [generator.randrange(1 << 15) for _ in range(num_instructions)])
    readers: list[Reader] = []
    with TraceReader(args.trace) as trace:
        requests = list(trace)
        scripts = Scripts(trace.header, trace.documents, vocab_size=1 << 15)
    for request in requests:
        script = scripts.script(request, time_scale=1 / args.speed)
        prompts = [instructions] if num_instructions else []
        for number in range(len(script.steps)):
            prompts.append(instructions + _tokens(str(script.prompt_after(number + 1))))
        for number in range(args.readers):
            late_s = generator.uniform(0.0, args.spread_s) if number else 0.0
            opened_s = script.arrival_s + late_s
            due_s = [opened_s] if num_instructions else []
            due_s += [opened_s + step.due_s for step in script.steps]
            reader = Reader(opened_s=opened_s, prompts=tuple(prompts), due_s=tuple(due_s))
            readers.append(reader)
    return readers


def make_placer(name: str, options: Mapping[str, str]) -> Placer:
    """A policy without a past."""
    return Placer(make_placement(name, options), format_placement(name, options))


def decision_us(placer: Placer, num_servers: int, num_decisions: int) -> list[float]:
    """CPU time of decisions, in microseconds, while servers hold documents and loads differ. What
    other processes take is not in it."""
    generator = random.Random(1)
    ids = [ServerId(f"prefill-{number:02}") for number in range(num_servers)]
    documents = [_document(generator) for _ in range(num_servers)]
    block_tokens = placer.policy.block_tokens
    for place, server_id in enumerate(ids):
        if block_tokens:
            # Each has its own blocks and some documents, so that some prompts match in many places.
            keys = [generator.getrandbits(64) for _ in range(DOCUMENT_BLOCKS)]
            for document in documents[place : place + 5]:
                keys += block_keys(document, block_tokens)
            placer.note_blocks(server_id, BlockNews(is_complete=True, stored=keys))
    loads = [_load(server_id, generator) for server_id in ids]
    times_us: list[float] = []
    gc.disable()
    try:
        for number in range(num_decisions):
            prompt = documents[generator.randrange(num_servers)]
            place = generator.randrange(num_servers)
            loads[place] = _load(ids[place], generator)
            placing = StreamPlacing(placer, StreamId(number))
            start_ns = time.thread_time_ns()
            request = placing.request(prompt, float(number), is_complete=False)
            placer.choose(request, loads, need_tokens=len(prompt), avoid=())
            times_us.append((time.thread_time_ns() - start_ns) / 1000)
    finally:
        gc.enable()
    return times_us


def _tokens(text: str) -> array[int]:
    """Stands for tokenising: equal beginnings of texts have equal ids."""
    pieces = (text[n : n + CHARS_PER_TOKEN] for n in range(0, len(text), CHARS_PER_TOKEN))
    return array("i", [zlib.crc32(piece.encode()) % (1 << 15) for piece in pieces])


def _document(generator: random.Random) -> array[int]:
    return array("i", [generator.randrange(1 << 15) for _ in range(PROMPT_TOKENS)])


def _load(server_id: ServerId, generator: random.Random) -> ServerLoad:
    return ServerLoad(
        server_id=server_id,
        role=Role.PREFILL,
        state=ServerState.ALIVE,
        num_streams=generator.randrange(20),
        pending_tokens=generator.randrange(8000),
        held_tokens=0,
        reported_pending_tokens=0,
        pool_tokens=1 << 20,
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m router.placement.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="POLICY")
    parser.add_argument("--servers", type=int, default=50, help="while decisions are timed")
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--trace", type=Path, default=Path("traces/ann-small.jsonl"))
    parser.add_argument("--readers", type=int, default=4, help="streams that read each context")
    parser.add_argument("--spread-s", type=float, default=1.0, help="they begin within so long")
    parser.add_argument("--speed", type=float, default=1.0, help="divides the trace's times")
    parser.add_argument("--instructions", type=int, default=0, help="tokens before all contexts")
    parser.add_argument("--sim-servers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1000.0, help="tokens/s of a server")
    parser.add_argument("--cache-tokens", type=int, default=32_768, help="of each server")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
