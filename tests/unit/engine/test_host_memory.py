"""Memory as a container may use it, read from made-up cgroup folders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from streamfill.engine.host_memory import HostMemory, read_host_memory

_MACHINE = HostMemory(total_bytes=1000, available_bytes=600)


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(total=_MACHINE.total_bytes, available=_MACHINE.available_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def _read(tmp_path: Path, own: str) -> HostMemory:
    _write(tmp_path / "own", own)
    return read_host_memory(tmp_path / "cgroup", tmp_path / "own")


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    """`max`, a missing file and a system without cgroups all mean the machine's memory."""
    assert read_host_memory(tmp_path, tmp_path / "missing") == _MACHINE
    assert _read(tmp_path, "0::/service") == _MACHINE
    _write(tmp_path / "cgroup/service/memory.max", "max")
    assert _read(tmp_path, "0::/service") == _MACHINE


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    """A limit of an outer group holds for the inner ones; reclaimable cache is not usage."""
    _write(tmp_path / "cgroup/a/memory.max", "500")
    _write(tmp_path / "cgroup/a/memory.current", "450")
    _write(tmp_path / "cgroup/a/memory.stat", "anon 250\ninactive_file 200")
    _write(tmp_path / "cgroup/a/b/memory.max", "800")
    _write(tmp_path / "cgroup/a/b/memory.current", "300")
    assert _read(tmp_path, "0::/a/b") == HostMemory(total_bytes=500, available_bytes=250)


def test_version_1_is_read_from_the_memory_hierarchy(tmp_path: Path) -> None:
    """Version 1 names its memory group on a line of its own; its "no limit" is a huge number."""
    own = "5:cpu,cpuacct:/x\n4:memory:/box"
    _write(tmp_path / "cgroup/memory/box/memory.limit_in_bytes", "400")
    _write(tmp_path / "cgroup/memory/box/memory.usage_in_bytes", "150")
    _write(tmp_path / "cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))
    assert _read(tmp_path, own) == HostMemory(total_bytes=400, available_bytes=250)


def test_a_full_container_has_nothing_left(tmp_path: Path) -> None:
    """Usage above the limit, which a lowered limit can cause, is no negative number."""
    _write(tmp_path / "cgroup/memory.max", "300")
    _write(tmp_path / "cgroup/memory.current", "350")
    assert _read(tmp_path, "0::/") == HostMemory(total_bytes=300, available_bytes=0)
