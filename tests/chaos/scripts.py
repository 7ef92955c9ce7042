"""What a stream of the soak does, as plain data. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from streamfill.api.types import Mode
from streamfill.errors import ErrorCode
from streamfill.stream.state import StreamState
from tests.support.stories import Piece


class Form(enum.StrEnum):
    """By which calls a stream lives."""

    BIDI = "one bidirectional call"
    UNARY = "unary calls"
    ONE_SHOT = "one shot"


class Fate(enum.StrEnum):
    """How a stream is to end. One that is *left* has its call dropped without a word; where there
    is no call, nobody ever comes back to it."""

    FINISHED = "finished"
    CANCELLED_OPENING = "cancelled right after opening"
    CANCELLED_OPEN = "cancelled before its commit"
    CANCELLED_COMMITTED = "cancelled between commit and first token"
    CANCELLED_ANSWERING = "cancelled in mid-answer"
    LEFT_OPENING = "left right after opening"
    LEFT_OPEN = "left before its commit"
    LEFT_COMMITTED = "left between commit and first token"
    LEFT_ANSWERING = "left in mid-answer"
    HALF_CLOSED = "closes its side without a commit"
    DISCONNECTED = "connection closed at any moment"
    DEADLINE_OPEN = "deadline before the commit"
    DEADLINE_ANY = "deadline at any moment"


ENDS_OPEN = frozenset({Fate.CANCELLED_OPEN, Fate.LEFT_OPEN, Fate.HALF_CLOSED, Fate.DEADLINE_OPEN})
"""Fates that come after some of the steps, and before the commit."""

_DONE = frozenset({StreamState.DONE})
_ABORTED = frozenset({StreamState.ABORTED})
_EITHER = _DONE | _ABORTED

ALLOWED: Mapping[Fate, frozenset[StreamState]] = MappingProxyType(
    {
        Fate.FINISHED: _DONE,
        Fate.CANCELLED_OPENING: _ABORTED,
        Fate.CANCELLED_OPEN: _ABORTED,
        # A word that comes too late changes nothing.
        Fate.CANCELLED_COMMITTED: _EITHER,
        Fate.CANCELLED_ANSWERING: _EITHER,
        Fate.LEFT_OPENING: _ABORTED,
        Fate.LEFT_OPEN: _ABORTED,
        Fate.LEFT_COMMITTED: _EITHER,
        Fate.LEFT_ANSWERING: _EITHER,
        Fate.HALF_CLOSED: _ABORTED,
        Fate.DISCONNECTED: _EITHER,
        Fate.DEADLINE_OPEN: frozenset({StreamState.DEADLINE}),
        Fate.DEADLINE_ANY: _DONE | {StreamState.DEADLINE},
    }
)
"""The terminal states that each fate may lead to."""


class Prank(enum.StrEnum):
    """An operation that is wrong or repeated. It is answered, and the stream is unharmed."""

    OTHER_MODE = "an operation of the other mode"
    UNKNOWN_TOKEN = "a token id outside the vocabulary"
    EMPTY_SEGMENT = "a segment without content"
    BROKEN_UTF8 = "text that is not UTF-8"
    TOO_LONG = "more tokens than the context has room for"
    BAD_SAMPLING = "a commit with a negative temperature"
    SECOND_OPEN = "a second opening"
    LATE_PIECE = "a piece after the commit"
    RESENT = "an operation again under its number"
    GAP = "a number that leaves a gap"


REFUSALS: Mapping[Prank, ErrorCode] = MappingProxyType(
    {
        Prank.OTHER_MODE: ErrorCode.FAILED_PRECONDITION,
        Prank.UNKNOWN_TOKEN: ErrorCode.INVALID_ARGUMENT,
        Prank.EMPTY_SEGMENT: ErrorCode.INVALID_ARGUMENT,
        Prank.BROKEN_UTF8: ErrorCode.INVALID_ARGUMENT,
        Prank.TOO_LONG: ErrorCode.INVALID_ARGUMENT,
        Prank.BAD_SAMPLING: ErrorCode.INVALID_ARGUMENT,
        Prank.SECOND_OPEN: ErrorCode.FAILED_PRECONDITION,
        Prank.LATE_PIECE: ErrorCode.FAILED_PRECONDITION,
    }
)
"""How each is refused. What is not in here is acknowledged, and changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One append or update, and what goes wrong around it."""

    gap_s: float
    """Pause before it; left out in a burst."""
    piece: Piece
    before: Prank | None = None
    after: Prank | None = None


@dataclass(frozen=True, kw_only=True)
class Script:
    """One stream, from its opening to its end."""

    number: int
    form: Form
    mode: Mode
    fate: Fate
    steps: tuple[Step, ...]
    """Of a one-shot: one, the whole prompt."""
    final: Piece | None
    """Travels with the commit."""
    before_commit: Prank | None
    after_commit: Prank | None
    prompt_ids: tuple[int, ...]
    """The prompt when all has arrived."""
    max_tokens: int
    sampling_seed: int | None
    """None: greedy."""
    priority: int
    deadline_s: float | None
    num_before: int
    """Steps, or tokens of the answer, that come before the fate does."""
    fate_after_s: float
    """Pause between them and the fate."""

    @property
    def is_greedy(self) -> bool:
        """Its answer is that of every other greedy stream with this prompt."""
        return self.sampling_seed is None

    @property
    def allowed(self) -> frozenset[StreamState]:
        """Terminal states that it may come to."""
        return ALLOWED[self.fate]

    def describe(self) -> str:
        """One line."""
        parts = [
            f"{self.form}, {self.mode}, {self.fate}",
            f"{len(self.steps)} steps{'' if self.final is None else ' and a final piece'}",
            f"{len(self.prompt_ids)} prompt tokens, max_tokens {self.max_tokens}",
            f"priority {self.priority}",
        ]
        if self.sampling_seed is not None:
            parts.append(f"sampled with seed {self.sampling_seed}")
        if self.deadline_s is not None:
            parts.append(f"deadline {self.deadline_s:g} s")
        return "; ".join(parts)
