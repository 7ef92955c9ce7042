"""A real cluster for tests: ``streamfill up`` as a user starts it, in a folder of its own, on free
ports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from streamfill.launcher.state import ClusterState, ProcessRecord, find_cluster

START_TIMEOUT_S = 180.0
"""Two SGLang processes on two busy cores; about ten seconds on a quiet machine."""
STOP_TIMEOUT_S = 60.0


@dataclass
class RunningCluster:
    """A cluster started by ``start_cluster``."""

    name: str
    folder: Path
    """Its ``STREAMFILL_HOME``."""
    launcher: subprocess.Popen[bytes]

    @property
    def state(self) -> ClusterState:
        """What the launcher wrote about its processes."""
        state = find_cluster(self.folder / "run" / self.name)
        assert state is not None, f"cluster {self.name} is not running; log:\n{self.log_tail()}"
        return state

    @property
    def address(self) -> str:
        """Where clients connect."""
        return self.state.address

    @property
    def http_url(self) -> str:
        """Where HTTP clients connect."""
        url = self.state.http_url
        assert url is not None
        return url

    def process(self, name: str) -> ProcessRecord:
        """One of the cluster's processes."""
        return next(record for record in self.state.processes if record.name == name)

    def log_tail(self, lines: int = 40) -> str:
        """The end of every log, for a failure message."""
        parts = []
        for path in sorted(self.folder.rglob("*.log")):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(text))
        return "\n".join(parts)

    def stop(self) -> int:
        """Ctrl-C; the launcher's exit code."""
        if self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGINT)
        try:
            return self.launcher.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait()
            raise


def start_cluster(
    folder: Path,
    model: Path,
    name: str,
    toml: str = "",
    *,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> RunningCluster:
    """Start a cluster and wait until every process is ready.

    Args:
        folder: for its configuration, logs and state.
        model: Hugging Face model folder.
        name: of the cluster.
        toml: further lines of the cluster file; tables other than [model] and [launcher].
        settings: ``KEY=VALUE`` of any key of the cluster file, as for ``streamfill up --set``.
        environment: variables of all its processes, besides ours.
    """
    config = folder / f"{name}.toml"
    config.write_text(
        f'name = "{name}"\n[model]\npath = "{model}"\n'
        f"[launcher]\nready_timeout_s = {START_TIMEOUT_S}\n{toml}\n"
    )
    command = [sys.executable, "-m", "streamfill.cli.main", "up", "--config", str(config)]
    command += ["--port", "0", "--http-port", "0"]
    for setting in settings:
        command += ["--set", setting]
    with (folder / "up.log").open("wb") as output:
        launcher = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **environment,
                "PYTHONUNBUFFERED": "1",
                "STREAMFILL_HOME": str(folder),
            },
        )
    cluster = RunningCluster(name, folder, launcher)
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s:
        if launcher.poll() is not None:
            break
        state = find_cluster(folder / "run" / name)
        if state is not None and state.phase.value == "ready":
            return cluster
        time.sleep(0.2)
    log = (folder / "up.log").read_text(errors="replace")
    tail = cluster.log_tail()
    launcher.kill()
    raise AssertionError(f"cluster {name} did not start:\n{log}\n{tail}")
