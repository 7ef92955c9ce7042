"""A child process of ours on the asyncio loop: until it is ready, and to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from streamfill.errors import UnavailableError
from streamfill.launcher.ready_line import parse_ready_line


async def read_ready(
    process: asyncio.subprocess.Process, name: str, timeout_s: float
) -> Mapping[str, Any]:
    """What its line ``READY`` says; its standard output is a pipe.

    Args:
        name: of the process, for errors.

    Raises:
        UnavailableError: it ended, or was not ready in time.
    """
    assert process.stdout is not None
    try:
        async with asyncio.timeout(timeout_s):
            async for line in process.stdout:
                facts = parse_ready_line(line)
                if facts is not None:
                    return facts
    except TimeoutError as error:
        raise UnavailableError(f"{name} was not ready after {timeout_s:g} s") from error
    raise UnavailableError(f"{name} ended before it was ready")


async def end_process(process: asyncio.subprocess.Process, timeout_s: float) -> None:
    """Ask it to end, and kill it if it has not after so long. Idempotent."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
