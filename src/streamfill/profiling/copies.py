"""Points of the copy curves: swap engine and KV transport, with torch and without sglang."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial

from streamfill.errors import StreamfillError
from streamfill.kv_transfer.layout import KvLayout
from streamfill.profiling.fits import Point

HANDOFF_TIMEOUT_S = 300.0


class MeasurementError(StreamfillError):
    """A measurement did not come to an end."""


def measure_swap(
    layout: KvLayout, device: str, num_tokens: Sequence[int], repeats: int
) -> tuple[list[Point], list[Point]]:
    """Points of swap out and swap in: each size in blocks that are not neighbours, as eviction
    leaves them.

    Raises:
        MeasurementError: the memory cannot be had.
    """
    import torch

    from prefill_server.swap import SwapEngine, block_tokens

    page_size, block = layout.page_size, block_tokens(layout.page_size)
    pages = {size: max(1, size // block) * (block // page_size) for size in num_tokens}
    num_pages = 2 * max(pages.values())
    shape = (num_pages * page_size, layout.num_kv_heads)
    dtype = getattr(torch, layout.dtype)
    try:
        k, v = (
            [
                torch.zeros((*shape, dim), dtype=dtype, device=device)
                for _ in range(layout.num_layers)
            ]
            for dim in (layout.head_dim, layout.v_head_dim)
        )
        num_blocks = num_pages * page_size // block
        engine = SwapEngine(k, v, page_size=page_size, num_host_blocks=num_blocks)
    except RuntimeError as error:
        raise MeasurementError(f"no memory for the swap measurement: {error}") from error
    # Blocks anywhere, each of neighbouring pages, as they are allocated.
    block_pages = block // page_size
    blocks = torch.randperm(num_pages // block_pages, generator=torch.Generator().manual_seed(0))
    order = (blocks[:, None] * block_pages + torch.arange(block_pages)).flatten().to(device)
    out: list[Point] = []
    back: list[Point] = []
    for repeat in range(repeats + 1):
        for size, number in pages.items():
            keys = engine.keys(array("q", range(size, size + number * page_size)))
            out_s = _timed(partial(engine.save, keys, order[:number]), engine.wait)
            in_s = _timed(partial(engine.restore, keys, order[-number:]), engine.wait)
            engine.clear()
            if repeat:  # the first one touches the memory
                x = {"num_bytes": float(number * page_size * layout.bytes_per_token)}
                out.append(Point(x=x, seconds=out_s))
                back.append(Point(x=x, seconds=in_s))
    return out, back


def measure_handoff(device: str, num_tokens: Sequence[int], repeats: int) -> list[Point]:
    """Points of the transport between two processes of this machine: over loopback, and on a
    machine with several GPUs from one to another.

    Args:
        device: ``cpu`` or ``cuda``.
        num_tokens: of SmolLM2-135M; what counts is the number of bytes.

    Raises:
        MeasurementError: it failed or took too long.
    """
    import torch

    receiver = 1 if device == "cuda" and torch.cuda.device_count() > 1 else 0
    command = [
        *(sys.executable, "-m", "streamfill.kv_transfer.bench"),
        *("--device", device, "--gpus", "0", str(receiver)),
        *("--repeats", str(repeats + 1), "--tokens", *map(str, num_tokens)),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=HANDOFF_TIMEOUT_S, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise MeasurementError(f"the hand-off could not be measured: {detail[-300:]}") from error
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    rows = json.loads(line.removeprefix("RESULT "))["sizes"]
    return [
        Point(
            x={"num_bytes": row["megabytes"] * 1e6},
            seconds=row["megabytes"] / 1000 / row["transport_median"],
        )
        for row in rows
    ]


def _timed(work: Callable[[], object], wait: Callable[[], None]) -> float:
    wait()
    start_s = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start_s
