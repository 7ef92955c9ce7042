"""A whole cluster that asks for keys and certificates, as its user and as its clients see it."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamfill.access.key_file import change_keys
from streamfill.access.keys import new_key
from streamfill.api import Client
from streamfill.errors import UnauthenticatedError, UnavailableError
from tests.support.certificates import make_authority
from tests.support.cli import run_cli
from tests.support.cluster import RunningCluster, start_cluster

pytestmark = [pytest.mark.integration, pytest.mark.clusters]

TOML = """
[prefill]
threads = 1
pool_tokens = 4096
host_pool_tokens = 0
[decode]
count = 0
[router]
api_keys_file = "{keys}"
tls_cert_file = "{server[0]}"
tls_key_file = "{server[1]}"
tls_client_ca_file = "{ca}"
"""


@dataclass(frozen=True)
class Guarded:
    cluster: RunningCluster
    key: str
    tls: dict[str, Any]
    """Of a client, as ``Client`` takes it."""

    @property
    def http_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.tls["tls_ca_file"])
        context.load_cert_chain(self.tls["tls_cert_file"], self.tls["tls_key_file"])
        return context

    @property
    def words(self) -> list[str]:
        """Options of commands that go to its address."""
        words = ["--address", self.cluster.address]
        for name, path in self.tls.items():
            words += [f"--{name.removesuffix('_file').replace('_', '-')}", path]
        return words


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    key, entry = new_key("a")
    change_keys(folder / "keys.jsonl", lambda _: [entry], "--file")
    authority = make_authority(folder)
    server = authority.certificate("router", "IP:127.0.0.1")
    client = authority.certificate("client")
    toml = TOML.format(keys=folder / "keys.jsonl", server=server, ca=authority.ca_file)
    cluster = start_cluster(folder, tiny_model, "guarded", toml)
    files: dict[str, Any] = {"tls_ca_file": authority.ca_file}
    files |= {"tls_cert_file": client[0], "tls_key_file": client[1]}
    yield Guarded(cluster, key, files)
    assert cluster.stop() == 0


async def test_clients_need_key_and_certificate(guarded: Guarded) -> None:
    """On both services; with them they get the same answer."""
    address, tls = guarded.cluster.address, guarded.tls
    async with Client(address, api_key=guarded.key) as client:
        with pytest.raises(UnavailableError):
            await client.complete("x", max_tokens=1)
    async with Client(address, api_key="", **tls) as client:
        with pytest.raises(UnauthenticatedError):
            await client.complete("x", max_tokens=1)
    async with Client(address, api_key=guarded.key, **tls) as client:
        told = await client.complete("Once upon a time", max_tokens=8, temperature=0.0)
    url = guarded.cluster.http_url
    assert url.startswith("https://")
    async with httpx.AsyncClient(base_url=url, verify=guarded.http_context, timeout=60.0) as http:
        body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        assert (await http.post("/v1/completions", json=body)).status_code == 401
        headers = {"authorization": f"Bearer {guarded.key}"}
        reply = await http.post("/v1/completions", json=body, headers=headers)
        assert reply.json()["choices"][0]["text"] == told.text


def test_the_user_who_started_it_needs_neither(guarded: Guarded) -> None:
    """By the cluster's name its user is an operator."""
    home, name = guarded.cluster.folder, guarded.cluster.name
    by_name = run_cli("status", "--name", name, "--json", home=home)
    assert by_name.returncode == 0, by_name.stderr
    assert json.loads(by_name.stdout)["address"] == guarded.cluster.address
    assert run_cli("policy", "set", "fcfs", "--name", name, home=home).returncode == 0


def test_commands_by_address(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the files by options or from the environment, and the key from the environment."""
    refused = run_cli("status", *guarded.words)
    assert refused.returncode == 2
    assert "UNAUTHENTICATED" in refused.stderr
    monkeypatch.setenv("STREAMFILL_API_KEY", guarded.key)
    assert run_cli("status", *guarded.words).returncode == 0
    denied = run_cli("policy", "set", "fcfs", *guarded.words)
    assert denied.returncode == 2
    assert "PERMISSION_DENIED" in denied.stderr
    without = run_cli("status", "--address", guarded.cluster.address)
    assert without.returncode == 2
    assert "UNAVAILABLE" in without.stderr
    for name, path in guarded.tls.items():
        monkeypatch.setenv(f"STREAMFILL_{name.removesuffix('_file').upper()}", path)
    assert run_cli("status", "--address", guarded.cluster.address).returncode == 0


def test_no_log_has_the_key(guarded: Guarded) -> None:
    """Nor any other file of the cluster."""
    files = [path for path in guarded.cluster.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert not [path for path in files if guarded.key[-20:].encode() in path.read_bytes()]
