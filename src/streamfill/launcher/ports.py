"""Which ports a cluster listens on, settled before any of its processes is started.

The launcher chooses free ports itself instead of letting the router bind port 0, so that a router
that is restarted comes back where servers and clients look for it.
"""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from streamfill.config import ClusterConfig, MetricsPort, ServerSection
from streamfill.errors import ConfigError

_LOWEST_FREE_PORT: Final = 10_240
"""Below it are the ports that well-known services like to use."""
_NUM_TRIES: Final = 200
_EPHEMERAL_RANGE_FILE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_FIRST_EPHEMERAL: Final = 32_768
_METRICS: Final = "metrics of "
MAX_PORT: Final = 65_535


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Every port that the launcher assigns, none of them 0."""

    router_grpc: int
    router_http: int | None = None
    """None: no HTTP."""
    router_zmq: int
    controller_zmq: int
    metrics: Mapping[str, int] = field(default_factory=dict)
    """Of ``/metrics``, by the name of the process. Those that have none are left out."""


def choose_ports(config: ClusterConfig) -> Ports:
    """The ports of `config`, with a free one for each 0.

    All of them are held at the same time while they are chosen, so they differ. Another program
    can still take one between this check and the start of its process.

    Raises:
        ConfigError: a given port is in use or not allowed, or the host is not of this machine.
    """
    router, controller = config.router, config.controller
    http_host = router.http_host or router.host
    zmq_host = router.zmq_host or router.host
    with ExitStack() as held:

        def settle(key: str, host: str, port: int) -> int:
            try:
                listener = _listen_free(key, host) if port == 0 else _listen(key, host, port)
            except ConfigError as error:
                own_key = {"router.http_port": "http_host", "router.zmq_port": "zmq_host"}.get(key)
                if error.key == "router.host" and own_key and getattr(router, own_key) is not None:
                    raise ConfigError(f"router.{own_key}", error.value, error.remedy) from error
                raise
            held.enter_context(listener)
            return int(listener.getsockname()[1])

        # Given ports first, so that no free one is chosen that is asked for below.
        wanted: dict[str, tuple[str, str, int | str]] = {
            "router_grpc": ("router.grpc_port", router.host, router.grpc_port),
            "router_http": ("router.http_port", http_host, router.http_port),
            "router_zmq": ("router.zmq_port", zmq_host, router.zmq_port),
            "controller_zmq": ("controller.zmq_port", controller.host, controller.zmq_port),
        }
        for process, place in _metrics_ports(config):
            wanted[f"{_METRICS}{process}"] = place
        in_order = sorted(wanted.items(), key=lambda item: item[1][2] == 0)
        chosen = {
            name: settle(key, host, port)
            for name, (key, host, port) in in_order
            if isinstance(port, int)
        }
    return Ports(
        router_grpc=chosen["router_grpc"],
        router_http=chosen.get("router_http"),
        router_zmq=chosen["router_zmq"],
        controller_zmq=chosen["controller_zmq"],
        metrics={
            name.removeprefix(_METRICS): port
            for name, port in chosen.items()
            if name.startswith(_METRICS)
        },
    )


def choose_metrics_port(
    role: str, section: ServerSection, host: str, index: int, taken: Collection[int] = ()
) -> int | None:
    """Of ``/metrics`` of one more server; None where the role has none.

    Args:
        role: name of the section.
        host: on which ``/metrics`` listen.
        index: number of the server among those of its role.
        taken: ports that are spoken for, whether anybody listens on them yet or not.

    Raises:
        ConfigError: the port that the section gives to this number is in use or none.
    """
    base, key = section.metrics_port, f"{role}.metrics_port"
    if isinstance(base, str):  # "off"
        return None
    if base:
        if base + index in taken or base + index > MAX_PORT:
            remedy = "is taken or none; set metrics_port to 0 for any free one"
            raise ConfigError(key, base + index, remedy)
        with _listen(key, host, base + index):
            return base + index
    while True:
        with _listen_free(key, host) as listener:
            port = int(listener.getsockname()[1])
        if port not in taken:
            return port


def _metrics_ports(config: ClusterConfig) -> Iterator[tuple[str, tuple[str, str, int]]]:
    """Each process that has ``/metrics``, with the key, the host and the port that is wanted."""
    host = config.metrics_host
    sections: tuple[tuple[str, MetricsPort, int | None], ...] = (
        ("router", config.router.metrics_port, None),
        ("controller", config.controller.metrics_port, None),
        ("prefill", config.prefill.metrics_port, config.prefill.count),
        ("decode", config.decode.metrics_port, config.decode.count),
    )
    for section, base, count in sections:
        if isinstance(base, str):  # "off"
            continue
        names = [section] if count is None else [f"{section}-{n}" for n in range(count)]
        for number, name in enumerate(names):
            yield name, (f"{section}.metrics_port", host, base + number if base else 0)


def _listen_free(key: str, host: str) -> socket.socket:
    """A listener on a port that the system will not hand to an outgoing connection later on."""
    highest = _first_ephemeral_port() - 1
    if highest - _LOWEST_FREE_PORT < _NUM_TRIES:
        return _listen(key, host, 0)
    for port in random.sample(range(_LOWEST_FREE_PORT, highest + 1), _NUM_TRIES):
        try:
            return _try_listen(host, port)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise _config_error(key, host, port, error) from error
    return _listen(key, host, 0)


def _listen(key: str, host: str, port: int) -> socket.socket:
    try:
        return _try_listen(host, port)
    except OSError as error:
        raise _config_error(key, host, port, error) from error


def _try_listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # such as "a..b", which cannot be a name at all
        raise OSError(errno.EADDRNOTAVAIL, "it is no name of a machine") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Connections of an earlier cluster that are still closing do not count as "in use".
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


def _config_error(key: str, host: str, port: int, error: OSError) -> ConfigError:
    section, _, option = key.partition(".")
    if error.errno == errno.EADDRINUSE:
        off = ", or off for no HTTP" if option == "http_port" else ""
        remedy = f"is in use on {host}; choose another port, or 0 for any free one{off}"
        return ConfigError(key, port, remedy)
    if error.errno == errno.EACCES:
        return ConfigError(key, port, "needs more rights; choose a port above 1023")
    remedy = f"is no address of this machine ({error.strerror}); try 127.0.0.1"
    host_key = "metrics_host" if option == "metrics_port" else f"{section}.host"
    return ConfigError(host_key, host, remedy)


def _first_ephemeral_port() -> int:
    try:
        return int(_EPHEMERAL_RANGE_FILE.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):  # not Linux, or not readable here
        return _DEFAULT_FIRST_EPHEMERAL
