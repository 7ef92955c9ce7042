"""``python -m router --config-file FILE``: the router process.

1. Read the configuration; a wrong value ends the process with status 2 and says what to do.
2. Start the core, then both servers, and write one line ``READY {...}`` to stdout.
3. Serve until SIGTERM or SIGINT.
4. Drain: take nothing new, let open streams finish, for a bounded time.
5. Stop. A second signal while draining comes here at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router.access.exposure import warn_of_exposure
from router.access.key_ring import KeyRing
from router.access.standing import sharing_rules
from router.garbage import pause_less
from router.manager import Manager
from router.service_server import GrpcServer
from router.tls import router_tls
from streamfill.config import RouterConfig, load_process_file
from streamfill.errors import ConfigError, StreamfillError
from streamfill.launcher.ready_line import announce_ready
from streamfill.observability.exposition import MetricsServer
from streamfill.observability.logging import configure_logging, log_event
from streamfill.unix_sockets import UNIX_PREFIX

if TYPE_CHECKING:
    from router.http.server import HttpServer

logger = logging.getLogger("router")

DRAIN_TIMEOUT_S = 25.0
"""Less than the launcher waits (30 s by default), so that streams are cancelled in good order."""

STOP_GRACE_S = 1.0
"""For the last events of streams that were just cancelled to reach their clients."""

EXIT_BAD_START = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the router. Returns the exit status of the process."""
    parser = argparse.ArgumentParser(
        prog="router", description="The router of a streamfill cluster."
    )
    parser.add_argument(
        "--config-file",
        type=Path,
        required=True,
        help="JSON file with the fields of streamfill.config.RouterConfig",
    )
    configure_logging("router")
    try:
        config = load_process_file(RouterConfig, parser.parse_args(arguments).config_file)
        configure_logging("router", config.log_level)
        asyncio.run(_run(config))
    except ConfigError as error:
        log_event(
            *(logger, "config_error"),
            level=logging.ERROR,
            key=error.key,
            value=error.value,
            remedy=error.remedy,
        )
        return EXIT_BAD_START
    except StreamfillError as error:
        log_event(logger, "start_failed", level=logging.ERROR, error=error)
        return EXIT_BAD_START
    return 0


async def _run(config: RouterConfig) -> None:
    signals = _Signals()
    manager = Manager(config)
    keys = None
    if config.api_keys_file is not None:
        keys = KeyRing(Path(config.api_keys_file), sharing_rules(config))
    tls = router_tls(config)
    noted = manager.metrics.count_refusal
    server = GrpcServer(
        manager, config.host, config.grpc_port, keys=keys, tls=tls, on_refused=noted
    )
    servers: list[GrpcServer | HttpServer] = [server]
    operator = None
    if config.operator_socket is not None:
        operator = GrpcServer(manager, UNIX_PREFIX + config.operator_socket, 0, on_refused=noted)
        servers.append(operator)
    http = None
    if config.http_port is not None:
        from router.http.server import HttpServer

        http = HttpServer(manager, config, keys=keys, tls=tls, on_refused=noted)
        servers.append(http)
    warn_of_exposure(config)
    await manager.start()
    if keys is not None:
        keys.start()
    if tls is not None:
        tls.start()
    metrics: MetricsServer | None = None
    try:
        ports: dict[str, Any] = {"grpc_port": await server.start(), "zmq_port": manager.zmq_port}
        if operator is not None:
            await operator.start()
        if http is not None:
            ports["http_port"] = await http.start()
        if config.metrics_port is not None:
            registry = manager.metrics.set.registry
            metrics = MetricsServer(
                registry,
                host=config.metrics_host,
                port=config.metrics_port,
                section="router",
                token_file=config.metrics_token_file,
            )
            ports["metrics_port"] = metrics.port
        pause_less()
        log_event(logger, "ready", **ports)
        announce_ready(ports)
        await signals.first.wait()
        log_event(logger, "draining", num_open_streams=manager.info().num_open_streams)
        await server.begin_drain()
        await signals.run_until_second(manager.drain(DRAIN_TIMEOUT_S))
    finally:
        grace_s = 0.0 if signals.second.is_set() else STOP_GRACE_S
        await asyncio.gather(*(each.stop(grace_s) for each in servers))
        await manager.close()
        if keys is not None:
            await keys.close()
        if tls is not None:
            await tls.close()
        if metrics is not None:
            metrics.close()
        log_event(logger, "stopped")


class _Signals:
    """SIGTERM and SIGINT, counted. Made inside the running loop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    async def run_until_second(self, work: Coroutine[Any, Any, None]) -> None:
        """``work``, given up at the second signal."""
        task = asyncio.create_task(work)
        second = asyncio.create_task(self.second.wait())
        await asyncio.wait({task, second}, return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        else:
            task.result()

    def _on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


if __name__ == "__main__":
    sys.exit(main())
