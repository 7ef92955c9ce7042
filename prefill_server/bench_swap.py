"""Bandwidth of the swap engine beside one plain large copy on the same device.

``python -m prefill_server.bench_swap`` needs torch only. It prints a line per case, then ``RESULT
{…}``; docs/benchmarks/swap.md explains the keys. Each case is measured in turn with the plain copy,
so that a machine that changes its speed meets both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from prefill_server.swap import SwapEngine, block_tokens

_POOLS = 8
"""Size of the pool, in copies: large beside what is moved, as in a server."""
_CASES = ("neighbours", "scattered")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="prefill_server.bench_swap")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="a torch dtype; default: float32")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        print(f"error: --dtype = {options.dtype!r} is no dtype of torch", file=sys.stderr)
        return 2
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print(f"error: --device = {options.device!r}: torch finds no GPU here", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    rows = [_Bench(options, dtype, num_tokens).row() for num_tokens in options.tokens]
    print("RESULT", json.dumps({"device": options.device, "sizes": rows}))
    return 0


class _Bench:
    """One size."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype, num_tokens: int) -> None:
        self._device = torch.device(options.device)
        self._repeats = options.repeats
        self._page_size = options.page_size
        num_tokens = -(-num_tokens // block_tokens(options.page_size)) * block_tokens(
            options.page_size
        )
        self._num_blocks = num_tokens // block_tokens(options.page_size)
        self._num_pages = num_tokens // options.page_size
        self._pool_pages = _POOLS * self._num_pages
        shape = (self._pool_pages * options.page_size, options.heads, options.head_dim)
        self._k, self._v = (
            [torch.ones(shape, dtype=dtype, device=self._device) for _ in range(options.layers)]
            for _ in range(2)
        )
        self._num_bytes = (
            2
            * options.layers
            * self._num_pages
            * options.page_size
            * options.heads
            * options.head_dim
            * dtype.itemsize
        )
        is_gpu = self._device.type == "cuda"
        self._plain_host = torch.zeros(self._num_bytes, dtype=torch.uint8, pin_memory=is_gpu)
        self._plain_device = torch.ones(self._num_bytes, dtype=torch.uint8, device=self._device)
        self._plain_twins = self._plain_host.clone(), self._plain_device.clone()
        if is_gpu:
            self._plain_twins = self._plain_twins[0].pin_memory(), self._plain_twins[1]
            self._streams = [torch.cuda.Stream(self._device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def row(self) -> dict[str, object]:
        """All figures, in GB/s, and their ratios to the plain copy in the same direction."""
        return {"num_bytes": self._num_bytes, **{case: self._case(case) for case in _CASES}}

    def _case(self, case: str) -> dict[str, float]:
        engine = SwapEngine(
            self._k, self._v, page_size=self._page_size, num_host_blocks=2 * self._num_blocks
        )
        pages, others = self._pages(case)
        keys, other_keys = (engine.keys(self._ids(number)) for number in range(2))

        def save() -> None:
            engine.save(keys, pages)

        def restore() -> None:
            engine.restore(keys, pages)

        def at_once() -> None:
            engine.save(other_keys, others)
            engine.restore(keys, pages)

        self._time(save)  # touches host memory once
        engine.clear()
        plain_out: list[float] = []
        out: list[float] = []
        plain_in: list[float] = []
        back: list[float] = []
        both: list[float] = []
        plain_both: list[float] = []
        engine.poll()
        for _ in range(self._repeats):
            plain_out.append(self._time(lambda: self._plain_host.copy_(self._plain_device, True)))
            out.append(self._time(save))
            plain_in.append(self._time(lambda: self._plain_device.copy_(self._plain_host, True)))
            back.append(self._time(restore))
            plain_both.append(self._time(self._plain_at_once))
            both.append(self._time(at_once))
            engine.clear()
            engine.poll()
        figures = {
            "plain_out_gbps": self._speed(plain_out),
            "out_gbps": self._speed(out),
            "plain_in_gbps": self._speed(plain_in),
            "in_gbps": self._speed(back),
            "plain_at_once_gbps": 2 * self._speed(plain_both),
            "out_and_in_at_once_gbps": 2 * self._speed(both),
        }
        figures["out_ratio"] = figures["out_gbps"] / figures["plain_out_gbps"]
        figures["in_ratio"] = figures["in_gbps"] / figures["plain_in_gbps"]
        figures["at_once_ratio"] = (
            figures["out_and_in_at_once_gbps"] / figures["plain_at_once_gbps"]
        )
        figures = {name: round(value, 3) for name, value in figures.items()}
        print(f"{self._num_bytes / 1e6:8.1f} MB {case:10} {figures}", flush=True)
        return figures

    def _plain_at_once(self) -> None:
        host, device = self._plain_twins
        pairs = ((self._plain_host, self._plain_device), (device, host))
        for number, (to, source) in enumerate(pairs):
            if self._device.type == "cuda":
                with torch.cuda.stream(self._streams[number]):
                    to.copy_(source, non_blocking=True)
            else:
                to.copy_(source)

    def _speed(self, seconds: list[float]) -> float:
        giga: float = self._num_bytes / 1e9
        return giga / statistics.median(seconds)

    def _pages(self, case: str) -> tuple[Tensor, Tensor]:
        if case == "neighbours":
            order = torch.arange(self._pool_pages)
        else:
            order = torch.randperm(self._pool_pages, generator=torch.Generator().manual_seed(0))
        order = order.to(self._device)
        return order[: self._num_pages], order[self._num_pages : 2 * self._num_pages]

    def _ids(self, number: int) -> array[int]:
        return array("q", range(number, number + self._num_pages * self._page_size))

    def _time(self, work: Callable[[], object]) -> float:
        self._synchronise()
        start_s = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - start_s

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


if __name__ == "__main__":
    sys.exit(main())
