"""What a router says at its start when more can reach it than may be meant to."""

from __future__ import annotations

import logging

from streamfill.config import RouterConfig
from streamfill.curve.exposure import is_loopback
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)


def warn_of_exposure(config: RouterConfig) -> None:
    """Logs a warning for each way in which other machines can reach a port where nobody asks who
    they are, or where what they say can be read on the way."""
    hosts = {"router.host": config.host}
    if config.http_port is not None:
        hosts["router.http_host"] = config.http_host or config.host
    exposed = {key: host for key, host in hosts.items() if not is_loopback(host)}
    servers_at = config.zmq_host or config.host
    if config.zmq_keys_dir is None and not is_loopback(servers_at):
        log_event(
            *(logger, "servers_not_authenticated"),
            level=logging.WARNING,
            address=servers_at,
            meaning="whoever can reach this address can be a server and read prompts",
            remedy="set zmq_keys_dir (streamfill zmq-keys create DIR), or router.zmq_host to "
            "127.0.0.1",
        )
    address = ",".join(sorted(set(exposed.values())))
    if exposed and config.api_keys_file is not None and config.tls_cert_file is None:
        log_event(
            *(logger, "keys_in_the_clear"),
            level=logging.WARNING,
            address=address,
            meaning="whoever can listen on the way can read API keys and prompts",
            remedy="set router.tls_cert_file and router.tls_key_file",
        )
    if exposed and config.api_keys_file is None and config.tls_client_ca_file is None:
        log_event(
            *(logger, "open_to_the_network"),
            level=logging.WARNING,
            address=address,
            meaning="whoever can reach this address may use the cluster and change its policies",
            remedy="set router.api_keys_file (streamfill keys add NAME), or keep router.host at "
            "127.0.0.1",
        )
