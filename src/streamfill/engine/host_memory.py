"""How much memory this process may use: the machine's, or its container's limit where that is less.

A container sees the whole machine in `/proc/meminfo` and is killed at its own cgroup's limit. Every
group from the process's own up to the root can set one, so the tightest counts. Both layouts are
read: version 2 (`memory.max`) and version 1 (`memory.limit_in_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import psutil

_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
_OWN_CGROUPS: Final = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of the machine as far as this process may have it.

    Attributes:
        total_bytes: what there is, used or not.
        available_bytes: what can still be had without swapping, at most `total_bytes`.
    """

    total_bytes: int
    available_bytes: int


def read_host_memory(
    cgroup_root: Path = _CGROUP_ROOT, own_cgroups: Path = _OWN_CGROUPS
) -> HostMemory:
    """Reads the machine's memory and all limits on it now.

    Args:
        cgroup_root: where the cgroup file system is mounted.
        own_cgroups: the file that names this process's groups.
    """
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for group in _own_groups(cgroup_root, own_cgroups):
        limit = _limit_bytes(group)
        if limit is None or limit >= machine.total:
            continue
        total = min(total, limit)
        available = min(available, max(0, limit - _unreclaimable_bytes(group)))
    return HostMemory(total_bytes=total, available_bytes=available)


def _own_groups(cgroup_root: Path, own_cgroups: Path) -> Iterator[Path]:
    """The folders of this process's memory groups, from the innermost to the root."""
    if not own_cgroups.exists():  # not Linux
        return
    for line in own_cgroups.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root = cgroup_root
        elif "memory" in controllers.split(","):
            root = cgroup_root / "memory"
        else:
            continue
        inner = PurePosixPath(name.lstrip("/"))
        for path in (inner, *inner.parents):
            yield root / path


def _limit_bytes(group: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = _read(group / name)
        if text is not None and text != "max":
            return int(text)
    return None


def _unreclaimable_bytes(group: Path) -> int:
    """What the group uses, less the page cache that the kernel would drop first."""
    for name in ("memory.current", "memory.usage_in_bytes"):
        used = _read(group / name)
        if used is not None:
            return max(0, int(used) - _inactive_file_bytes(group))
    return 0


def _inactive_file_bytes(group: Path) -> int:
    for line in (_read(group / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _read(file: Path) -> str | None:
    """The file's text, or None where a container's mount does not show it."""
    return file.read_text().strip() if file.is_file() else None
