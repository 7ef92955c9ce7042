"""Run as a script: runs a peer's program, and ends it with all its children when asked to, or when
the tool that started it is gone.

``python -I -S keeper.py LAUNCHER_PID GRACE_S PROGRAM ARGUMENT…``

Servers of others start processes of their own that outlive them when they are killed. So their
program leads a process group, and whatever ends it, the group is killed after it. Orphans of the
program become children of this process, so that those which left the group are found as well, and
none stays behind as a zombie. The kernel sends this process SIGTERM when the tool dies, by whatever
cause; and it kills the program should this process be killed (`launcher.guard`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER: Final = 36
_REAP_TIMEOUT_S: Final = 5.0
"""A killed process ends as soon as the kernel has freed its memory, some GB at most."""
_EXIT_NO_LAUNCHER: Final = 3
_REAP_POLL_S: Final = 0.02
_GUARD: Final = Path(__file__).resolve().parents[2] / "launcher" / "guard.py"


class _StopError(BaseException):
    """SIGTERM came."""


def main(argv: list[str]) -> int:
    """The program's exit code."""
    launcher_pid, grace_s, program = int(argv[1]), float(argv[2]), argv[3:]
    signal.signal(signal.SIGTERM, _on_term)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tool's to answer
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != launcher_pid:
        return _EXIT_NO_LAUNCHER
    child: subprocess.Popen[bytes] | None = None
    try:
        child = subprocess.Popen(
            (sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), *program),
            start_new_session=True,
        )
        return child.wait()
    except _StopError:
        if child is None:
            return _EXIT_NO_LAUNCHER
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(grace_s)
        return -signal.SIGKILL
    finally:
        if child is not None:
            with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            _end_orphans()


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl: {os.strerror(error)}")


def _end_orphans() -> None:
    """Kills and reaps what the program left behind."""
    deadline_s = time.monotonic() + _REAP_TIMEOUT_S
    while time.monotonic() < deadline_s:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, signal.SIGKILL)
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # none is left
            return
        if pid == 0:
            time.sleep(_REAP_POLL_S)


def _children() -> list[int]:
    return [
        int(pid)
        for file in Path("/proc/self/task").glob("*/children")
        for pid in file.read_text(encoding="ascii").split()
    ]


def _on_term(number: int, frame: FrameType | None) -> None:
    del number, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _StopError


if __name__ == "__main__":
    sys.exit(abs(main(sys.argv)))
