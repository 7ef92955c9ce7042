"""A whole cluster that asks for keys, as its user and as its clients see it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from streamfill.access.key_file import change_keys
from streamfill.access.keys import new_key
from streamfill.api import Client
from streamfill.errors import UnauthenticatedError
from tests.support.cli import run_cli
from tests.support.cluster import RunningCluster, start_cluster

pytestmark = pytest.mark.integration

TOML = "[prefill]\nthreads = 1\npool_tokens = 4096\nhost_pool_tokens = 0\n[decode]\ncount = 0\n"


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[tuple[RunningCluster, str]]:
    """The cluster and a key."""
    folder = tmp_path_factory.mktemp("guarded")
    key, entry = new_key("a")
    change_keys(folder / "keys.jsonl", lambda _: [entry], "--file")
    toml = f'{TOML}[router]\napi_keys_file = "{folder / "keys.jsonl"}"'
    cluster = start_cluster(folder, tiny_model, "guarded", toml)
    yield cluster, key
    assert cluster.stop() == 0


async def test_clients_need_the_key(guarded: tuple[RunningCluster, str]) -> None:
    """On both services; with it they get the same answer."""
    cluster, key = guarded
    async with Client(cluster.address, api_key="") as client:
        with pytest.raises(UnauthenticatedError):
            await client.complete("x", max_tokens=1)
    async with Client(cluster.address, api_key=key) as client:
        told = await client.complete("Once upon a time", max_tokens=8, temperature=0.0)
    async with httpx.AsyncClient(base_url=cluster.http_url, timeout=60.0) as http:
        body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        assert (await http.post("/v1/completions", json=body)).status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        reply = await http.post("/v1/completions", json=body, headers=headers)
        assert reply.json()["choices"][0]["text"] == told.text


def test_the_user_who_started_it_needs_none(guarded: tuple[RunningCluster, str]) -> None:
    """By the cluster's name. By its address it takes the key, which the environment may have."""
    cluster, key = guarded
    home = cluster.folder
    by_name = run_cli("status", "--name", cluster.name, "--json", home=home)
    assert by_name.returncode == 0, by_name.stderr
    assert json.loads(by_name.stdout)["address"] == cluster.address
    assert run_cli("policy", "set", "fcfs", "--name", cluster.name, home=home).returncode == 0
    refused = run_cli("status", "--address", cluster.address, home=home)
    assert refused.returncode == 2
    assert "UNAUTHENTICATED" in refused.stderr
    os.environ["STREAMFILL_API_KEY"] = key
    try:
        assert run_cli("status", "--address", cluster.address, home=home).returncode == 0
        denied = run_cli("policy", "set", "fcfs", "--address", cluster.address, home=home)
    finally:
        del os.environ["STREAMFILL_API_KEY"]
    assert denied.returncode == 2
    assert "PERMISSION_DENIED" in denied.stderr


def test_no_log_has_the_key(guarded: tuple[RunningCluster, str]) -> None:
    """Nor any other file of the cluster."""
    cluster, key = guarded
    files = [path for path in cluster.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert not [path for path in files if key[-20:].encode() in path.read_bytes()]
