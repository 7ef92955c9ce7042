"""May a ZeroMQ socket listen at an address? With keys, anywhere; without, on this machine only;
in any case by IPv4.

Needs the standard library only, so that a configuration is checked without ZeroMQ.
"""

from __future__ import annotations

import ipaddress
from typing import Protocol

from streamfill.errors import ConfigError


class LinkSettings(Protocol):
    """What each configuration says of the links between processes."""

    @property
    def zmq_keys_dir(self) -> str | None:
        """Folder of `streamfill zmq-keys`. None: no keys."""

    @property
    def allow_plain_zmq(self) -> bool:
        """Listen without keys also where others can reach it."""


def check_listening(settings: LinkSettings, option: str, host: str) -> None:
    """Whether a socket may listen at ``host``.

    Raises:
        ConfigError: it may not; names ``option``, the address and the remedies.
    """
    if ":" in host:
        remedy = (
            "is an IPv6 address, and the links between processes use IPv4; give an IPv4 address or "
            "a name (router.zmq_host leaves router.host to clients, who may use IPv6)"
        )
        raise ConfigError(option, host, remedy)
    if settings.zmq_keys_dir is None and not settings.allow_plain_zmq and not is_loopback(host):
        remedy = (
            "can be reached by other machines, and without keys whoever reaches it can be a server "
            "and read prompts; make keys with `streamfill zmq-keys create DIR` and set "
            "zmq_keys_dir, or set allow_plain_zmq = true where nobody else is on the network"
        )
        raise ConfigError(option, host, remedy)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket that is bound to ``host``. A name that is not
    known to be this machine's own counts as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
