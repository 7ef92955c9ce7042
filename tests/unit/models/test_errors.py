"""The exception tree."""

from __future__ import annotations

import pickle

import pytest

from streamfill import errors
from streamfill.errors import ConfigError, ErrorCode, StreamError, StreamfillError


def test_config_error_says_all_three() -> None:
    """Key, value and remedy are in the message, also after a trip between processes."""
    error = ConfigError("port", 80, "choose a free port")
    assert str(pickle.loads(pickle.dumps(error))) == "port = 80: choose a free port"


@pytest.mark.parametrize("code", list(ErrorCode))
def test_code_survives_the_wire(code: ErrorCode) -> None:
    """An error made from a code has that code, whether or not it has a class of its own."""
    error = StreamError.from_code(code, "too long", details={"limit_tokens": 5})
    assert error.code is code
    assert str(error) == f"{code.value}: too long"
    assert error.details["limit_tokens"] == 5


def test_every_error_is_in_the_drawing() -> None:
    """The docstring draws each class, and all hang under the root."""
    found = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    for error in found:
        assert issubclass(error, StreamfillError)
        assert error.__name__ in (errors.__doc__ or "")
