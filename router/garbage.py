"""How the router's process uses Python's garbage collector: seldom, since its loop waits for it.

Nearly everything here is freed by its reference count. What the collector is for, cycles, comes
from tasks and exceptions, some per stream.
"""

from __future__ import annotations

import gc
from typing import Final

THRESHOLDS: Final = (5_000, 10, 100)
"""Of young, middle-aged and all objects. Python's own are 700, 10 and 10. A young collection looks
at no more than so many new objects, in a quarter of a millisecond; a full one at all those of all
streams, which are ten to fifty milliseconds for a thousand open ones."""


def pause_less() -> None:
    """To be called when the process is ready: what is there now stays and is looked at no more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
