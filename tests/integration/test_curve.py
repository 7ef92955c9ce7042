"""A whole cluster whose processes know each other by keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamfill.api import Client
from tests.support.cli import run_cli
from tests.support.cluster import start_cluster
from tests.support.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.clusters]

HEARD_S = 20.0
"""Telemetry goes twice a second."""
TOML = """
[prefill]
threads = 1
pool_tokens = 4096
host_pool_tokens = 0
[decode]
threads = 1
pool_tokens = 4096
"""


async def hears_controller(client: Client) -> bool:
    """Plans come, so telemetry went."""
    info = await client.server_info()
    return all(server.controller_alive for server in info.servers if server.role == "prefill")


async def test_a_cluster_with_keys_answers(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> None:
    """Registration, telemetry and hand-off all go over encrypted links; no secret is in a log."""
    folder = tmp_path_factory.mktemp("curve")
    made = run_cli("zmq-keys", "create", str(folder / "keys"))
    assert made.returncode == 0, made.stderr
    cluster = start_cluster(
        folder, tiny_model, "curve", TOML, settings=[f"zmq_keys_dir={folder / 'keys'}"]
    )
    try:
        async with Client(cluster.address) as client:
            async with client.stream() as stream:
                await stream.append("A text that is streamed. ")
                result = await stream.commit("Why?", max_tokens=8, temperature=0.0).read()
            assert len(result.token_ids) == 8
            assert result.metadata.handoff == "done"
            await until("plans came", lambda: hears_controller(client), HEARD_S)
    finally:
        stopped = cluster.stop()
    assert stopped == 0
    logs = cluster.log_tail(10_000)
    for name in ("client.secret", "server.secret"):
        assert (folder / "keys" / name).read_text().strip() not in logs
    assert "handshake_refused" not in logs
