"""Starts one vLLM engine behind our driver, for all three modes."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from streamfill.launcher.ready_line import ReadyLineScanner
from streamfill.loadgen.peers import vllm_stream_server
from streamfill.loadgen.peers.environment import peer_variables
from streamfill.loadgen.peers.limits import context_tokens, pool_bytes
from streamfill.loadgen.peers.process import peer_process
from streamfill.loadgen.peers.recipes import Recipe
from streamfill.loadgen.peers.vllm_target import VllmTarget

READY_TIMEOUT_S: Final = 360.0
"""Seen on two cores: 80 s for the first start, which compiles the model, 40 s for later ones."""
_POLL_S: Final = 0.2


@asynccontextmanager
async def vllm_engine(
    recipe: Recipe, *, model_path: Path, threads: int, run_dir: Path, say: Callable[[str], None]
) -> AsyncIterator[VllmTarget]:
    """The target, ready and with empty caches. Raises ``PeerUnavailable``."""
    started = time.monotonic()
    variables = peer_variables(recipe.folder, threads=threads) | {
        # As many threads as OMP_NUM_THREADS, on any core, like our servers.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(recipe.folder / "cache"),
        # With this torch vLLM cannot read back what it compiles ahead of time ("no attribute
        # 'finalize_loading'") and would compile at each start; without, its other cache serves.
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    # Of its own, since the path of a Unix socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="streamfill-vllm-"))
    socket = folder / "socket"
    argv = [
        str(recipe.folder / "bin" / "python"),
        "-P",  # the modules beside the script are not its own
        vllm_stream_server.__file__,
        *("--model", str(model_path), "--socket", str(socket)),
        *("--context-tokens", str(context_tokens(model_path))),
        *("--kv-bytes", str(pool_bytes(model_path))),
    ]
    try:
        say(f"vllm: starting (log: {run_dir / 'logs' / 'vllm.log'}); the first start compiles")
        async with peer_process("vllm", argv, variables=variables, run_dir=run_dir) as process:
            scanner = ReadyLineScanner(process.log)
            while scanner.scan() is None:
                process.check()
                if time.monotonic() - started > READY_TIMEOUT_S:
                    raise process.failure(f"was not ready within {READY_TIMEOUT_S:.0f} s")
                await process.pause(_POLL_S)
            target = VllmTarget(socket, model_path=model_path)
            try:
                say(f"vllm: ready after {time.monotonic() - started:.0f} s")
                yield target
            finally:
                await target.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
