"""Key files for tests of the router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from router.access.key_ring import KeyRing
from router.access.standing import SharingRules
from router.http.server import HttpServer
from router.service_server import GrpcServer
from streamfill.access.key_file import change_keys
from streamfill.access.keys import KeyLimits, new_key
from streamfill.config import RouterConfig
from tests.unit.router.cluster_for_tests import TestCluster


class TestKeys:
    """A key file in a folder of a test, and the ring that reads it."""

    __test__ = False

    def __init__(self, folder: Path, rules: SharingRules | None = None) -> None:
        self.path = folder / "keys.jsonl"
        change_keys(self.path, lambda _: [], "--file")
        self.ring = KeyRing(self.path, rules)

    async def add(self, name: str, **options: Any) -> str:
        """A new key, which the ring knows afterwards.

        Args:
            options: of ``new_key``, and those of ``KeyLimits``.
        """
        fields = {key: options.pop(key) for key in KeyLimits.__struct_fields__ if key in options}
        key, entry = new_key(name, limits=KeyLimits(**fields), **options)
        change_keys(self.path, lambda before: [*before, entry], "--file")
        await self.ring.look()
        return key

    async def remove(self, name: str) -> None:
        """The ring does not know it afterwards."""
        change_keys(self.path, lambda before: [e for e in before if e.name != name], "--file")
        await self.ring.look()


@asynccontextmanager
async def whole_router(model: Path, keys: TestKeys) -> AsyncIterator[tuple[str, str, TestCluster]]:
    """The real core with fake servers, behind both services. Gives their addresses."""
    async with TestCluster(model) as cluster:
        await cluster.prefill()
        await cluster.decode()
        values = {"host": "127.0.0.1", "grpc_port": 0, "zmq_port": 0, "http_port": 0}
        config = RouterConfig(model_path="fake", **values)  # type: ignore[arg-type]
        grpc_server = GrpcServer(cluster.manager, "127.0.0.1", 0, keys=keys.ring)
        http_server = HttpServer(cluster.manager, config, keys=keys.ring)
        try:
            address = f"127.0.0.1:{await grpc_server.start()}"
            yield address, f"http://127.0.0.1:{await http_server.start()}", cluster
        finally:
            await asyncio.gather(grpc_server.stop(0.0), http_server.stop(0.0))
