"""A soak: many streams do everything at random for minutes, and everything is checked.

``make soak``, or ``python -m tests.chaos.soak --help``. ``docs/benchmarks/soak.md`` says what is
done and what is checked.

Ctrl-C ends the load early, or the comparison of answers; a second one ends everything at once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from streamfill.errors import StreamfillError
from streamfill.launcher.cluster import StoppedError
from streamfill.launcher.signals import StopRequest, stop_on_signal
from streamfill.models.resolve import resolve_model
from streamfill.models.tiny import make_tiny_model
from tests.chaos.options import Command, parse
from tests.chaos.progress import Progress
from tests.chaos.report import SoakReport, print_report
from tests.chaos.run import soak

_SIGNAL_POLL_S = 0.5
_INTERRUPTED = 130


async def _until_second_signal(
    command: Command, model: Path, folder: Path, stop: StopRequest, progress: Progress
) -> SoakReport:
    work = asyncio.create_task(soak(command.soak, model, folder, stop, progress))
    while not work.done():
        await asyncio.wait({work}, timeout=_SIGNAL_POLL_S)
        if stop.num_signals > 1:
            work.cancel()
    if work.cancelled():
        raise StoppedError("stopped")
    return work.result()


async def _main(command: Command) -> int:
    folder = Path(tempfile.mkdtemp(prefix=f"streamfill-soak-{os.getpid()}-"))
    progress = Progress()
    keeps_logs = True
    try:
        if command.model is None and not command.default_model:
            model = make_tiny_model(folder / "model", tokenizer="bpe")
        else:
            model = resolve_model(command.model)
        with stop_on_signal() as stop:
            report = await _until_second_signal(command, model, folder, stop, progress)
        keeps_logs = bool(report.violations) or command.soak.keeps_logs
        print_report(report, sys.stdout)
        if report.violations:
            return 1
        return _INTERRUPTED if report.interrupted else 0
    except StoppedError:
        keeps_logs = False
        return _INTERRUPTED
    except StreamfillError as error:
        progress.say(str(error))
        return 1
    finally:
        if keeps_logs:
            progress.say(f"Logs are kept in {folder / 'logs'}.")
        else:
            shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    return asyncio.run(_main(parse(arguments, secrets.randbelow(1_000_000))))


if __name__ == "__main__":
    sys.exit(main())
