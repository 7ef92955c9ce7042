"""The streams of a run against the whole cluster: what each does, and what must come of it. Pure.

Every segment begins with its identity, ``[stream/segment]``. One that is lost, doubled or in
another's place therefore changes the prompt, the number of its tokens, and the answer.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from random import Random

from streamfill.api.types import Mode, SamplingOptions
from streamfill.stream.tokenizer import TextTokenizer
from tests.support.stories import StoryTeller

_NUM_FAMILIES = 5
"""Beginnings that streams share, so that caches and eviction have something to share."""
_FAMILY_TOKENS = 120


class Form(enum.StrEnum):
    """By which calls a stream lives."""

    BIDI = "one bidirectional call"
    UNARY = "unary calls"
    ONE_SHOT = "one shot"


class Fate(enum.StrEnum):
    """What its client means to do with it."""

    FINISHED = "read to its end"
    CANCELLED = "cancelled in mid-answer"
    CUT = "connection closed at any moment"


@dataclass(frozen=True, kw_only=True)
class PlannedStream:
    """One stream."""

    number: int
    form: Form
    mode: Mode
    fate: Fate
    segments: tuple[str, ...]
    """Of an update stream each is a whole context. The last one travels with the commit where
    ``commit_brings_last``."""
    gaps_s: tuple[float, ...]
    """Before each segment."""
    commit_brings_last: bool
    max_tokens: int
    sampling_seed: int | None
    """None: greedy."""
    fate_after: float
    """Tokens before a cancellation; seconds before a cut."""
    num_received: tuple[int, ...]
    """Tokens of the context after each segment, as they are to be acknowledged."""
    prompt_ids: tuple[int, ...]
    """When all has arrived: each segment once, in order."""

    @property
    def text(self) -> str:
        """The final prompt."""
        return "".join(self.segments) if self.mode == "append" else self.segments[-1]

    @property
    def sampling(self) -> SamplingOptions:
        """As it is asked for."""
        options: SamplingOptions = {"max_tokens": self.max_tokens, "ignore_eos": True}
        if self.sampling_seed is None:
            return {**options, "temperature": 0.0}
        return {**options, "temperature": 1.0, "seed": self.sampling_seed}

    def describe(self) -> str:
        """One line."""
        how = "greedy" if self.sampling_seed is None else f"sampled with {self.sampling_seed}"
        return (
            f"{self.form}, {self.mode}, {self.fate}; {len(self.segments)} segments, "
            f"{len(self.prompt_ids)} prompt tokens, {self.max_tokens} to answer, {how}"
        )


class StreamWriter:
    """Writes the stream of any number; the same seed and number give the same one."""

    def __init__(self, tokenizer: TextTokenizer, seed: int, *, longest_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._longest_tokens = longest_tokens
        teller = StoryTeller(tokenizer, seed)
        self._families = [teller.text(_FAMILY_TOKENS) for _ in range(_NUM_FAMILIES)]

    def stream(self, number: int) -> PlannedStream:
        """What stream ``number`` does."""
        random = Random(f"chaos stream {self._seed} {number}")
        teller = StoryTeller(self._tokenizer, random.randrange(1 << 30))
        form = random.choices(list(Form), [5, 3, 2])[0]
        fate = random.choices(list(Fate), [80, 10, 10])[0]
        mode: Mode = "append" if form is Form.ONE_SHOT or random.random() < 0.6 else "update"
        num_segments = 1 if form is Form.ONE_SHOT else random.randint(1, 6)
        family = random.choice(self._families) if random.random() < 0.6 else ""
        most = max(2, (self._longest_tokens - _FAMILY_TOKENS) // num_segments)
        bodies = [
            f"[{number}/{place}] {teller.text(random.randint(most // 4, most))}\n"
            for place in range(num_segments)
        ]
        if mode == "append":
            segments = [family + bodies[0], *bodies[1:]]
        else:
            segments = self._versions(family, bodies, random)
        contexts = [
            "".join(segments[: place + 1]) if mode == "append" else segments[place]
            for place in range(num_segments)
        ]
        ids = [tuple(self._tokenizer.encode(text, add_special_tokens=True)) for text in contexts]
        return PlannedStream(
            number=number,
            form=form,
            mode=mode,
            fate=fate,
            segments=tuple(segments),
            gaps_s=tuple(random.choice([0.0, random.uniform(0.05, 0.8)]) for _ in segments),
            commit_brings_last=form is Form.ONE_SHOT or random.random() < 0.5,
            max_tokens=random.randint(16, 120),
            sampling_seed=random.randrange(1_000_000) if random.random() < 0.25 else None,
            fate_after=random.uniform(0, 3) if fate is Fate.CUT else random.randint(1, 12),
            num_received=tuple(map(len, ids)),
            prompt_ids=ids[-1],
        )

    @staticmethod
    def _versions(family: str, bodies: list[str], random: Random) -> list[str]:
        """Contexts that grow by a body each, now and then at the front; three bodies at most."""
        versions: list[str] = []
        kept: list[str] = []
        for body in bodies:
            if len(kept) == 3:
                kept.pop(random.randrange(len(kept)))
            kept.insert(len(kept) if random.random() < 0.7 else 0, body)
            versions.append(family + "".join(kept))
        return versions
