"""A router core with fake servers around it, for the tests of the core."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router import timing
from router.interface import (
    CommitOptions,
    DoneEvent,
    OpenOptions,
    Segment,
    StreamHandle,
    TokenEvent,
)
from router.manager import Manager
from streamfill.config import RouterConfig
from streamfill.messages.common import Role, Sampling, StreamMode
from streamfill.models.describe import describe_model
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from tests.unit.router.fake_server import FakeServer

PATIENCE_S = 60.0
"""Nothing in these tests takes so long; what does has failed."""


class TestCluster:
    """A started `Manager`; fake servers are added by `serve`."""

    __test__ = False

    def __init__(self, model: Path, **config: Any) -> None:
        self.model = model
        self.vocab_size = describe_model(model).vocab_size
        self.tokenizer: TextTokenizer = load_tokenizer(model)
        values = {"host": "127.0.0.1", "grpc_port": 0, "zmq_port": 0, **config}
        self.manager = Manager(RouterConfig(model_path=str(model), **values))
        self.servers: list[FakeServer] = []

    async def __aenter__(self) -> TestCluster:
        await self.manager.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for server in self.servers:
            await server.stop()
        await self.manager.close()

    async def serve(self, server_id: str, role: Role, **facts: Any) -> FakeServer:
        """Start a fake server and wait until it was answered."""
        port = self.manager.zmq_port
        server = FakeServer(port, server_id, role, self.vocab_size, **facts)
        self.servers.append(server)
        return await server.start()

    async def serve_unregistered(self) -> FakeServer:
        """A connection that never says who it is."""
        stranger = FakeServer(self.manager.zmq_port, "stranger", Role.PREFILL, self.vocab_size)
        self.servers.append(stranger)
        return stranger

    async def prefill(self, number: int = 0, **facts: Any) -> FakeServer:
        return await self.serve(f"prefill-{number}", Role.PREFILL, **facts)

    async def decode(self, number: int = 0, **facts: Any) -> FakeServer:
        return await self.serve(f"decode-{number}", Role.DECODE, **facts)

    async def kill(self, server: FakeServer) -> None:
        """As `kill -9`: the connection is gone, nothing is said."""
        self.servers.remove(server)
        await server.stop()

    async def open(self, mode: StreamMode = StreamMode.APPEND, **options: Any) -> StreamHandle:
        return await self.manager.open(OpenOptions(mode=mode, **options))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=True)

    def outcomes(self) -> dict[str, int]:
        return dict(self.manager.info().num_streams_by_outcome)

    def state_of(self, server: FakeServer) -> str:
        states = {each.server_id: each.state for each in self.manager.info().servers}
        return states[server.server_id]

    def assert_no_load(self) -> None:
        """Everything that was counted was taken off again."""
        for server in self.manager._cluster.registry:
            assert (server.num_streams, server.pending_tokens, server.held_tokens) == (0, 0, 0)


def commit_of(max_new_tokens: int, **options: Any) -> CommitOptions:
    """A commit with a length."""
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    return CommitOptions(sampling=sampling, **options)


async def answer_of(handle: StreamHandle) -> tuple[list[TokenEvent], DoneEvent]:
    """All tokens and the end, checked to be numbered without gap or repetition."""
    tokens: list[TokenEvent] = []

    async def read() -> DoneEvent:
        async for event in handle.events():
            if isinstance(event, TokenEvent):
                assert event.index == len(tokens)
                tokens.append(event)
            elif isinstance(event, DoneEvent):
                return event
        raise AssertionError("the events ended without a DoneEvent")

    return tokens, await asyncio.wait_for(read(), PATIENCE_S)


async def until(condition: Callable[[], object]) -> None:
    """Wait for something to become true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        await asyncio.sleep(0.005)


def fast_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions and retries after a twentieth of the usual time, heartbeats as always."""
    for name in (
        "RETRANSMIT_AFTER_S",
        "RETRANSMIT_AT_MOST_EVERY_S",
        "PROBE_AFTER_S",
        "GAP_REPEAT_S",
        "RETRY_PAUSE_S",
    ):
        monkeypatch.setattr(timing, name, getattr(timing, name) / 20)
    monkeypatch.setattr(timing, "HOUSEKEEPING_INTERVAL_S", 0.01)
    monkeypatch.setattr(timing, "UNREACHABLE_DEAD_AFTER_S", 0.3)


def text(value: str) -> Segment:
    return Segment(text=value)


def ids(*values: int) -> Segment:
    return Segment(token_ids=values)
