"""KV of prompts that are not committed yet, and what senders want to know about prompts.

Such KV is in the radix tree like any other, and the first to go when memory is needed: nothing
protects it. Here is only known whose it is, so that it is bounded, and that senders hear of what
was lost.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from streamfill.engine.interface import Engine
from streamfill.kv_transfer.interface import (
    Farewell,
    HeldReport,
    IncomingTransfer,
    Question,
    SenderLost,
    SenderNote,
)

EARLY_SHARE = 0.5
"""Of the pool; more is refused. Answers that run need the rest, and can take this too."""
KEEP_S = 600.0
"""A prompt that nobody spoke of for so long is forgotten; its sender would have let it go."""


@dataclass
class _Prompt:
    """A prompt that a sender asked about or sent KV of."""

    sender_id: str
    version: int
    ids: array[int]
    """All that this server was told of it; type code ``q``."""
    namespace: str
    touched_s: float
    num_held: int = 0
    """Leading tokens that the tree held when it was last looked at."""
    is_early: bool = False
    """KV came ahead of the commit."""


class EarlyKv:
    """The prompts of one decode server. All ranks do the same in the same turn."""

    def __init__(
        self, engine: Engine, server_id: str, tell: Callable[[str, HeldReport], None]
    ) -> None:
        """
        Args:
            engine: whose tree holds the KV.
            server_id: of this server.
            tell: takes news for a sender; of one rank only, where there are several.
        """
        self._engine = engine
        self._server_id = server_id
        self._tell = tell
        self._prompts: dict[int, _Prompt] = {}
        """By stream id, the one longest untouched first."""
        self._early_tokens = 0

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def room_tokens(self) -> int:
        """For further KV ahead of its commit."""
        limit = int(EARLY_SHARE * self._engine.memory().total_tokens)
        return max(0, limit - self._early_tokens)

    def take_notes(self, notes: Iterable[SenderNote], now_s: float) -> None:
        """What senders said."""
        for note in notes:
            match note:
                case Question():
                    ids = array("q", note.token_ids)
                    prompt = _Prompt(
                        note.server_id, note.version, ids, note.namespace, touched_s=now_s
                    )
                    self._put(note.stream_id, prompt)
                    self._report(note.stream_id)
                case Farewell(server_id=sender_id, stream_id=stream_id):
                    self._forget_of(sender_id, [stream_id])
                case SenderLost(server_id=sender_id):
                    self._forget_of(sender_id, list(self._prompts))

    def note_import(self, incoming: IncomingTransfer, now_s: float) -> None:
        """KV ahead of its commit was put into the tree, or could not be."""
        ids = array("q", incoming.token_ids)
        prompt = _Prompt(
            incoming.source_server_id,
            incoming.version,
            ids,
            incoming.namespace,
            touched_s=now_s,
            is_early=True,
        )
        self._put(incoming.stream_id, prompt)
        self._report(incoming.stream_id, is_loss=prompt.num_held < len(incoming.token_ids))

    def report_missed(self, incoming: IncomingTransfer, num_held: int) -> None:
        """The KV of a hand-off goes on behind tokens that are not there."""
        self._tell(
            incoming.source_server_id,
            HeldReport(
                server_id=self._server_id,
                stream_id=incoming.stream_id,
                version=incoming.version,
                num_tokens=num_held,
                is_loss=True,
                missed_transfer_id=(
                    incoming.transfer_id if incoming.replaces is None else incoming.replaces
                ),
            ),
        )

    def note_losses(self, losers: Iterable[int]) -> None:
        """These streams lost KV."""
        for stream_id in losers:
            prompt = self._prompts.get(stream_id)
            if prompt is None:
                continue
            num_before = prompt.num_held
            self._look(prompt)
            if prompt.num_held < num_before:
                self._report(stream_id, is_loss=True)

    def forget(self, stream_id: int) -> None:
        """The stream is over, or its answer goes on here: no news are wanted any more."""
        prompt = self._prompts.pop(stream_id, None)
        if prompt is not None:
            self._early_tokens -= prompt.num_held if prompt.is_early else 0
            self._engine.untag(stream_id, prompt.ids, namespace=prompt.namespace)

    def expire(self, now_s: float) -> None:
        """Forget what nobody speaks of any more."""
        while self._prompts:
            stream_id, prompt = next(iter(self._prompts.items()))
            if now_s - prompt.touched_s < KEEP_S:
                return
            self.forget(stream_id)

    def flushed(self) -> None:
        """The tree is empty."""
        for stream_id in list(self._prompts):
            self._look(self._prompts[stream_id])
            self._report(stream_id, is_loss=True)

    def _forget_of(self, sender_id: str, stream_ids: Iterable[int]) -> None:
        for stream_id in stream_ids:
            prompt = self._prompts.get(stream_id)
            if prompt is not None and prompt.sender_id == sender_id:
                self.forget(stream_id)

    def _put(self, stream_id: int, prompt: _Prompt) -> None:
        old = self._prompts.get(stream_id)
        if old is not None:
            self.forget(stream_id)
            prompt.is_early = prompt.is_early or old.is_early
            is_same = old.version == prompt.version and old.namespace == prompt.namespace
            if is_same and len(old.ids) > len(prompt.ids):
                prompt.ids = old.ids  # asked about in full, and sent in parts
        self._prompts[stream_id] = prompt
        self._look(prompt)
        held_ids = prompt.ids[: prompt.num_held]
        self._engine.tag(stream_id, held_ids, namespace=prompt.namespace)

    def _look(self, prompt: _Prompt) -> None:
        num_held = self._engine.cached_tokens(prompt.ids, namespace=prompt.namespace)
        if prompt.is_early:
            self._early_tokens += num_held - prompt.num_held
        prompt.num_held = num_held

    def _report(self, stream_id: int, *, is_loss: bool = False) -> None:
        prompt = self._prompts[stream_id]
        self._tell(
            prompt.sender_id,
            HeldReport(
                server_id=self._server_id,
                stream_id=stream_id,
                version=prompt.version,
                num_tokens=prompt.num_held,
                is_loss=is_loss,
            ),
        )
