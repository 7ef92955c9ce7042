"""Runs that a file holds already, so that an interrupted measurement need not make them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamfill.loadgen.compare import PlannedRun
from streamfill.loadgen.run_file import SavedRun, read_records


class KeptRuns:
    """Finished runs of earlier calls."""

    def __init__(self, saved: Sequence[SavedRun] = ()) -> None:
        self._saved = tuple(saved)

    def find(
        self, planned: PlannedRun, *, config: Mapping[str, Any], trace_digest: str
    ) -> SavedRun | None:
        """The newest run of the same mode, policy and repetition over the same trace, with the same
        options of the replay and of the cluster; None: there is none.

        Args:
            config: what would be saved with the run.
            trace_digest: as in ``Environment``.
        """
        wanted = _comparable(config)
        variant = planned.variant
        for saved in reversed(self._saved):
            result = saved.result
            is_same = (
                (result.label, result.policy, result.run)
                == (variant.label, variant.policy, planned.run)
                and saved.environment.trace_digest == trace_digest
                and _comparable(saved.config) == wanted
            )
            if is_same:
                return saved
        return None


def read_kept_runs(path: Path) -> KeptRuns:
    """The runs of the records beside a file of figures; none where there is no such file yet.

    Raises:
        ConfigError: it has figures without records, or a line of it is no run.
    """
    if not path.exists() or path.stat().st_size == 0:
        return KeptRuns()
    return KeptRuns(list(read_records(path)))


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the cluster's name, which is another one at each start."""
    cluster = config.get("cluster")
    if not isinstance(cluster, Mapping):
        return dict(config)
    return {**config, "cluster": {key: cluster[key] for key in cluster if key != "name"}}
