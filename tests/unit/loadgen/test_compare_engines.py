"""Peers as engines of a comparison."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from streamfill.cli.bench_engines import Engines
from streamfill.config import ClusterConfig
from streamfill.launcher.cluster import StoppedError
from streamfill.launcher.signals import StopRequest
from streamfill.loadgen import peers
from streamfill.loadgen.cluster_target import OwnCluster
from streamfill.loadgen.peers import PeerUnavailable
from streamfill.loadgen.target import Target
from streamfill.loadgen.targets.fake import FakeTarget


class Peer:
    """Stands for ``running_peer``."""

    def __init__(self) -> None:
        self.fake = FakeTarget()
        self.folder = Path()
        self.threads = 0
        self.is_running = False
        self.starting: asyncio.Event | None = None
        """Set once it starts, which then never ends."""

    @asynccontextmanager
    async def run(
        self,
        name: str,
        *,
        model_path: Path,
        threads: int,
        run_dir: Path,
        say: Callable[[str], None],
    ) -> AsyncIterator[Target]:
        self.folder, self.threads, self.is_running = run_dir, threads, True
        try:
            if self.starting is not None:
                self.starting.set()
                await asyncio.Event().wait()
            yield self.fake
        finally:
            self.is_running = False


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Peer:
    made = Peer()
    monkeypatch.setattr(peers, "running_peer", made.run)
    return made


def engines(stop: StopRequest, said: list[str] | None = None) -> Engines:
    own = OwnCluster(config=ClusterConfig(), model_path=Path("/model"))
    said = [] if said is None else said
    return Engines(own, peer_threads=3, stop=stop, say=said.append)


async def test_a_peer_is_given_out_warm_and_ended(peer: Peer) -> None:
    """It has answered a request and is cold again; afterwards nothing of it is left."""
    async with engines(StopRequest()).open("vllm") as opened:
        assert (peer.is_running, peer.threads) == (True, 3)
        assert [sent.kind for sent in peer.fake.sent] == ["generate"]
        assert peer.fake.num_emptied == 1
        assert opened.facts.model == "fake"
    assert not peer.is_running
    assert not peer.folder.exists()


def break_down() -> None:
    raise PeerUnavailable("gone")


async def test_logs_of_a_peer_that_broke_down_are_kept(peer: Peer) -> None:
    """Their folder is named, and the error comes through."""
    said: list[str] = []
    with pytest.raises(PeerUnavailable):
        async with engines(StopRequest(), said).open("vllm"):
            break_down()
    assert peer.folder.exists()
    assert str(peer.folder) in said[-1]
    peer.folder.rmdir()


async def test_a_signal_ends_the_start_of_a_peer(peer: Peer) -> None:
    """Ctrl-C while a peer starts ends it at once, and the task goes on with a StoppedError."""
    stop = StopRequest()
    peer.starting = asyncio.Event()

    async def signal() -> None:
        assert peer.starting is not None
        await peer.starting.wait()
        stop.note()

    signalling = asyncio.create_task(signal())
    with pytest.raises(StoppedError):
        async with engines(stop).open("vllm"):
            pytest.fail("it never starts")
    await signalling
    assert not peer.is_running
    assert not peer.folder.exists()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_signal_while_a_peer_runs_does_not_cancel(peer: Peer) -> None:
    """Once a peer is there, a signal is left to whoever uses it."""
    stop = StopRequest()
    async with engines(stop).open("vllm"):
        stop.note()
        await asyncio.sleep(0.01)
    assert not peer.folder.exists()
