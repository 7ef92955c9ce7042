"""Makes the runs of a comparison, one engine after the other.

1. An engine starts, and answers a request that counts nowhere, so that no run pays for what is done
   only once. While it runs, no other one does.
2. Before each run on our cluster the servers get the policy of its mode. The caches are emptied;
   then the run is made and handed over.
3. The engine is stopped.

A peer that cannot be started, or that breaks down, is left out with its reason and the comparison
goes on. Our own engine has to work. When the task is cancelled, the run under way is thrown away
and the engine is stopped.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias

from streamfill.errors import StreamError, StreamfillError
from streamfill.loadgen.cluster_target import OpenTarget
from streamfill.loadgen.compare import OWN_ENGINE, EngineSession, PlannedRun
from streamfill.loadgen.environment import LoadAverage, load_average
from streamfill.loadgen.policy_control import use_policy
from streamfill.loadgen.records import RunResult

OpenEngine: TypeAlias = Callable[[str], AbstractAsyncContextManager[OpenTarget]]
"""Starts the engine of that name and makes it do everything once; it is stopped at the end of the
block."""
Replay: TypeAlias = Callable[[OpenTarget, PlannedRun], Awaitable[RunResult]]
"""Makes one run."""
OnResult: TypeAlias = Callable[[RunResult, LoadAverage], None]
"""Called after each run, before the next one."""


async def make_runs(
    sessions: Sequence[EngineSession],
    *,
    open_engine: OpenEngine,
    replay: Replay,
    on_result: OnResult,
) -> dict[str, str]:
    """Makes all runs; by their label, why runs of a peer are missing.

    Raises:
        StoppedError: a signal came while our own engine was starting.
        StreamfillError: our own engine could not be started, broke down between two runs, or
            refused a policy.
    """
    skipped: dict[str, str] = {}
    for session in sessions:
        num_made = 0
        try:
            async with open_engine(session.engine) as opened:
                for planned in session.runs:
                    result, load = await _one_run(opened, planned, replay)
                    on_result(result, load)
                    num_made += 1
        except StreamfillError as error:
            if session.engine == OWN_ENGINE or not _is_of_peer(error):
                raise
            for planned in session.runs[num_made:]:
                skipped.setdefault(planned.variant.label, str(error))
    return skipped


async def _one_run(
    opened: OpenTarget, planned: PlannedRun, replay: Replay
) -> tuple[RunResult, LoadAverage]:
    if planned.variant.policy:
        await use_policy(opened.target, planned.variant.policy)
    await opened.target.empty_caches()
    start = load_average()
    result = await replay(opened, planned)
    if any(record.error_code is not None for record in result.records):
        opened.keeps_logs = True
    return result, LoadAverage(start=start, end=load_average())


def _is_of_peer(error: StreamfillError) -> bool:
    """Whether an engine of others is to blame, rather than the trace or an option."""
    from streamfill.loadgen.peers.errors import PeerUnavailable

    return isinstance(error, (PeerUnavailable, StreamError))
