"""The router as a process: its command line, its start, its signals, its weight."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from router.__main__ import EXIT_BAD_START, main
from streamfill.access.key_file import change_keys
from streamfill.access.keys import new_key
from streamfill.api import Client
from streamfill.errors import UnauthenticatedError, UnavailableError
from streamfill.models.tiny import make_tiny_model
from streamfill.observability.metrics import Metric
from streamfill.unix_sockets import unix_target
from tests.support.metrics import scrape

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
PROCESS_TIMEOUT_S = 60.0
"""The router starts within a second; a loaded machine may need many."""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with the sources on its path."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT,
    )


def test_help_is_printed() -> None:
    """With the one option."""
    done = run_python("-m", "router", "--help")
    assert done.returncode == 0
    assert "--config-file" in done.stdout


def test_the_router_loads_no_engine() -> None:
    """Neither torch nor sglang nor transformers: it runs on a small machine."""
    program = (
        "import sys, router.__main__\n"
        "heavy = {'torch', 'sglang', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = run_python("-c", program)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["key=--config-file", "cannot be read"]),
        ("{", ["no valid JSON"]),
        ('{"grpc_prot": 1}', ["key=grpc_prot", "no known option"]),
    ],
)
def test_a_wrong_configuration_stops_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: list[str]
) -> None:
    """With key, value and remedy on stderr, and a status of its own."""
    path = tmp_path / "router.json"
    if content is not None:
        path.write_text(content)
    assert main(["--config-file", str(path)]) == EXIT_BAD_START
    output = capsys.readouterr()
    assert output.out == ""
    assert all(word in output.err for word in ["config_error", *words])


def test_a_wrong_model_path_stops_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the path."""
    missing = str(tmp_path / "no-model")
    path = tmp_path / "router.json"
    settings = {"model_path": missing, "host": "127.0.0.1", "grpc_port": 0, "zmq_port": 0}
    path.write_text(json.dumps(settings))
    assert main(["--config-file", str(path)]) == EXIT_BAD_START
    assert missing in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=1)


def write_config(folder: Path, model: Path, **more: object) -> Path:
    path = folder / "router.json"
    settings = {"model_path": str(model), "host": "127.0.0.1", "zmq_port": 0, "http_port": 0}
    path.write_text(json.dumps({**settings, "grpc_port": 0, **more}))
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_process_says_when_it_is_ready_and_stops_at_a_signal(
    tmp_path: Path, model: Path, number: signal.Signals
) -> None:
    """READY carries its ports; `/metrics` and HTTP are there; a stream is refused without a server;
    the exit status is 0."""
    path = write_config(tmp_path, model, metrics_port=0)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", "--config-file", str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), PROCESS_TIMEOUT_S)
        word, _, ports = line.decode().partition(" ")
        assert word == "READY"
        assert set(json.loads(ports)) == {"grpc_port", "http_port", "zmq_port", "metrics_port"}
        async with httpx.AsyncClient(timeout=PROCESS_TIMEOUT_S) as http:
            reply = await http.get(f"http://127.0.0.1:{json.loads(ports)['http_port']}/ready")
            reason = "no prefill server is there"
            assert (reply.status_code, reply.json()) == (503, {"ready": False, "reason": reason})
        page = await asyncio.to_thread(scrape, json.loads(ports)["metrics_port"])
        assert page.value(Metric.READY) == 0
        async with Client(f"127.0.0.1:{json.loads(ports)['grpc_port']}") as client:
            assert not (await client.server_info()).ready
            with pytest.raises(UnavailableError, match="no prefill server"):
                await client.complete("hello")
        process.send_signal(number)
        _, errors = await asyncio.wait_for(process.communicate(), PROCESS_TIMEOUT_S)
        assert process.returncode == 0
        events = [line.split()[3] for line in errors.decode().splitlines()]
        on_the_way = {"readiness", "router_stalled"}  # a loaded machine lets it stand still
        assert [each for each in events if each not in on_the_way] == [
            *("ready", "draining", "stopped")
        ]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_process_that_asks_for_keys(tmp_path: Path, model: Path) -> None:
    """Strangers are refused on its port; whoever may write to its socket, its user alone, is not;
    a key that comes into the file is good while it runs. No key is in its log."""
    folder = tmp_path / "a #1?%20"  # as STREAMFILL_HOME may be called
    folder.mkdir()
    keys, sock = tmp_path / "keys.jsonl", folder / "router.sock"
    change_keys(keys, lambda _: [], "--file")
    with socket.socket(socket.AF_UNIX) as dead:  # of a router that was killed
        dead.bind(str(sock))
    path = write_config(
        tmp_path, model, api_keys_file=str(keys), operator_socket=str(sock), log_level="debug"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", "--config-file", str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), PROCESS_TIMEOUT_S)
        ports = json.loads(line.decode().partition(" ")[2])
        address = f"127.0.0.1:{ports['grpc_port']}"
        assert stat.S_IMODE(sock.stat().st_mode) == 0o600
        async with Client(unix_target(sock), api_key="") as client:
            assert not (await client.server_info()).ready
        async with Client(address, api_key="") as client:
            with pytest.raises(UnauthenticatedError):
                await client.server_info()
        key, entry = new_key("late")
        change_keys(keys, lambda before: [*before, entry], "--file")
        end_s = time.monotonic() + PROCESS_TIMEOUT_S
        async with Client(address, api_key=key) as client:
            while True:
                try:
                    await client.server_info()
                    break
                except UnauthenticatedError:
                    assert time.monotonic() < end_s
                    await asyncio.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), PROCESS_TIMEOUT_S)
        assert process.returncode == 0
        assert "keys_read" in errors.decode()
        assert key[-20:] not in errors.decode()
        assert not sock.exists()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_a_key_file_that_is_none_stops_the_start(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the key of the configuration, the file, and the line; what stands there is not shown."""
    keys = tmp_path / "keys.jsonl"
    keys.write_text("sf-SECRET\n")
    path = write_config(tmp_path, model, api_keys_file=str(keys))
    assert main(["--config-file", str(path)]) == EXIT_BAD_START
    errors = capsys.readouterr().err
    assert f"config_error key=router.api_keys_file value={keys}" in errors
    assert "line 1" in errors
    assert "SECRET" not in errors


@pytest.mark.parametrize("key", ["grpc_port", "http_port", "metrics_port"])
def test_a_port_in_use_stops_the_start(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """With the key, the port and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        path = write_config(tmp_path, model, **{key: port})
        assert main(["--config-file", str(path)]) == EXIT_BAD_START
    output = capsys.readouterr()
    assert output.out == ""
    assert f"config_error key=router.{key} value={port} remedy=" in output.err
