"""Checks of what a commit asks for. The ranges are those of SGLang's ``SamplingParams.verify``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from streamfill.errors import InvalidArgumentError
from streamfill.messages.common import Sampling

MAX_LOGPROBS = 1000
"""Competitors reported per token; more is a mistake, and megabytes per answer."""

MAX_STOP_STRINGS = 64
"""Each is searched for in every piece of text."""


def check_sampling(sampling: Sampling, stop: Sequence[str], vocab_size: int) -> None:
    """Raises InvalidArgumentError, which names the first wrong value."""
    for name, value, fits, expected in (
        ("temperature", sampling.temperature, sampling.temperature >= 0, "0 or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0, at most 1"),
        ("top_k", sampling.top_k, sampling.top_k == -1 or sampling.top_k >= 1, "-1, or 1 or more"),
        ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "between 0 and 1"),
        (
            "frequency_penalty",
            sampling.frequency_penalty,
            -2 <= sampling.frequency_penalty <= 2,
            "between -2 and 2",
        ),
        (
            "presence_penalty",
            sampling.presence_penalty,
            -2 <= sampling.presence_penalty <= 2,
            "between -2 and 2",
        ),
        (
            "repetition_penalty",
            sampling.repetition_penalty,
            0 < sampling.repetition_penalty <= 2,
            "above 0, at most 2",
        ),
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "1 or more"),
        (
            "min_new_tokens",
            sampling.min_new_tokens,
            0 <= sampling.min_new_tokens <= sampling.max_new_tokens,
            f"between 0 and max_new_tokens ({sampling.max_new_tokens})",
        ),
        (
            "num_logprobs",
            sampling.num_logprobs,
            sampling.num_logprobs is None or 0 <= sampling.num_logprobs <= MAX_LOGPROBS,
            f"between 0 and {MAX_LOGPROBS}",
        ),
    ):
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise InvalidArgumentError(
                f"{name} is {value}, must be {expected}", details={"name": name}
            )
    for token_id in sampling.stop_token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidArgumentError(
                f"stop_token_ids has {token_id}, outside the vocabulary of {vocab_size}",
                details={"name": "stop_token_ids", "token_id": token_id},
            )
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidArgumentError(f"stop has {len(stop)} strings, at most {MAX_STOP_STRINGS}")
    if any(not text for text in stop):
        raise InvalidArgumentError("stop has an empty string, which every text contains")


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
