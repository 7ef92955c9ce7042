"""Bandwidth of Mooncake's transfer engine between two paged KV pools, as SGLang 0.5.16 drives it.

``python -m streamfill.kv_transfer.bench_mooncake`` prints one line ``RESULT {…}``. It is the
baseline of our own transport: SGLang's TCP backend over loopback, without SGLang's servers around
it, which would only add to it. Mooncake comes with the peer ``sglang-pd`` of ``streamfill bench
compare``, into that peer's environment and never into ours; where it cannot be had, one line says
why. See `mooncake_pair` for what is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from streamfill.kv_transfer.bench import LAYOUTS
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.mooncake_pair import (
    ERROR_PREFIX,
    QUEUE_OPERATIONS,
    RESULT_PREFIX,
    PairRequest,
    PairResult,
)
from streamfill.kv_transfer.page_runs import PageOrder, page_table, slots_of
from streamfill.launcher import guard
from streamfill.loadgen.peers.environment import peer_variables
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.loadgen.peers.installer import install
from streamfill.loadgen.peers.recipes import PeerName, recipe_of

Say = Callable[[str], None]

START_TIMEOUT_S: Final = 180.0
"""Two processes import torch, fill a pool of a gigabyte or two each, and compare it twice."""
TRANSFER_TIMEOUT_S: Final = 120.0
"""Of each transfer: 8,192 scattered pages of one token took 25 s with other work on the machine."""


def main() -> int:
    """Measure and print. The exit code: 2 when Mooncake cannot be had or failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m streamfill.kv_transfer.bench_mooncake"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--page-size", type=int, nargs="+", default=[1, 16])
    orders = [order.value for order in PageOrder]
    parser.add_argument("--pages", choices=orders, nargs="+", default=orders)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layout", choices=LAYOUTS, default="smollm2-135m")
    parser.add_argument(
        "--pool-tokens", type=int, default=32768, help="of either side; 1.5 GB of smollm2-135m"
    )
    parser.add_argument(
        "--one-call",
        action="store_true",
        help="never split a batch that the engine's queue refuses; SGLang does not",
    )
    options = parser.parse_args()
    for name in ("tokens", "page_size"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} = {getattr(options, name)}: must be above 0")
    if options.repeats < 1:
        parser.error(f"--repeats = {options.repeats}: must be above 0")
    try:
        install(recipe_of(PeerName.SGLANG_PD.value), _say)
    except PeerUnavailable as error:
        _say(f"mooncake: {error}")
        return 2
    rows: list[dict[str, Any]] = []
    code = 0
    for page_size in options.page_size:
        for order in map(PageOrder, options.pages):
            for num_tokens in options.tokens:
                try:
                    rows.append(_row(options, page_size, order, num_tokens))
                except PeerUnavailable as error:
                    _say(f"mooncake: {error}")
                    code = 2
                except ValueError as error:
                    parser.error(str(error))
    if rows:
        print(RESULT_PREFIX + json.dumps({"layout": options.layout, "transfers": rows}))
    return code


def measure_mooncake(
    layout: KvLayout,
    source_slots: Sequence[int],
    destination_slots: Sequence[int],
    *,
    num_slots: int,
    repeats: int,
    say: Say,
) -> float | None:
    """Median seconds of one transfer; None, with the reason in one line, where there is none.

    To be called in a process's main thread; installs the peer where that was not done yet. Who gets
    None should not ask again: an install that cannot succeed would be tried anew.

    Args:
        layout: of the pools on both sides; its page size is that of the tables.
        source_slots: of the tokens, whole pages in order.
        destination_slots: the same for where they go.
        num_slots: of each pool.
        repeats: transfers of which the median is taken, after one that is not timed.
        say: told what an install does, and why there is no figure.

    Raises:
        ValueError: the tables do not fit each other or the pools.
    """
    try:
        result = run_mooncake(
            layout, source_slots, destination_slots, num_slots=num_slots, repeats=repeats, say=say
        )
    except PeerUnavailable as error:
        say(f"mooncake is left out: {error}")
        return None
    return statistics.median(result.seconds)


def run_mooncake(
    layout: KvLayout,
    source_slots: Sequence[int],
    destination_slots: Sequence[int],
    *,
    num_slots: int,
    repeats: int,
    operations_per_call: int | None = QUEUE_OPERATIONS,
    say: Say,
) -> PairResult:
    """`measure_mooncake` with all that was measured.

    Raises:
        PeerUnavailable: Mooncake cannot be had here, failed, or sent wrong bytes.
        ValueError: as there.
    """
    if len(source_slots) != len(destination_slots) or len(source_slots) % layout.page_size:
        raise ValueError(
            f"{len(source_slots)} source and {len(destination_slots)} destination slots "
            f"are not equally many whole pages of {layout.page_size}"
        )
    for slots in (source_slots, destination_slots):
        if not slots or min(slots) < 0 or max(slots) >= num_slots:
            raise ValueError(f"slots must be given and lie in 0 to {num_slots - 1}")
    request = PairRequest(
        layout=layout,
        num_slots=num_slots,
        source_slots=list(source_slots),
        destination_slots=list(destination_slots),
        repeats=repeats,
        operations_per_call=operations_per_call,
    )
    recipe = recipe_of(PeerName.SGLANG_PD.value)
    install(recipe, say)
    command = (
        *(sys.executable, "-I", "-S", guard.__file__, str(os.getpid())),
        *(str(recipe.folder / "bin" / "python"), "-m", "streamfill.kv_transfer.mooncake_pair"),
    )
    # Without it Mooncake looks for RDMA. The rest of its settings are left alone, as in SGLang.
    variables = peer_variables(recipe.folder, threads=1) | {"MC_FORCE_TCP": "1"}
    timeout_s = START_TIMEOUT_S + (repeats + 1) * TRANSFER_TIMEOUT_S
    try:
        done = subprocess.run(
            command,
            input=msgspec.json.encode(request),
            capture_output=True,
            env=variables,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PeerUnavailable(f"no result within {timeout_s:.0f} s") from error
    except OSError as error:
        raise PeerUnavailable(f"{command[-3]} cannot be started: {error}") from error
    return result_of(done)


def result_of(done: subprocess.CompletedProcess[bytes]) -> PairResult:
    """What `mooncake_pair` found. Raises ``PeerUnavailable``: nothing."""
    lines = done.stdout.decode(errors="replace").splitlines()
    for line in lines:
        if line.startswith(RESULT_PREFIX):
            return msgspec.json.decode(line.removeprefix(RESULT_PREFIX), type=PairResult)
        if line.startswith(ERROR_PREFIX):
            raise PeerUnavailable(line.removeprefix(ERROR_PREFIX))
    said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    raise PeerUnavailable(f"ended with exit code {done.returncode}: {said[-1][:200]}")


def _row(
    options: argparse.Namespace, page_size: int, order: PageOrder, num_tokens: int
) -> dict[str, Any]:
    if num_tokens % page_size:
        raise ValueError(f"--tokens {num_tokens} is not whole pages of {page_size}")
    layout = msgspec.structs.replace(LAYOUTS[options.layout], page_size=page_size)
    pool_pages = options.pool_tokens // page_size
    source, destination = (
        slots_of(
            page_table(order, num_tokens // page_size, pool_pages=pool_pages, seed=seed), page_size
        )
        for seed in (1, 2)
    )
    result = run_mooncake(
        layout,
        source,
        destination,
        num_slots=pool_pages * page_size,
        repeats=options.repeats,
        operations_per_call=None if options.one_call else QUEUE_OPERATIONS,
        say=_say,
    )
    median_s = statistics.median(result.seconds)
    giga = num_tokens * layout.bytes_per_token / 1e9
    row = {
        "page_size": page_size,
        "pages": order.value,
        "tokens": num_tokens,
        "megabytes": round(giga * 1000, 1),
        "operations": result.num_operations,
        "calls": result.num_calls,
        "seconds_median": round(median_s, 4),
        "engine_seconds_median": round(statistics.median(result.engine_seconds), 4),
        "gb_per_s": round(giga / median_s, 3),
        "gb_per_s_best": round(giga / min(result.seconds), 3),
        "load_average": round(os.getloadavg()[0], 2),
    }
    _say(f"mooncake: {row}")
    return row


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
