"""What holds for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# By default an example that takes a fifth of a second fails its test, and so do examples that are
# long in the making, which on a machine with other work happens for no reason of the test's own.
# Each test has the time-out of pyproject.toml.
settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machine")
