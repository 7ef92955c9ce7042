"""The decode server is chosen before the commit, so that KV can go there ahead of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.placement import PREFER_SLACK, ServerLoad, ServerState, choose_server
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Role
from streamfill.stream.ids import ServerId
from tests.unit.router.cluster_for_tests import (
    TestCluster,
    answer_of,
    commit_of,
    fast_timing,
    ids,
    until,
)
from tests.unit.router.fake_server import FakeServer, expected_answer

PROMPT = [20, 21, 22, 23]


@pytest.fixture
async def cluster(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestCluster]:
    fast_timing(monkeypatch)
    async with TestCluster(tiny_model) as started:
        yield started


def _targets(prefill: FakeServer) -> list[str]:
    """Decode servers that were announced, in order."""
    return [message.peer.server_id for message in prefill.of_type(r.PushTo)]


def _handoffs(prefill: FakeServer) -> list[str | None]:
    commits = prefill.of_type(r.Commit)
    return [None if commit.handoff is None else commit.handoff.server_id for commit in commits]


async def test_the_announced_server_gets_the_answer(cluster: TestCluster) -> None:
    """Its share of the load is reserved from then on, so streams are spread; it goes back when the
    stream ends."""
    prefill, decodes = await cluster.prefill(), [await cluster.decode(n) for n in range(2)]
    first, second = await cluster.open(), await cluster.open()
    for handle in (first, second):
        await handle.append(ids(*PROMPT))
    await until(lambda: len(_targets(prefill)) == 2)
    assert sorted(_targets(prefill)) == ["decode-0", "decode-1"]
    order = [type(message) for message in prefill.received]
    assert order.index(r.PushTo) > order.index(r.OpenStream)
    for handle in (second, first):
        await handle.commit(commit_of(4))
        tokens, done = await answer_of(handle)
        expected = expected_answer(PROMPT, 4, cluster.vocab_size)
        assert [token.token_id for token in tokens] == expected
        assert done.handoff == "done"
    assert _handoffs(prefill) == list(reversed(_targets(prefill)))
    assert len(decodes) == 2
    await until(lambda: not len(cluster.manager._cluster.cancels))
    cluster.assert_no_load()


async def test_a_cancelled_stream_gives_its_share_back(cluster: TestCluster) -> None:
    """Although it never came to the decode server."""
    prefill, _ = await cluster.prefill(), await cluster.decode()
    handle = await cluster.open()
    await until(lambda: _targets(prefill) == ["decode-0"])
    await handle.cancel("enough")
    await until(lambda: not len(cluster.manager._cluster.cancels))
    cluster.assert_no_load()


@pytest.mark.parametrize("how", ["dies", "drains"])
async def test_another_one_is_announced_when_it_goes(cluster: TestCluster, how: str) -> None:
    """Before the commit; the answer goes there."""
    prefill = await cluster.prefill()
    decodes = {name: await cluster.decode(n) for n, name in enumerate(("decode-0", "decode-1"))}
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await until(lambda: len(_targets(prefill)) == 1)
    (gone,) = _targets(prefill)
    if how == "dies":
        await cluster.kill(decodes[gone])
    else:
        await decodes[gone].send(s.Draining(server_id=gone))
    await until(lambda: len(_targets(prefill)) == 2)
    other = _targets(prefill)[1]
    assert other != gone
    await handle.commit(commit_of(4))
    _, done = await answer_of(handle)
    assert (done.decode_server, done.handoff) == (other, "done")
    assert done.num_attempts == 1


async def test_a_decode_server_that_comes_later_is_announced(cluster: TestCluster) -> None:
    """To streams that are open already."""
    prefill = await cluster.prefill()
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    assert _targets(prefill) == []
    await cluster.decode()
    await until(lambda: _targets(prefill) == ["decode-0"])
    await handle.commit(commit_of(4))
    assert (await answer_of(handle))[1].decode_server == "decode-0"


async def test_a_new_prefill_server_is_told_too(cluster: TestCluster) -> None:
    """When the first one died."""
    prefills = {f"prefill-{n}": await cluster.prefill(n) for n in range(2)}
    await cluster.decode()
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await until(lambda: any(_targets(server) for server in prefills.values()))
    (old,) = [name for name, server in prefills.items() if _targets(server)]
    await cluster.kill(prefills.pop(old))
    (left,) = prefills.values()
    await until(lambda: _targets(left) == ["decode-0"])
    await handle.commit(commit_of(2))
    assert (await answer_of(handle))[1].handoff == "done"


def _load(server_id: str, held_tokens: int, state: ServerState = ServerState.ALIVE) -> ServerLoad:
    return ServerLoad(
        server_id=ServerId(server_id),
        role=Role.DECODE,
        state=state,
        num_streams=0,
        pending_tokens=0,
        held_tokens=held_tokens,
        reported_pending_tokens=0,
        pool_tokens=1000,
    )


def test_a_server_that_has_part_of_the_stream_is_preferred() -> None:
    """Unless another is emptier by more than that is worth, or it failed, or cannot."""
    slack = round(PREFER_SLACK[Role.DECODE] * 1000)
    preferred = ServerId("b")
    near, far = _load("b", slack), _load("b", slack + 100)
    best = _load("a", 0)
    assert choose_server([best, near], Role.DECODE, prefer=preferred) == "b"
    assert choose_server([best, far], Role.DECODE, prefer=preferred) == "a"
    assert choose_server([best, near], Role.DECODE, prefer=preferred, avoid=[preferred]) == "a"
    suspect = _load("b", 0, ServerState.SUSPECT)
    assert choose_server([best, suspect], Role.DECODE, prefer=preferred) == "a"
