"""What a run can be made again from, as facts that are kept with it; no folders of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from streamfill.cli.bench_options import ReplayOptions
from streamfill.loadgen.cluster_target import OwnCluster


def run_config(options: ReplayOptions, target: object) -> dict[str, Any]:
    """The options of the replay, and the cluster where the run started one."""
    facts: dict[str, Any] = msgspec.to_builtins(options, enc_hook=_name)
    if isinstance(target, OwnCluster):
        cluster = msgspec.to_builtins(target.config)
        cluster["model"]["path"] = target.model_path.name
        facts["cluster"] = cluster
    return facts


def _name(value: object) -> object:
    if isinstance(value, Path):
        return value.name
    raise NotImplementedError(f"{type(value)} in the options of a run")
