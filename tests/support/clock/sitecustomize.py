"""Shifts the wall clock of every Python process that is started with this folder on its
``PYTHONPATH`` and ``STREAMFILL_TEST_CLOCK`` in its environment.

The variable names a file of eight bytes: the shift in seconds, as a float in the machine's byte
order. Whoever writes it changes the clock of all those processes at once, while they run, as an
administrator or a time server does. The monotonic clock is left alone, as the kernel leaves it.
"""

from __future__ import annotations

import mmap
import os
import struct
import time


def _shift(path: str) -> None:
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    real_time, real_time_ns = time.time, time.time_ns

    def shift_s() -> float:
        shift: float = struct.unpack_from("d", memory)[0]
        return shift

    def shifted_time() -> float:
        return real_time() + shift_s()

    def shifted_time_ns() -> int:
        return real_time_ns() + int(shift_s() * 1e9)

    for name, function in (("time", shifted_time), ("time_ns", shifted_time_ns)):
        setattr(time, name, function)


if "STREAMFILL_TEST_CLOCK" in os.environ:
    _shift(os.environ["STREAMFILL_TEST_CLOCK"])
