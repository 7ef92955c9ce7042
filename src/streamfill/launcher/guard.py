"""Run as a script: ties this process to its launcher, then becomes the program to be run.

``python -I -S guard.py LAUNCHER_PID PROGRAM ARGUMENT…``

The kernel is asked to kill this process when the launcher dies, by whatever cause; the wish
survives ``exec``. A script of its own, because a function run between ``fork`` and ``exec`` could
hang on a lock that one of the launcher's other threads held.

The kernel acts when the *thread* that started this process ends, so that a launcher must start its
processes from a thread that lives as long as itself, which is its main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_EXIT_NO_LAUNCHER: Final = 3


def main(argv: list[str]) -> int:
    """Replaces this process by ``argv[2:]``; returns only when the launcher, whose process id is
    ``argv[1]``, is gone already."""
    launcher_pid, program = int(argv[1]), argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"prctl: {os.strerror(error)}")
    if os.getppid() == launcher_pid:
        os.execvp(program[0], program)
    return _EXIT_NO_LAUNCHER  # it died before the kernel knew of the wish


if __name__ == "__main__":
    sys.exit(main(sys.argv))
