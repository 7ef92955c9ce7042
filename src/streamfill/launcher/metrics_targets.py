"""Where Prometheus finds the processes of a cluster: a file in its run folder.

Its form is that of Prometheus's file-based service discovery (``file_sd_configs``), so that a
Prometheus on this machine follows clusters whose ports are free ones; see
``deploy/prometheus/prometheus.yml``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from streamfill.launcher.plan import ProcessSpec

TARGETS_FILE: Final = "prometheus.json"


class TargetGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the file."""

    targets: tuple[str, ...]
    """``host:port``"""
    labels: dict[str, str]


def metrics_targets(name: str, processes: Iterable[ProcessSpec]) -> list[TargetGroup]:
    """Each process that has ``/metrics``. Pure."""
    return [
        TargetGroup(
            targets=(spec.metrics_address,),
            labels={"cluster": name, "process": spec.name, "kind": spec.kind.value},
        )
        for spec in processes
        if spec.metrics_address is not None
    ]


def write_targets(name: str, processes: Iterable[ProcessSpec], run_dir: Path) -> None:
    """Replace the file in one step: Prometheus reads it whenever it changes.

    Raises:
        OSError: the folder cannot be written to.
    """
    content = msgspec.json.format(msgspec.json.encode(metrics_targets(name, processes)), indent=2)
    part = run_dir / f".{TARGETS_FILE}.part"
    part.write_bytes(content + b"\n")
    part.replace(run_dir / TARGETS_FILE)
