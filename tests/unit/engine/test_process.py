"""From a server's configuration to SGLang's arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("sglang")

from streamfill.config import ServerConfig
from streamfill.engine import process
from streamfill.errors import ConfigError
from streamfill.messages.common import Role
from streamfill.models.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def _config(model: Path, **fields: Any) -> ServerConfig:
    return ServerConfig(
        role=Role.PREFILL,
        server_id="prefill-0",
        model_path=str(model),
        router_endpoint="tcp://127.0.0.1:1",
        controller_endpoint=None,
        **fields,
    )


def test_step_tokens_follow_the_device_unless_they_are_set(tmp_path: Path) -> None:
    """The configuration wins."""
    assert process.step_tokens_of(_config(tmp_path), "cpu") == process.CPU_STEP_TOKENS
    assert process.step_tokens_of(_config(tmp_path), "cuda") == process.GPU_STEP_TOKENS
    assert process.step_tokens_of(_config(tmp_path, step_tokens=7), "cuda") == 7


def test_the_digest_tells_models_apart(tmp_path: Path) -> None:
    """By their configuration, not by how its file is written."""

    def digest(name: str, text: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(text, encoding="utf-8")
        return process.model_digest(folder)

    config = {"vocab_size": 10, "hidden_size": 4}
    first = digest("a", json.dumps(config))
    assert first == digest("b", json.dumps(dict(reversed(config.items())), indent=4))
    assert first != digest("c", json.dumps(config | {"vocab_size": 11}))


def test_the_pool_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never so small that nothing fits."""
    import psutil

    def available(num_bytes: int) -> None:
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: msgspec.defstruct("M", ["available"])(num_bytes)
        )

    available(1 << 50)
    assert process.default_cpu_pool_tokens(46_000) == process.CPU_POOL_TOKENS
    available(4 * 46_000 * 2000)
    assert process.default_cpu_pool_tokens(46_000) == 2000
    available(0)
    assert process.default_cpu_pool_tokens(46_000) == 1024


def test_the_environment_of_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not set is set: threads, and no network for model files."""
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "7"})
    process.prepare_environment(_config(tmp_path, threads=3))
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["MKL_NUM_THREADS"] == "3"
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_server_arguments_come_from_the_configuration(model: Path) -> None:
    """Ours by their own keys, all others by SGLang's names, which win."""
    config = _config(
        model,
        pool_tokens=4096,
        page_size=4,
        context_tokens=128,
        max_requests=5,
        step_tokens=64,
        sglang={"random_seed": 17, "max_running_requests": 6},
    )
    server_args, _ = process.build_server_args(config, 1024)
    assert server_args.max_total_tokens == 4096
    assert server_args.page_size == 4
    assert server_args.context_length == 128
    assert server_args.max_running_requests == 6
    assert server_args.random_seed == 17
    assert server_args.radix_cache_backend == "streamfill"
    assert server_args.sleep_on_idle
    # The trap of SGLang's single chunked request: no step of ours may ever be cut.
    assert server_args.chunked_prefill_size >= 64 + 5 * 4


def test_an_unknown_sglang_key_is_named(model: Path) -> None:
    """With the section where it stands."""
    with pytest.raises(ConfigError, match="no_such_option") as raised:
        process.build_server_args(_config(model, sglang={"no_such_option": 1}), 1024)
    assert raised.value.key == "prefill.sglang"


def test_a_wrong_sglang_value_is_named(model: Path) -> None:
    """As SGLang puts it."""
    with pytest.raises(ConfigError, match="--sidecar-args requires --sidecar"):
        process.build_server_args(_config(model, sglang={"sidecar_args": "[]"}), 1024)


def test_a_configuration_for_the_other_role_stops_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2 and one line; so does a file that is not there."""
    file = tmp_path / "server.json"
    file.write_bytes(msgspec.json.encode(_config(tmp_path)))

    def build(*args: object) -> object:
        raise AssertionError("nothing may be built")

    assert process.main(Role.DECODE, build, ["--config-file", str(file)]) == 2
    assert "role = 'prefill'" in capsys.readouterr().err
    assert process.main(Role.DECODE, build, ["--config-file", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_folders_of_killed_servers_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of dead processes only, and nothing that somebody else has put there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [
        f"streamfill-server-{ended.pid}-a",
        f"streamfill-server-{os.getpid()}-b",
        "streamfill-c-d",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    process._remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_context_longer_than_the_models_is_named_by_its_key(model: Path) -> None:
    """SGLang refuses it as one of its own arguments, which nobody gave."""
    with pytest.raises(ConfigError, match="SGLang refuses it") as caught:
        process.build_server_args(_config(model, context_tokens=1_000_000), 64)
    assert (caught.value.key, caught.value.value) == ("model.context_tokens", 1_000_000)
