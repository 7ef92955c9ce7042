"""The target of a `streamfill bench` command, with its start shown to the user."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager

from streamfill.cli.process_view import process_view
from streamfill.launcher.cluster import unless_stopped
from streamfill.launcher.managed_process import ProcessStatus
from streamfill.launcher.signals import StopRequest
from streamfill.loadgen.cluster_target import (
    OpenTarget,
    OwnCluster,
    TargetSpec,
    open_target,
    prime,
)


@asynccontextmanager
async def shown_target(spec: TargetSpec, stop: StopRequest) -> AsyncIterator[OpenTarget]:
    """As ``cluster_target.open_target``. A cluster of its own has done everything once and is cold.

    The processes are shown only while they start, so that nothing is drawn while requests are sent.
    """
    with ExitStack() as start:
        view = start.enter_context(process_view())
        is_starting = True

        def show(statuses: Sequence[ProcessStatus]) -> None:
            if is_starting:
                view.show(statuses)

        async with open_target(spec, stop=stop, on_change=show, say=_say) as opened:
            if isinstance(spec, OwnCluster):
                view.say(f"Ready after {opened.startup_s or 0.0:.1f} s. Warming up.")
                await unless_stopped(prime(opened), stop)
            is_starting = False
            start.close()
            yield opened


def _say(text: str) -> None:
    print(text, file=sys.stderr)
