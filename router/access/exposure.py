"""What a router says at its start when more can reach it than may be meant to."""

from __future__ import annotations

import ipaddress
import logging

from streamfill.config import RouterConfig
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)


def warn_of_exposure(config: RouterConfig) -> None:
    """Logs a warning where other machines can reach a port and nobody asks who they are."""
    hosts = {"router.host": config.host}
    if config.http_port is not None:
        hosts["router.http_host"] = config.http_host or config.host
    exposed = {key: host for key, host in hosts.items() if not is_loopback(host)}
    if exposed and config.api_keys_file is None:
        log_event(
            *(logger, "open_to_the_network"),
            level=logging.WARNING,
            address=",".join(sorted(set(exposed.values()))),
            meaning="whoever can reach this address may use the cluster and change its policies",
            remedy="set router.api_keys_file (streamfill keys add NAME), or keep router.host at "
            "127.0.0.1",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket that is bound to ``host``. A name that is not
    known to be this machine's own counts as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
