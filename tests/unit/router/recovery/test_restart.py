"""A router process is killed and comes back: clients go on with their streams and notice nothing.

Real processes and sockets; the servers are fake, and their answer is a function of the prompt.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from streamfill.api import Client, Stream, SyncClient
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.errors import StreamNotFoundError, UnavailableError
from streamfill.messages.common import Role
from streamfill.observability.metrics import Metric
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from tests.support.metrics import scrape
from tests.unit.router.fake_server import FakeServer, expected_answer
from tests.unit.router.recovery.router_process import RouterProcess

PATIENCE_S = 60.0
NUM_STREAMS = 12
NUM_PIECES = 30
NUM_TOKENS = 60


@pytest.fixture
async def router(tmp_path: Path, tiny_model: Path) -> AsyncIterator[RouterProcess]:
    async with RouterProcess(tmp_path, tiny_model) as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> TextTokenizer:
    return load_tokenizer(tiny_model)


def pieces(seed: int) -> list[str]:
    """A text in pieces that are cut anywhere, also inside words."""
    generator = random.Random(seed)
    text = " ".join(
        generator.choice(("tree", "Straße", "日本", "42", "and\n", "x")) for _ in range(90)
    )
    cuts = sorted(generator.sample(range(1, len(text)), NUM_PIECES - 1))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


async def append_all(stream: Stream, seed: int, pause_s: float) -> None:
    for piece in pieces(seed):
        await stream.append(piece)
        await asyncio.sleep(pause_s)


async def read_all(stream: Stream, num_tokens: int = NUM_TOKENS) -> list[int]:
    """All tokens of the answer. The client itself refuses one that is missing or comes twice."""
    answer = stream.commit("!", max_tokens=num_tokens, temperature=0.0)
    return [token.token_id async for token in answer]


def expected(
    tokenizer: TextTokenizer, router: RouterProcess, text: str, num_tokens: int = NUM_TOKENS
) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=True)
    return expected_answer(ids, num_tokens, router.vocab_size)


async def let_out(server: FakeServer, tokens: int, pause_s: float) -> None:
    """A decode server that gives one token after the other."""
    for limit in range(server.output_limit, tokens + 1):
        server.output_limit = limit
        await asyncio.sleep(pause_s)


async def test_killed_while_clients_append_and_answers_stream(
    router: RouterProcess, tokenizer: TextTokenizer
) -> None:
    """Killed four times: each stream ends with the tokens of an undisturbed one, none missing,
    none twice; and the router counts what it found again."""
    _, decode = await router.pair()
    decode.output_limit = 1
    # What is not open yet when the router dies is not in its log.
    all_open = asyncio.Barrier(NUM_STREAMS + 1)

    async def one(client: Client, seed: int) -> tuple[list[int], int]:
        async with client.stream() as stream:
            await all_open.wait()
            await append_all(stream, seed, 0.03)
            return await read_all(stream), stream.num_resumptions

    async with Client(router.target) as client:
        runs = [asyncio.create_task(one(client, seed)) for seed in range(NUM_STREAMS)]
        await asyncio.wait_for(all_open.wait(), PATIENCE_S)
        # Without the last token no stream ends before the router has died for the last time.
        outputs = asyncio.create_task(let_out(decode, NUM_TOKENS - 1, 0.06))
        for _ in range(4):
            await asyncio.sleep(0.35)
            await router.restart()
        await outputs
        decode.output_limit = NUM_TOKENS
        done = await asyncio.wait_for(asyncio.gather(*runs), PATIENCE_S)
    for seed, (tokens, _) in enumerate(done):
        assert tokens == expected(tokenizer, router, "".join(pieces(seed)) + "!")
    assert sum(resumptions for _, resumptions in done) >= NUM_STREAMS
    page = await asyncio.to_thread(scrape, router.metrics_port)
    assert page.value(Metric.STREAMS_RESTORED) >= 1
    assert page.value(Metric.LOG_ON) == 1
    assert page.value(Metric.LOG_FAILURES) == 0


async def test_killed_between_commit_and_first_token(
    router: RouterProcess, tokenizer: TextTokenizer
) -> None:
    """The commit is not lost, nor carried out twice."""
    prefill, _ = await router.pair()
    prefill.output_limit = 0
    async with Client(router.target) as client, client.stream() as stream:
        await stream.append("Some text")
        reading = asyncio.create_task(read_all(stream))
        await asyncio.sleep(0.3)
        await router.restart()
        prefill.output_limit = 1_000_000
        tokens = await asyncio.wait_for(reading, PATIENCE_S)
        assert tokens == expected(tokenizer, router, "Some text!")
        assert stream.result.usage.num_output_tokens == NUM_TOKENS
        assert stream.num_resumptions == 1


async def test_updates_and_chats_go_on(router: RouterProcess, tokenizer: TextTokenizer) -> None:
    """The text state of both is as it was: what comes behind is tokenised as in one piece."""
    await router.pair()
    async with (
        Client(router.target) as client,
        client.stream(mode="update") as updated,
        client.stream(messages=[{"role": "user", "content": "I say "}]) as chat,
        client.stream(messages=[{"role": "user", "content": "I say "}]) as undisturbed,
    ):
        await updated.update("one two three")
        for each in (chat, undisturbed):
            await each.append("hel")
            await each.append("lo  ")
        await asyncio.wait_for(read_all(undisturbed), PATIENCE_S)
        await router.restart()
        await updated.update("one two four fi")
        tokens = await asyncio.wait_for(anext_all(updated, "one two four five"), PATIENCE_S)
        assert tokens == expected(tokenizer, router, "one two four five", 9)
        assert await asyncio.wait_for(read_all(chat), PATIENCE_S) == list(
            undisturbed.result.token_ids
        )


async def anext_all(stream: Stream, final: str) -> list[int]:
    answer = stream.commit(final, max_tokens=9, temperature=0.0)
    return [token.token_id async for token in answer]


async def test_refusals_keep_their_numbers(router: RouterProcess) -> None:
    """Operations behind a refused one are applied after a restart, not taken for a gap."""
    await router.pair()
    async with Client(router.target) as client, client.stream() as stream:
        await stream.append("a")
        with pytest.raises(Exception, match="outside the vocabulary"):
            await stream.append(token_ids=[10**6])
        await router.restart()
        progress = await asyncio.wait_for(stream.append(token_ids=[20]), PATIENCE_S)
        assert (progress.seq, progress.num_received_tokens) == (3, 2)


async def test_a_stream_that_ended_unheard_is_told_again(
    router: RouterProcess, tokenizer: TextTokenizer
) -> None:
    """A client that the end did not reach gets the rest of the answer, from the token it names."""
    await router.pair()
    async with grpc.aio.insecure_channel(router.target) as channel:
        stub = StreamfillStub(channel)
        opened = await stub.OpenStream(pb.OpenStreamRequest())
        assert opened.is_resumable
        request = pb.CommitStreamRequest(
            stream_id=opened.stream_id,
            seq=1,
            commit=pb.Commit(
                sampling=pb.Sampling(max_tokens=8, temperature=0.0),
                final_segment=pb.Segment(text="Hello"),
            ),
        )
        events = [event async for event in stub.CommitStream(request)]
        await router.restart()
        request.next_token_index = 5
        again = [event async for event in stub.CommitStream(request, wait_for_ready=True)]
        assert again == events[5:]
        tokens = [event.token.token_id for event in events[:-1]]
        assert tokens == expected(tokenizer, router, "Hello", 8)


async def test_unary_streams_survive(router: RouterProcess) -> None:
    """`GetStream` tells the newest number; a repeated one is not applied twice."""
    await router.pair()
    async with grpc.aio.insecure_channel(router.target) as channel:
        stub = StreamfillStub(channel)
        opened = await stub.OpenStream(pb.OpenStreamRequest(open=pb.Open(request_id="mine")))
        append = pb.AppendSegmentRequest(
            stream_id=opened.stream_id, seq=1, segment=pb.Segment(text="abc")
        )
        before = await stub.AppendSegment(append)
        await router.restart()
        get = pb.GetStreamRequest(stream_id=opened.stream_id)
        found = await stub.GetStream(get, wait_for_ready=True)
        assert (found.request_id, found.state) == ("mine", "OPEN")
        assert found.acknowledged.seq == 1
        again = await stub.AppendSegment(append)
        assert again.num_received_tokens == before.num_received_tokens


async def test_a_drain_holds_until_it_is_taken_back(router: RouterProcess) -> None:
    """Through restarts of the router, also of one before the server has come back; what it is given
    goes elsewhere. A server process that was started meanwhile has nothing to do with it."""
    await router.pair()
    other = await router.serve("prefill-1", Role.PREFILL, pool_tokens=100_000)
    async with Client(router.target) as client:

        async def until_states(first: str, second: str) -> None:
            wanted = {"prefill-0": first, "prefill-1": second}
            end_s = time.monotonic() + PATIENCE_S
            while True:
                servers = (await client.server_info()).servers
                states = {server.server_id: server.state for server in servers}
                if wanted.items() <= states.items():
                    return
                assert time.monotonic() < end_s, states
                await asyncio.sleep(0.05)

        await client.drain_server("prefill-0", move_answers_after_s=300.0)
        await router.restart()
        await client.wait_ready(PATIENCE_S)
        await until_states("draining", "alive")
        result = await client.complete("abc", max_tokens=2, temperature=0.0)
        assert result.metadata.prefill_server == other.server_id
        await client.resume_server("prefill-0")
        await client.drain_server("prefill-1")
        await router.restart()
        await client.wait_ready(PATIENCE_S)
        await until_states("alive", "draining")
        await router.kill()
        await other.stop()
        await router.start()
        await router.serve("prefill-1", Role.PREFILL, pool_tokens=100_000)
        await until_states("alive", "alive")


async def test_without_a_log_the_client_says_so(tmp_path: Path, tiny_model: Path) -> None:
    """A stream of a router that keeps none fails at once, and its id is not found later."""
    async with RouterProcess(tmp_path, tiny_model, log="memory") as router:
        await router.pair()
        async with Client(router.target) as client, client.stream() as stream:
            await stream.append("a")
            stream_id = stream.stream_id
            await router.kill()
            with pytest.raises(UnavailableError, match="had no log of the stream"):
                await asyncio.wait_for(stream.append("b"), PATIENCE_S)
            await router.start()
            call = client.stub.Stream(None)
            resume = pb.Resume(stream_id=stream_id)
            await call.write(pb.StreamRequest(resume=resume))
            event = await call.read()
            assert isinstance(event, pb.StreamEvent)
            assert event.failed.code == pb.CODE_NOT_FOUND


async def test_a_router_that_lost_its_log_is_not_found(router: RouterProcess) -> None:
    """Somebody removed the file: the client hears that its stream is gone."""
    await router.pair()
    async with Client(router.target) as client, client.stream() as stream:
        await stream.append("a")
        await router.kill()
        for file in router.log_file.parent.glob(f"{router.log_file.name}*"):
            file.unlink()
        await router.start()
        with pytest.raises(StreamNotFoundError, match=re.escape("router.log")):
            await asyncio.wait_for(stream.append("b"), PATIENCE_S)


async def test_a_client_looks_for_its_router_for_a_bounded_time(router: RouterProcess) -> None:
    """As long as it was told, also not at all; then the error says so."""
    await router.pair()
    async with (
        Client(router.target, reconnect_s=0.5) as patient,
        Client(router.target, reconnect_s=0) as hasty,
        patient.stream() as first,
        hasty.stream() as second,
    ):
        await router.kill()
        with pytest.raises(UnavailableError, match="not back within"):
            await asyncio.wait_for(first.append("a"), PATIENCE_S)
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(second.append("a"), 5.0)


async def test_a_client_without_asyncio_goes_on_too(
    router: RouterProcess, tokenizer: TextTokenizer
) -> None:
    """The same, in a thread."""
    await router.pair()
    appended, back = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> tuple[int, ...]:
        with SyncClient(router.target) as client, client.stream() as stream:
            stream.append("Hello ")
            loop.call_soon_threadsafe(appended.set)
            asyncio.run_coroutine_threadsafe(back.wait(), loop).result(PATIENCE_S)
            stream.append("world")
            return stream.commit(max_tokens=9, temperature=0.0).read().token_ids

    working = asyncio.create_task(asyncio.to_thread(work))
    await asyncio.wait_for(appended.wait(), PATIENCE_S)
    await router.restart()
    back.set()
    assert list(await working) == expected(tokenizer, router, "Hello world", 9)
