"""What a router that others can reach says at its start."""

from __future__ import annotations

from typing import Any

import pytest

from router.access.exposure import warn_of_exposure
from streamfill.config import RouterConfig
from streamfill.curve.exposure import is_loopback


def config(**values: Any) -> RouterConfig:
    return RouterConfig(model_path="fake", **{"grpc_port": 0, "zmq_port": 0, **values})


@pytest.mark.parametrize(
    ("values", "address"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0"),
        ({"host": "::"}, "::"),
        ({"host": "::", "tls_cert_file": "/c", "tls_key_file": "/k"}, "::"),
        ({"host": "127.0.0.1", "http_host": "10.0.0.7", "http_port": 0}, "10.0.0.7"),
    ],
)
def test_an_open_router_that_others_can_reach_warns(
    caplog: pytest.LogCaptureFixture, values: dict[str, Any], address: str
) -> None:
    """With the address and what to do."""
    warn_of_exposure(config(**{"zmq_host": "127.0.0.1", **values}))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"open_to_the_network address={address} " in record.message
    assert "router.api_keys_file" in record.message


def test_a_port_for_servers_that_others_can_reach_warns(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever clients are asked for; servers are asked for nothing, unless there are keys."""
    asked = {"api_keys_file": "/k", "tls_cert_file": "/c", "tls_key_file": "/p"}
    warn_of_exposure(config(host="10.0.0.7", **asked))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "servers_not_authenticated address=10.0.0.7 " in record.message
    assert "zmq_keys_dir" in record.message
    caplog.clear()
    warn_of_exposure(config(host="10.0.0.7", zmq_keys_dir="/z", **asked))
    assert not caplog.records


def test_keys_in_the_clear_warn(caplog: pytest.LogCaptureFixture) -> None:
    """They can be read on the way; with a certificate they cannot."""
    warn_of_exposure(config(host="0.0.0.0", zmq_host="127.0.0.1", api_keys_file="/k"))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "keys_in_the_clear address=0.0.0.0 " in record.message
    assert "router.tls_cert_file" in record.message


@pytest.mark.parametrize(
    "values",
    [
        {"host": "0.0.0.0", "api_keys_file": "/k", "tls_cert_file": "/c"},
        {"host": "0.0.0.0", "tls_cert_file": "/c", "tls_client_ca_file": "/a"},
        {"host": "127.0.0.1", "http_port": 0},
        {"host": "::1"},
        {"host": "127.0.0.1", "http_host": "10.0.0.7"},  # without http_port there is no HTTP
    ],
)
def test_others_do_not(caplog: pytest.LogCaptureFixture, values: dict[str, Any]) -> None:
    """Nobody but this machine can reach them, or they ask who is there, and in secret."""
    warn_of_exposure(config(**{"zmq_host": "127.0.0.1", **values}))
    assert not caplog.records


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.2", True), ("localhost", True), ("[::1]", True), ("*", False), ("box", False)],
)
def test_loopback(host: str, is_own: bool) -> None:
    """A name that is not known to be this machine's own counts as reachable."""
    assert is_loopback(host) is is_own
