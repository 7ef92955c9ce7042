"""What really happened to one stream, as its client, the router's status and its log saw it."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from streamfill.errors import ErrorCode
from streamfill.stream.state import StreamState
from tests.chaos.scripts import Prank

STATE_OF_CODE = {
    ErrorCode.DEADLINE_EXCEEDED: StreamState.DEADLINE,
    ErrorCode.CANCELLED: StreamState.ABORTED,
    ErrorCode.ABORTED: StreamState.ABORTED,
}
"""What the error that ends a call says about its stream. FAILED_PRECONDITION says it in its
details; any other code belongs to no ending that a script has."""


class Source(enum.StrEnum):
    """Who says that a stream ended."""

    DONE = "Done event"
    ERROR = "error of the call"
    STATUS = "GetStream"
    LOG = "router's log"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """One report of a stream's end."""

    source: Source
    state: StreamState


@dataclass(frozen=True, kw_only=True)
class DoneSeen:
    """What a ``Done`` event says."""

    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_recomputed_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token, as it came."""

    index: int
    token_id: int


@dataclass(frozen=True, kw_only=True)
class PrankAnswer:
    """What became of a wrong or repeated operation."""

    prank: Prank
    code: ErrorCode | None
    """None: it was acknowledged."""
    num_tokens_before: int = 0
    num_tokens_after: int = 0
    """Of the prompt, received by the router; only where it was acknowledged."""


@dataclass(frozen=True, kw_only=True)
class History:
    """All of one stream."""

    was_opened: bool
    """As the router's log has it."""
    tokens: tuple[Token, ...] = ()
    dones: tuple[DoneSeen, ...] = ()
    endings: tuple[Ending, ...] = ()
    pranks: tuple[PrankAnswer, ...] = ()
    lost_status: bool = False
    """gRPC's client broke the call before its end could be read; see ``wire_bidi``."""
    troubles: tuple[str, ...] = ()
    """What must never happen, whatever the script: no reply in time, an unasked refusal."""
    notes: tuple[str, ...] = ()
    """The story, for people."""

    @property
    def state(self) -> StreamState | None:
        """The terminal state, where all agree on one."""
        states = {ending.state for ending in self.endings}
        return states.pop() if len(states) == 1 else None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the answer, as far as it was read."""
        return tuple(token.token_id for token in self.tokens)


@dataclass
class Recorder:
    """Takes down what happens to one stream; ``history`` makes plain data of it."""

    began_s: float = field(default_factory=time.monotonic)
    stream_id: int | None = None
    is_gone: bool = False
    """The client cut its connection: what its calls say from now on is not the router's word."""
    tokens: list[Token] = field(default_factory=list)
    dones: list[DoneSeen] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    lost_status: bool = False
    pranks: list[PrankAnswer] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """One more line of the story."""
        self.notes.append(f"{time.monotonic() - self.began_s:8.3f} s  {text}")

    def trouble(self, text: str) -> None:
        """Something that must not be."""
        self.note(text if self.is_gone else f"!! {text}")
        if not self.is_gone:
            self.troubles.append(text)

    def ended(self, source: Source, state: StreamState) -> None:
        """Somebody says that the stream ended."""
        self.note(f"{state} ({source})")
        if self.is_gone and source is Source.ERROR:
            return
        self.endings.append(Ending(source=source, state=state))

    def history(self, *, was_opened: bool) -> History:
        """All so far."""
        return History(
            was_opened=was_opened,
            tokens=tuple(self.tokens),
            dones=tuple(self.dones),
            endings=tuple(self.endings),
            pranks=tuple(self.pranks),
            lost_status=self.lost_status,
            troubles=tuple(self.troubles),
            notes=tuple(self.notes),
        )
