"""The kernels that copy pages of all layers at once: in Triton's interpreter, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from prefill_server.page_kernels import PageBlocks

WIDTHS = {
    "equal": [64, 64, 64],
    "keys wider than values": [3000 * 8, 16],
    "no words": [5, 7],
}


def check(widths: list[int]) -> bool:
    """Pages come out and go in again, and nothing else is touched. Returns whether by kernel."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        torch.randint(0, 256, (20, width), dtype=torch.uint8, generator=generator)
        for width in widths
    ]
    before = [layer.clone() for layer in layers]
    blocks = PageBlocks(layers)
    order = torch.randperm(20, generator=generator)
    pages, to = order[:10], order[10:]
    block = torch.zeros(10 * blocks.page_bytes, dtype=torch.uint8)
    blocks.gather(pages, block)
    assert torch.equal(block.view(10, -1), torch.cat([layer[pages] for layer in before], 1))
    blocks.scatter(block, to)
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer[to], old[pages])
        assert torch.equal(layer[pages], old[pages])
    return blocks.by_kernel


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_without_kernels(widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_server.page_kernels.triton", None)
    assert not check(widths)


def test_with_kernels() -> None:
    """In a process of its own: Triton looks at the variable when it is imported."""
    pytest.importorskip("triton")
    script = (
        "from tests.unit.prefill_server.test_page_kernels import WIDTHS, check\n"
        "print([check(widths) for widths in WIDTHS.values()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[True, True, False]", done.stderr
