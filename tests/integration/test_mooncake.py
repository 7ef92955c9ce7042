"""The Mooncake baseline with the real engine, where the peer that brings it is installed."""

from __future__ import annotations

import pytest

from streamfill.kv_transfer.bench_mooncake import run_mooncake
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.page_runs import PageOrder, page_table, slots_of
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.loadgen.peers.installer import is_installed
from streamfill.loadgen.peers.recipes import PeerName, recipe_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

_LAYOUT = KvLayout(
    num_layers=8,
    num_kv_heads=2,
    head_dim=8,
    v_head_dim=4,
    dtype="bfloat16",
    item_bytes=2,
    page_size=2,
)
_POOL_PAGES = 512


@pytest.fixture(autouse=True)
def _installed() -> None:
    """An install takes a minute or two and gigabytes, which a test does not ask for."""
    if not is_installed(recipe_of(PeerName.SGLANG_PD.value)):
        pytest.skip("`python -m streamfill.loadgen.peers install sglang-pd` was not run")


def _tables(order: PageOrder, num_pages: int) -> list[list[int]]:
    return [
        slots_of(page_table(order, num_pages, pool_pages=_POOL_PAGES, seed=seed), _LAYOUT.page_size)
        for seed in (1, 2)
    ]


def test_scattered_pages_arrive_in_several_calls() -> None:
    """More operations than the engine's queue takes, none lost; the time of each transfer is more
    than the engine's part of it."""
    source, destination = _tables(PageOrder.SCATTERED, 400)
    result = run_mooncake(
        _LAYOUT, source, destination, num_slots=2 * _POOL_PAGES, repeats=2, say=print
    )
    assert result.num_runs > 390
    assert result.num_operations == result.num_runs * 16
    assert result.num_calls == 4
    assert all(
        whole > engine > 0
        for whole, engine in zip(result.seconds, result.engine_seconds, strict=True)
    )
    assert len(result.seconds) == 2


def test_adjacent_pages_arrive_in_one_call() -> None:
    """One operation for each tensor."""
    source, destination = _tables(PageOrder.ADJACENT, 400)
    result = run_mooncake(
        _LAYOUT, source, destination, num_slots=2 * _POOL_PAGES, repeats=1, say=print
    )
    assert (result.num_operations, result.num_calls) == (16, 1)


def test_all_in_one_call_is_refused_where_the_queue_is_too_short() -> None:
    """What SGLang's request would meet; should this fail, the engine has learned to wait, and
    nothing needs to be split any more."""
    source, destination = _tables(PageOrder.SCATTERED, 400)
    with pytest.raises(PeerUnavailable, match=r"refused 6[0-9]{3} operations in one call"):
        run_mooncake(
            _LAYOUT,
            source,
            destination,
            num_slots=2 * _POOL_PAGES,
            repeats=1,
            operations_per_call=None,
            say=print,
        )
