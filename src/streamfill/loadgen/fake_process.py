"""The fake router in a process of its own, so that it takes no time from the one that measures."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from streamfill.errors import UnavailableError
from streamfill.launcher import guard
from streamfill.launcher.ready_line import parse_ready_line

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
        yield f"127.0.0.1:{await _port(process)}"
    finally:
        await _end(process)


async def _port(process: asyncio.subprocess.Process) -> int:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            async for line in process.stdout:
                facts = parse_ready_line(line)
                if facts is not None:
                    return int(facts["port"])
    except TimeoutError as error:
        text = f"the fake router was not ready after {READY_TIMEOUT_S:g} s"
        raise UnavailableError(text) from error
    raise UnavailableError("the fake router ended before it was ready")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
