"""Streams of token ids, or of text: ``python -m streamfill.router_bench.stream_load``.

Each stream opens, sends segments, commits with an answer of one token, and is followed by a new
one. There are three kinds of load:

* ``saturate``: a stream sends its next segment as soon as the one before is computed, so as many
  are under way as there are streams. Says how many the router takes.
* ``paced``: segments are due at a steady rate, the streams in turns. Says how long they take.
* ``idle``: streams get their prompt and stay open. Says what memory that takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import selectors
import sys
import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import StreamfillError, UnavailableError
from streamfill.loadgen.short_collections import short_collections
from streamfill.observability.lifetime import percentile
from streamfill.router_bench.grpc_connection import Connection
from streamfill.router_bench.lane_connection import LaneConnection
from streamfill.router_bench.processes import cpu_s, rss_bytes
from streamfill.router_bench.segments import (
    SegmentMaker,
    TextMaker,
    commit_message,
    now_us,
    open_message,
)

PATH: Final = "/streamfill.v1.Streamfill/Stream"
TICK_S: Final = 0.0005
SILENT_S: Final = 20.0
"""Nothing came for so long: the router, or the fake server, is stuck."""
WAVE_STREAMS: Final = 250
SETTLE_S: Final = 1.0
"""From the last acknowledgement to the look at the router's memory."""


class Figures:
    """What is counted while the load is measured, and nothing before."""

    def __init__(self) -> None:
        self.num_segments = 0
        self.under_way_us = array("q")
        self.received_us = array("q")
        self.computed_us = array("q")
        self.lag_us = array("q")
        self.num_streams = 0
        """That came to their end."""
        self.num_failed = 0

    def percentiles(self) -> dict[str, float]:
        """Of all latencies, in ms."""
        found: dict[str, float] = {}
        for name in ("under_way", "received", "computed", "lag"):
            values: array[int] = getattr(self, f"{name}_us")
            for percent in (50, 99):
                value = percentile(values, percent) or 0.0
                found[f"{name}_p{percent}_ms"] = round(value / 1000, 3)
        return found


class Stream:
    """One place in the load: a stream, then the next one."""

    def __init__(self, load: Load, connection: Connection | LaneConnection) -> None:
        self._load = load
        self._connection = connection
        self._number = 0
        self._seq = 0
        self._sent_us = 0
        self._is_received = True
        self.is_free = False
        """The router has said that everything is computed; a further segment may be sent."""
        self._has_ended = False

    def open(self) -> None:
        """Begin a stream."""
        self._seq = 0
        self._has_ended = False
        self._number = self._connection.open_call(self)
        self._connection.send(self._number, open_message("load"))

    def send(self) -> None:
        """Send the next segment."""
        self.is_free = False
        self._is_received = False
        self._seq += 1
        self._sent_us = now_us()
        self._connection.send(self._number, self._load.maker.segment(self._seq))

    @property
    def is_full(self) -> bool:
        """Whether it has had all its segments."""
        return self._seq >= self._load.segments_per_stream

    def commit(self) -> None:
        """Ask for the answer."""
        self.is_free = False
        self._connection.send(self._number, commit_message(self._seq + 1))

    def on_message(self, body: bytes) -> None:
        """See `grpc_connection.Call`."""
        self.on_event(pb.StreamEvent.FromString(body))

    def on_event(self, event: pb.StreamEvent) -> None:
        """See `lane_connection.LaneCall`."""
        match event.WhichOneof("event"):
            case "acknowledged":
                self._on_acknowledged(event.acknowledged)
            case "opened":
                self._become_free()
            case "done":
                self._has_ended = True
                self._load.figures.num_streams += 1
            case "error" | "failed":
                raise StreamfillError(f"the router refused a segment: {event}")

    def on_end(self) -> None:
        """See `grpc_connection.Call`."""
        if not self._has_ended:
            self._load.figures.num_failed += 1
            raise StreamfillError("the router ended a stream of the load without an answer")
        self.open()

    def _on_acknowledged(self, event: pb.Acknowledged) -> None:
        if event.seq != self._seq or self.is_free:
            return
        figures = self._load.figures
        if not self._is_received:
            self._is_received = True
            figures.received_us.append(now_us() - self._sent_us)
        expected = self._load.num_tokens(self._seq)
        if event.num_computed_tokens == (expected or event.num_received_tokens):
            figures.computed_us.append(now_us() - self._sent_us)
            if self._load.is_stamped:
                figures.under_way_us.append(event.num_invalidated_tokens)
            figures.num_segments += 1
            self._become_free()

    def _become_free(self) -> None:
        self.is_free = True
        self._load.free.append(self)


class Load:
    """All streams on all connections, in one thread."""

    def __init__(self, args: argparse.Namespace) -> None:
        host, _, port = args.address.rpartition(":")
        self.is_stamped = args.text is None
        """The fake server finds out how long a segment was under way."""
        self.maker = (
            SegmentMaker(args.segment_tokens, args.vocab_size)
            if args.text is None
            else TextMaker(args.text)
        )
        self._segment_tokens: int | None = args.segment_tokens if self.is_stamped else None
        self.segments_per_stream: int = args.segments_per_stream
        self.figures = Figures()
        self.free: deque[Stream] = deque()
        """Streams that may go on, in the order in which they became so."""
        self._args = args
        self._heard_s = time.monotonic()
        self._selector = selectors.EpollSelector()
        self._connections: list[Connection | LaneConnection] = [
            LaneConnection(host, int(port)) if args.lanes else Connection(host, int(port), PATH)
            for _ in range(min(args.connections, args.streams))
        ]
        for connection in self._connections:
            self._selector.register(connection, selectors.EVENT_READ, connection)
        self._num_streams = 0

    def num_tokens(self, num_segments: int) -> int | None:
        """Of so many segments. None: that is the tokenizer's business."""
        return None if self._segment_tokens is None else num_segments * self._segment_tokens

    def open(self, num_streams: int) -> None:
        """Open streams until there are so many."""
        while self._num_streams < num_streams:
            place = self._num_streams % len(self._connections)
            Stream(self, self._connections[place]).open()
            self._num_streams += 1

    def turn(self, timeout_s: float) -> None:
        """Send what was put together, then read what has come or comes in this time."""
        for connection in self._connections:
            connection.flush()
        ready = self._selector.select(timeout_s)
        if ready:
            self._heard_s = time.monotonic()
        elif time.monotonic() > self._heard_s + SILENT_S:
            raise UnavailableError(f"nothing came from the router for {SILENT_S:g} s")
        for key, _ in ready:
            key.data.on_readable()

    def go_on(self, stream: Stream) -> bool:
        """Let a free stream send; whether that was a segment."""
        if stream.is_full:
            stream.commit()
            return False
        stream.send()
        return True

    def saturate(self, end_s: float) -> None:
        """Each stream as fast as it goes."""
        while time.monotonic() < end_s:
            while self.free:
                self.go_on(self.free.popleft())
            self.turn(TICK_S * 20)

    def paced(self, end_s: float) -> None:
        """Segments when they are due. One for which no stream is free is late."""
        interval_s = 1.0 / self._args.rate
        next_s = time.monotonic()
        while (now_s := time.monotonic()) < end_s:
            while next_s <= now_s and self.free:
                if self.go_on(self.free.popleft()):
                    self.figures.lag_us.append(int(1e6 * (now_s - next_s)))
                    next_s += interval_s
            self.turn(max(0.0, min(TICK_S, next_s - now_s)))

    def fill(self, num_streams: int) -> None:
        """Open so many and give each its whole prompt; they stay open. Some at a time: gRPC refuses
        calls of which more than a thousand wait to be begun."""
        while self._num_streams < num_streams:
            self.open(min(num_streams, self._num_streams + WAVE_STREAMS))
            while self.figures.num_segments < self._num_streams * self.segments_per_stream:
                while self.free:
                    stream = self.free.popleft()
                    if not stream.is_full:
                        stream.send()
                self.turn(0.05)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    _allow_connections(args.connections)
    load = Load(args)
    with short_collections():
        if args.kind == "idle":
            return _idle(load, args)
        load.open(args.streams)
        work = load.saturate if args.kind == "saturate" else load.paced
        work(time.monotonic() + args.warm_s)
        load.figures = Figures()
        began_s, own_s, router_s = time.monotonic(), time.process_time(), cpu_s(args.router_pid)
        work(time.monotonic() + args.seconds)
        wall_s = time.monotonic() - began_s
        own_s, router_s = time.process_time() - own_s, cpu_s(args.router_pid) - router_s
    num_segments = load.figures.num_segments
    if not num_segments:
        raise StreamfillError("not one segment was computed while the load was measured")
    return {
        "segments_per_s": round(num_segments / wall_s, 1),
        "router_cpu_us": round(1e6 * router_s / num_segments, 1),
        "router_cores": round(router_s / wall_s, 3),
        "load_cpu_us": round(1e6 * own_s / num_segments, 1),
        "num_segments": num_segments,
        "num_streams_ended": load.figures.num_streams,
        "wall_s": round(wall_s, 2),
        **load.figures.percentiles(),
    }


def _idle(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for num_streams in args.steps:
        load.fill(num_streams)
        settled_s = time.monotonic() + SETTLE_S
        while time.monotonic() < settled_s:
            load.turn(0.05)
        rows.append({"num_streams": num_streams, "rss_bytes": rss_bytes(args.router_pid)})
    began_s, router_s = time.monotonic(), cpu_s(args.router_pid)
    while time.monotonic() < began_s + args.seconds:
        load.turn(0.05)
    idle = (cpu_s(args.router_pid) - router_s) / (time.monotonic() - began_s)
    return {"steps": rows, "router_cores": round(idle, 3)}


def _allow_connections(num: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num + 64
    if soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one load; prints ``RESULT {json}``."""
    parser = argparse.ArgumentParser(
        prog="python -m streamfill.router_bench.stream_load",
        description="Streams of token ids, or of text, against a router.",
    )
    parser.add_argument("kind", choices=("saturate", "paced", "idle"))
    parser.add_argument("--address", required=True, help="HOST:PORT of the router's gRPC")
    parser.add_argument("--router-pid", type=int, required=True, help="whose CPU time counts")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--streams", type=int, default=1000, help="open at once")
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument(
        "--lanes",
        action="store_true",
        help="one Streams call per connection, not a call per stream",
    )
    parser.add_argument("--segment-tokens", type=int, default=64)
    parser.add_argument("--text", help="segments are this text, in place of token ids")
    parser.add_argument("--segments-per-stream", type=int, default=31)
    parser.add_argument("--rate", type=float, default=2500.0, help="segments per second")
    parser.add_argument("--warm-s", type=float, default=3.0, help="before anything counts")
    parser.add_argument("--seconds", type=float, default=10.0, help="that count")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 10000], help="of idle")
    args = parser.parse_args(argv)
    try:
        result = _run(args)
    except StreamfillError as error:
        print(f"stream_load: {error}", file=sys.stderr)
        return 1
    print(f"RESULT {json.dumps(result)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
