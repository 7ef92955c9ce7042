"""What a request cost, in the words of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from router.http.choices import Choice
from router.interface import DoneEvent


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the prompt tokens."""

    cached_tokens: int
    """Already computed when the prompt was complete: found in the prefix cache, or computed while
    the context was still arriving."""


class UsageReply(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    """Each prompt counts once, however many answers it has."""
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(choices: Sequence[Choice], done: Mapping[int, DoneEvent]) -> UsageReply:
    """Of all choices, by their index."""
    first_of = {choice.prompt: n for n, choice in reversed(list(enumerate(choices)))}
    prompts = [done[n].usage for n in first_of.values()]
    num_prompt = sum(usage.num_prompt_tokens for usage in prompts)
    num_output = sum(event.usage.num_output_tokens for event in done.values())
    return UsageReply(
        prompt_tokens=num_prompt,
        completion_tokens=num_output,
        total_tokens=num_prompt + num_output,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(usage.num_cached_tokens for usage in prompts)
        ),
    )
