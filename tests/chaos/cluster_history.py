"""What the client of one stream saw, as plain data."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

from streamfill.errors import ErrorCode, StreamError


@dataclass(frozen=True, kw_only=True)
class Acknowledgement:
    """Of one segment."""

    place: int
    """Of the segment, from 0 on."""
    num_received: int
    """Tokens of the context, as the router has it."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The end of an answer."""

    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_attempts: int
    handoff: str
    prefill_server: str
    decode_server: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a stream ended that has no whole answer."""

    code: ErrorCode
    text: str


@dataclass
class StreamHistory:
    """All of one stream. Times are of the monotonic clock, in seconds."""

    number: int
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    """None: it did not end."""
    committed_s: float | None = None
    acknowledged: list[Acknowledgement] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    """Of the tokens, as they came."""
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    answered: Answered | None = None
    failure: Failure | None = None
    left: bool = False
    """By its client, on purpose."""
    num_retries: int = 0
    """Calls that were said again."""
    request_ids: list[str] = field(default_factory=list)
    """Under which it was opened, or tried to be."""
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """One more line of the story."""
        self.notes.append(f"{time.monotonic() - self.began_s:8.3f} s  {text}")

    def token(self, index: int, token_id: int) -> None:
        """One came."""
        self.indices.append(index)
        self.token_ids.append(token_id)
        self.token_times_s.append(time.monotonic())

    def failed(self, error: StreamError) -> None:
        """It ended without a whole answer."""
        self.note(f"!! {error}")
        self.failure = Failure(code=error.code, text=str(error))

    @property
    def longest_wait_s(self) -> float:
        """For a token, from the commit on."""
        if self.committed_s is None:
            return 0.0
        times_s = [self.committed_s, *self.token_times_s]
        return max((b - a for a, b in pairwise(times_s)), default=0.0)
