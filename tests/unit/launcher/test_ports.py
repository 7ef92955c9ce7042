"""Choosing and checking ports."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamfill.config import ClusterConfig, ControllerSection, RouterSection
from streamfill.errors import ConfigError
from streamfill.launcher.ports import choose_ports

FREE = ClusterConfig(router=RouterSection(grpc_port=0, http_port=0))


def test_free_ports_differ() -> None:
    """Zeroes become different ports that can be bound."""
    ports = choose_ports(FREE)
    chosen = (ports.router_grpc, ports.router_http, ports.router_zmq, ports.controller_zmq)
    assert len(set(chosen)) == 4
    assert 0 not in chosen


def test_free_ports_are_not_ephemeral() -> None:
    """A free port is below those that the system gives to outgoing connections."""
    range_file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first_ephemeral = int(range_file.read_text().split()[0])
    if first_ephemeral < 11_000:
        pytest.skip("this system leaves no ports below its ephemeral range")
    assert choose_ports(FREE).router_zmq < first_ephemeral


def test_port_in_use() -> None:
    """A port that another program listens on is named with its key and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = ClusterConfig(router=RouterSection(grpc_port=port, http_port="off"))
        with pytest.raises(ConfigError, match="choose another port") as caught:
            choose_ports(config)
    assert (caught.value.key, caught.value.value) == ("router.grpc_port", port)


def test_same_port_twice() -> None:
    """A port that the configuration names twice is in use for the second one."""
    port = choose_ports(FREE).router_grpc
    config = ClusterConfig(
        router=RouterSection(grpc_port=port, http_port="off"),
        controller=ControllerSection(zmq_port=port),
    )
    with pytest.raises(ConfigError, match="in use") as caught:
        choose_ports(config)
    assert caught.value.key == "controller.zmq_port"


@pytest.mark.parametrize("grpc_port", [0, 45678])
def test_foreign_host(grpc_port: int) -> None:
    """A host that is not of this machine is refused by its own key."""
    config = ClusterConfig(router=RouterSection(host="192.0.2.1", grpc_port=grpc_port, http_port=0))
    with pytest.raises(ConfigError, match="no address of this machine") as caught:
        choose_ports(config)
    assert caught.value.key == "router.host"


def test_given_port_is_kept() -> None:
    """A given port is taken as it is."""
    port = choose_ports(FREE).router_grpc
    assert (
        choose_ports(
            ClusterConfig(router=RouterSection(grpc_port=port, http_port="off"))
        ).router_grpc
        == port
    )


def test_http_port_in_use() -> None:
    """Two clusters with one port for HTTP do not clash silently: the second one says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = ClusterConfig(router=RouterSection(grpc_port=0, http_port=port))
        with pytest.raises(ConfigError, match="or off for no HTTP") as caught:
            choose_ports(config)
    assert (caught.value.key, caught.value.value) == ("router.http_port", port)


def test_no_http() -> None:
    """Without HTTP there is no port for it."""
    config = ClusterConfig(router=RouterSection(grpc_port=0, http_port="off"))
    assert choose_ports(config).router_http is None


@pytest.mark.parametrize("field", ["host", "http_host", "zmq_host"])
def test_a_host_of_another_machine_is_named_by_its_key(field: str) -> None:
    """Each address of the router is a key of its own."""
    named: dict[str, Any] = {field: "192.0.2.1"}
    router = RouterSection(grpc_port=0, http_port=0, **named)
    with pytest.raises(ConfigError) as caught:
        choose_ports(ClusterConfig(router=router))
    assert (caught.value.key, caught.value.value) == (f"router.{field}", "192.0.2.1")


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_what_is_no_name_of_a_machine(host: str) -> None:
    """It is refused by its key, like a name that is not known."""
    with pytest.raises(ConfigError, match="no address of this machine") as caught:
        choose_ports(msgspec.structs.replace(FREE, metrics_host=host))
    assert (caught.value.key, caught.value.value) == ("metrics_host", host)
