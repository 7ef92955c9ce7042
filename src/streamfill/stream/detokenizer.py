"""Output token ids to text for the client, and the end of the text at a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streamfill.stream.tokenizer import TextTokenizer


class IncrementalDetokenizer:
    """Text of one output, piece by piece; never half a character.

    The pieces put together are ``decode(context_ids + ids)`` without its beginning
    ``decode(context_ids)``. With the prompt's last tokens as context a first token keeps its
    leading space, as in SGLang; without context the text is ``decode(ids)``.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        skip_special_tokens: bool = True,
        *,
        context_ids: Sequence[int] = (),
    ) -> None:
        self._decoder = tokenizer.new_decoder(skip_special_tokens=skip_special_tokens)
        for token_id in context_ids:
            self._decoder.push(token_id)
        self._is_flushed = False

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain after these further tokens; may be empty.

        Raises:
            InvalidArgumentError: an id is outside the vocabulary.
            RuntimeError: after `flush`.
        """
        if self._is_flushed:
            raise RuntimeError("token after the end of an output")
        return "".join(map(self._decoder.push, token_ids))

    def flush(self) -> str:
        """What was held back; a broken last character as U+FFFD. Empty when called again."""
        if self._is_flushed:
            return ""
        self._is_flushed = True
        return self._decoder.flush()


@dataclass(frozen=True, slots=True)
class Matched:
    """What a `StopMatcher` says about a piece of text.

    Attributes:
        text: may be shown.
        stop: the stop string that ended the output; None while it goes on.
    """

    text: str
    stop: str | None = None


class StopMatcher:
    """Ends a text at the first of several stop strings.

    As in SGLang (`Req._check_str_based_finish`, `DetokenizerManager.trim_matched_stop`): one piece
    is the text of one step; of several stop strings complete after the same step, the one that was
    given first wins; the text ends before its first occurrence, or behind it with `no_stop_trim`.
    Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, stop_strings: Sequence[str], *, no_stop_trim: bool = False) -> None:
        self._stops = tuple(stop for stop in stop_strings if stop)
        self._no_stop_trim = no_stop_trim
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matched

    def push(self, text: str) -> Matched:
        """What may be shown after one more piece; nothing once a stop string matched."""
        if self._matched is not None:
            return Matched("", self._matched)
        self._held += text
        for stop in self._stops:
            begin = self._held.find(stop)
            if begin >= 0:
                self._matched = stop
                end = begin + len(stop) if self._no_stop_trim else begin
                shown, self._held = self._held[:end], ""
                return Matched(shown, stop)
        num_shown = len(self._held) - self._num_undecided()
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return Matched(shown)

    def flush(self) -> str:
        """What was held back, when the output ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _num_undecided(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(self._held), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
