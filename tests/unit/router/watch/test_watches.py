"""What somebody who looks at the real core sees, with fake servers around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from router.interface import OpenOptions
from router.watch import hub
from router.watch.frames import Frame
from router.watch.wish import Show, WatchWish
from streamfill.errors import ResourceExhaustedError, UnavailableError
from streamfill.messages import router_to_server as r
from streamfill.messages.common import ComputeRun, StreamAccount, StreamDecision
from tests.unit.router.cluster_for_tests import (
    PATIENCE_S,
    TestCluster,
    answer_of,
    commit_of,
    ids,
    text,
    until,
)


@pytest.fixture(autouse=True)
def fast_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty samples a second."""
    monkeypatch.setattr(hub, "SAMPLE_INTERVAL_S", 0.02)
    monkeypatch.setattr(hub, "DESCRIBE_INTERVAL_S", 0.02)


@pytest.fixture
async def cluster(tiny_model: Path) -> AsyncIterator[TestCluster]:
    """One fake server of each role."""
    async with TestCluster(tiny_model) as cluster:
        await cluster.prefill()
        await cluster.decode()
        yield cluster


@dataclass
class Seen:
    """What a page knows that applied all frames."""

    frames: AsyncGenerator[Frame, None]
    streams: dict[str, dict[str, Any]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    servers: dict[str, Any] = field(default_factory=dict)
    newest: Frame | None = None
    num_matching: int = 0

    async def look(self) -> Frame:
        """Apply one frame."""
        frame = await asyncio.wait_for(anext(self.frames), PATIENCE_S)
        self.newest = frame
        for raw in frame.streams:
            change = msgspec.json.decode(raw)
            if change.get("is_new"):
                self.streams[change["id"]] = {"facts": {}}
            known = self.streams[change["id"]]
            known["facts"].update(change.get("facts", {}))
            for name in ("verdict", "moments"):
                if name in change:
                    known[name] = change[name]
            for name in ("segments", "runs", "preemptions", "progress"):
                rows = known.setdefault(name, {})
                rows.update({row[0]: row[1:] for row in change.get(name, ())})
        if frame.selected is not None:
            self.order, self.num_matching = frame.selected.order, frame.selected.num_matching
        if frame.servers is not None:
            self.servers = {server.id: server for server in frame.servers}
        return frame

    async def look_until(self, condition: Any) -> None:
        """Apply frames until it is true."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self.look()

    def facts(self, stream_id: int) -> dict[str, Any]:
        return dict(self.streams.get(str(stream_id), {}).get("facts", {}))


def watching(cluster: TestCluster, **wish: Any) -> Any:
    return aclosing(cluster.manager.watch(WatchWish(**wish)))


async def test_a_whole_life_is_seen(cluster: TestCluster) -> None:
    """From the opening to the end: tokens, segments, runs of the account, servers, hand-off."""
    run = ComputeRun(start_age_s=0.01, end_age_s=0.005, num_tokens=4, reason="commit")
    cluster.servers[0].account = StreamAccount(
        num_computed_tokens=4,
        num_recomputed_tokens=0,
        num_reused_tokens=0,
        runs=(run,),
        preemptions=(),
    )
    async with watching(cluster) as frames:
        seen = Seen(frames)
        await seen.look()
        assert set(seen.servers) == {"prefill-0", "decode-0"}
        handle = await cluster.open(request_id="agent-1")
        await handle.append(ids(11, 12, 13))
        await seen.look_until(lambda: seen.facts(handle.stream_id).get("num_computed_tokens") == 3)
        await handle.append(ids(14))
        await handle.commit(commit_of(4))
        await answer_of(handle)
        await seen.look_until(lambda: seen.facts(handle.stream_id).get("state") == "DONE")
        stream = seen.streams[str(handle.stream_id)]
    facts, moments = stream["facts"], stream["moments"]
    assert (facts["request_id"], facts["num_known_tokens"], facts["num_output_tokens"]) == (
        "agent-1",
        4,
        4,
    )
    assert (facts["prefill_server"], facts["decode_server"]) == ("prefill-0", "decode-0")
    assert facts["handoff"] == "done"
    assert [row[0] is not None and row[1] is not None for row in stream["segments"].values()] == [
        True,
        True,
    ]
    ((start_ms, end_ms, num_tokens, reason),) = stream["runs"].values()
    assert start_ms <= end_ms
    assert (num_tokens, reason) == (4, "commit")
    times = (
        *(facts["opened_ms"], stream["segments"][0][0], stream["segments"][1][0]),
        *(moments["commit_ms"], moments["first_token_ms"], moments["newest_token_ms"]),
        facts["ended_ms"],
    )
    assert list(times) == sorted(times)


async def test_only_changes_are_sent(cluster: TestCluster) -> None:
    """A stream that nothing happens to is sent once; of a change, the fields that changed."""
    handle = await cluster.open()
    await handle.append(ids(11, 12, 13))
    other = await cluster.open()
    async with watching(cluster) as frames:
        seen = Seen(frames)
        await seen.look_until(lambda: seen.facts(handle.stream_id).get("num_computed_tokens") == 3)
        quiet = [await seen.look() for _ in range(3)]
        assert all(not frame.streams and frame.selected is None for frame in quiet)
        assert [frame.now_ms for frame in quiet] == sorted(frame.now_ms for frame in quiet)
        await other.append(ids(7))
        frame = await seen.look()
        while not frame.streams:
            frame = await seen.look()
        change = msgspec.json.decode(frame.streams[0])
        assert change["id"] == str(other.stream_id)
        assert set(change["facts"]) <= {"num_known_tokens", "num_computed_tokens"}
        assert "is_new" not in change


async def test_nobody_looks_nothing_is_done(cluster: TestCluster) -> None:
    """No sampling, no question to servers; after the last one who looked everything is dropped."""
    watches = cluster.manager._watches
    handle = await cluster.open()
    await handle.append(ids(1, 2))
    await asyncio.sleep(0.1)

    def questions() -> int:
        return sum(len(x.of_type(r.DescribeStreams)) for x in cluster.servers)

    before = questions()
    assert watches._sampling is None
    async with watching(cluster) as frames:
        seen = Seen(frames)
        await seen.look_until(lambda: questions() > before)
        assert watches.num_viewers == 1
    assert (watches.num_viewers, watches._sampling, watches._sample) == (0, None, None)
    assert not watches._timelines
    assert not watches._watched
    await asyncio.sleep(0.1)
    settled = questions()
    await asyncio.sleep(0.2)
    assert questions() == settled


async def test_what_schedulers_think_is_shown(cluster: TestCluster) -> None:
    """The decision with its reason, what is resident, and how many streams each decision has."""
    handle = await cluster.open()
    await handle.append(ids(1, 2))
    cluster.servers[0].decisions = (
        StreamDecision(
            stream_id=handle.stream_id,
            state="open",
            num_known_tokens=2,
            num_computed_tokens=1,
            num_shared_tokens=1,
            priority=0,
            idle_s=0.0,
            expected_next_s=None,
            decision="no_memory",
            reason="the KV pool had no room for it",
            victim_rank=4,
        ),
    )
    async with watching(cluster) as frames:
        seen = Seen(frames)
        await seen.look()
        key = str(handle.stream_id)
        await seen.look_until(lambda: seen.streams[key].get("verdict"))
        assert seen.streams[key]["verdict"] == {
            "server": "prefill-0",
            "decision": "no_memory",
            "reason": "the KV pool had no room for it",
            "num_resident_tokens": 1,
            "num_shared_tokens": 1,
            "victim_rank": 4,
        }
        assert seen.servers["prefill-0"].decisions == {"no_memory": 1}
        assert seen.servers["prefill-0"].policy == "fcfs"


async def test_no_text_is_shown(cluster: TestCluster) -> None:
    """Neither of the prompt nor of the answer."""
    handle = await cluster.open()
    await handle.append(text("a secret of the client"))
    await handle.commit(commit_of(3))
    tokens, _ = await answer_of(handle)
    answer = "".join(token.text for token in tokens)
    async with watching(cluster) as frames:
        frame = await Seen(frames).look()
    sent = msgspec.json.encode(frame).decode()
    assert str(handle.stream_id) in sent
    assert "secret" not in sent
    assert answer not in sent


async def test_a_late_comer_sees_what_ended_before(cluster: TestCluster) -> None:
    """With its whole timeline, and how it ended; one who looks on sees it for longer than the
    router itself remembers it."""
    handle = await cluster.open()
    await handle.append(ids(1, 2))
    await handle.cancel("enough")
    async with watching(cluster, show=Show.ENDED) as frames:
        seen = Seen(frames)
        await seen.look()
        stream = seen.streams[str(handle.stream_id)]
        assert stream["facts"]["state"] == "ABORTED"
        assert "enough" in stream["facts"]["error"]
        assert len(stream["segments"]) == 1
        cluster.manager._finished.clear()
        cluster.manager._handles.clear()
        for _ in range(3):
            await seen.look()
        assert seen.order == [str(handle.stream_id)]


async def test_ended_streams_are_bounded(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In number and in time; the oldest one goes first."""
    monkeypatch.setattr(hub, "MAX_ENDED", 3)
    handles = [await cluster.open() for _ in range(5)]
    for handle in handles[:4]:
        await handle.cancel("")
    async with watching(cluster) as frames:
        seen = Seen(frames)
        await seen.look()
        ended = {each for each in seen.order if seen.facts(int(each))["ended_ms"] is not None}
        assert ended == {str(each.stream_id) for each in handles[1:4]}
        await handles[4].cancel("")
        await seen.look_until(lambda: seen.facts(handles[4].stream_id)["ended_ms"] is not None)
        assert set(seen.order) == {str(each.stream_id) for each in handles[2:]}
        monkeypatch.setattr(hub, "ENDED_KEPT_S", 0.0)
        cluster.manager._finished.clear()
        await seen.look_until(lambda: not seen.order)


async def test_a_view_is_limited(cluster: TestCluster) -> None:
    """It has as many streams as were wished for, and says how many there are."""
    handles = [await cluster.open() for _ in range(30)]
    async with watching(cluster, limit=10) as frames:
        seen = Seen(frames)
        await seen.look()
        assert len(seen.order) == len(seen.streams) == 10
        assert seen.num_matching == len(handles)
        assert len(cluster.manager._watches._timelines) == 10


async def test_tenants_see_their_own(cluster: TestCluster) -> None:
    """Streams of others are neither sent nor counted for them."""
    for tenant in ("a", "b", "b"):
        await cluster.manager.open(OpenOptions(tenant=tenant))
    async with watching(cluster, tenant="a") as frames:
        seen = Seen(frames)
        frame = await seen.look()
        assert frame.selected is not None
        assert frame.selected.num_visible == 1
        assert [each["facts"]["tenant"] for each in seen.streams.values()] == ["a"]
        assert frame.cluster is not None
        assert not frame.cluster.sees_all


async def test_too_many_viewers_are_refused(cluster: TestCluster) -> None:
    """Of one tenant and of all; a place that became free can be taken."""
    opened: list[AsyncGenerator[Frame, None]] = []

    async def look(tenant: str | None) -> None:
        opened.append(cluster.manager.watch(WatchWish(tenant=tenant)))
        await asyncio.wait_for(anext(opened[-1]), PATIENCE_S)

    for _ in range(hub.MAX_VIEWERS_OF_TENANT):
        await look("a")
    with pytest.raises(ResourceExhaustedError, match="close one"):
        await look("a")
    while cluster.manager._watches.num_viewers < hub.MAX_VIEWERS:
        await look(None)
    with pytest.raises(ResourceExhaustedError):
        await look("b")
    await opened[0].aclose()
    await look("b")
    for frames in opened:
        await frames.aclose()
    assert cluster.manager._watches.num_viewers == 0


async def test_the_end_of_the_router_ends_the_view(cluster: TestCluster) -> None:
    """With an error that says so; later ones are refused."""
    async with watching(cluster) as frames:
        seen = Seen(frames)
        await seen.look()
        await cluster.manager.drain(0.1)
        with pytest.raises(UnavailableError, match="shutting down"):
            await seen.look_until(lambda: False)
    with pytest.raises(UnavailableError):
        await anext(cluster.manager.watch(WatchWish()))


async def test_a_bad_sample_is_survived(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The view goes on with the next one."""
    async with watching(cluster) as frames:
        seen = Seen(frames)
        await seen.look()
        with monkeypatch.context() as broken:
            broken.setattr(cluster.manager, "info", lambda: 1 / 0)
            await asyncio.sleep(0.1)
        before = seen.newest
        assert before is not None
        await until(lambda: cluster.manager._watches._sampling is not None)
        assert (await seen.look()).now_ms >= before.now_ms
        assert (await seen.look()).now_ms > before.now_ms
