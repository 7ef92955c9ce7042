"""A cluster with the default model, as ``make demo`` starts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfill.models.default import ensure_default_model
from tests.support.cluster import RunningCluster, start_cluster


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct; converted on first use."""
    return ensure_default_model()


@pytest.fixture(scope="session")
def smollm_cluster(
    tmp_path_factory: pytest.TempPathFactory, smollm: Path
) -> Iterator[RunningCluster]:
    """One prefill and one decode server with a thread each."""
    toml = "[prefill]\nthreads = 1\n[decode]\nthreads = 1"
    running = start_cluster(tmp_path_factory.mktemp("smollm"), smollm, "smollm", toml)
    yield running
    running.stop()
