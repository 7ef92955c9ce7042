"""A bounded number of final prompts, so that the answers of many streams need few one-shots.

Many prompts begin like others, as those of real users do, so that policies and eviction have shared
prefixes to deal with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from streamfill.stream.tokenizer import TextTokenizer
from tests.support.stories import Piece, Story, StoryTeller

_NUM_FAMILIES = 8
_SHARE_WITH_FAMILY = 0.7
_FEWEST_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as it is in the end."""

    runs: tuple[Piece, ...]
    """One or two, each tokenised at once: text, token ids, or one behind the other. None is
    empty."""
    token_ids: tuple[int, ...]


class PromptBank:
    """All prompts of a run; the same arguments give the same ones."""

    def __init__(
        self, tokenizer: TextTokenizer, seed: int, *, num_prompts: int, longest_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        random = Random(f"prompts {seed}")
        teller = StoryTeller(tokenizer, seed)
        families = [teller.text(longest_tokens // 2) for _ in range(_NUM_FAMILIES)]
        self.prompts: list[Prompt] = []
        for _ in range(num_prompts):
            # Squared: many are short, few are long.
            num_tokens = _FEWEST_TOKENS + int(random.random() ** 2 * longest_tokens / 2)
            text = teller.text(num_tokens)
            if random.random() < _SHARE_WITH_FAMILY:
                text = random.choice(families) + text
            self.prompts.append(self._prompt(text, random))

    def ids(self, text: str, *, is_first: bool = True) -> tuple[int, ...]:
        """A text as token ids.

        Args:
            is_first: nothing stands before it, so it gets what begins every prompt.
        """
        return tuple(self._tokenizer.encode(text, add_special_tokens=is_first))

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""
        return self._tokenizer.vocab_size

    def _prompt(self, text: str, random: Random) -> Prompt:
        place = random.randint(1, len(text) - 1)
        head, tail = text[:place], text[place:]
        match random.randrange(6):
            case 0:
                runs: Sequence[Piece] = (head, self.ids(tail, is_first=False))
            case 1:
                runs = (self.ids(head), tail)
            case 2:
                runs = (self.ids(text),)
            case _:
                runs = (text,)
        story = Story(
            mode="append",
            pieces=tuple(runs),
            gaps_s=(0.0,) * len(runs),
            commit_brings_last=False,
        )
        return Prompt(runs=tuple(runs), token_ids=tuple(story.token_ids(self._tokenizer)))
