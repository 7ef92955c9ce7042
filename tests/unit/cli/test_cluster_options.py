"""Cluster files, and options that change them."""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamfill.cli.cluster_options import (
    add_cluster_options,
    add_target_options,
    cluster_from_options,
    parse_settings,
    tls_files,
)
from streamfill.config import ClusterConfig, load_cluster_file
from streamfill.errors import ConfigError
from streamfill.tls import TlsFiles

DEPLOY = Path(__file__).parents[3] / "deploy"


def cluster(*words: str) -> ClusterConfig:
    """The cluster of a command line."""
    parser = argparse.ArgumentParser()
    add_cluster_options(parser)
    return cluster_from_options(parser.parse_args(words))


def test_nothing_given() -> None:
    """Without options it is the default cluster."""
    assert cluster() == ClusterConfig()


def test_options_go_before_the_file(tmp_path: Path) -> None:
    """What the command line says replaces what the file says; the rest of the file stays."""
    file = tmp_path / "cluster.toml"
    file.write_text('name = "f"\n[prefill]\ncount = 3\nthreads = 2\n[decode]\ncount = 4\n')
    made = cluster(
        "--config", str(file), "--prefill", "1", "--port", "0", "--model", "/m", "--name", "n"
    )
    assert (made.prefill.count, made.prefill.threads, made.decode.count) == (1, 2, 4)
    assert (made.router.grpc_port, made.model.path, made.name) == (0, "/m", "n")


def test_http_port() -> None:
    """A number, or the word for none."""
    assert cluster("--http-port", "8123").router.http_port == 8123
    assert cluster("--http-port", "off").router.http_port == "off"


def test_set_any_key() -> None:
    """--set reaches every key, reads values as TOML, and takes bare words as strings."""
    made = cluster(
        "--set", "prefill.threads=2", "--set", "launcher.drain_timeout_s=1.5",
        "--set", "log_level=debug", "--set", 'decode.sglang.dtype="float32"',
    )  # fmt: skip
    assert made.prefill.threads == 2
    assert made.launcher.drain_timeout_s == 1.5
    assert made.log_level == "debug"
    assert made.decode.sglang == {"dtype": "float32"}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("k=1", 1), ("k=true", True), ("k=[1, 2]", [1, 2]), ("k=a=b", "a=b"), ("k=/x y", "/x y")],
)
def test_values_of_settings(setting: str, value: object) -> None:
    """A value is TOML where it can be read as such, and a string otherwise."""
    assert parse_settings([setting]) == {"k": value}


@pytest.mark.parametrize("written", ["1024", '"1024"', " 1024 "])
def test_options_of_policies_are_strings(written: str) -> None:
    """A number is given to a policy as it was written, as docs/placement.md does."""
    placement = f"router.placement_options.slack_tokens={written}"
    policy = f"prefill.policy_options.window_ms={written}"
    made = cluster(
        *("--set", "router.placement=dualmap", "--set", placement),
        *("--set", "prefill.policy=laps", "--set", policy),
    )
    assert made.router.placement_options == {"slack_tokens": "1024"}
    assert made.prefill.policy_options == {"window_ms": "1024"}


def test_an_option_of_a_policy_that_is_no_string_is_named_with_its_table(tmp_path: Path) -> None:
    """A cluster file is typed: the error names the table, and shows what is in it."""
    file = tmp_path / "cluster.toml"
    file.write_text("[router.placement_options]\nslack_tokens = 1024\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster_file(file)
    assert (caught.value.key, caught.value.value) == (
        "router.placement_options",
        {"slack_tokens": 1024},
    )


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        (("--set", "prefill.thread=2"), "prefill.thread", "known here: count, host, threads"),
        (("--set", "prefil.threads=2"), "prefil", "known here: name, log_level, zmq_keys_dir"),
        (("--set", "name.x=2"), "name.x", "name is an option, not a section"),
        (("--set", "prefill"), "--set", "write KEY=VALUE"),
        (("--set", "prefill.count=many"), "prefill.count", "int"),
        (("--prefill", "0"), "prefill.count", "at least 1"),
        (("--decode", "-1"), "decode.count", "at least 0"),
        (
            ("--set", "prefill.max_uncommitted_tokens=0"),
            "prefill.max_uncommitted_tokens",
            "at least 1",
        ),
        (("--set", "router.max_waiting_segments=0"), "router.max_waiting_segments", "at least 1"),
        (("--set", "prefill.pool_tokens=1"), "prefill.pool_tokens", "at least 2"),
        (("--set", "router.admission_wait_s=0.0"), "router.admission_wait_s", "above 0"),
        (("--set", "prefill.policy=sjf"), "prefill.policy", "known: adaptive, default"),
        (
            ("--set", "prefill.policy=lcas", "--set", 'prefill.policy_options={order="up"}'),
            "prefill.policy option order",
            "one of: oldest, newest",
        ),
        (("--set", "decode.policy=lcas"), "decode.policy", "set prefill.policy"),
        (("--port", "70000"), "router.grpc_port", "between 0"),
        (("--http-port", "70000"), "router.http_port", "between 0"),
        (("--http-port", "on"), "router.http_port", "or off"),
        (("--set", "router.max_body_bytes=5"), "router.max_body_bytes", "at least 1024"),
        (("--set", "decode.metrics_port=on"), "decode.metrics_port", '"off"'),
        (("--set", "router.otlp_endpoint=h:4318"), "router.otlp_endpoint", "http://127.0.0.1:4318"),
        (
            ("--set", "router.api_keys_file=/nowhere/k"),
            "router.api_keys_file",
            "streamfill keys add",
        ),
        (
            ("--set", "router.cache_namespaces=none"),
            "router.cache_namespaces",
            "tenant, shared",
        ),
        (("--set", "router.tls_cert_file=/c"), "router.tls_cert_file", "needs router.tls_key_file"),
        (("--set", "router.tls_key_file=/k"), "router.tls_key_file", "needs router.tls_cert_file"),
        (
            ("--set", "router.tls_client_ca_file=/k"),
            "router.tls_client_ca_file",
            "set router.tls_cert_file",
        ),
        (
            ("--set", "router.tls_cert_file=/c", "--set", "router.tls_key_file=/k"),
            "router.tls_cert_file",
            "is no file",
        ),
        (("--name", "a/b"), "name", "use up to 64 letters"),
        (("--config", "/nowhere/c.toml"), "--config", "cannot be read"),
    ],
)
def test_wrong_values(words: tuple[str, ...], key: str, remedy: str) -> None:
    """Each wrong value is refused with its key and what would be right."""
    with pytest.raises(ConfigError, match=re.escape(remedy)) as caught:
        cluster(*words)
    assert caught.value.key == key


def test_unknown_option_in_a_file(tmp_path: Path) -> None:
    """An unknown key of a cluster file is named with its value and the known ones."""
    file = tmp_path / "c.toml"
    file.write_text("[router]\nport = 5\n")
    with pytest.raises(ConfigError, match="known here: host, grpc_port") as caught:
        cluster("--config", str(file))
    assert (caught.value.key, caught.value.value) == ("router.port", 5)


@pytest.mark.parametrize("name", ["local.toml", "two-by-two.toml"])
def test_deployed_files_load(name: str) -> None:
    """The cluster files of the repository are valid."""
    load_cluster_file(DEPLOY / name)


def test_local_file_has_every_key_with_its_default() -> None:
    """deploy/local.toml shows every key there is, and its values are the defaults."""
    assert load_cluster_file(DEPLOY / "local.toml") == ClusterConfig()
    text = (DEPLOY / "local.toml").read_text(encoding="utf-8")
    uncommented = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    shown: dict[str, Any] = tomllib.loads(uncommented)
    assert keys(shown) == keys(msgspec.to_builtins(ClusterConfig()))


def test_tls_files_of_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options go before the environment; both belong to an address, and a named cluster needs
    none."""
    parser = argparse.ArgumentParser()
    add_target_options(parser)
    monkeypatch.setenv("STREAMFILL_TLS_CA", "/env/ca")
    monkeypatch.setenv("STREAMFILL_TLS_CERT", "")
    assert tls_files(parser.parse_args(["--address", "h:1"])) == TlsFiles(ca_file="/env/ca")
    words = ["--address", "h:1", "--tls-ca", "/ca", "--tls-cert", "/c", "--tls-key", "/k"]
    expected = TlsFiles(ca_file="/ca", cert_file="/c", key_file="/k")
    assert tls_files(parser.parse_args(words)) == expected
    assert not tls_files(parser.parse_args(["--name", "local"]))
    with pytest.raises(ConfigError, match="goes with --address") as caught:
        tls_files(parser.parse_args(["--tls-ca", "/ca"]))
    assert (caught.value.key, caught.value.value) == ("--tls-ca", "/ca")


def keys(data: dict[str, Any]) -> set[str]:
    """Dotted names of everything in `data`."""
    found = set()
    for key, value in data.items():
        found.add(key)
        if isinstance(value, dict):
            found |= {f"{key}.{inner}" for inner in keys(value)}
    return found


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("router.max_streams=0", "must be at least 1"),
        ("router.idle_stream_timeout_s=0", "must be above 0"),
        ("router.idle_stream_timeout_s=nan", "must be above 0"),
        ("launcher.ready_timeout_s=-5.0", "must be above 0"),
        ("launcher.drain_timeout_s=-1", "must be at least 0"),
        ("launcher.max_restarts=-1", "must be at least 0"),
        ("model.context_tokens=0", "must be at least 1"),
        ("decode.base_gpu_id=-1", "must be at least 0"),
    ],
)
def test_numbers_that_cannot_work(setting: str, remedy: str) -> None:
    """Such as a limit that lets nothing through."""
    with pytest.raises(ConfigError, match=remedy) as caught:
        cluster("--set", setting)
    assert caught.value.key == setting.partition("=")[0]
