"""The synchronous client, used from a thread while the service runs in the test's loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from streamfill.api import SyncClient
from streamfill.errors import FailedPreconditionError, InvalidArgumentError
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve


async def in_thread(manager: FakeManager, program: Callable[[SyncClient], None]) -> None:
    """Run ``program`` as a program without a loop would, against ``manager``."""

    def run(target: str) -> None:
        with SyncClient(target) as client:
            program(client)

    async with serve(manager) as target:
        await asyncio.wait_for(asyncio.to_thread(run, target), STEP_S)


async def test_a_document_is_streamed_and_answered() -> None:
    """The same operations, results and errors as the asyncio client's."""
    manager = FakeManager()

    def program(client: SyncClient) -> None:
        assert client.wait_ready(STEP_S).model == "fake"
        assert client.server_info().vocab_size == 1000
        assert client.flush_caches() == {"prefill-0": True}
        with client.stream(mode="append") as stream:
            assert stream.append("abc").num_received_tokens == 3
            with pytest.raises(FailedPreconditionError):
                stream.update("abc")
            texts = [token.text for token in stream.commit("d", temperature=0.0)]
            assert texts == ["Hello", " ", "world"]
            assert stream.result.text == "Hello world!"
            assert stream.progress.num_received_tokens >= 3
            assert stream.stream_id in manager.streams
            assert stream.num_resumptions == 0

    await in_thread(manager, program)


async def test_whole_prompts() -> None:
    """Token by token and all at once; a refusal is raised."""

    def program(client: SyncClient) -> None:
        answer = client.generate("abc")
        assert next(answer).text == "Hello"
        assert answer.read().text == "Hello world!"
        assert list(client.generate("abc").texts()) == ["Hello", " ", "world", "!"]
        assert client.complete(token_ids=[1], max_tokens=4).token_ids == (0, 1, 2)
        with pytest.raises(InvalidArgumentError, match="top_p"):
            client.complete("abc", top_p=2.0)

    await in_thread(FakeManager(), program)


@pytest.mark.parametrize("how", ["stream", "generate", "cancel"])
async def test_what_is_left_half_done_is_cancelled(how: str) -> None:
    """A stream that is left, an answer that is forgotten, an explicit cancel."""
    manager = FakeManager(answer=lambda: iter("x" for _ in range(1_000_000)))

    def program(client: SyncClient) -> None:
        if how == "generate":
            for _ in client.generate("abc"):
                break
        else:
            with client.stream() as stream:
                stream.append("abc")
                if how == "cancel":
                    stream.cancel("why not")

    await in_thread(manager, program)
    (stream,) = manager.streams.values()
    await asyncio.wait_for(stream.ended.wait(), STEP_S)
    assert stream.cancelled_because == ("why not" if how == "cancel" else "the client went away")


async def test_the_thread_ends_with_the_last_client() -> None:
    """Clients share one thread; nothing is left behind."""

    def program(client: SyncClient) -> None:
        assert client.server_info().ready
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("streamfill-client") == 1

    await in_thread(FakeManager(), program)
    assert "streamfill-client" not in [thread.name for thread in threading.enumerate()]


def test_a_closed_client_says_so() -> None:
    """Instead of starting a thread that nobody stops."""
    client = SyncClient()
    with pytest.raises(FailedPreconditionError, match="inside `with`"):
        client.server_info()
