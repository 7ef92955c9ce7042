"""The engines that `streamfill bench compare` starts: our cluster, and the servers of others."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from streamfill.cli.bench_target import shown_target
from streamfill.launcher.cluster import StoppedError, unless_stopped
from streamfill.launcher.signals import StopRequest
from streamfill.loadgen.cluster_target import (
    OpenTarget,
    OwnCluster,
    RunningCluster,
    prime,
)
from streamfill.loadgen.compare import OWN_ENGINE
from streamfill.loadgen.policy_control import restored_policies


class Engines:
    """Starts engines by their names. Each has answered a request when it is given out."""

    def __init__(
        self,
        own: OwnCluster | RunningCluster,
        *,
        peer_threads: int,
        stop: StopRequest,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            own: our cluster; peers run the same model, so they need one that is started here.
            peer_threads: CPU threads of each server of a peer.
            stop: its first signal ends whatever is starting.
            say: shows one line.
        """
        self._own = own
        self._peer_threads = peer_threads
        self._stop = stop
        self._say = say

    @asynccontextmanager
    async def open(self, engine: str) -> AsyncIterator[OpenTarget]:
        """As ``compare_runs.OpenEngine``. A cluster that ran already has the policy from before
        again at the end.

        Raises:
            StoppedError: a signal came while it was starting.
            PeerUnavailable: a peer cannot be installed or started.
            StreamfillError: our cluster cannot be started, or does not answer.
        """
        if engine == OWN_ENGINE:
            async with shown_target(self._own, self._stop) as opened:
                if isinstance(self._own, OwnCluster):
                    yield opened
                else:
                    await unless_stopped(prime(opened), self._stop)
                    async with restored_policies(opened.target, self._say):
                        yield opened
        else:
            assert isinstance(self._own, OwnCluster)
            async with self._peer(engine, self._own.model_path) as opened:
                yield opened

    @asynccontextmanager
    async def _peer(self, name: str, model_path: Path) -> AsyncIterator[OpenTarget]:
        from streamfill.loadgen.peers import running_peer

        self._say(f"Starting {name}.")
        owner = asyncio.current_task()
        assert owner is not None
        watcher = asyncio.create_task(self._cancel_at_signal(owner))
        folder = Path(tempfile.mkdtemp(prefix=f"streamfill-{name}-"))
        keeps_logs = True
        try:
            async with running_peer(
                name,
                model_path=model_path,
                threads=self._peer_threads,
                run_dir=folder,
                say=self._say,
            ) as target:
                # From here on a signal ends what is waited for, never the peer's own end.
                watcher.cancel()
                facts = await unless_stopped(target.facts(), self._stop)
                opened = OpenTarget(target=target, facts=facts, logs=folder / "logs")
                await unless_stopped(prime(opened), self._stop)
                yield opened
                keeps_logs = opened.keeps_logs
        except StoppedError:
            keeps_logs = False
            raise
        except asyncio.CancelledError as error:
            keeps_logs = False
            if not self._stop.first.is_set() or watcher.cancelled():
                raise
            owner.uncancel()
            raise StoppedError("stopped") from error
        finally:
            watcher.cancel()
            if keeps_logs:
                self._say(f"Logs of {name} are kept in {folder / 'logs'}.")
            else:
                shutil.rmtree(folder)

    async def _cancel_at_signal(self, owner: asyncio.Task[object]) -> None:
        await self._stop.first.wait()
        owner.cancel()
