"""The state file and the lock of a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamfill.errors import ConfigError
from streamfill.launcher.state import (
    STATE_FILE,
    ClusterPhase,
    ClusterState,
    claimed,
    cluster_folder,
    find_cluster,
    own_start_ticks,
    read_state,
    start_ticks,
    write_state,
)


def state(pid: int, ticks: int) -> ClusterState:
    """A state as the launcher `pid` would write it."""
    return ClusterState(
        name="c",
        address="127.0.0.1:5",
        model_path="/m",
        phase=ClusterPhase.READY,
        launcher_pid=pid,
        launcher_start_ticks=ticks,
        run_dir="/run",
        startup_s=1.5,
        processes=(),
    )


def test_living_cluster_is_found(tmp_path: Path) -> None:
    """What a living launcher wrote is read back."""
    written = state(os.getpid(), own_start_ticks())
    write_state(tmp_path, written)
    assert find_cluster(tmp_path) == written


def test_reused_pid_is_not_taken_for_the_launcher(tmp_path: Path) -> None:
    """A living process of the same id but another start time is not the launcher."""
    write_state(tmp_path, state(os.getpid(), own_start_ticks() - 1))
    assert find_cluster(tmp_path) is None
    assert read_state(tmp_path) is not None


def test_dead_launcher(tmp_path: Path) -> None:
    """The state of a launcher that was killed is stale, also before it was waited for."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ticks = start_ticks(process.pid)
        assert ticks is not None
        write_state(tmp_path, state(process.pid, ticks))
        assert find_cluster(tmp_path) is not None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert find_cluster(tmp_path) is None


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"name": 1}'])
def test_no_readable_state(tmp_path: Path, content: bytes | None) -> None:
    """No file, or one that cannot be understood, is no cluster."""
    if content is not None:
        (tmp_path / STATE_FILE).write_bytes(content)
    assert find_cluster(tmp_path) is None


def test_second_launcher_is_refused(tmp_path: Path) -> None:
    """A name is held by one launcher; the refusal names it; afterwards the name is free."""
    with claimed(tmp_path, "c"):
        write_state(tmp_path, state(4711, 1))
        with pytest.raises(ConfigError, match="run by process 4711"), claimed(tmp_path, "c"):
            pass
        assert read_state(tmp_path) is not None
    assert read_state(tmp_path) is None
    with claimed(tmp_path, "c"):
        pass


def test_stale_state_is_no_hindrance(tmp_path: Path) -> None:
    """A state file that a killed launcher left does not keep the next one out."""
    write_state(tmp_path, state(os.getpid(), 1))
    with claimed(tmp_path, "c"):
        pass


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "x" * 65])
def test_bad_names(name: str) -> None:
    """A name that is no plain folder name is refused."""
    with pytest.raises(ConfigError, match="name"):
        cluster_folder(name)


def test_folder_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State lies under STREAMFILL_HOME."""
    monkeypatch.setenv("STREAMFILL_HOME", str(tmp_path))
    assert cluster_folder("c-1") == tmp_path / "run" / "c-1"
