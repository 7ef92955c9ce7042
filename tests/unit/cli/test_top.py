"""`streamfill top` as a user runs it: once, into a file, and on a terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from router.interface import ServerStreams
from streamfill.cli.main import main
from streamfill.messages.common import Role, StreamDecision
from streamfill.stream.ids import ServerId
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    "TERM": "xterm-256color",
    "COLUMNS": "160",
    "LINES": "40",
}
PATIENCE_S = 30.0
AS_A_SHELL_STARTS_IT = (
    "import fcntl, os, sys, termios\n"
    "os.setsid()\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.argv[1], sys.argv[1:])\n"
)
"""With the terminal as its own, whose Ctrl-C it gets as a signal."""
ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def manager() -> FakeManager:
    decision = StreamDecision(
        stream_id=4711,
        state="open",
        num_known_tokens=40,
        num_computed_tokens=20,
        num_shared_tokens=0,
        priority=0,
        idle_s=1.0,
        expected_next_s=None,
        decision="no_budget",
        reason="streams [before] it used the tokens",
        victim_rank=3,
    )
    streams = ServerStreams(answered=True, role=Role.PREFILL, policy="lcas", streams=[decision])
    return FakeManager(described={ServerId("prefill-0"): streams})


@pytest.fixture
async def address(manager: FakeManager) -> AsyncIterator[str]:
    async with serve(manager) as target:
        yield target


def words(address: str, *more: str) -> list[str]:
    command = [sys.executable, "-m", "streamfill.cli.main", "top", "--address", address]
    return [*command, "--interval", "0.2", *more]


async def test_one_frame(address: str, capsys: Capture) -> None:
    """With the servers and the streams of the cluster, and no time above it."""
    command = ("top", "--once", "--address", address)
    assert await asyncio.wait_for(asyncio.to_thread(main, command), STEP_S) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{address} serves ")
    assert any(line.startswith("prefill-0 ") for line in shown)
    row = next(line for line in shown if line.lstrip().startswith("4711"))
    assert row.endswith("streams [before] it used the tokens")
    assert "\x1b" not in "".join(shown)


async def test_a_cluster_that_is_not_ready_is_exit_code_1(
    manager: FakeManager, address: str, capsys: Capture
) -> None:
    """The frame says so."""
    manager.set_ready(False)
    command = ("top", "--once", "--address", address)
    assert await asyncio.wait_for(asyncio.to_thread(main, command), STEP_S) == 1
    assert "NOT READY" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--interval", "0"], "--interval = 0.0: must be between 0.2 and 3600 seconds"),
        (["--interval", "nan"], "--interval = nan: must be between"),
        (["--rows", "0"], "--rows = 0: must be at least 1"),
        (["--name", "nobody"], "no cluster of this name runs here"),
    ],
)
def test_what_cannot_be_shown(
    options: list[str],
    remedy: str,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line with the value and what to do."""
    monkeypatch.setenv("STREAMFILL_HOME", str(tmp_path))
    assert main(["top", *options]) == 2
    assert remedy in capsys.readouterr().err


def test_a_router_that_is_not_there(capsys: Capture) -> None:
    """An error, not an empty screen."""
    assert main(["top", "--address", "127.0.0.1:1"]) == 2
    assert "error: UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_frames_go_into_a_file_until_a_signal(address: str, number: signal.Signals) -> None:
    """One below the other with the time above each, and without any control characters."""
    process = await asyncio.create_subprocess_exec(
        *words(address),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        shown = b""
        async with asyncio.timeout(PATIENCE_S):
            while shown.count(b"=== ") < 3:
                shown += await process.stdout.read(4096)
        process.send_signal(number)
        _, errors = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, errors) == (0, b"")
    assert b"\x1b" not in shown
    assert shown.count(b"4711") >= 2


async def test_a_router_that_goes_away_and_comes_back(manager: FakeManager) -> None:
    """The frame says that it is old, and the command goes on."""
    async with serve(manager) as target:
        process = await asyncio.create_subprocess_exec(
            *words(target), stdout=asyncio.subprocess.PIPE, env=ENVIRONMENT
        )
        assert process.stdout is not None
        shown = await asyncio.wait_for(process.stdout.readuntil(b"4711"), PATIENCE_S)
        assert b"NOT UP TO DATE" not in shown
    try:
        await asyncio.wait_for(process.stdout.readuntil(b"NOT UP TO DATE"), PATIENCE_S)
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), PATIENCE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 1


@contextmanager
def on_a_terminal(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """The process, our end of its terminal, and the terminal itself."""
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 160))
    process = subprocess.Popen(
        [sys.executable, "-c", AS_A_SHELL_STARTS_IT, *command],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=ENVIRONMENT,
    )
    try:
        yield process, ours, terminal
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(terminal)


def read_until(ours: int, is_there: Callable[[bytes], bool]) -> bytes:
    shown = b""
    end_s = time.monotonic() + PATIENCE_S
    os.set_blocking(ours, False)
    while not is_there(shown):
        assert time.monotonic() < end_s, f"never shown; at the end: {shown[-2000:]!r}"
        try:
            shown += os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.02)
    return shown


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
async def test_on_a_terminal_it_draws_a_screen_and_gives_it_back(address: str, key: bytes) -> None:
    """Servers and streams are redrawn in place; a key ends it, and the terminal is as it was."""

    def use() -> None:
        with on_a_terminal(words(address)) as (process, ours, terminal):
            before = termios.tcgetattr(terminal)
            shown = read_until(ours, lambda text: text.count(b"4711") >= 3)
            assert ENTER_SCREEN in shown
            assert b"streams [before] it used the tokens" in shown
            assert b"q ends" in shown
            assert not termios.tcgetattr(terminal)[3] & termios.ECHO
            os.write(ours, key)
            end = read_until(ours, lambda text: LEAVE_SCREEN in text)
            assert process.wait(PATIENCE_S) == 0
            assert b"Traceback" not in end
            assert termios.tcgetattr(terminal) == before

    await asyncio.to_thread(use)


async def test_a_small_terminal_still_shows_the_servers(manager: FakeManager, address: str) -> None:
    """What does not fit is cut, and never scrolls the rest away."""
    streams = manager.described[ServerId("prefill-0")]
    many = ServerStreams(
        answered=True, role=Role.PREFILL, policy="lcas", streams=[*streams.streams] * 50
    )
    manager.described = {ServerId("prefill-0"): many}

    def use() -> None:
        with on_a_terminal(words(address)) as (_, ours, terminal):
            del terminal
            shown = read_until(ours, lambda text: b"more" in text)
            assert b"prefill-0" in shown

    await asyncio.to_thread(use)
