"""Two answers to the same prompt: are they the same?"""

from __future__ import annotations

from dataclasses import dataclass

from streamfill.api.types import Result

TIE_LOGPROB = 1e-3
"""Two tokens whose log probabilities differ by no more are a tie that rounding may decide."""


@dataclass(frozen=True)
class Difference:
    """The first place at which two answers differ."""

    place: int
    streamed: int | None
    """Token there; None: the answer is over."""
    one_shot: int | None
    is_tie: bool
    """The one-shot answer's log probabilities of both tokens are within ``TIE_LOGPROB``."""


def first_difference(streamed: Result, one_shot: Result) -> Difference | None:
    """Where the token ids part. ``one_shot`` should have log probabilities of the likeliest
    tokens; without them nothing counts as a tie."""
    ours, theirs = streamed.token_ids, one_shot.token_ids
    for place in range(max(len(ours), len(theirs))):
        left = ours[place] if place < len(ours) else None
        right = theirs[place] if place < len(theirs) else None
        if left == right:
            continue
        is_tie = False
        if left is not None and right is not None:
            top = dict(one_shot.tokens[place].top_logprobs)
            is_tie = left in top and right in top and abs(top[left] - top[right]) <= TIE_LOGPROB
        return Difference(place, left, right, is_tie)
    return None


def assert_same(streamed: Result, one_shot: Result, what: str = "") -> None:
    """Token ids, text and the way of ending are the same."""
    difference = first_difference(streamed, one_shot)
    assert difference is None, f"{what}: {difference}"
    assert streamed.text == one_shot.text, what
    assert streamed.finish_reason == one_shot.finish_reason, what
    assert streamed.matched_stop == one_shot.matched_stop, what
    assert streamed.usage.num_prompt_tokens == one_shot.usage.num_prompt_tokens, what
    assert streamed.usage.num_output_tokens == one_shot.usage.num_output_tokens, what
