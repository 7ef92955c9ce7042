"""One running cluster for all integration tests: a tiny random model, one prefill and one decode
server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfill.models.tiny import make_tiny_model
from tests.support.cluster import RunningCluster, start_cluster


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level BPE tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tokenizer="bpe")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningCluster]:
    """The shared cluster. Tests leave it as they found it; what kills processes starts its own."""
    running = start_cluster(tmp_path_factory.mktemp("cluster"), tiny_model, "tests")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def lone_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[RunningCluster]:
    """One prefill server with a small pool and nobody to hand over to."""
    # One thread, since it shares the machine with the other cluster.
    toml = "[prefill]\nthreads = 1\npool_tokens = 1950\nhost_pool_tokens = 0\n[decode]\ncount = 0"
    running = start_cluster(tmp_path_factory.mktemp("lone"), tiny_model, "lone", toml)
    yield running
    running.stop()
