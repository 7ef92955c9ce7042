"""The fake router in a process of its own, so that it takes no time from the one that measures."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from streamfill.launcher import guard
from streamfill.launcher.child_process import end_process, read_ready

READY_TIMEOUT_S: Final = 30.0
"""It takes a second; a loaded machine may need many."""
END_TIMEOUT_S: Final = 5.0
"""It ends within its grace time of a fraction of a second."""


@asynccontextmanager
async def fake_router_process(
    *, core: int | None = None, ttft_ms: float = 0.0, tpot_ms: float = 0.0
) -> AsyncIterator[str]:
    """Its address. The process ends with the block, and with this one however that ends.

    Args:
        core: run on this core only.

    Raises:
        UnavailableError: it did not start.
    """
    program = [sys.executable, "-m", "streamfill.loadgen.fake_router", "--port", "0"]
    program += ["--ttft-ms", str(ttft_ms), "--tpot-ms", str(tpot_ms)]
    if core is not None:
        program += ["--core", str(core)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", guard.__file__, str(os.getpid())),
        *program,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the one that measures
    )
    try:
        ready = await read_ready(process, "the fake router", READY_TIMEOUT_S)
        yield f"127.0.0.1:{int(ready['port'])}"
    finally:
        await end_process(process, END_TIMEOUT_S)
