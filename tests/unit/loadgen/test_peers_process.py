"""Processes of peers: nothing is left behind, and a failure says why."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamfill.loadgen.peers import keeper
from streamfill.loadgen.peers.environment import peer_variables
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.loadgen.peers.process import peer_process
from streamfill.loadgen.peers.running import PEER_NAMES, running_peer

# Starts a child in its own process group's care, writes both ids, and sleeps.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}\\n")
time.sleep(60)
"""
ESCAPED = PARENT.replace('sleep(60)"]', 'sleep(60)"], start_new_session=True')
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + PARENT
LAUNCHER = """
import os, subprocess, sys
command = [sys.executable, "-I", "-S", sys.argv[1], str(os.getpid()), "5", *sys.argv[2:]]
print(subprocess.Popen(command).pid, flush=True)
sys.stdin.read()
"""


def pids_in(file: Path) -> list[int]:
    """The ids that a started program wrote."""
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.02)
    return [int(each) for each in file.read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def all_end(pids: list[int]) -> bool:
    """Whether all end within a time that even a busy machine keeps."""
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


async def test_children_end_with_the_block(tmp_path: Path) -> None:
    """A program's own children are gone when the block is left, by an error too."""
    argv = [sys.executable, "-c", PARENT, str(tmp_path / "pids")]
    pids: list[int] = []

    async def use() -> None:
        async with peer_process("p", argv, variables=os.environ, run_dir=tmp_path):
            pids.extend(await asyncio.to_thread(pids_in, tmp_path / "pids"))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await use()
    assert len(pids) == 2
    assert all_end(pids)


async def test_failure_names_cause_and_log(tmp_path: Path) -> None:
    """A program that ends by itself is reported with its last error and where its log is."""
    argv = [sys.executable, "-c", "import sys; print('OSError: no room'); sys.exit(7)"]
    async with peer_process("p", argv, variables=os.environ, run_dir=tmp_path) as process:
        await process.pause(20)
        with pytest.raises(PeerUnavailable) as caught:
            process.check()
    text = str(caught.value)
    assert "p ended with exit code 7: OSError: no room" in text
    assert str(tmp_path / "logs" / "p.log") in text
    assert "\n" not in text


async def test_program_that_is_missing(tmp_path: Path) -> None:
    """A program that does not exist is a process that ended, not an exception of another kind."""
    argv = [str(tmp_path / "nothing")]
    async with peer_process("p", argv, variables=os.environ, run_dir=tmp_path) as process:
        await process.pause(20)
        with pytest.raises(PeerUnavailable, match="FileNotFoundError"):
            process.check()


@pytest.mark.parametrize("program", [PARENT, STUBBORN, ESCAPED])
def test_keeper_ends_the_group(program: str, tmp_path: Path) -> None:
    """SIGTERM to the keeper ends the program and its children, even one that does not
    listen, or that left the group."""
    argv = [sys.executable, "-c", program, str(tmp_path / "pids")]
    command = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), "0.2", *argv]
    with subprocess.Popen(command) as process:
        pids = pids_in(tmp_path / "pids")
        process.terminate()
        assert process.wait(20) != 0
    assert all_end(pids)


@pytest.mark.parametrize("victim", ["launcher", "keeper"])
def test_nothing_survives_a_crash(victim: str, tmp_path: Path) -> None:
    """When the tool is killed, keeper, program and children end; when the keeper is, the program
    does."""
    argv = [sys.executable, "-c", PARENT, str(tmp_path / "pids")]
    command = [sys.executable, "-c", LAUNCHER, keeper.__file__, *argv]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as launcher:
        assert launcher.stdout is not None
        keeper_pid = int(launcher.stdout.readline())
        program, child = pids_in(tmp_path / "pids")
        if victim == "launcher":
            launcher.kill()
            assert all_end([keeper_pid, program, child])
        else:
            os.kill(keeper_pid, signal.SIGKILL)
            assert all_end([program])
            os.kill(child, signal.SIGKILL)
            launcher.kill()


def test_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer has the threads of our servers, its own libraries, and nothing of our Python."""
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/known")
    libraries = tmp_path / "root" / "usr" / "lib" / "x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    variables = peer_variables(tmp_path, threads=3)
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & variables.keys()
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"
    assert variables["OMP_WAIT_POLICY"] == "PASSIVE"
    assert variables["LD_LIBRARY_PATH"] == f"{libraries}:/known"
    assert variables["PATH"].startswith(f"{tmp_path / 'bin'}:")


async def test_unknown_peer(tmp_path: Path) -> None:
    """A name that is no peer's is refused with those that are."""
    with pytest.raises(PeerUnavailable, match=", ".join(PEER_NAMES)):
        async with running_peer("tgi", model_path=tmp_path, threads=1, run_dir=tmp_path, say=print):
            pass
