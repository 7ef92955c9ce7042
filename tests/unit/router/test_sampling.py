"""What a commit may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from router.sampling import MAX_STOP_STRINGS, check_sampling, fit_max_new_tokens
from streamfill.errors import InvalidArgumentError
from streamfill.messages.common import Sampling


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("top_k", -2),
        ("min_p", 1.5),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("num_logprobs", -1),
        ("stop_token_ids", (100,)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_wrong_value_is_named(name: str, value: Any) -> None:
    """The error has the parameter's name and its value."""
    shown = str(value[0] if isinstance(value, tuple) else value)
    with pytest.raises(InvalidArgumentError, match=name) as refused:
        check_sampling(Sampling(**{name: value}), (), vocab_size=100)
    assert shown in refused.value.message


@pytest.mark.parametrize("stop", [("a", ""), ("x",) * (MAX_STOP_STRINGS + 1)])
def test_wrong_stop_strings_are_refused(stop: tuple[str, ...]) -> None:
    """An empty one would match at once; too many cost time for every token."""
    with pytest.raises(InvalidArgumentError, match="stop"):
        check_sampling(Sampling(), stop, vocab_size=100)


def test_ends_of_the_ranges_are_valid() -> None:
    """Nothing that SGLang takes is refused."""
    low = Sampling(temperature=0.0, top_p=0.01, top_k=1, frequency_penalty=-2.0, max_new_tokens=1)
    high = Sampling(temperature=9.0, min_p=1.0, presence_penalty=2.0, repetition_penalty=2.0)
    for sampling in (low, high):
        check_sampling(sampling, ("stop",), vocab_size=100)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "expected"), [(10, 50), (60, 40), (99, 1), (100, 1), (120, 1)]
)
def test_length_is_cut_to_the_room_and_never_below_one(
    num_prompt_tokens: int, expected: int
) -> None:
    """A minimum that does not fit any more is cut as well."""
    sampling = Sampling(max_new_tokens=50, min_new_tokens=45)
    fitted = fit_max_new_tokens(sampling, num_prompt_tokens, room_tokens=100)
    assert fitted.max_new_tokens == expected
    assert fitted.min_new_tokens == min(45, expected)
