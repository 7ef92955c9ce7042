"""What `streamfill up` says when the cluster is ready."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamfill.cli.main import EXIT_ERROR, EXIT_INTERRUPTED, main
from streamfill.cli.process_view import process_view
from streamfill.cli.up import http_lines, keep_launcher_log, launcher_words
from streamfill.config import ClusterConfig, RouterSection
from streamfill.launcher.log_files import open_log
from streamfill.launcher.state import (
    ClusterPhase,
    ClusterState,
    claimed,
    cluster_folder,
    own_start_ticks,
    write_state,
)

URL = "http://127.0.0.1:8000"


def test_addresses_for_http() -> None:
    """The API and the status page, where there is one; nothing without HTTP."""
    with_page, without = (ClusterConfig(router=RouterSection(status_page=x)) for x in (True, False))
    assert http_lines(URL, with_page)[1:] == [f"Status page: {URL}/status"]
    assert http_lines(URL, without) == [f"HTTP, as of the OpenAI API: {URL}/v1"]
    assert http_lines(None, with_page) == []


@pytest.mark.parametrize("option", ["--detach", "--detac", "--det"])
def test_a_launcher_in_the_background_starts_no_other_one(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """argparse takes options that are cut short."""
    asked: list[list[str]] = []

    def detach(config: ClusterConfig, words: list[str]) -> int:
        asked.append(launcher_words(words))
        return 0

    monkeypatch.setattr("streamfill.cli.up._detach", detach)
    assert main(["up", "--name", "x", option, "--set", "prefill.threads=2"]) == 0
    assert asked == [["up", "--name", "x", "--set", "prefill.threads=2"]]


def test_a_log_of_the_launcher_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cluster is ready by then, and stays; who started it is told."""

    def full(*rest: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("streamfill.cli.up.logging.FileHandler", full)
    out = io.StringIO()
    with process_view(out) as view:
        keep_launcher_log(tmp_path, "info", view)
    assert "is not logged: [Errno 28] No space left on device" in out.getvalue()


def test_a_start_in_the_background_under_a_name_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is refused before the log of the launcher that runs is put aside."""
    monkeypatch.setenv("STREAMFILL_HOME", str(tmp_path))
    folder = cluster_folder("t")
    with claimed(folder, "t"), open_log(folder / "logs", "launcher") as log:
        log.write(b"of the one that runs")
        log.flush()
        write_state(folder, running_state("t"))
        assert main(["up", "--detach", "--name", "t"]) == EXIT_ERROR
        assert f"is run by process {os.getpid()}" in capsys.readouterr().err
        assert [path.read_bytes() for path in (folder / "logs").iterdir()] == [
            b"of the one that runs"
        ]


def running_state(name: str) -> ClusterState:
    """Of a cluster whose launcher is this process."""
    return ClusterState(
        name=name,
        address="127.0.0.1:7",
        model_path="/m",
        phase=ClusterPhase.READY,
        launcher_pid=os.getpid(),
        launcher_start_ticks=own_start_ticks(),
        run_dir="/r",
        startup_s=1.0,
        processes=(),
    )


def test_ctrl_c_takes_back_a_start_in_the_background(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever ends the command before the cluster is ready wants none."""
    monkeypatch.setenv("STREAMFILL_HOME", str(tmp_path))
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return started[0]

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    popen = subprocess.Popen
    monkeypatch.setattr("streamfill.cli.up.subprocess.Popen", start)
    monkeypatch.setattr("streamfill.cli.up.find_cluster", interrupted)
    assert main(["up", "--detach"]) == EXIT_INTERRUPTED
    (launcher,) = started
    with launcher:
        assert launcher.wait(10) == -signal.SIGTERM
