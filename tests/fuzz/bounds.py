"""How much each fuzz test tries, and how much a decoder may take.

By default as many examples as fit an ordinary test run. `make fuzz` sets
``STREAMFILL_FUZZ_EXAMPLES`` and goes on with other seeds until its time is over.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from hypothesis import HealthCheck, settings

EXAMPLES_VARIABLE = "STREAMFILL_FUZZ_EXAMPLES"
DEADLINE_S = 5.0
"""Of one example of a few kilobytes, which takes milliseconds. More is a loop that grows faster
than its input."""
MEMORY_FACTOR = 200
"""Python's objects for each byte read: an empty list in an array takes 56 for its one."""
MEMORY_FLOOR_BYTES = 1 << 20
FILE_FLOOR_BYTES = 1 << 25
"""Readers of files take buffers as large as the largest file that they accept."""


def examples(num_fast: int) -> settings:
    """For a test that tries ``num_fast`` examples in an ordinary run."""
    return settings(
        max_examples=int(os.environ.get(EXAMPLES_VARIABLE, num_fast)),
        deadline=timedelta(seconds=DEADLINE_S),
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@contextmanager
def bounded_memory(num_bytes: int, floor_bytes: int = MEMORY_FLOOR_BYTES) -> Iterator[None]:
    """Fails when what is done within takes much more memory than the input of ``num_bytes``."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    limit = floor_bytes + MEMORY_FACTOR * num_bytes
    assert peak <= limit, f"{peak} bytes for an input of {num_bytes}"
