"""One process of a peer: started under `keeper`, watched while it starts, stopped whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from streamfill.launcher.log_files import last_lines, log_file, open_log
from streamfill.loadgen.peers import keeper
from streamfill.loadgen.peers.errors import PeerUnavailable

GRACE_S: Final = 3.0
"""From SIGTERM to SIGKILL. SGLang takes longer even without open requests, but a peer has nothing
to save, and its sockets and shared memory go with its processes."""
_KEEPER_MARGIN_S: Final = 5.0


class PeerProcess:
    """A process that runs. Made by `peer_process`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        """Both outputs of the process and of all it starts."""
        self._process = process
        self._ended = asyncio.create_task(process.wait())

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return not self._ended.done()

    def check(self) -> None:
        """Raises ``PeerUnavailable``, with the log's last words, when the process has ended."""
        if self._ended.done():
            raise self.failure(f"ended with exit code {self._ended.result()}")

    def failure(self, what: str) -> PeerUnavailable:
        """The error that says what became of the process."""
        lines = last_lines(self.log, 60)
        errors = [line for line in lines if "error" in line.lower()]
        said = (errors or list(lines) or ["it said nothing"])[-1].strip()[:200]
        return PeerUnavailable(f"{self.name} {what}: {said} (log: {self.log})")

    async def pause(self, seconds: float) -> None:
        """Waits so long, less when the process ends meanwhile."""
        await asyncio.wait({self._ended}, timeout=seconds)

    async def stop(self) -> None:
        """Ends the process and its group. Idempotent."""
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
                self._process.terminate()
            await asyncio.wait({self._ended}, timeout=GRACE_S + _KEEPER_MARGIN_S)
        if not self._ended.done():
            self._process.kill()
        await self._ended


@asynccontextmanager
async def peer_process(
    name: str,
    argv: Sequence[str],
    *,
    variables: Mapping[str, str],
    run_dir: Path,
) -> AsyncIterator[PeerProcess]:
    """A process as long as the block lasts. The event loop must be that of the main thread.

    Args:
        name: of its log file ``run_dir/logs/NAME.log``.
        variables: its whole environment.
        run_dir: it works there; absolute.

    Raises:
        PeerUnavailable: it cannot be started.
    """
    keeping = (sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), str(GRACE_S))
    try:
        with open_log(run_dir / "logs", name) as log:
            process = await asyncio.create_subprocess_exec(
                *keeping,
                *argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=run_dir,
                env=variables,
                start_new_session=True,
            )
    except OSError as error:
        raise PeerUnavailable(f"{name} cannot be started: {error}") from error
    running = PeerProcess(name, process, log_file(run_dir / "logs", name))
    try:
        yield running
    finally:
        # Shielded: a second Ctrl-C must not leave the group behind.
        await asyncio.shield(asyncio.ensure_future(running.stop()))
