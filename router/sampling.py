"""How long an answer may become. What else a commit asks for is checked in `request_checks`."""

from __future__ import annotations

import msgspec

from streamfill.messages.common import Sampling


def fit_max_new_tokens(sampling: Sampling, num_prompt_tokens: int, room_tokens: int) -> Sampling:
    """`sampling` with as many tokens as there is room for behind the prompt, and at least one.

    Args:
        room_tokens: for prompt and answer together, see `Cluster.room_tokens`.
    """
    longest = max(1, room_tokens - num_prompt_tokens)
    if sampling.max_new_tokens <= longest:
        return sampling
    return msgspec.structs.replace(
        sampling,
        max_new_tokens=longest,
        min_new_tokens=min(sampling.min_new_tokens, longest),
    )
