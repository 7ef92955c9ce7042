"""Which server each policy chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement import STREAM_WEIGHT_TOKENS, ServerLoad, ServerState
from router.placement.interface import (
    BlockNews,
    Choice,
    PlacementPolicy,
    PlacementReason,
    PlacementRequest,
)
from router.placement.placer import Placer
from router.placement.registry import make_placement
from streamfill.messages.common import Role
from streamfill.stream.ids import ServerId, StreamId
from streamfill.stream.prefix_blocks import block_keys

SHIPPED = ("least-loaded", "round-robin", "power-of-two", "cache-aware", "dualmap", "pull")
DOCUMENT = list(range(100, 420))


def load(server_id: str, role: Role = Role.PREFILL, **changes: Any) -> ServerLoad:
    """An idle, living server but for `changes`."""
    values: dict[str, Any] = {
        "state": ServerState.ALIVE,
        "num_streams": 0,
        "pending_tokens": 0,
        "held_tokens": 0,
        "reported_pending_tokens": 0,
        "pool_tokens": 10_000,
        **changes,
    }
    return ServerLoad(server_id=ServerId(server_id), role=role, **values)


def request(
    policy: PlacementPolicy, prompt: Sequence[int] = (), stream_id: int = 1, **changes: Any
) -> PlacementRequest:
    """What the router asks."""
    keys = block_keys(prompt, policy.block_tokens) if policy.block_tokens else ()
    values: dict[str, Any] = {"now_s": 1.0, "prompt": prompt, "keys": keys, **changes}
    return PlacementRequest(stream_id=StreamId(stream_id), **values)


_LOADS = st.lists(
    st.builds(
        load,
        st.sampled_from("abcdef"),
        st.sampled_from(Role),
        state=st.sampled_from(ServerState),
        num_streams=st.integers(0, 9),
        pending_tokens=st.integers(0, 9_000),
        held_tokens=st.integers(0, 9_000),
        pool_tokens=st.sampled_from([100, 10_000]),
        spare_tokens=st.sampled_from([None, 0, 50, 5_000]),
        has_free_slot=st.booleans(),
    ),
    unique_by=lambda each: each.server_id,
    max_size=6,
)
_QUESTIONS = st.lists(
    st.tuples(_LOADS, st.integers(0, 400), st.booleans(), st.sets(st.sampled_from("abcdef"))),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", SHIPPED)
@settings(deadline=None, max_examples=60)
@given(questions=_QUESTIONS)
def test_only_able_servers_are_chosen_and_always_the_same(name: str, questions: Any) -> None:
    """Never a dead, suspected, draining or too small one, nor one of the other role; one to avoid
    only where there is no other; none only where there is none. The same questions get the same
    answers."""
    twins = [Placer(make_placement(name, {}), name) for _ in range(2)]
    for loads, num_tokens, is_complete, avoid in questions:
        answers = {
            placer.choose(
                request(placer.policy, DOCUMENT[:num_tokens], is_complete=is_complete),
                loads,
                need_tokens=num_tokens + 1,
                avoid=avoid,
            )
            for placer in twins
        }
        able = {
            each.server_id
            for each in loads
            if each.role is Role.PREFILL
            and each.state is ServerState.ALIVE
            and each.pool_tokens > num_tokens
        }
        assert len(answers) == 1
        (chosen,) = answers
        assert (chosen is None) == (not able)
        assert chosen is None or chosen in (able - avoid or able)
        for placer in twins:
            if chosen is not None and placer.policy.block_tokens:
                keys = block_keys(DOCUMENT[:num_tokens], placer.policy.block_tokens)
                placer.note_sent(chosen, keys, 1.0)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_choice_is_the_one_that_is_told(name: str) -> None:
    """With and without why."""
    told, bare = make_placement(name, {}), make_placement(name, {})
    loads = [load("a", num_streams=1), load("b")]
    for num_tokens in (0, 40, 320):
        choice = told.decide(request(told, DOCUMENT[:num_tokens]), loads)
        assert choice.server_id == bare.choose(request(bare, DOCUMENT[:num_tokens]), loads)


# Policies by loads


def test_simple_policies_say_what_they_go_by() -> None:
    """Loads, or a rule of their own."""
    reasons = {
        name: (policy := make_placement(name, {})).decide(request(policy), [load("a")]).reason
        for name in ("least-loaded", "power-of-two", "pull", "round-robin")
    }
    assert reasons.pop("round-robin") is PlacementReason.RULE
    assert set(reasons.values()) == {PlacementReason.LOAD}


def test_round_robin_takes_turns_whoever_comes_and_goes() -> None:
    """By id, over those that are there."""
    policy = make_placement("round-robin", {})
    three = [load("b"), load("c"), load("a")]
    assert [policy.choose(request(policy), three) for _ in range(4)] == ["a", "b", "c", "a"]
    assert policy.choose(request(policy), [load("a"), load("c")]) == "c"
    assert policy.choose(request(policy), three) == "a"


def test_power_of_two_follows_its_seed_and_the_load() -> None:
    """The busiest of three is never the better of two; other seeds draw others."""
    loads = [load("a"), load("b"), load("c", num_streams=5)]

    def draw(seed: int) -> list[str]:
        policy = make_placement("power-of-two", {"seed": str(seed)})
        return [policy.choose(request(policy), loads) for _ in range(50)]

    assert draw(1) == draw(1) != draw(2)
    assert set(draw(1)) == {"a", "b"}


def test_pull_goes_on_where_a_server_is_full() -> None:
    """No room for the context, no free slot: the next one; where all are full the first."""
    policy = make_placement("pull", {"max_asked": "3"})
    full = load("a", spare_tokens=0)
    tight = load("b", num_streams=1, spare_tokens=100)
    busy = load("c", num_streams=2, has_free_slot=False)
    last = load("d", num_streams=3)

    def chosen(*loads: ServerLoad, num_tokens: int = 0, **changes: Any) -> str:
        return policy.choose(request(policy, DOCUMENT[:num_tokens], **changes), loads)

    assert chosen(full, tight, busy, last) == "b"
    assert chosen(full, tight, busy, last, num_tokens=200) == "a", "only three are asked"
    assert chosen(full, tight, last, num_tokens=200) == "d"
    assert chosen(full, tight, last, num_tokens=200, is_complete=True) == "b", "a commit fits"

    def reason(*loads: ServerLoad) -> PlacementReason:
        return policy.decide(request(policy), loads).reason

    assert reason(tight, last) is PlacementReason.LOAD
    assert reason(full, tight) is PlacementReason.ROOM
    assert reason(full, busy) is PlacementReason.FULL


# dualmap


def test_dualmap_brings_equal_beginnings_together() -> None:
    """Whatever follows; other beginnings are spread over all servers."""
    policy = make_placement("dualmap", {})
    loads = [load(name) for name in "abcde"]
    chosen = {policy.choose(request(policy, [*DOCUMENT, n]), loads) for n in range(20)}
    assert len(chosen) == 1
    others = Counter(policy.choose(request(policy, [n] * 64), loads) for n in range(400))
    assert set(others) == set("abcde")
    assert max(others.values()) < 2.5 * min(others.values())


def test_dualmap_moves_few_beginnings_when_a_server_goes() -> None:
    """Those of the one that went, and no others, where servers are idle."""
    before, after = make_placement("dualmap", {}), make_placement("dualmap", {})
    loads = [load(name) for name in "abcde"]
    for number in range(200):
        prompt = [number] * 64
        first = before.choose(request(before, prompt), loads)
        second = after.choose(request(after, prompt), loads[:-1])
        assert first in (second, "e")


def test_dualmap_weighs_affinity_against_load_and_relieves_hot_spots() -> None:
    """The home of a beginning is left for the other candidate when that is far better, and for a
    third server when both are hot."""
    policy = make_placement("dualmap", {"slack_tokens": "1000"})
    idle = {name: load(name) for name in "abcdefgh"}
    home = policy.choose(request(policy, DOCUMENT), list(idle.values()))

    def with_load(**tokens: int) -> list[ServerLoad]:
        return [load(n, pending_tokens=tokens.get(n, 0)) for n in idle]

    assert policy.choose(request(policy, DOCUMENT), with_load(**{home: 900})) == home
    other = policy.choose(request(policy, DOCUMENT), with_load(**{home: 5000}))
    assert other != home
    third = policy.choose(request(policy, DOCUMENT), with_load(**{home: 5000, other: 5000}))
    assert third not in (home, other)
    again = policy.choose(request(policy, DOCUMENT), with_load(**{home: 5000, other: 5000}))
    assert again == third, "the beginning is there now"


def test_dualmap_says_why() -> None:
    """Affinity once the beginning was somewhere, and what is found then is what was hashed."""
    policy = make_placement("dualmap", {"slack_tokens": "1000"})

    def decided(prompt: Sequence[int], **tokens: int) -> Choice:
        loads = [load(name, pending_tokens=tokens.get(name, 0)) for name in "abcdefgh"]
        return policy.decide(request(policy, prompt), loads)

    load_alone = (PlacementReason.LOAD, 0)
    assert decided(DOCUMENT[:10])[1:] == load_alone, "too little is known to hash it"
    home, *first = decided(DOCUMENT)
    assert tuple(first) == load_alone
    assert decided(DOCUMENT) == Choice(home, PlacementReason.AFFINITY, 64)
    other, *second = decided(DOCUMENT, **{home: 5000})
    assert tuple(second) == load_alone, "the other candidate"
    assert decided(DOCUMENT, **{home: 5000, other: 5000})[1:] == (PlacementReason.RELIEF, 0)


# cache-aware


def test_a_shared_document_draws_streams_until_that_costs_more() -> None:
    """The second reader goes where the first one is, although another server is idle; the server is
    left when it is behind by more than sharing saves."""
    policy = make_placement("cache-aware", {"ahead_tokens": "2048"})
    first = request(policy, DOCUMENT)
    policy.note_sent(ServerId("b"), first.keys, 1.0)
    idle = load("a")
    assert policy.choose(first, [idle, load("b", num_streams=1)]) == "b"
    saved = 2048 + len(DOCUMENT)
    assert policy.choose(first, [idle, load("b", pending_tokens=saved - 1)]) == "b"
    assert policy.choose(first, [idle, load("b", pending_tokens=saved + 1)]) == "a"


def test_cache_aware_says_why() -> None:
    """What it expects to find is whole blocks of the prompt at the server that it chose."""
    policy = make_placement("cache-aware", {"ahead_tokens": "0"})
    asked = request(policy, DOCUMENT[:100])
    assert policy.decide(asked, [load("a"), load("b")]) == Choice(
        ServerId("a"), PlacementReason.LOAD
    )
    policy.note_sent(ServerId("b"), asked.keys, 1.0)
    assert policy.decide(asked, [load("a"), load("b")]) == Choice(
        ServerId("b"), PlacementReason.AFFINITY, 96
    )
    policy.note_sent(ServerId("a"), asked.keys[:1], 1.0)
    assert policy.decide(asked, [load("a"), load("b", pending_tokens=500)]) == Choice(
        ServerId("a"), PlacementReason.RELIEF, 32
    )


def test_a_complete_prompt_saves_what_is_cached_and_no_more() -> None:
    """Nothing follows behind a commit."""
    policy = make_placement("cache-aware", {})
    policy.note_blocks(
        ServerId("b"), BlockNews(is_complete=True, stored=block_keys(DOCUMENT, 32), removed=())
    )
    whole = request(policy, DOCUMENT, is_complete=True)
    assert policy.choose(whole, [load("a"), load("b", pending_tokens=319)]) == "b"
    assert policy.choose(whole, [load("a"), load("b", pending_tokens=321)]) == "a"


def test_a_context_that_goes_its_own_way_saves_its_beginning_only() -> None:
    """Its last piece is not there, so what follows will not be either."""
    policy = make_placement("cache-aware", {})
    policy.note_sent(ServerId("b"), block_keys(DOCUMENT, 32), 1.0)
    own = request(policy, [*DOCUMENT, *range(5000, 5064)])
    assert policy.choose(own, [load("a"), load("b", pending_tokens=319)]) == "b"
    assert policy.choose(own, [load("a"), load("b", pending_tokens=STREAM_WEIGHT_TOKENS)]) == "a"


def test_namespaces_share_nothing() -> None:
    """What one tenant has cached draws no other one."""
    policy = make_placement("cache-aware", {})
    policy.note_sent(ServerId("b"), block_keys(DOCUMENT, 32, "one"), 1.0)
    loads = [load("a"), load("b", pending_tokens=10)]
    for namespace, expected in (("one", "b"), ("two", "a"), ("", "a")):
        keys = block_keys(DOCUMENT, 32, namespace)
        asked = request(policy, DOCUMENT, keys=keys, namespace=namespace)
        assert policy.choose(asked, loads) == expected


def test_a_lost_server_has_nothing() -> None:
    """Its successor starts with an empty cache."""
    policy = make_placement("cache-aware", {})
    asked = request(policy, DOCUMENT)
    policy.note_sent(ServerId("b"), asked.keys, 1.0)
    policy.note_lost(ServerId("b"))
    assert policy.choose(asked, [load("a"), load("b", pending_tokens=10)]) == "a"


def test_instructions_that_go_on_differently_draw_nobody_for_long() -> None:
    """After some prompts that went on otherwise they save their own length and hardly more; a
    document that all read on keeps its drawing power."""
    policy = make_placement("cache-aware", {"ahead_tokens": "2000"})
    behind = load("b", pending_tokens=len(DOCUMENT) + 500)

    def chosen() -> str:
        return policy.choose(request(policy, DOCUMENT), [load("a"), behind])

    for _ in range(8):
        policy.note_sent(ServerId("b"), block_keys([*DOCUMENT, *range(32)], 32), 1.0)
    assert chosen() == "b"
    for number in range(40):
        keys = block_keys([*DOCUMENT, *[number] * 32], 32)
        policy.note_sent(ServerId("b"), keys, 1.0)
    assert chosen() == "a"
