"""What a router that others can reach says at its start."""

from __future__ import annotations

from typing import Any

import pytest

from router.access.exposure import is_loopback, warn_of_exposure
from streamfill.config import RouterConfig


def config(**values: Any) -> RouterConfig:
    return RouterConfig(model_path="fake", **{"grpc_port": 0, "zmq_port": 0, **values})


@pytest.mark.parametrize(
    ("values", "address"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0"),
        ({"host": "::"}, "::"),
        ({"host": "127.0.0.1", "http_host": "10.0.0.7", "http_port": 0}, "10.0.0.7"),
    ],
)
def test_an_open_router_that_others_can_reach_warns(
    caplog: pytest.LogCaptureFixture, values: dict[str, Any], address: str
) -> None:
    """With the address and what to do."""
    warn_of_exposure(config(**values))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"open_to_the_network address={address} " in record.message
    assert "router.api_keys_file" in record.message


@pytest.mark.parametrize(
    "values",
    [
        {"host": "127.0.0.1", "http_port": 0},
        {"host": "::1"},
        {"host": "127.0.0.1", "http_host": "10.0.0.7"},  # without http_port there is no HTTP
    ],
)
def test_others_do_not(caplog: pytest.LogCaptureFixture, values: dict[str, Any]) -> None:
    """Nobody but this machine can reach them."""
    warn_of_exposure(config(**values))
    assert not caplog.records


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.2", True), ("localhost", True), ("[::1]", True), ("*", False), ("box", False)],
)
def test_loopback(host: str, is_own: bool) -> None:
    """A name that is not known to be this machine's own counts as reachable."""
    assert is_loopback(host) is is_own
