"""Child processes that a test talks to through a pipe, and may kill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any


@contextmanager
def child(
    context: BaseContext, target: Any, *arguments: Any
) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that runs ``target(pipe, *arguments)``, and our end of the pipe. It is killed at
    the end, whether it is over or not."""
    ours, theirs = context.Pipe()
    process: BaseProcess = context.Process(  # type: ignore[attr-defined]  # each context has one
        target=target, args=(theirs, *arguments), daemon=True
    )
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
