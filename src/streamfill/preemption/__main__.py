"""The preemption controller as a process: ``python -m streamfill.preemption --config-file F``.

Prints ``READY {"zmq_port": …}`` on stdout once it listens, with its ``metrics_port`` where it has
one, and ends on SIGTERM or SIGINT with status 0. A configuration that cannot work ends it with
status 2.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from streamfill.config import ControllerConfig, load_process_file
from streamfill.errors import ConfigError
from streamfill.launcher.ready_line import announce_ready
from streamfill.observability.exposition import MetricsServer
from streamfill.observability.logging import configure_logging, log_event
from streamfill.preemption.controller import Controller

PROCESS_NAME = "controller"

_logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run the controller. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m streamfill.preemption", description="The preemption controller."
    )
    parser.add_argument(
        "--config-file", type=Path, required=True, help="a ControllerConfig as JSON"
    )
    options = parser.parse_args(arguments)
    try:
        config = load_process_file(ControllerConfig, options.config_file)
        configure_logging(PROCESS_NAME, config.log_level)
        controller = Controller(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        with _metrics_of(controller, config) as metrics_port:
            _serve(controller, metrics_port)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        controller.close()
    log_event(_logger, "stopped")
    return 0


@contextmanager
def _metrics_of(controller: Controller, config: ControllerConfig) -> Iterator[int | None]:
    """Its port. None: it is off. Raises ConfigError."""
    if config.metrics_port is None:
        yield None
        return
    registry = controller.metrics.set.registry
    server = MetricsServer(
        registry,
        host=config.metrics_host,
        port=config.metrics_port,
        section="controller",
        token_file=config.metrics_token_file,
    )
    try:
        yield server.port
    finally:
        server.close()


def _serve(controller: Controller, metrics_port: int | None) -> None:
    def stop(signal_number: int, _frame: FrameType | None) -> None:
        controller.stop()

    # Without the descriptor a signal that comes just before the loop falls asleep would be seen
    # only at its end.
    signal.set_wakeup_fd(controller.wake_fd, warn_on_full_buffer=False)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, stop)
    ports: dict[str, Any] = {"zmq_port": controller.port}
    if metrics_port is not None:
        ports["metrics_port"] = metrics_port
    log_event(_logger, "ready", **ports, epoch=controller.status.epoch)
    announce_ready(ports)
    try:
        controller.run()
    finally:
        # It ends by itself now; a second signal must not find the sockets closed.
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)


if __name__ == "__main__":
    sys.exit(main())
