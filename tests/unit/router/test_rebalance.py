"""Who moves from a busy server to an idle one: properties of the rule, by its own cost model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.rebalance import (
    HotWatch,
    MovableStream,
    RebalanceLimits,
    ServerBacklog,
    after_move,
    is_hot,
    plan_moves,
)
from router.rebalancer import Speeds
from streamfill.stream.ids import ServerId, StreamId

LIMITS = RebalanceLimits()
A, B, C = ServerId("a"), ServerId("b"), ServerId("c")


def server(
    name: ServerId, backlog: int, speed: float = 1000.0, room: int = 10**9, pool: int = 10**9
) -> ServerBacklog:
    return ServerBacklog(
        server_id=name,
        backlog_tokens=backlog,
        tokens_per_s=speed,
        room_tokens=room,
        pool_tokens=pool,
    )


def stream(
    number: int,
    pending: int,
    computed: int = 0,
    *,
    on: ServerId = A,
    moves: int = 0,
    rested: float = 1e9,
) -> MovableStream:
    return MovableStream(
        stream_id=StreamId(number),
        server_id=on,
        num_tokens=pending + computed,
        num_computed_tokens=computed,
        num_moves=moves,
        rested_s=rested,
    )


def moved(servers: list[ServerBacklog], streams: list[MovableStream]) -> list[int]:
    return [move.stream_id for move in plan_moves(servers, streams, {A, B, C}, LIMITS)]


def test_what_waits_longest_for_least_moves() -> None:
    """The largest context of which nothing is computed first, until both are about as busy."""
    streams = [stream(1, 1000), stream(2, 3000), stream(3, 2000, 900), stream(4, 0, 500)]
    (first, *rest) = plan_moves([server(A, 8000), server(B, 0)], streams, {A}, LIMITS)
    assert (first.stream_id, first.source, first.target) == (2, A, B)
    assert (first.avoided_s, first.cost_s) == (5.0, 0.0)
    assert rest == []  # 5 s there, 3 s here: not worth it any more
    assert first.why == "b is through with it 5.00 s sooner than a, for 0.00 s of computing again"


@pytest.mark.parametrize(
    ("servers", "streams"),
    [
        ([server(A, 8000)], [stream(1, 3000)]),
        ([server(A, 900), server(B, 0)], [stream(1, 300)]),
        ([server(A, 9000), server(B, 5000)], [stream(1, 300)]),
        ([server(A, 8000), server(B, 0)], [stream(1, 8000)]),
        ([server(A, 8000), server(B, 0)], [stream(1, 100, 3500)]),
        ([server(A, 8000), server(B, 0)], [stream(1, 0, 100)]),
        ([server(A, 8000), server(B, 0)], [stream(1, 3000, on=B)]),
        ([server(A, 8000), server(B, 0)], [stream(1, 3000, moves=LIMITS.max_moves)]),
        ([server(A, 8000), server(B, 0)], [stream(1, 3000, rested=LIMITS.rest_s - 1)]),
        ([server(A, 8000), server(B, 0, room=2999)], [stream(1, 3000)]),
        ([server(A, 8000), server(B, 0, pool=3000)], [stream(1, 3000)]),
        ([server(A, 8000), server(B, 0, speed=300)], [stream(1, 3000)]),
    ],
    ids=[
        *("nowhere to go", "a short wait", "both are busy", "nobody is ahead of it"),
        *("much is computed", "nothing to compute", "it is elsewhere", "moved often"),
        *("moved just now", "no room", "a small pool", "a slow server"),
    ],
)
def test_who_stays(servers: list[ServerBacklog], streams: list[MovableStream]) -> None:
    """Each for a reason of its own; the stream of 3,000 tokens moves without it."""
    assert moved(servers, streams) == []
    assert moved([server(A, 8000), server(B, 0)], [stream(1, 3000)]) == [1]


def test_a_round_is_bounded() -> None:
    """However many wait."""
    streams = [stream(n, 100) for n in range(100)]
    assert len(moved([server(A, 100_000), server(B, 0)], streams)) == LIMITS.max_per_round


def test_a_server_is_hot_only_after_a_while() -> None:
    """One look at which it was not, and the time starts anew; both thresholds count."""
    watch = HotWatch(LIMITS)
    hot, cool = [server(A, 5000), server(B, 0)], [server(A, 900), server(B, 0)]
    assert watch.look(hot, 10.0) == frozenset()
    assert watch.look(hot, 10.9) == frozenset()
    assert watch.look(hot, 11.0) == {A}
    assert watch.look(cool, 11.1) == frozenset()
    assert watch.look(hot, 11.2) == frozenset()
    assert watch.look(hot, 12.2) == {A}
    assert watch.look([server(A, 5000), server(B, 2600)], 12.3) == frozenset()


def test_speeds_are_measured_while_there_is_work() -> None:
    """Idle times do not count, long steps do, and a restarted server is measured anew."""
    speeds = Speeds()
    assert speeds.of(A) is None
    for at_s, computed, pending in ((0, 0, 500), (1, 0, 500), (2, 1000, 500), (3, 1500, 0)):
        speeds.look(A, computed, pending, float(at_s))
    assert speeds.of(A) == 500.0
    speeds.look(A, 1500, 10, 100.0)
    speeds.look(A, 2500, 10, 101.0)
    assert speeds.of(A) == 750.0  # half of it is the newest
    speeds.look(A, 5, 10, 102.0)
    speeds.look(A, 5, 10, 103.0)
    assert speeds.of(A) == 750.0
    assert speeds.of(B) == 750.0  # never busy
    speeds.keep([B])
    assert speeds.of(B) is None


servers_st = st.lists(
    st.builds(
        lambda backlog, speed, room, pool: (backlog, speed, room, pool),
        st.integers(0, 50_000),
        st.sampled_from([200.0, 1000.0, 1500.0, 20_000.0]),
        st.integers(0, 60_000),
        st.integers(100, 60_000),
    ),
    min_size=1,
    max_size=5,
).map(lambda rows: [server(ServerId(f"s{n}"), *row) for n, row in enumerate(rows)])


@st.composite
def situations(
    draw: st.DrawFn,
) -> tuple[list[ServerBacklog], list[MovableStream]]:
    """Servers, each with at least the backlog of its streams."""
    servers = draw(servers_st)
    streams = [
        stream(
            number,
            draw(st.integers(0, 4000)),
            draw(st.integers(0, 4000)),
            on=draw(st.sampled_from([each.server_id for each in servers])),
            moves=draw(st.integers(0, 3)),
            rested=draw(st.sampled_from([0.0, 9.0, 11.0, float("inf")])),
        )
        for number in range(draw(st.integers(0, 12)))
    ]
    least = {
        each.server_id: sum(x.num_pending_tokens for x in streams if x.server_id == each.server_id)
        for each in servers
    }
    return [
        server(
            x.server_id,
            x.backlog_tokens + least[x.server_id],
            x.tokens_per_s,
            x.room_tokens,
            x.pool_tokens,
        )
        for x in servers
    ], streams


@given(situations())
@settings(max_examples=300, deadline=None)
def test_no_move_makes_anything_worse(
    situation: tuple[list[ServerBacklog], list[MovableStream]],
) -> None:
    """By the cost model: the longest wait never grows, each move pays for what it costs and fits,
    there are few of them, and each stream moves at most once."""
    servers, streams = situation
    now = {each.server_id: each for each in servers}
    by_id = {each.stream_id: each for each in streams}
    moves = plan_moves(servers, streams, now, LIMITS)
    assert len(moves) <= LIMITS.max_per_round
    assert len({move.stream_id for move in moves}) == len(moves)
    for move in moves:
        one = by_id[move.stream_id]
        source, target = now[move.source], now[move.target]
        assert one.server_id == move.source != move.target
        assert one.num_moves < LIMITS.max_moves
        assert one.num_tokens <= target.room_tokens
        assert is_hot(source.wait_s, target.wait_s, LIMITS)
        longest = max(each.wait_s for each in now.values())
        left, come = after_move(source, target, one)
        now |= {move.source: left, move.target: come}
        assert max(each.wait_s for each in now.values()) <= longest
        assert come.wait_s <= left.wait_s < source.wait_s
        assert move.avoided_s == pytest.approx(source.wait_s - come.wait_s)
        assert move.avoided_s >= max(LIMITS.min_avoided_s, LIMITS.cost_factor * move.cost_s)


@given(situations())
@settings(max_examples=300, deadline=None)
def test_nothing_is_moved_back(
    situation: tuple[list[ServerBacklog], list[MovableStream]],
) -> None:
    """With nothing computed and nothing new, rounds end, and no stream ever comes back to a server
    that it left, even if it might move again at once and as often as it likes."""
    servers, streams = situation
    eager = RebalanceLimits(rest_s=0.0, max_moves=10**6)
    now = {each.server_id: each for each in servers}
    places = {each.stream_id: each for each in streams}
    left: dict[int, set[str]] = {each.stream_id: {each.server_id} for each in streams}
    for _ in range(200):
        moves = plan_moves(now.values(), places.values(), now, eager)
        if not moves:
            break
        for move in moves:
            one = places[move.stream_id]
            source, target = after_move(now[move.source], now[move.target], one)
            now |= {move.source: source, move.target: target}
            assert move.target not in left[move.stream_id], "it was there before"
            left[move.stream_id].add(move.target)
            places[move.stream_id] = stream(
                move.stream_id, one.num_tokens, on=move.target, moves=one.num_moves + 1
            )
    assert not plan_moves(now.values(), places.values(), now, eager)
