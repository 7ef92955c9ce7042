"""The preemption controller as a process: ``python -m streamfill.preemption --config-file F``.

Prints ``READY {"zmq_port": …}`` on stdout once it listens, and ends on SIGTERM or SIGINT with
status 0. A configuration that cannot work ends it with status 2.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from streamfill.config import ControllerConfig, load_process_file
from streamfill.errors import ConfigError
from streamfill.launcher.ready_line import announce_ready
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
        _serve(controller)
    finally:
        controller.close()
    log_event(_logger, "stopped")
    return 0


def _serve(controller: Controller) -> None:
    def stop(signal_number: int, _frame: FrameType | None) -> None:
        controller.stop()

    # Without the descriptor a signal that comes just before the loop falls asleep would be seen
    # only at its end.
    signal.set_wakeup_fd(controller.wake_fd, warn_on_full_buffer=False)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, stop)
    log_event(_logger, "ready", zmq_port=controller.port, epoch=controller.status.epoch)
    announce_ready({"zmq_port": controller.port})
    try:
        controller.run()
    finally:
        # It ends by itself now; a second signal must not find the sockets closed.
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)


if __name__ == "__main__":
    sys.exit(main())
