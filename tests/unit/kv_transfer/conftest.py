"""Endpoints that are closed, and found to leave no thread behind, at the end of each test."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import pytest
import torch

from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.sender import KvSender
from tests.unit.kv_transfer.builders import CALM, HOST, LAYOUT, PATIENCE_S


class MakeReceiver(Protocol):
    def __call__(self, server_id: str = ..., **options: Any) -> KvReceiver: ...


class MakeSender(Protocol):
    def __call__(self, server_id: str = ..., **options: Any) -> KvSender: ...


def _threads() -> set[str]:
    """Of the operating system, since most of the transport's are not Python's."""
    return set(os.listdir("/proc/self/task"))


@pytest.fixture
def endpoints() -> Iterator[ExitStack]:
    # Or torch starts helpers for the first large copy of each of our threads.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = _threads()
    with ExitStack() as stack:
        yield stack
    deadline_s = time.monotonic() + PATIENCE_S
    while (left := _threads() - before) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    torch.set_num_threads(num_threads)
    assert not left, f"{len(left)} threads outlived their endpoints"


@pytest.fixture(params=[True, False], ids=["shared memory", "gloo"])
def same_host(request: pytest.FixtureRequest) -> bool:
    """Whether receivers share memory. Every test of endpoints is run with both."""
    wanted: bool = request.param
    return wanted


@pytest.fixture
def make_receiver(endpoints: ExitStack, *, same_host: bool) -> MakeReceiver:
    def make(server_id: str = "d0", **options: Any) -> KvReceiver:
        settings: dict[str, Any] = {
            "layout": LAYOUT,
            "bind_host": HOST,
            "memory_limit_bytes": 1 << 24,
            "timeouts": CALM,
            "same_host": same_host,
        }
        receiver = KvReceiver(server_id, **(settings | options))
        endpoints.callback(receiver.close)
        return receiver

    return make


@pytest.fixture
def make_sender(endpoints: ExitStack) -> MakeSender:
    def make(server_id: str = "p0", **options: Any) -> KvSender:
        settings: dict[str, Any] = {"layout": LAYOUT, "timeouts": CALM}
        sender = KvSender(server_id, **(settings | options))
        endpoints.callback(sender.close)
        return sender

    return make
