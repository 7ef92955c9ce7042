"""A prefill server that computes nothing: ``python -m streamfill.router_bench.fake_server``.

It speaks the wire protocol with the same `InboundGate` and batches as a real one, says of each
splice that it is computed, and answers each commit at once. It costs as little as that can cost, in
a thread without asyncio.

How long a segment was under way, from the write of the client that stamped it, comes back in
`Progress.num_invalidated_tokens`, in microseconds: a number that the router hands on to the client
and does nothing with.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Final

import zmq

from streamfill.launcher.ready_line import announce_ready
from streamfill.links.inbound_gate import InboundGate
from streamfill.messages import PROTOCOL_VERSION
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.batch import BatchDecoder, MessageBatch
from streamfill.messages.codec import encode, pack_ids, unpack_ids
from streamfill.messages.common import Finish, FinishReason, Role, ServerCounters
from streamfill.router_bench.segments import STAMP_TOKENS, age_us

HEARTBEAT_INTERVAL_S: Final = 0.2
MAX_FRAMES_PER_TURN: Final = 512
POOL_TOKENS: Final = 1 << 28
"""More than any load holds open: the router's admission is not what is measured."""
CONTEXT_TOKENS: Final = 1 << 20
FIRST_TEXT_ID: Final = 1000
LATE_US: Final = 60_000_000
"""A stamp that is older was none: the prompt of somebody else."""


class FakeServer:
    """One fake server. `run` until `stop`."""

    def __init__(
        self, endpoint: str, server_id: str, vocab_size: int, tokens_per_output: int
    ) -> None:
        self._register = s.Register(
            server_id=server_id,
            incarnation=random.getrandbits(60),
            role=Role.PREFILL,
            protocol_version=PROTOCOL_VERSION,
            pid=os.getpid(),
            model_id="fake",
            vocab_size=vocab_size,
            context_tokens=CONTEXT_TOKENS,
            pool_tokens=POOL_TOKENS,
            page_size=1,
            tp_size=1,
            kv_host="127.0.0.1",
            kv_control_ports=(1,),
            engine_version="fake",
        )
        self._vocab_size = vocab_size
        self._tokens_per_output = tokens_per_output
        self._gate = InboundGate()
        self._decoder: BatchDecoder[r.RouterToServer] = BatchDecoder(r.RouterToServer)
        self._batch = MessageBatch()
        self._num_tokens: dict[int, int] = {}
        self._router: int | None = None
        self._stopped = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 1_000_000
        self._socket.connect(endpoint)

    def stop(self) -> None:
        """From a signal handler."""
        self._stopped = True

    def run(self) -> None:
        """Serves."""
        next_beat_s = 0.0
        while not self._stopped:
            now_s = time.monotonic()
            if now_s >= next_beat_s:
                next_beat_s = now_s + HEARTBEAT_INTERVAL_S
                self._beat()
            self._socket.poll(max(1, int(1000 * (next_beat_s - now_s))))
            for _ in range(MAX_FRAMES_PER_TURN):
                try:
                    frame = self._socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                for message in self._decoder.decode(frame):
                    self._take(message)
            self._send_batch()
        self._socket.close()
        self._context.term()

    def _beat(self) -> None:
        if self._router is None:
            self._send(self._register)
            return
        counters = ServerCounters(num_streams=len(self._num_tokens))
        self._send(
            s.ServerHeartbeat(
                server_id=self._register.server_id,
                incarnation=self._register.incarnation,
                loop_age_s=0.0,
                controller_alive=True,
                counters=counters,
            )
        )

    def _take(self, message: r.RouterToServer) -> None:
        admission = self._gate.admit(message)
        if admission.reply is not None:
            self._send(admission.reply)
        if not admission.deliver:
            return
        match message:
            case r.Splice():
                self._splice(message)
            case r.Commit():
                self._answer(message)
            case r.OpenStream(stream_id=stream_id):
                self._num_tokens[stream_id] = 0
            case r.Cancel(stream_id=stream_id, attempt=attempt):
                self._num_tokens.pop(stream_id, None)
                self._send(s.Closed(stream_id=stream_id, attempt=attempt))
            case r.Forget(stream_id=stream_id):
                self._num_tokens.pop(stream_id, None)
            case r.Registered(router_incarnation=incarnation):
                self._router = incarnation
            case r.RegistrationRefused(reason=reason):
                raise SystemExit(f"the router refuses the fake server: {reason}")
            case _:
                pass

    def _splice(self, splice: r.Splice) -> None:
        num_tokens = splice.keep_tokens + len(splice.token_ids) // 4
        self._num_tokens[splice.stream_id] = num_tokens
        if splice.commit_follows:
            return
        stamp = unpack_ids(splice.token_ids[: 4 * STAMP_TOKENS])
        under_way_us = age_us(stamp) if len(stamp) == STAMP_TOKENS else LATE_US
        self._send(
            s.Progress(
                stream_id=splice.stream_id,
                attempt=splice.attempt,
                seq=splice.seq,
                num_known_tokens=num_tokens,
                num_computed_tokens=num_tokens,
                num_invalidated_tokens=under_way_us if under_way_us < LATE_US else 0,
            )
        )

    def _answer(self, commit: r.Commit) -> None:
        num_tokens = 1 if commit.handoff is not None else commit.sampling.max_new_tokens
        ids = [(FIRST_TEXT_ID + index) % self._vocab_size for index in range(num_tokens)]
        for begin in range(0, num_tokens, self._tokens_per_output):
            part = ids[begin : begin + self._tokens_per_output]
            is_last = begin + len(part) == num_tokens
            self._send(
                s.Output(
                    stream_id=commit.stream_id,
                    attempt=commit.attempt,
                    first_index=begin,
                    token_ids=pack_ids(part),
                    finish=Finish(reason=FinishReason.LENGTH) if is_last else None,
                )
            )

    def _send(self, message: s.ServerToRouter) -> None:
        encoded = encode(message)
        if not self._batch.has_room_for(encoded):
            self._send_batch()
        self._batch.add(encoded)

    def _send_batch(self) -> None:
        if len(self._batch):
            self._socket.send(self._batch.take(), zmq.NOBLOCK)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal."""
    parser = argparse.ArgumentParser(
        prog="python -m streamfill.router_bench.fake_server",
        description="A prefill server that computes nothing.",
    )
    parser.add_argument("--endpoint", required=True, help="of the router: tcp://HOST:PORT")
    parser.add_argument("--server-id", default="prefill-0")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument(
        "--tokens-per-output", type=int, default=1, metavar="N", help="of answers; default: 1"
    )
    args = parser.parse_args(argv)
    server = FakeServer(args.endpoint, args.server_id, args.vocab_size, args.tokens_per_output)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    announce_ready({"pid": os.getpid()})
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
