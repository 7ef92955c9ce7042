"""The controller as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from streamfill.preemption.client import fetch_status

WAIT_S = 60.0
COMMAND = [sys.executable, "-m", "streamfill.preemption", "--config-file"]
_SRC = Path(__file__).resolve().parents[3] / "src"
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(_SRC)}


def _config_file(folder: Path, **values: object) -> str:
    path = folder / "controller.json"
    path.write_text(json.dumps({"host": "127.0.0.1", "zmq_port": 0, **values}))
    return str(path)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [*COMMAND, _config_file(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_ENVIRONMENT,
    )
    with started:
        yield started
        started.kill()


def _ready_port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    word, _, fields = process.stdout.readline().partition(" ")
    assert word == "READY"
    port = json.loads(fields)["zmq_port"]
    assert isinstance(port, int)
    return port


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_ready_then_clean_end(process: subprocess.Popen[str], signal_number: int) -> None:
    """It says READY with its port, answers there, and ends on a signal with status 0."""
    port = _ready_port(process)
    assert fetch_status(f"tcp://127.0.0.1:{port}", WAIT_S).num_servers == 0
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    assert f"INFO controller ready zmq_port={port}" in errors
    assert "controller stopped" in errors


def test_it_is_light(process: subprocess.Popen[str]) -> None:
    """Neither torch nor sglang nor grpc is mapped into the controller."""
    _ready_port(process)
    mapped = " ".join(region.path for region in psutil.Process(process.pid).memory_maps())
    assert "msgspec" in mapped
    for package in ("torch", "sglang", "grpc", "numpy"):
        assert f"/{package}/" not in mapped


def test_imports_are_light() -> None:
    """Controller, client and policy import no heavy package."""
    code = (
        "import sys, streamfill.preemption.__main__, streamfill.preemption.client,"
        " streamfill.preemption.standing, streamfill.scheduling.adaptive\n"
        "print(sorted({'torch', 'sglang', 'grpc', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=_ENVIRONMENT,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_wrong_option_stops_the_start(tmp_path: Path) -> None:
    """An unknown key ends the process with status 2 and names the key."""
    done = subprocess.run(
        [*COMMAND, _config_file(tmp_path, zmq_prot=1)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=_ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "zmq_prot" in done.stderr
    assert "Traceback" not in done.stderr
