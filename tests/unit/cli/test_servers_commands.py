"""`streamfill servers` against the real gRPC service over a core without servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest

from router.interface import ClusterInfo, ServerInfo
from streamfill.cli.main import main
from streamfill.stream.ids import ServerId
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve

Capture = pytest.CaptureFixture[str]


@dataclass
class DrainableManager(FakeManager):
    """Its one server loses a stream each time that somebody looks."""

    num_left: list[int] = field(default_factory=lambda: [0])
    state: str = "alive"

    def info(self) -> ClusterInfo:
        info = super().info()
        num_streams = self.num_left.pop(0) if len(self.num_left) > 1 else self.num_left[0]
        servers = [
            replace(each, state=self.state, num_assigned_streams=num_streams, pool_tokens=4096)
            for each in info.servers
        ]
        return replace(info, servers=servers, num_moves={"drain": 3})

    async def drain_server(
        self, server_id: ServerId, answers_s: float | None, *, force: bool
    ) -> ServerInfo:
        self._server(server_id)
        self.state = "draining"
        return await super().drain_server(server_id, answers_s, force=force)


@pytest.fixture
def manager() -> DrainableManager:
    return DrainableManager()


@pytest.fixture
async def address(manager: DrainableManager) -> AsyncIterator[str]:
    async with serve(manager) as target:
        yield target


async def command(*words: str) -> int:
    return await asyncio.wait_for(asyncio.to_thread(main, words), STEP_S)


async def test_the_list(manager: DrainableManager, address: str, capsys: Capture) -> None:
    """A row for each server, what was moved, and whether the router is ready; by exit code too."""
    assert await command("servers", "list", "--address", address) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["prefill-0", "prefill", "alive"]
    assert "4,096" in lines[1]
    assert lines[2:] == ["streams moved between servers: 3 drain", "ready"]
    assert await command("servers", "list", "--address", address, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["servers"][0]["pool_tokens"] == 4096
    manager.ready = False
    assert await command("servers", "list", "--address", address) == 1
    assert "NOT READY: no prefill server is there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ((), ("prefill-0", 60.0, False)),
        (("--timeout", "0", "--force"), ("prefill-0", 0.0, True)),
        (("--timeout", "inf"), ("prefill-0", None, False)),
    ],
)
async def test_a_drain_is_watched(
    manager: DrainableManager,
    address: str,
    capsys: Capture,
    words: tuple[str, ...],
    call: tuple[ServerId, float | None, bool],
) -> None:
    """Until the server is empty; the router does the rest."""
    manager.num_left = [5, 5, 4, 2, 0]
    assert await command("servers", "drain", "prefill-0", "--address", address, *words) == 0
    assert manager.drain_calls == [call]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("prefill-0 takes nothing new; ")
    assert lines[-1] == "prefill-0 is empty"


async def test_a_drain_that_does_not_end(
    manager: DrainableManager, address: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1 with the number of streams that nobody else can take."""
    monkeypatch.setattr("streamfill.cli.draining.GRACE_S", 0.3)
    manager.num_left = [2]
    words = ("--timeout", "0", "--address", address)
    assert await command("servers", "drain", "prefill-0", *words) == 1
    assert "2 streams left that no other server can take" in capsys.readouterr().out


async def test_a_drain_that_somebody_takes_back(
    manager: DrainableManager, address: str, capsys: Capture
) -> None:
    """Is said, and is not empty."""
    manager.num_left = [2]
    draining = asyncio.ensure_future(command("servers", "drain", "prefill-0", "--address", address))
    while not manager.drain_calls:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    manager.state = "alive"
    assert await draining == 1
    assert "somebody took the drain back" in capsys.readouterr().out


async def test_resume(manager: DrainableManager, address: str, capsys: Capture) -> None:
    """By its id; an unknown one is exit code 2."""
    assert await command("servers", "resume", "prefill-0", "--address", address) == 0
    assert manager.resume_calls == ["prefill-0"]
    assert capsys.readouterr().out == "prefill-0 is alive\n"
    for what in ("resume", "drain"):
        assert await command("servers", what, "nobody", "--address", address) == 2
        assert "'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("timeout", ["-1", "nan", "soon"])
def test_a_time_that_is_none(timeout: str, capsys: Capture) -> None:
    """Refused before anything is connected."""
    assert main(["servers", "drain", "prefill-0", f"--timeout={timeout}"]) == 2
    assert f"--timeout = '{timeout}'" in capsys.readouterr().err
