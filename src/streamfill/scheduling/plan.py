"""The decision of one step. The policy makes it; only the server's loop carries it out."""

from __future__ import annotations

import enum
from typing import NamedTuple

from streamfill.scheduling.snapshot import StreamView
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
    """Why a stream does not run in this step."""

    IDLE = "idle"
    """There is nothing to compute."""
    AWAITS_COMMIT = "awaits_commit"
    """Its commit is right behind its newest segment; one step does both."""
    IN_FLIGHT = "in_flight"
    """It runs already."""
    NO_SLOT = "no_slot"
    NO_BUDGET = "no_budget"
    NO_MEMORY = "no_memory"
    YIELDS = "yields"
    """Uncommitted, while a committed stream runs or waits for memory."""
    NOT_WORTH_IT = "not_worth_it"
    """In this step it would make others wait for longer than it gains."""
    WINDOW = "window"
    """It waits for others of its kind, for a moment."""


SENTENCES: dict[RunReason | DeferReason, str] = {
    RunReason.COMMIT: "the rest of its prompt and its first token were computed",
    RunReason.COMMIT_CHUNK: "a part of its committed prompt was computed",
    RunReason.COMMIT_TRIED: "it was first in line, and memory was asked for it",
    RunReason.SEGMENT: "new context was computed",
    RunReason.RECOMPUTE: "context that had lost its KV was computed again",
    DeferReason.IDLE: "everything known of it is computed",
    DeferReason.AWAITS_COMMIT: "its commit is on its way; one step does both",
    DeferReason.IN_FLIGHT: "the engine is at it",
    DeferReason.NO_SLOT: "all request slots were taken",
    DeferReason.NO_BUDGET: "streams before it used the tokens of the step",
    DeferReason.NO_MEMORY: "the KV pool had no room for it",
    DeferReason.YIELDS: "a committed stream had to go first",
    DeferReason.NOT_WORTH_IT: "in that step it would have cost others more than it gained",
    DeferReason.WINDOW: "it waited for others of its kind to share a step",
}


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
    num_restored: int = 0
    """Tokens whose KV has to come back from host memory first; they are not in ``num_tokens``."""


class Deferral(NamedTuple):
    """A stream that has to wait."""

    stream_id: StreamId
    reason: DeferReason


class Victim(NamedTuple):
    """A stream that gives up memory."""

    stream_id: StreamId
    num_freed_tokens: int
    """What that frees: its evictable tokens without those that others share."""
    reason: str


class StepPlan(NamedTuple):
    """What to start now, and at whose cost."""

    runs: tuple[StreamRun, ...]
    """In the order in which to start them. Their tokens together are within the budget, and so is
    their number."""
    deferred: tuple[Deferral, ...]
    """Streams whose turn it was and that cannot run, in the order of their turn. Those behind them
    were not looked at: the next two say why they wait."""
    rest_of_commits: DeferReason | None = None
    """Why committed streams wait that are in neither list."""
    rest_of_context: DeferReason | None = None
    """Why uncommitted streams with something to compute wait that are in neither list."""
    victims: tuple[Victim, ...] = ()
    """Memory is taken from these, first to give first. Just enough for ``runs``; empty where memory
    suffices that is free or belongs to no open stream."""
    interruptible: bool = False
    """Commits that come while it is computed may run between two of its layers, where the server
    can do that: the policy is asked again, with ``Snapshot.under_way``."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all runs."""
        return sum(run.num_tokens for run in self.runs)

    def reason(self, view: StreamView, page_size: int) -> RunReason | DeferReason:
        """What the plan says of any stream of its snapshot."""
        for run in self.runs:
            if run.stream_id == view.stream_id:
                return run.reason
        for deferral in self.deferred:
            if deferral.stream_id == view.stream_id:
                return deferral.reason
        if view.in_flight:
            return DeferReason.IN_FLIGHT
        if view.committed_s is not None:
            return self.rest_of_commits or DeferReason.NO_BUDGET
        if view.awaits_commit:
            return DeferReason.AWAITS_COMMIT
        if view.num_known_tokens // page_size <= view.num_kept_tokens // page_size:
            return DeferReason.IDLE
        return self.rest_of_context or DeferReason.NO_BUDGET
