"""One request of a trace as what a client has to send, and when.

``Scripts`` turns the records of a file into ``Script`` objects, for a given vocabulary. The same
file and vocabulary always give the same tokens.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from streamfill.messages.common import StreamMode
from streamfill.traces.format import (
    BLOCK_TOKENS,
    ChatMessage,
    Request,
    Segment,
    TraceHeader,
)

if TYPE_CHECKING:
    import numpy as np

FIRST_ORDINARY_TOKEN: Final = 256
"""Made tokens are at or above this: vocabularies put control tokens and single bytes first."""
_NUM_CACHED_BLOCKS: Final = 1024
"""Of 4 KB each."""

Content: TypeAlias = str | tuple[int, ...] | tuple[ChatMessage, ...]
"""Text, token ids or chat messages. An empty tuple is no token id and no message."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One arrival of context.

    Attributes:
        due_s: when the context is there, in seconds since the arrival of the request.
        piece: what is new: goes behind the context in append mode, replaces it in update mode.
    """

    due_s: float
    piece: Content


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a client does for one request.

    Attributes:
        arrival_s: when the query arrives, in seconds since the start of the trace.
        steps: at least one, in their order.
        commit_due_s: when the prompt is complete; the due time of the last step, or later.
    """

    request_id: str
    session_id: str | None
    mode: StreamMode
    arrival_s: float
    steps: tuple[Step, ...]
    commit_due_s: float
    max_output_tokens: int

    @property
    def commits_with_last(self) -> bool:
        """Whether the last step is sent with the commit."""
        return self.commit_due_s <= self.steps[-1].due_s

    def prompt_after(self, num_steps: int) -> Content:
        """The whole prompt as it is known after so many steps, at least one."""
        if self.mode is StreamMode.UPDATE:
            return self.steps[num_steps - 1].piece
        return join([step.piece for step in self.steps[:num_steps]])

    @property
    def prompt(self) -> Content:
        """The whole prompt."""
        return self.prompt_after(len(self.steps))


def join(pieces: list[Content]) -> Content:
    """Pieces of one kind, one behind the other."""
    if isinstance(pieces[0], str):
        return "".join(piece for piece in pieces if isinstance(piece, str))
    joined: list[int | ChatMessage] = []
    for piece in pieces:
        joined.extend(piece)  # type: ignore[arg-type]  # one kind: `check_request` saw to it
    return tuple(joined)  # type: ignore[return-value]


class Scripts:
    """Makes scripts of the requests of one trace."""

    def __init__(
        self, header: TraceHeader, documents: Mapping[str, str], *, vocab_size: int
    ) -> None:
        """
        Args:
            documents: those of the file, by id; may grow while the file is read.
            vocab_size: made token ids are below this.
        """
        self._header = header
        self._documents = documents
        first = FIRST_ORDINARY_TOKEN if vocab_size > 2 * FIRST_ORDINARY_TOKEN else 0
        self._ids = (first, vocab_size)
        self._block = functools.lru_cache(_NUM_CACHED_BLOCKS)(self._make_block)

    def script(self, request: Request, *, time_scale: float = 1.0) -> Script:
        """What the client does; all times are multiplied by ``time_scale``."""
        scale = time_scale / 1000.0
        steps: list[Step] = []
        due_ms = 0.0
        for number, segment in enumerate(request.segments):
            due_ms += segment.delay_ms
            steps.append(Step(due_s=due_ms * scale, piece=self._piece(request, number, segment)))
        return Script(
            request_id=request.id,
            session_id=request.session_id,
            mode=request.mode,
            arrival_s=request.arrival_ms * scale,
            steps=tuple(steps),
            commit_due_s=(due_ms + request.commit_delay_ms) * scale,
            max_output_tokens=request.max_output_tokens,
        )

    def _piece(self, request: Request, number: int, segment: Segment) -> Content:
        if segment.messages is not None:
            return segment.messages
        if segment.token_ids is not None:
            return segment.token_ids
        if segment.block_ids is not None:
            return self._tokens_of_blocks(segment.block_ids, segment.num_tokens or 0)
        if segment.text is None and segment.document_ids is None:
            seed = f"{request.id}\0{number}"
            return tuple(self._make_tokens(seed, segment.num_tokens or 0).tolist())
        if segment.text is not None:
            text = segment.text
        else:
            ids, separator = segment.document_ids or (), self._header.document_separator
            text = "".join(self._documents[each] + separator for each in ids)
        is_update = request.mode is StreamMode.UPDATE
        before = request.prefix if is_update or number == 0 else ""
        is_last = number == len(request.segments) - 1
        return before + text + (request.suffix if is_update or is_last else "")

    def _tokens_of_blocks(self, block_ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        tokens: list[int] = []
        for block_id in block_ids[:num_blocks]:
            tokens.extend(self._block(block_id))
        return tuple(tokens[:num_tokens])

    def _make_block(self, block_id: int) -> list[int]:
        made: list[int] = self._make_tokens(f"block\0{block_id}", BLOCK_TOKENS).tolist()
        return made

    def _make_tokens(self, name: str, num_tokens: int) -> np.ndarray:
        import numpy as np  # not for `--help`

        digest = hashlib.blake2b(f"{self._header.seed}\0{name}".encode(), digest_size=8).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        return generator.integers(*self._ids, size=num_tokens, dtype=np.int64)
