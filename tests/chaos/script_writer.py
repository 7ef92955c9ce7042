"""Draws the scripts of a soak. Pure: the same seed and number give the same script."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import TypeVar

from streamfill.api.types import Mode
from tests.chaos.prompts import Prompt, PromptBank
from tests.chaos.scripts import ENDS_OPEN, Fate, Form, Prank, Script, Step
from tests.support.stories import Piece

S = TypeVar("S", str, tuple[int, ...])

_FATES = {
    Fate.FINISHED: 56,
    Fate.CANCELLED_OPENING: 4,
    Fate.CANCELLED_OPEN: 4,
    Fate.CANCELLED_COMMITTED: 5,
    Fate.CANCELLED_ANSWERING: 5,
    Fate.LEFT_OPENING: 2,
    Fate.LEFT_OPEN: 3,
    Fate.LEFT_COMMITTED: 4,
    Fate.LEFT_ANSWERING: 4,
    Fate.HALF_CLOSED: 2,
    Fate.DISCONNECTED: 4,
    Fate.DEADLINE_OPEN: 2,
    Fate.DEADLINE_ANY: 5,
}
_ONE_SHOT_FATES = {
    Fate.FINISHED,
    Fate.LEFT_COMMITTED,
    Fate.LEFT_ANSWERING,
    Fate.DISCONNECTED,
    Fate.DEADLINE_ANY,
}
_ABANDONED = {Fate.LEFT_OPENING, Fate.LEFT_OPEN, Fate.DISCONNECTED}
_SHARE_ABANDONED_UNARY = 0.15
"""Such a stream takes a place until the router's idle time-out."""
_CUT_SHORT = {Fate.CANCELLED_ANSWERING, Fate.LEFT_ANSWERING, Fate.DISCONNECTED}
_LONG_ANSWER_TOKENS = 150
_PRANKS = (
    Prank.OTHER_MODE,
    Prank.UNKNOWN_TOKEN,
    Prank.EMPTY_SEGMENT,
    Prank.BROKEN_UTF8,
    Prank.TOO_LONG,
    Prank.BAD_SAMPLING,
    Prank.SECOND_OPEN,
)
LONG_DEADLINE_S = 3600.0
"""Never over during a soak."""


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How the streams of a soak behave."""

    longest_gap_s: float = 1.0
    most_pieces: int = 8
    longest_answer_tokens: int = 32
    share_pranks: float = 0.08
    """Of all operations."""
    longest_deadline_s: float = 4.0


class ScriptWriter:
    """Writes the script of any number."""

    def __init__(self, bank: PromptBank, seed: int, habits: Habits) -> None:
        self._bank = bank
        self._seed = seed
        self._habits = habits

    def script(self, number: int) -> Script:
        """What stream ``number`` does."""
        random = Random(f"script {self._seed} {number}")
        fate = random.choices(list(_FATES), list(_FATES.values()))[0]
        form = self._form(fate, random)
        mode: Mode = random.choice(["append", "update"])
        prompt = random.choice(self._bank.prompts)
        if form is Form.ONE_SHOT:
            # A prompt in two runs cannot be said in one segment but by its ids.
            pieces = [prompt.runs[0] if len(prompt.runs) == 1 else prompt.token_ids]
        elif mode == "append":
            pieces = self._cut(prompt, random)
        else:
            pieces = self._versions(prompt, random)
        final = None
        if form is not Form.ONE_SHOT and random.random() < 0.5:
            final = pieces.pop()
        steps = tuple(self._step(piece, form, random) for piece in pieces)
        habits = self._habits
        is_cut_short = fate in _CUT_SHORT
        is_before_commit = fate in ENDS_OPEN
        script = Script(
            number=number,
            form=form,
            mode=mode,
            fate=fate,
            steps=steps,
            final=final,
            before_commit=self._prank(form, random),
            after_commit=None,
            prompt_ids=prompt.token_ids,
            max_tokens=_LONG_ANSWER_TOKENS
            if is_cut_short
            else random.randint(1, habits.longest_answer_tokens),
            sampling_seed=random.randrange(10_000) if random.random() < 0.1 else None,
            priority=random.choice([0, 0, 0, -1, 1, 2]),
            deadline_s=self._deadline_s(fate, random),
            num_before=random.randint(0, len(steps)) if is_before_commit else random.randint(1, 12),
            fate_after_s=random.choice([0.0, 0.0, random.uniform(0, 0.03), random.uniform(0, 0.5)]),
        )
        if fate is Fate.DISCONNECTED:
            script = replace(script, fate_after_s=random.uniform(0, 3 * habits.longest_gap_s))
        if form is not Form.ONE_SHOT and random.random() < habits.share_pranks:
            script = replace(script, after_commit=Prank.LATE_PIECE)
        return script

    def _form(self, fate: Fate, random: Random) -> Form:
        if fate is Fate.HALF_CLOSED:
            return Form.BIDI
        if fate in _ABANDONED:
            return Form.UNARY if random.random() < _SHARE_ABANDONED_UNARY else Form.BIDI
        if fate in _ONE_SHOT_FATES and random.random() < 0.15:
            return Form.ONE_SHOT
        return Form.BIDI if random.random() < 0.6 else Form.UNARY

    def _deadline_s(self, fate: Fate, random: Random) -> float | None:
        if fate is Fate.DEADLINE_ANY:
            return random.uniform(0.05, self._habits.longest_deadline_s)
        if fate is Fate.DEADLINE_OPEN:
            return random.uniform(0.05, self._habits.longest_deadline_s / 2)
        return LONG_DEADLINE_S if random.random() < 0.2 else None

    def _cut(self, prompt: Prompt, random: Random) -> list[Piece]:
        """A prompt in pieces that come one after the other, cut anywhere, also twice at a place."""
        runs = prompt.runs
        if random.random() < 0.2:
            runs = (prompt.token_ids,)
        pieces: list[Piece] = []
        for run in runs:
            num_pieces = random.randint(1, max(1, self._habits.most_pieces // len(runs)))
            places = sorted(random.randint(0, len(run)) for _ in range(num_pieces - 1))
            pieces += [run[begin:end] for begin, end in pairwise([0, *places, len(run)])]
        return pieces

    def _versions(self, prompt: Prompt, random: Random) -> list[Piece]:
        """Contexts that replace each other, the last of which is the prompt."""
        num_before = random.randint(0, self._habits.most_pieces - 1)
        last = prompt.runs[0] if len(prompt.runs) == 1 else prompt.token_ids
        versions: list[Piece] = [last]
        for _ in range(num_before):
            other = random.choice(self._bank.prompts).runs[0]
            new = versions[0]
            if isinstance(new, str):
                text = other if isinstance(other, str) else " other "
                before: Piece = _earlier(new, text, len(prompt.runs[0]), random)
                if random.random() < 0.15:
                    before = self._bank.ids(str(before))
            else:
                ids = other if not isinstance(other, str) else self._bank.ids(other)
                before = _earlier(new, ids, len(prompt.token_ids), random)
            versions.insert(0, before)
        return versions

    def _step(self, piece: Piece, form: Form, random: Random) -> Step:
        is_slow = random.random() < 0.5
        after = None
        if form is not Form.ONE_SHOT and random.random() < self._habits.share_pranks:
            after = random.choice([Prank.RESENT, Prank.RESENT, Prank.GAP])
        return Step(
            gap_s=random.uniform(0, self._habits.longest_gap_s) if is_slow else 0.0,
            piece=piece,
            before=self._prank(form, random),
            after=after,
        )

    def _prank(self, form: Form, random: Random) -> Prank | None:
        if form is Form.ONE_SHOT or random.random() >= self._habits.share_pranks:
            return None
        prank = random.choice(_PRANKS)
        return Prank.OTHER_MODE if form is Form.UNARY and prank is Prank.SECOND_OPEN else prank


def _earlier(new: S, other: S, longest: int, random: Random) -> S:
    """A context that an update may turn into ``new``, not much longer than the final one."""
    place = random.randint(0, len(new))
    match random.randrange(5):
        case 0:  # shrinks to it
            before = new + other
        case 1:  # grows to it
            before = new[:place]
        case 2:  # keeps a beginning of it
            before = new[:place] + other
        case 3:  # is that already
            before = new
        case _:  # has nothing to do with it
            before = other
    return before[: 2 * longest]
