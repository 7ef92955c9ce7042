"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# By default an example that takes a fifth of a second fails its test, which on a machine with other
# work it may do for no reason of its own. Each test has the time-out of pyproject.toml.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
