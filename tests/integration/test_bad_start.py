"""A start that cannot work: ``streamfill up`` stops with key, value and remedy."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import run_cli
from tests.support.cluster import RunningCluster

pytestmark = pytest.mark.integration


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def up(home: Path, *words: str | Path) -> str:
    """What ``streamfill up`` says when it stops with exit code 2: exactly one line."""
    done = run_cli("up", *words, home=home)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1, output
    assert lines[0].startswith("error: "), output
    assert not list(home.rglob("cluster.json")), "the state of a cluster was left behind"
    return lines[0]


def test_model_that_is_not_there(tmp_path: Path) -> None:
    """The option, the path and what to give instead."""
    line = up(tmp_path, "--model", tmp_path / "nowhere")
    assert line.startswith("error: model")
    assert f"= '{tmp_path / 'nowhere'}': " in line
    assert "name the folder of" in line


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    """A folder without the files of a model is named, with the file that is missing."""
    folder = tmp_path / "empty"
    folder.mkdir()
    line = up(tmp_path, "--model", folder)
    assert str(folder) in line
    assert "config.json" in line


@pytest.mark.parametrize(
    "key", ["router.grpc_port", "router.http_port", "router.zmq_port", "controller.zmq_port"]
)
def test_port_in_use(tmp_path: Path, tiny_model: Path, taken_port: int, key: str) -> None:
    """The key of the port, its number, and that another one helps."""
    settings = ["--set", f"{key}={taken_port}"]
    if key != "router.grpc_port":
        settings += ["--port", "0"]
    if key != "router.http_port":
        settings += ["--http-port", "0"]
    line = up(tmp_path, "--model", tiny_model, *settings)
    assert f"{key} = {taken_port}" in line
    assert "in use" in line
    assert "choose another" in line


def test_port_option_in_use(tmp_path: Path, tiny_model: Path, taken_port: int) -> None:
    """The same by ``--port``."""
    line = up(tmp_path, "--model", tiny_model, "--port", str(taken_port))
    assert f"router.grpc_port = {taken_port}" in line


@pytest.mark.parametrize(
    ("toml", "key", "remedy"),
    [
        ("colour = 'red'", "colour = 'red'", "known here: name,"),
        ("[prefill]\ncuont = 2", "prefill.cuont = 2", "known here: count,"),
        ("[prefill]\ncount = 'two'", "prefill.count = 'two'", "int"),
        ("[prefill]\ncount = 0", "prefill.count = 0", "at least 1"),
        ("[router]\ngrpc_port = 70000", "router.grpc_port = 70000", "between 0"),
        ("log_level = 'loud'", "log_level = 'loud'", "one of debug"),
        ("name = '../up'", "name = '../up'", "letters"),
    ],
)
def test_option_in_the_file(tmp_path: Path, toml: str, key: str, remedy: str) -> None:
    """An unknown option or a wrong value in a cluster file, with what would be right."""
    file = tmp_path / "cluster.toml"
    file.write_text(toml, encoding="utf-8")
    line = up(tmp_path, "--config", file)
    assert key in line
    assert remedy in line


def test_unknown_option_on_the_command_line(tmp_path: Path) -> None:
    """``--set`` knows the keys of the file and no others."""
    assert "prefill.cuont = 2" in up(tmp_path, "--set", "prefill.cuont=2")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A cluster file that is not there, or is no TOML."""
    assert "give an existing file" in up(tmp_path, "--config", tmp_path / "nowhere.toml")
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"name = \xff")
    assert "no valid TOML" in up(tmp_path, "--config", bad)


def test_engine_option_that_sglang_does_not_know(tmp_path: Path, tiny_model: Path) -> None:
    """What only a server finds out when it starts is shown too: the key, the value and the reason,
    and nothing of the cluster is left."""
    setting = "prefill.sglang={ no_such_argument = 1 }"
    done = run_cli(
        "up",
        "--model",
        tiny_model,
        "--port",
        "0",
        "--http-port",
        "0",
        "--set",
        setting,
        home=tmp_path,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "prefill.sglang" in output
    assert "no_such_argument" in output
    assert "Traceback" not in output, output
    assert not list(tmp_path.rglob("cluster.json"))


def test_name_of_a_running_cluster(cluster: RunningCluster, tiny_model: Path) -> None:
    """A second cluster of a name is refused, with the first one's process id and what to do."""
    done = run_cli(
        "up",
        "--model",
        tiny_model,
        "--port",
        "0",
        "--http-port",
        "0",
        "--name",
        cluster.name,
        home=cluster.folder,
    )
    assert done.returncode == 2
    assert f"process {cluster.launcher.pid}" in done.stderr
    assert f"streamfill down --name {cluster.name}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert cluster.state.phase.value == "ready"
