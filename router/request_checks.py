"""Checks of values that clients send, the same for gRPC and HTTP.

All functions raise ``InvalidArgumentError``, which names the field as the client wrote it and the
value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from streamfill.errors import InvalidArgumentError
from streamfill.messages.common import Sampling

MAX_LOGPROBS = 20
"""As in the OpenAI API."""
MAX_STOP_STRINGS = 16
"""Each is searched for in every piece of text."""
MAX_STOP_TOKEN_IDS = 128
MAX_STOP_STRING_BYTES = 1024
"""Text is held back while a stop string may be beginning in it."""
MAX_TOP_K = 2**31 - 1
"""What a tensor of 32-bit integers holds. A server whose batch cannot be made dies of it."""
MAX_TEMPERATURE = 1e6
MIN_REPETITION_PENALTY = 1e-6
"""Beyond these two 32-bit floats overflow, and nothing can be drawn from what comes out."""
MAX_KEEP_S = 3600.0
"""Longer nobody can say when they come back."""

SAMPLING_RANGES: Sequence[tuple[str, Callable[[float], bool], str]] = (
    ("temperature", lambda value: 0 <= value <= MAX_TEMPERATURE, f"in [0, {MAX_TEMPERATURE:.0f}]"),
    ("top_p", lambda value: 0 < value <= 1, "in (0, 1]"),
    (
        "top_k",
        lambda value: value == -1 or 1 <= value <= MAX_TOP_K,
        f"in 1 .. {MAX_TOP_K}, or -1 for all",
    ),
    ("min_p", lambda value: 0 <= value <= 1, "in [0, 1]"),
    ("frequency_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]"),
    ("presence_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]"),
    (
        "repetition_penalty",
        lambda value: MIN_REPETITION_PENALTY <= value <= 2,
        f"in [{MIN_REPETITION_PENALTY:.6f}, 2]",
    ),
    ("max_tokens", lambda value: value >= 1, "1 or more"),
    ("min_tokens", lambda value: value >= 0, "0 or more"),
    ("seed", lambda value: value >= 0, "0 or more"),
    ("logprobs", lambda value: 0 <= value <= MAX_LOGPROBS, f"in 0 .. {MAX_LOGPROBS}"),
)
"""Names of clients, what fits, and that as words. Within those of SGLang's
``SamplingParams.verify``."""

MAX_INT = 2**63 - 1
"""What servers can take."""

_INTERNAL_NAMES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "logprobs": "num_logprobs",
}


def checked_sampling(
    given: Mapping[str, float],
    *,
    ignore_eos: bool,
    stop_token_ids: Sequence[int],
    vocab_size: int,
    prefix: str = "",
) -> Sampling:
    """Sampling parameters; what is not given has its default.

    Args:
        given: values by the names of ``SAMPLING_RANGES``.
        ignore_eos: go on behind the end-of-sequence token.
        stop_token_ids: end at these.
        vocab_size: of the served model; token ids are below it.
        prefix: path of the message that the fields are in, with its dot.
    """
    values: dict[str, float] = {}
    for name, fits, expected in SAMPLING_RANGES:
        if name in given:
            if not fits(given[name]):
                raise wrong(f"{prefix}{name}", given[name], expected)
            if isinstance(given[name], int) and given[name] > MAX_INT:
                raise wrong(f"{prefix}{name}", given[name], f"at most {MAX_INT}")
            values[_INTERNAL_NAMES.get(name, name)] = given[name]
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        many = f"{len(stop_token_ids)} ids"
        raise wrong(f"{prefix}stop_token_ids", many, f"at most {MAX_STOP_TOKEN_IDS}")
    check_token_ids(stop_token_ids, vocab_size, f"{prefix}stop_token_ids")
    sampling = Sampling(
        **values,  # type: ignore[arg-type]
        ignore_eos=ignore_eos,
        stop_token_ids=tuple(stop_token_ids),
    )
    if sampling.min_new_tokens > sampling.max_new_tokens:
        most = f"at most max_tokens, which is {sampling.max_new_tokens}"
        raise wrong(f"{prefix}min_tokens", sampling.min_new_tokens, most)
    return sampling


def checked_stop(stop: Sequence[str], name: str) -> tuple[str, ...]:
    """Stop strings."""
    if len(stop) > MAX_STOP_STRINGS:
        raise wrong(name, f"{len(stop)} strings", f"at most {MAX_STOP_STRINGS}")
    for number, text in enumerate(stop):
        if not text:
            raise wrong(f"{name}[{number}]", text, "a string that is not empty")
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        if num_bytes > MAX_STOP_STRING_BYTES:
            most = f"at most {MAX_STOP_STRING_BYTES} bytes"
            raise wrong(f"{name}[{number}]", f"{num_bytes} bytes", most)
    return tuple(stop)


def check_token_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Every id is in the vocabulary."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    place, bad = next(pair for pair in enumerate(ids) if not 0 <= pair[1] < vocab_size)
    raise InvalidArgumentError(
        f"{name}[{place}] is {bad}, outside the vocabulary of {vocab_size} tokens",
        details={"field": f"{name}[{place}]", "token_id": bad, "vocab_size": vocab_size},
    )


def checked_deadline_s(value: float, name: str) -> float:
    """The whole life of a stream."""
    if not 0 < value < math.inf:
        raise wrong(name, value, "greater than 0")
    return value


def checked_ttft_slo_s(value_ms: float, name: str) -> float:
    """Milliseconds that a client wishes for, as seconds."""
    if not 0 < value_ms < math.inf:
        raise wrong(name, value_ms, "greater than 0")
    return value_ms / 1000


def checked_keep_s(value: float, name: str) -> float:
    """For how long a prompt that begins with this one is to be expected."""
    if not 0 <= value <= MAX_KEEP_S:
        raise wrong(name, value, f"between 0 and {MAX_KEEP_S:g}")
    return value


def checked_next_in_s(value: float, name: str) -> float:
    """When the next piece of context is to be expected."""
    if not 0 <= value < math.inf:
        raise wrong(name, value, "0 or more")
    return value


def wrong(name: str, value: object, expected: str) -> InvalidArgumentError:
    """The error for a field with a value that it cannot have."""
    shown = repr(value) if value == "" else value
    return InvalidArgumentError(
        f"{name} is {shown}; it must be {expected}", details={"field": name}
    )
