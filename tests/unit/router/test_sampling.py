"""What a commit may ask for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from router.request_checks import MAX_STOP_STRINGS, checked_sampling, checked_stop
from router.sampling import fit_max_new_tokens
from streamfill.errors import InvalidArgumentError
from streamfill.messages.common import Sampling


def _checked(given: dict[str, float], stop_token_ids: Sequence[int] = ()) -> Sampling:
    return checked_sampling(
        given, ignore_eos=False, stop_token_ids=stop_token_ids, vocab_size=100, prefix="sampling."
    )


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
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("logprobs", -1),
        ("logprobs", 21),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_wrong_value_is_named(name: str, value: float) -> None:
    """The error has the parameter's name and its value."""
    with pytest.raises(InvalidArgumentError, match=f"sampling.{name}") as refused:
        _checked({name: value})
    assert str(value) in refused.value.message


@pytest.mark.parametrize("token_id", [100, -1])
def test_wrong_stop_token_is_named(token_id: int) -> None:
    """The error has its place and its value."""
    with pytest.raises(InvalidArgumentError, match=rf"sampling.stop_token_ids\[1\] is {token_id}"):
        _checked({}, (5, token_id))


@pytest.mark.parametrize("stop", [("a", ""), ("x",) * (MAX_STOP_STRINGS + 1)])
def test_wrong_stop_strings_are_refused(stop: tuple[str, ...]) -> None:
    """An empty one would match at once; too many cost time for every token."""
    with pytest.raises(InvalidArgumentError, match="stop"):
        checked_stop(stop, "stop")


def test_ends_of_the_ranges_are_valid() -> None:
    """Nothing that SGLang takes and can be computed is refused."""
    for given in (
        {"temperature": 0.0, "top_p": 0.01, "top_k": 1, "frequency_penalty": -2.0, "max_tokens": 1},
        {"temperature": 9.0, "min_p": 1.0, "presence_penalty": 2.0, "repetition_penalty": 2.0},
    ):
        _checked(given, (0, 99))
    assert checked_stop(("stop",), "stop") == ("stop",)


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
