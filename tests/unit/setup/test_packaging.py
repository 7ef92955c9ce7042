"""What pyproject.toml, the lock files and the Makefile promise each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import streamfill
from streamfill.engine.version import PINNED_SGLANG_VERSION

ROOT = Path(__file__).resolve().parents[3]
SETUP = ROOT / "deploy" / "setup"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("torch", "sglang", "transformers", "torchvision")


def names(requirements: list[str]) -> set[str]:
    """Normalised names of packages in lines of requirements."""
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in requirements)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def lines(file: str) -> list[str]:
    text = (SETUP / file).read_text().splitlines()
    return [line for line in text if line and not line.startswith("#")]


def test_version_is_said_once() -> None:
    """The package and the distribution have one version."""
    assert streamfill.__version__ == PROJECT["version"]


def test_base_dependencies_are_light() -> None:
    """A router or client installs neither torch nor sglang."""
    assert not names(PROJECT["dependencies"]) & set(HEAVY)
    for extra in ("client", "router", "otel", "dev"):
        assert not names(PROJECT["optional-dependencies"][extra]) & set(HEAVY)


def test_lock_holds_all_dependencies() -> None:
    """Everything that pyproject.toml asks for is in the CPU lock or the tools' lock."""
    locked = names(lines("requirements-cpu.lock"))
    assert names(PROJECT["dependencies"]) <= locked
    tools = names(PROJECT["optional-dependencies"]["dev"])
    assert tools <= locked | names(lines("requirements-dev.lock"))
    bench = names(PROJECT["optional-dependencies"]["bench"])
    assert bench <= locked | names(lines("requirements-bench.lock"))


@pytest.mark.parametrize("file", sorted(path.name for path in SETUP.glob("*.lock")))
def test_locks_are_exact(file: str) -> None:
    """Each line pins one version; none names a path, an index or an option."""
    for line in lines(file):
        assert re.fullmatch(
            r"[a-z0-9-]+==[A-Za-z0-9.+]+( ; python_version (<|>=) \"3\.11\")?", line
        )


def test_one_sglang_version() -> None:
    """The engine, the locks and the GPU extra name the same SGLang."""
    pin = f"sglang=={PINNED_SGLANG_VERSION}"
    assert pin in lines("requirements-cpu-nodeps.lock")
    assert pin in lines("requirements-gpu.txt")
    assert pin in PROJECT["optional-dependencies"]["server-gpu"]


def test_gpu_list_holds_the_base_dependencies() -> None:
    """streamfill itself is installed without dependencies, so the GPU list must bring them."""
    assert names(PROJECT["dependencies"]) <= names(lines("requirements-gpu.txt"))


@pytest.mark.parametrize(
    "module", ["streamfill", "streamfill.errors", "streamfill.models.describe"]
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    """What the router imports first brings neither torch nor sglang nor grpc with it."""
    script = (
        f"import sys, {module}\n"
        f"print([name for name in {(*HEAVY, 'grpc')!r} if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert answer.stdout.strip() == "[]"


def test_packages_import_after_an_editable_install(tmp_path: Path) -> None:
    """All four packages are found from another folder."""
    code = "import streamfill, router, prefill_server, decode_server"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)


def test_ci_runs_all_tests() -> None:
    """Continuous integration runs what a person runs, from any folder, and leaves nothing out."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = script.read_text().splitlines()
    assert [line for line in commands if line.startswith("make ")] == [
        "make test || failed=1",
        "make test-clusters || failed=1",
    ]
    assert commands[-1] == 'exit "$failed"'


def test_what_starts_a_cluster_is_marked() -> None:
    """So that `make test` stays short. Fixtures of `conftest.py` are shared by many tests."""
    for path in sorted((ROOT / "tests" / "integration").glob("test_*.py")):
        text = path.read_text()
        starts = re.findall(r"= start_cluster\(", text)
        if starts and path.name != "test_bad_input.py":  # one server that is started once
            assert "pytest.mark.clusters" in text, path.name
