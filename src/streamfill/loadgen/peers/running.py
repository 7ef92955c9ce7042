"""A peer for the length of a block: installed where that was not done yet, started, stopped."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from streamfill.launcher.log_files import log_file
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.loadgen.peers.installer import is_installed
from streamfill.loadgen.peers.process import peer_process
from streamfill.loadgen.peers.recipes import PeerName, Recipe, recipe_of
from streamfill.loadgen.target import Target

ERROR_PREFIX: Final = "error: "
"""Begins the last line of an install that failed."""
_POLL_S: Final = 0.5
PEER_NAMES: Final = tuple(peer.value for peer in PeerName)


@asynccontextmanager
async def running_peer(
    name: str, *, model_path: Path, threads: int, run_dir: Path, say: Callable[[str], None]
) -> AsyncIterator[Target]:
    """A peer that answers; its processes are gone when the block is left, whatever ended it.

    To be used in the event loop of the main thread (see ``launcher.guard``).

    Args:
        name: one of ``PEER_NAMES``.
        model_path: absolute folder of the model, the same as our own servers run.
        threads: CPU threads of each of its servers.
        run_dir: absolute folder; logs go to ``logs`` in it.
        say: told in a line now and then how far it is.

    Raises:
        PeerUnavailable: it cannot be installed or started here; says why in one line.
    """
    recipe = recipe_of(name)
    await asyncio.to_thread(run_dir.mkdir, parents=True, exist_ok=True)
    if not is_installed(recipe):
        await _install(recipe, run_dir, say)
    if recipe.name is PeerName.SGLANG_PD:
        from streamfill.loadgen.peers.sglang_pd import sglang_pd

        async with sglang_pd(
            recipe, model_path=model_path, threads=threads, run_dir=run_dir, say=say
        ) as sglang:
            yield sglang
    else:
        from streamfill.loadgen.peers.vllm_engine import vllm_engine

        async with vllm_engine(
            recipe, model_path=model_path, threads=threads, run_dir=run_dir, say=say
        ) as engine:
            yield engine


async def _install(recipe: Recipe, run_dir: Path, say: Callable[[str], None]) -> None:
    """Installs in a process of its own, so that the event loop stays free and Ctrl-C ends it."""
    name = f"install-{recipe.name.value}"
    argv = (sys.executable, "-m", "streamfill.loadgen.peers", "install", recipe.name.value)
    lines = _NewLines(log_file(run_dir / "logs", name))
    async with peer_process(name, argv, variables=os.environ, run_dir=run_dir) as process:
        while process.is_running:
            await process.pause(_POLL_S)
            for line in lines.read():
                if line.startswith(ERROR_PREFIX):
                    raise PeerUnavailable(line.removeprefix(ERROR_PREFIX))
                say(line)
    if not is_installed(recipe):
        raise process.failure("did not finish")


class _NewLines:
    """Reads a log that is being written, each whole line once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[str]:
        """The lines that are new."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode("utf-8", errors="replace").splitlines()
