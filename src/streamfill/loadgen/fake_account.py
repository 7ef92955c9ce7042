"""What the fake router reads of a request, and what it says of it at its end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

from streamfill.api import streamfill_pb2 as pb
from streamfill.observability.lifetime import LifetimeEvent
from streamfill.traces.format import ChatMessage
from streamfill.traces.script import Content

_BYTES_PER_TOKEN: Final = 4
"""The fake has no tokenizer; text has about so many."""


@dataclass
class FakeAccount:
    """What is said of a stream at its end. Times are seconds since its start."""

    opened_s: float = field(default_factory=time.monotonic)
    events: list[pb.LifetimeEvent] = field(default_factory=list)
    num_segments: int = 0

    def note(
        self,
        event: LifetimeEvent,
        *,
        segment: int | None = None,
        num_tokens: int | None = None,
    ) -> None:
        """It happens now."""
        time_s = time.monotonic() - self.opened_s
        self.events.append(
            pb.LifetimeEvent(
                name=event.value, time_s=time_s, segment=segment, num_tokens=num_tokens
            )
        )

    def note_segment(self) -> None:
        """A piece came, and is done with at once."""
        for event in (
            LifetimeEvent.SEGMENT_RECEIVED,
            LifetimeEvent.SEGMENT_TOKENISED,
            LifetimeEvent.SEGMENT_SENT,
        ):
            self.note(event, segment=self.num_segments)
        self.num_segments += 1


def read_content(segment: pb.Segment) -> Content:
    """A piece as it came."""
    match segment.WhichOneof("content"):
        case "text":
            return segment.text
        case "text_utf8":
            return segment.text_utf8.decode()
        case "messages":
            return tuple(read_message(one) for one in segment.messages.messages)
        case _:
            return tuple(segment.token_ids.ids)


def read_message(message: pb.ChatMessage) -> ChatMessage:
    """A chat message as it came."""
    return ChatMessage(role=message.role, content=message.content)


def count_tokens(prompt: Content) -> int:
    """About as many as a tokenizer would make of it."""
    if isinstance(prompt, str):
        return -(-len(prompt.encode()) // _BYTES_PER_TOKEN)
    return sum(
        -(-len(part.content.encode()) // _BYTES_PER_TOKEN) if isinstance(part, ChatMessage) else 1
        for part in prompt
    )
