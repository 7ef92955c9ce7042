"""Resident memory of a cluster's processes."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from streamfill.launcher.managed_process import ProcessStatus

_MB = 1e6


def resident_mb(statuses: Sequence[ProcessStatus]) -> dict[str, float]:
    """By the processes' names, their children included; those that are gone are left out."""
    found: dict[str, float] = {}
    for status in statuses:
        if status.pid is None:
            continue
        try:
            process = psutil.Process(status.pid)
            family = [process, *process.children(recursive=True)]
            found[status.name] = sum(each.memory_info().rss for each in family) / _MB
        except psutil.NoSuchProcess:
            continue
    return found
