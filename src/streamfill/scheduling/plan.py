"""The decision of one step. The policy makes it, only the prefill server's loop carries it out."""

from __future__ import annotations

import enum
from typing import NamedTuple

from streamfill.stream.ids import StreamId


class RunReason(enum.Enum):
    """Why a stream runs."""

    COMMIT = "commit"
    """All that is left of a committed prompt, and its first token."""
    COMMIT_CHUNK = "commit_chunk"
    """Part of a committed prompt that is too long for what is left of this step."""
    COMMIT_TRIED = "commit_tried"
    """Memory looks too short for it, but it is first in line: the engine is to find some, or to say
    no."""
    SEGMENT = "segment"
    """New context of an uncommitted stream."""
    RECOMPUTE = "recompute"
    """Context of an uncommitted stream whose KV was taken, while memory is spare."""


class DeferReason(enum.Enum):
    """Why a stream with something to compute does not run in this step."""

    IN_FLIGHT = "in_flight"
    """It runs already."""
    NO_SLOT = "no_slot"
    NO_BUDGET = "no_budget"
    NO_MEMORY = "no_memory"
    YIELDS = "yields"
    """Uncommitted, while a committed stream runs or waits for memory."""


class StreamRun(NamedTuple):
    """One request to the engine: compute a stream's tokens up to ``up_to``."""

    stream_id: StreamId
    num_tokens: int
    """Tokens to compute, at least 1. What the prefix lacks, and for a commit the last token in any
    case."""
    up_to: int
    """Length of the prefix that is computed afterwards: whole pages, except in a commit's run,
    where it is the whole prompt."""
    is_commit: bool
    """The prompt is complete with it: sample the first token. Else it only fills the cache."""
    reason: RunReason


class Deferral(NamedTuple):
    """A stream that has to wait."""

    stream_id: StreamId
    reason: DeferReason


class StepPlan(NamedTuple):
    """What to start now. A stream is in ``runs``, or in ``deferred``, or has nothing to compute."""

    runs: tuple[StreamRun, ...]
    """In the order in which to start them. Their tokens together are within the budget, and so is
    their number."""
    deferred: tuple[Deferral, ...]
    """In the order of their turn."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all runs."""
        return sum(run.num_tokens for run in self.runs)
