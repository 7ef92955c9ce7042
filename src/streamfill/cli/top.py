"""`streamfill top`: a live view of a cluster's servers, streams, memory and policy decisions.

1. Ask the router once; whoever cannot be asked ends the command with an error.
2. Ask again every interval. What the schedulers decided is asked beside it, since a server answers
   that between two steps only, which may take seconds.
3. Draw what is known by now. A router that went away is said in the frame, and tried again.
4. `q`, Ctrl-C or a signal end it; the terminal is as it was.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

from streamfill.api import Client, ServerStreams
from streamfill.cli.cluster_options import add_target_options, target_address, target_client
from streamfill.cli.top_frame import Moment, frame
from streamfill.cli.top_view import FrameView, frame_view
from streamfill.errors import ConfigError, StreamError
from streamfill.launcher.signals import StopRequest, stop_on_signal

MIN_INTERVAL_S: Final = 0.2
"""Servers report to the router four times a second."""
MAX_INTERVAL_S: Final = 3600.0
DESCRIBE_TIMEOUT_S: Final = 5.0
_ROWS_IN_A_FILE: Final = 20
_EPILOG: Final = """\
servers, as the router sees them:

  policy          by which the server schedules now; `streamfill policy set` changes it
  to compute      tokens of prompts that it knows and has not computed
  computed/s      prompt tokens computed per second since the frame before
  KV pool         # in use, = cached (may be evicted), . free
  in host memory  tokens whose KV was swapped out and may be needed again
  preempted       how often a stream had lost KV, since the server's start

streams, as the servers' schedulers see them, those first that have something to compute, in the
order of their turn:

  computed        of the tokens of its prompt that are there; # computed, - not
  idle            since its newest segment
  victim          its place in the order in which memory is taken, 0 first; -: none is taken
  decision        what was decided in the newest step, and the reason as a sentence

`streamfill status` shows more of one moment, /metrics keeps numbers over time (docs/metrics.md).

examples:
  streamfill top                              the cluster of this machine, until q
  streamfill top --address gpu1:50051         one elsewhere
  streamfill top --interval 5 > cluster.log   a frame every five seconds, as text
  streamfill top --once                       one frame
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add_target_options(parser)
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds between frames, from 0.2 on; default: 1",
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help="streams shown; default: as many as fit, 20 in a file"
    )
    parser.add_argument("--once", action="store_true", help="show one frame and end")


def run(args: argparse.Namespace) -> int:
    """Shows frames until it is told to stop. Exit code 1 when the last one shows a cluster that
    could not serve a request."""
    interval_s: float = args.interval
    if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
        remedy = f"must be between {MIN_INTERVAL_S:g} and {MAX_INTERVAL_S:g} seconds"
        raise ConfigError("--interval", interval_s, remedy)
    if args.rows is not None and args.rows < 1:
        raise ConfigError("--rows", args.rows, "must be at least 1")
    address, client = target_address(args), target_client(args)
    return asyncio.run(_show(client, address, interval_s, args.rows, once=args.once))


async def _show(
    connection: Client, address: str, interval_s: float, rows: int | None, *, once: bool
) -> int:
    async with connection as client:
        watch = Watch(client)
        await watch.begin()
        if once:
            with frame_view(is_live=False) as view:
                _draw(view, watch, address, rows)
        else:
            with stop_on_signal() as stop, frame_view(is_live=True) as view:
                await _follow(watch, view, stop, address=address, interval_s=interval_s, rows=rows)
    return 0 if watch.now.info.ready and not watch.now.trouble else 1


async def _follow(
    watch: Watch,
    view: FrameView,
    stop: StopRequest,
    *,
    address: str,
    interval_s: float,
    rows: int | None,
) -> None:
    """Frames until a signal or a key ends it."""
    describing = asyncio.create_task(watch.describe_for_ever(interval_s))
    ending = asyncio.create_task(_end_of(view, stop))
    try:
        while not ending.done():
            _draw(view, watch, address, rows)
            await asyncio.wait({ending}, timeout=interval_s)
            asking = asyncio.create_task(watch.ask())
            await asyncio.wait({ending, asking}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
            else:
                await _given_up(asking)
    finally:
        await _given_up(describing, ending)


async def _end_of(view: FrameView, stop: StopRequest) -> None:
    """Returns when the user wants no more."""
    signalled = asyncio.create_task(stop.first.wait())
    pressed = asyncio.create_task(view.wait_for_quit())
    try:
        await asyncio.wait({signalled, pressed}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _given_up(signalled, pressed)


async def _given_up(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _draw(view: FrameView, watch: Watch, address: str, rows: int | None) -> None:
    view.draw(
        lambda max_streams: frame(
            watch.now, watch.before, address=address, max_streams=rows or max_streams
        ),
        _ROWS_IN_A_FILE,
    )


class Watch:
    """What is known of a cluster: the newest moment, and the one before it.

    Call `begin` before anything else.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._now: Moment | None = None
        self.before: Moment | None = None
        self._described: Mapping[str, ServerStreams] = {}

    @property
    def now(self) -> Moment:
        """The newest moment."""
        if self._now is None:
            raise RuntimeError("nobody was asked yet")
        return self._now

    async def begin(self) -> None:
        """Ask for the first time.

        Raises:
            StreamError: the router cannot be reached, or refuses.
        """
        info, self._described = await asyncio.gather(
            self._client.server_info(),
            self._client.describe_streams(timeout_s=DESCRIBE_TIMEOUT_S),
        )
        self._now = Moment(at_s=time.monotonic(), info=info, described=self._described)

    async def ask(self) -> None:
        """Ask again. A router that does not answer makes the moment an old one."""
        try:
            info = await self._client.server_info()
        except StreamError as error:
            old = self.now
            self._now = Moment(
                at_s=old.at_s, info=old.info, described=old.described, trouble=str(error)
            )
            return
        if not self.now.trouble:
            self.before = self._now
        self._now = Moment(at_s=time.monotonic(), info=info, described=self._described)

    async def describe_for_ever(self, interval_s: float) -> None:
        """Keep what is known of the streams new."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                self._described = await self._client.describe_streams(timeout_s=DESCRIBE_TIMEOUT_S)
            except StreamError:
                continue  # `ask` says so
