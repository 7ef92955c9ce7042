"""The Mooncake baseline, as far as it goes without Mooncake."""

from __future__ import annotations

import subprocess

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamfill.kv_transfer import bench_mooncake
from streamfill.kv_transfer.bench_mooncake import measure_mooncake, result_of
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.mooncake_pair import (
    PairRequest,
    PairResult,
    arrival_problem,
    block_operations,
    source_tensor,
)
from streamfill.kv_transfer.page_runs import slots_of
from streamfill.loadgen.peers.errors import PeerUnavailable

_LAYOUT = KvLayout(
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    v_head_dim=4,
    dtype="bfloat16",
    item_bytes=2,
    page_size=2,
)
_NUM_PAGES = 8
_RESULT = PairResult(
    seconds=[0.3, 0.1, 0.2],
    engine_seconds=[0.2, 0.1, 0.1],
    num_runs=1,
    num_operations=4,
    num_calls=1,
)


def _request(source: list[int], destination: list[int]) -> PairRequest:
    return PairRequest(
        layout=_LAYOUT,
        num_slots=_NUM_PAGES * _LAYOUT.page_size,
        source_slots=slots_of(source, _LAYOUT.page_size),
        destination_slots=slots_of(destination, _LAYOUT.page_size),
        repeats=1,
    )


def _carried_out(request: PairRequest) -> list[Tensor]:
    """The destination's pool after the operations, read and written by address as an engine does
    it. Each tensor has a range of addresses of its own, 1,000 apart."""
    source = [source_tensor(request, index) for index in range(2 * _LAYOUT.num_layers)]
    pool = [torch.zeros_like(tensor) for tensor in source]
    operations = block_operations(
        _LAYOUT,
        request.source_slots,
        request.destination_slots,
        [1000 * index for index in range(len(source))],
        [1000 * index for index in range(len(pool))],
    )
    for read, written, length in zip(*operations, strict=True):
        (index, begin), (to_index, to_begin) = divmod(read, 1000), divmod(written, 1000)
        data = source[index].view(-1)[begin : begin + length]
        pool[to_index].view(-1)[to_begin : to_begin + length] = data
    return pool


@given(
    source=st.permutations(range(1, _NUM_PAGES)),
    destination=st.permutations(range(1, _NUM_PAGES)),
    num_pages=st.integers(1, _NUM_PAGES - 1),
)
def test_operations_carry_each_token_to_its_slot(
    source: list[int], destination: list[int], num_pages: int
) -> None:
    """All bytes of all layers are where they belong, and nowhere else."""
    request = _request(source[:num_pages], destination[:num_pages])
    assert arrival_problem(request, _carried_out(request)) is None


def test_adjacent_pages_take_one_operation_per_tensor() -> None:
    """Two layers have two tensors of keys and two of values, whose rows differ in length."""
    request = _request([1, 2, 3], [4, 5, 6])
    starts = [0, 1000, 2000, 3000]
    operations = block_operations(
        _LAYOUT, request.source_slots, request.destination_slots, starts, starts
    )
    assert operations == (
        [64, 1064, 2032, 3032],
        [256, 1256, 2128, 3128],
        [192, 192, 96, 96],
    )


def test_wrong_bytes_are_seen() -> None:
    """One bit that is not as it was sent, and one byte where nothing was sent, are told apart."""
    request = _request([1, 2], [5, 3])
    pool = _carried_out(request)
    pool[1][request.destination_slots[-1], 3] ^= 1
    assert arrival_problem(request, pool) == "tensor 1 of 4 did not arrive as it was sent"
    pool = _carried_out(request)
    pool[2][0, 0] = 1
    problem = arrival_problem(request, pool)
    assert problem == "tensor 2 of 4 was written to where nothing was sent"


def test_comparing_clears_the_pool() -> None:
    """So that what is compared next must have arrived again."""
    request = _request([1, 2], [5, 3])
    pool = _carried_out(request)
    assert arrival_problem(request, pool) is None
    assert arrival_problem(request, pool) == "tensor 0 of 4 did not arrive as it was sent"


def test_without_mooncake_one_line_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark that asked goes on without a figure."""

    def no_way(*_: object) -> None:
        raise PeerUnavailable("no package index")

    monkeypatch.setattr(bench_mooncake, "install", no_way)
    lines: list[str] = []
    measured = measure_mooncake(_LAYOUT, [2, 3], [4, 5], num_slots=16, repeats=1, say=lines.append)
    assert measured is None
    assert lines == ["mooncake is left out: no package index"]


def test_median_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of a whole transfer, the making of its operations included."""
    monkeypatch.setattr(bench_mooncake, "run_mooncake", lambda *_, **__: _RESULT)
    assert measure_mooncake(_LAYOUT, [2], [4], num_slots=8, repeats=3, say=print) == 0.2


@pytest.mark.parametrize(
    ("source", "destination", "said"),
    [
        ([2, 3], [4, 5, 6, 7], "2 source and 4 destination slots"),
        ([2, 3, 4], [2, 3, 4], "not equally many whole pages of 2"),
        ([2, 3], [16, 17], "0 to 15"),
        ([], [], "0 to 15"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    source: list[int], destination: list[int], said: str
) -> None:
    """Before anything is installed or started."""
    with pytest.raises(ValueError, match=said):
        measure_mooncake(_LAYOUT, source, destination, num_slots=16, repeats=1, say=print)


def _done(stdout: bytes, stderr: bytes = b"", code: int = 0) -> subprocess.CompletedProcess[bytes]:
    return subprocess.CompletedProcess((), code, stdout, stderr)


def test_result_is_found_among_other_lines() -> None:
    """Foreign libraries may print to the same output."""
    line = b"RESULT " + msgspec.json.encode(_RESULT)
    assert result_of(_done(b"hello\n" + line + b"\nbye\n")) == _RESULT


@pytest.mark.parametrize(
    ("done", "said"),
    [
        (_done(b"error: wrong bytes\n", code=2), "wrong bytes"),
        (_done(b"", b"first\nkilled by a fault\n", -11), "exit code -11: killed by a fault"),
        (_done(b"", b"", 1), "exit code 1: it said nothing"),
    ],
)
def test_a_run_without_result_says_why(done: subprocess.CompletedProcess[bytes], said: str) -> None:
    """The reason is the process's own, else its last words."""
    with pytest.raises(PeerUnavailable, match=said):
        result_of(done)
