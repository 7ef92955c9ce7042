"""Who is taken from first, and how: the price of each victim, evaluated at the victim."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_server.host_index import HostIndex
from streamfill.messages.control import (
    PlanEntry,
    PreemptionAction,
    PreemptionMode,
    Residency,
    StreamTelemetry,
)
from streamfill.preemption.costs import BUILT_IN, CopyCost, CostModel, RecomputeCost
from streamfill.preemption.rule import Pricing, expected_idle_s, price_of, rank_victims
from streamfill.preemption.standing import streams_to_save

KEEP, RECOMPUTE, SWAP = PreemptionAction.KEEP, PreemptionAction.RECOMPUTE, PreemptionAction.SWAP


def _stream(stream_id: int = 1, computed: int = 1000, **fields: object) -> StreamTelemetry:
    values: dict[str, object] = {
        "num_known_tokens": computed,
        "num_computed_tokens": computed,
        "residency": Residency.DEVICE,
        "committed": False,
        "active": False,
        "idle_s": 1.0,
        **fields,
    }
    return StreamTelemetry(stream_id=stream_id, **values)  # type: ignore[arg-type]


def _pricing(
    mode: PreemptionMode = PreemptionMode.AUTO,
    room: int = 10**6,
    costs: CostModel = BUILT_IN["cpu"],
) -> Pricing:
    return Pricing(mode=mode, costs=costs, bytes_per_token=46_080, free_host_tokens=room)


def _ids(entries: tuple[PlanEntry, ...]) -> list[int]:
    return [entry.stream_id for entry in entries]


def test_cheap_copies_are_taken() -> None:
    price = price_of(_stream(), _pricing())
    assert price.action is SWAP
    assert price.cost_s < BUILT_IN["cpu"].recompute.seconds(1000)


def test_dear_copies_are_not() -> None:
    slow = CopyCost(fixed_s=1.0, per_byte_s=1e-6)
    costs = CostModel(
        recompute=RecomputeCost(fixed_s=0.0, per_token_s=1e-4),
        swap_out=slow,
        swap_in=slow,
        copies_overlap=False,
    )
    assert price_of(_stream(), _pricing(costs=costs)).action is RECOMPUTE
    assert price_of(_stream(), _pricing(PreemptionMode.SWAP, costs=costs)).action is SWAP


def test_idle_time_hides_copies_that_run_beside_the_engine() -> None:
    costs = BUILT_IN["cuda"]
    hidden = price_of(_stream(expected_next_s=10.0), _pricing(costs=costs))
    assert (hidden.action, hidden.cost_s) == (SWAP, 0.0)
    large = _stream(computed=100_000, expected_next_s=0.1)
    seen = price_of(large, _pricing(costs=costs))
    num_bytes = 100_000 * 46_080
    copies_s = costs.swap_out.seconds(num_bytes) + costs.swap_in.seconds(num_bytes)
    assert seen.action is SWAP
    assert seen.cost_s == pytest.approx(copies_s - 0.1)


def test_full_host_memory_means_recomputing() -> None:
    assert price_of(_stream(), _pricing(room=999)).action is RECOMPUTE
    assert price_of(_stream(), _pricing(room=1000)).action is SWAP
    assert price_of(_stream(num_saved_tokens=500), _pricing(room=999)).action is RECOMPUTE


def test_copies_that_are_there_take_room_when_their_kv_is_taken() -> None:
    """As host memory has it: until then they count as room, since others may have it."""
    index = HostIndex(num_blocks=4)
    first, second = ([bytes([name, number]) for number in range(4)] for name in b"ab")
    index.put(first, is_resident=True)
    assert index.num_spare == 4
    room = index.num_spare * 250
    streams = [_stream(1, num_saved_tokens=1000, expected_next_s=60.0), _stream(2)]
    entries = rank_victims(streams, _pricing(room=room))
    assert [(entry.stream_id, entry.action) for entry in entries] == [(1, SWAP), (2, RECOMPUTE)]
    assert streams_to_save(entries, streams, _pricing(room=room)) == {1}
    index.put(first)  # it is taken
    assert index.put(second) == []


def test_a_shared_prefix_is_neither_freed_nor_computed_again() -> None:
    price = price_of(_stream(num_shared_tokens=900), _pricing(PreemptionMode.RECOMPUTE))
    assert price.num_freed_tokens == 100
    assert price.cost_s == BUILT_IN["cpu"].recompute.seconds(100, 900)


def test_what_frees_nothing_goes_last() -> None:
    shared, own = _stream(1, num_shared_tokens=1000, idle_s=99.0), _stream(2)
    entries = rank_victims([shared, own], _pricing())
    assert _ids(entries) == [2, 1]
    assert entries[1].reason == "frees nothing"


def test_the_longer_a_stream_stays_away_the_sooner_it_gives() -> None:
    soon, late = _stream(1, expected_next_s=0.2), _stream(2, expected_next_s=20.0)
    assert _ids(rank_victims([soon, late], _pricing())) == [2, 1]


def test_a_copy_that_is_there_already_makes_a_cheaper_victim() -> None:
    fresh, saved = _stream(1), _stream(2, num_saved_tokens=1000)
    assert _ids(rank_victims([fresh, saved], _pricing())) == [2, 1]


def test_nobody_is_preempted_twice_in_a_row_while_another_can_be() -> None:
    again, other = _stream(1, was_preempted=True, expected_next_s=60.0), _stream(2)
    assert _ids(rank_victims([again, other], _pricing())) == [2, 1]


def test_host_memory_goes_to_the_first() -> None:
    streams = [_stream(number, expected_next_s=10.0 / number) for number in (1, 2, 3)]
    actions = [entry.action for entry in rank_victims(streams, _pricing(room=2000))]
    assert actions == [SWAP, SWAP, RECOMPUTE]


def test_no_mode_no_ranking() -> None:
    assert rank_victims([_stream()], _pricing(PreemptionMode.NONE)) == ()


def test_streams_to_keep_are_saved_where_a_copy_is_cheaper() -> None:
    streams = [_stream(1), _stream(2, committed=True), _stream(3, active=True)]
    pricing = _pricing()
    assert streams_to_save(rank_victims(streams, pricing), streams, pricing) == {1, 2, 3}
    pricing = _pricing(PreemptionMode.RECOMPUTE)
    assert streams_to_save(rank_victims(streams, pricing), streams, pricing) == frozenset()


@pytest.mark.parametrize(
    ("expected_next_s", "idle_s", "result"),
    [(None, 0.1, 1.0), (None, 8.0, 8.0), (3.0, 1.0, 3.0), (-2.0, 4.0, 2.0), (0.0, 0.0, 0.05)],
)
def test_expected_idle_time(expected_next_s: float | None, idle_s: float, result: float) -> None:
    stream = _stream(expected_next_s=expected_next_s, idle_s=idle_s)
    assert expected_idle_s(stream) == pytest.approx(result)


_streams = st.lists(
    st.builds(
        _stream,
        st.integers(1, 30),
        st.integers(0, 3000),
        num_shared_tokens=st.integers(0, 3000),
        num_saved_tokens=st.integers(0, 3000),
        expected_next_s=st.none() | st.floats(-50, 50),
        was_preempted=st.booleans(),
        committed=st.booleans(),
        active=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda stream: stream.stream_id,
)


@given(
    _streams,
    st.sampled_from(PreemptionMode),
    st.integers(0, 5000),
    st.sampled_from(["cpu", "cuda"]),
)
def test_copies_never_take_more_host_memory_than_there_is(
    streams: list[StreamTelemetry], mode: PreemptionMode, room: int, platform: str
) -> None:
    pricing = _pricing(mode, room, BUILT_IN[platform])
    entries = rank_victims(streams, pricing)
    saved = streams_to_save(entries, streams, pricing)
    by_id = {stream.stream_id: stream for stream in streams}
    held = sum(price_of(by_id[stream_id], pricing).num_host_tokens for stream_id in saved)
    assert held <= room
    for entry in entries:
        stream = by_id[entry.stream_id]
        assert (entry.action is KEEP) == (stream.committed or stream.active)
        assert entry.cost_s >= 0.0
