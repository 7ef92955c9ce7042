"""Frames that are no messages, on every ZeroMQ socket of a running cluster: they are counted,
logged and answered, the process lives, and the streams of others go on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from streamfill.api import Client, Server
from streamfill.config import ControllerConfig, RouterConfig, load_process_file
from streamfill.messages import control, handoff
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import FrameDecoder, encode, pack_ids, unpack_ids
from streamfill.messages.common import HandoffTarget, Sampling, StreamMode
from streamfill.preemption.client import fetch_status
from tests.support.cluster import RunningCluster
from tests.support.garbage import (
    HOST,
    Stranger,
    bad_messages,
    beyond_what_zeromq_takes,
    speaks_zeromq,
    talk_another_protocol,
)
from tests.support.lone_server import LoneServer
from tests.support.processes import listening_ports, pid_of
from tests.support.waiting import until
from tests.unit.kv_transfer.builders import RawReceiver

pytestmark = pytest.mark.integration

COUNTED_S = 30.0
"""Counters come with heartbeats, four in a second."""
FLOOD = 3_000
NUM_TOKENS = 600
"""An answer of a second and a half, in whose middle the garbage comes."""
PROMPT = "Somebody is shouting next door, and we go on reading. " * 6

RECEIVED = s.Received(stream_id=1, attempt=1, seq=1)
CANCEL = r.Cancel(stream_id=1, attempt=1)
TELEMETRY = control.Telemetry(
    server_id="stranger",
    incarnation=1,
    report=1,
    num_free_tokens=0,
    num_cached_tokens=0,
    num_total_tokens=0,
    streams=(),
)
PLAN = control.Plan(server_id="lone", epoch=1, version=1, victims=())
PING = handoff.Ping(epoch=1)
PONG = handoff.Pong(epoch=1)


async def while_a_stream_is_answered(cluster: RunningCluster, shout: Callable[[], None]) -> None:
    """Call ``shout`` in a thread in the middle of an answer, which must be the usual one; nobody
    may have died of it."""
    pids = {record.name: record.pid for record in cluster.state.processes}
    async with Client(cluster.address) as client:
        usual = await client.complete(
            PROMPT, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
        )
        async with client.stream() as stream:
            await stream.append(PROMPT)
            answer = stream.commit(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
            token_ids = [(await anext(answer)).token_id]
            shouting = asyncio.create_task(asyncio.to_thread(shout))
            token_ids += [token.token_id async for token in answer]
            await shouting
        assert tuple(token_ids) == usual.token_ids
        after = await client.complete("And now?", max_tokens=3, temperature=0.0)
        assert after.metadata.num_attempts == 1
    assert pids == {record.name: record.pid for record in cluster.state.processes}
    assert all(record.num_restarts == 0 for record in cluster.state.processes)


def answers_to_all_garbage(
    port: int, valid: msgspec.Struct, foreign: msgspec.Struct, answer_of: object
) -> int:
    """Send everything bad to a port; returns how many messages must be counted at least. Each is to
    be answered with a message of the type ``answer_of``."""
    decoder: FrameDecoder[object] = FrameDecoder(answer_of)
    messages = bad_messages(valid, foreign)
    talk_another_protocol(port)
    with Stranger(port) as stranger:
        for frames in messages.values():
            decoder.decode(stranger.ask(frames))
        stranger.send([beyond_what_zeromq_takes()])
    with Stranger(port) as flooding:
        flooding.flood([b"\xc1"], FLOOD)
    return len(messages) + FLOOD


async def test_router_port(cluster: RunningCluster) -> None:
    """Each bad frame at the router's port is answered with ``Malformed`` and counted."""
    config = load_process_file(RouterConfig, config_of(cluster, "router"))
    async with Client(cluster.address) as client:
        before = (await client.server_info()).num_malformed_frames
        sent: list[int] = []
        await while_a_stream_is_answered(
            cluster,
            lambda: sent.append(
                answers_to_all_garbage(config.zmq_port, RECEIVED, CANCEL, r.Malformed)
            ),
        )
        await counted("the router's", before + sent[0], lambda: router_count(client))
    assert "malformed_frame" in log_of(cluster, "router")


async def test_controller_port(cluster: RunningCluster) -> None:
    """Each bad frame at the controller's port is answered with its status, which counts it."""
    config = load_process_file(ControllerConfig, config_of(cluster, "controller"))
    endpoint = f"tcp://{HOST}:{config.zmq_port}"
    before = fetch_status(endpoint, COUNTED_S).num_malformed_frames
    sent: list[int] = []
    await while_a_stream_is_answered(
        cluster,
        lambda: sent.append(
            answers_to_all_garbage(config.zmq_port, TELEMETRY, RECEIVED, control.ControllerStatus)
        ),
    )
    await counted("the controller's", before + sent[0], lambda: controller_count(endpoint))
    assert "malformed_frame" in log_of(cluster, "controller")
    async with Client(cluster.address) as client:
        assert (await server(client, "prefill-0")).controller_alive


async def test_decode_servers_kv_port(cluster: RunningCluster) -> None:
    """Each bad frame at the port for KV is answered with ``Reject`` and counted by the server."""
    ports = [port for port in listening_ports(pid_of(cluster, "decode-0")) if speaks_zeromq(port)]
    assert len(ports) == 1, "one ZeroMQ port is expected, that of the KV transport"
    async with Client(cluster.address) as client:
        before = await server_count(client, "decode-0")
        sent: list[int] = []
        await while_a_stream_is_answered(
            cluster,
            lambda: sent.append(answers_to_all_garbage(ports[0], PING, CANCEL, handoff.Reject)),
        )
        await counted(
            "the decode server's", before + sent[0], lambda: server_count(client, "decode-0")
        )
        whole = await client.complete(PROMPT + "Again.", max_tokens=3, temperature=0.0)
    assert whole.metadata.handoff == "done"
    assert "malformed frame" in log_of(cluster, "decode-0")


async def test_no_other_zeromq_port(cluster: RunningCluster) -> None:
    """There is no further one that this file would have forgotten."""
    assert not [p for p in listening_ports(pid_of(cluster, "prefill-0")) if speaks_zeromq(p)]
    router = load_process_file(RouterConfig, config_of(cluster, "router"))
    controller = load_process_file(ControllerConfig, config_of(cluster, "controller"))
    for name, zmq_port in (("router", router.zmq_port), ("controller", controller.zmq_port)):
        ports = listening_ports(pid_of(cluster, name))
        assert [port for port in ports if speaks_zeromq(port)] == [zmq_port]


# Garbage that comes *to* a server, from those that it has connected to.


@pytest.fixture(scope="module")
def controller() -> Iterator[zmq.Socket[bytes]]:
    """The controller of the lone server."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(f"tcp://{HOST}:*")
    yield socket
    context.destroy(linger=0)


@pytest.fixture(scope="module")
def lone(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, controller: zmq.Socket[bytes]
) -> Iterator[LoneServer]:
    """A prefill server whose router, controller and decode servers are tests."""
    endpoint = controller.getsockopt_string(zmq.LAST_ENDPOINT)
    with LoneServer(tmp_path_factory.mktemp("lone"), tiny_model, endpoint) as server:
        yield server


def generate(stream_id: int, prompt: list[int], num_tokens: int) -> r.Generate:
    """A whole answer, asked of one server."""
    return r.Generate(
        stream_id=stream_id,
        attempt=1,
        prompt_ids=pack_ids(prompt),
        output_ids=b"",
        sampling=Sampling(temperature=0.0, max_new_tokens=num_tokens, ignore_eos=True),
        transfer_id=None,
    )


def finish_answer(lone: LoneServer, stream_id: int) -> list[int]:
    """The tokens of an answer that comes in order, to its end."""
    token_ids: list[int] = []
    outputs: list[s.Output] = []

    def is_finished() -> bool:
        outputs.extend(lone.take(s.Output, stream_id))
        return bool(outputs) and outputs[-1].finish is not None

    lone.wait_for("the end of the answer", is_finished)
    for output in outputs:
        assert output.first_index == len(token_ids)
        token_ids.extend(unpack_ids(output.token_ids))
    return token_ids


def test_garbage_from_the_router(lone: LoneServer) -> None:
    """A server tells its router of each frame that it could not read, counts it, and goes on with
    its answer."""
    prompt, before = list(range(20, 80)), lone.num_malformed_frames
    lone.send(generate(1, prompt, NUM_TOKENS))
    usual = finish_answer(lone, 1)
    lone.send(generate(2, prompt, NUM_TOKENS))
    messages = bad_messages(CANCEL, RECEIVED)
    for what, frames in messages.items():
        lone.send_frames(frames)
        complaints = lone.wait_for(f"a word about {what}", lambda: lone.take(s.MalformedByRouter))
        assert len(complaints) == 1, what
    assert finish_answer(lone, 2) == usual
    assert len(usual) == NUM_TOKENS
    lone.wait_for("counted", lambda: lone.num_malformed_frames == before + len(messages))
    assert "malformed_frame" in lone.log()


def test_nonsense_from_the_router(lone: LoneServer) -> None:
    """Messages that can be read but make no sense end their own stream and no other."""
    lone.send(generate(3, [20, 21, 22], 300))
    lone.send(r.OpenStream(stream_id=4, attempt=1, mode=StreamMode.APPEND))
    torn = r.Splice(stream_id=4, attempt=1, seq=1, keep_tokens=0, token_ids=b"abc")
    lone.send(torn)
    lone.wait_for("stream 4 is refused", lambda: lone.take(s.StreamFailed, 4))
    lone.send(generate(5, [20, 10_000_000], 3))
    lone.wait_for("stream 5 is refused", lambda: lone.take(s.StreamFailed, 5))
    lone.send(generate(6, [], 3))
    lone.wait_for("stream 6 is refused", lambda: lone.take(s.StreamFailed, 6))
    lone.send(r.OpenStream(stream_id=7, attempt=1, mode=StreamMode.UPDATE))
    beyond = r.Splice(stream_id=7, attempt=1, seq=1, keep_tokens=9, token_ids=pack_ids([20]))
    lone.send(beyond)
    lone.wait_for("stream 7 is refused", lambda: lone.take(s.StreamFailed, 7))
    lone.send(r.Splice(stream_id=8, attempt=1, seq=3, keep_tokens=0, token_ids=pack_ids([20])))
    lone.wait_for("stream 8 is asked for", lambda: lone.take(s.ResyncRequest, 8))
    lone.send(r.ResendOutput(stream_id=9, attempt=1, from_index=-5))
    lone.send(r.ResendOutput(stream_id=3, attempt=1, from_index=10**9))
    lone.send(r.HandoffFailed(stream_id=9, attempt=1, transfer_id=1))
    assert len(finish_answer(lone, 3)) == 300


def test_garbage_from_the_controller(lone: LoneServer, controller: zmq.Socket[bytes]) -> None:
    """A server counts what it cannot read of its controller, and hears its next plan."""
    before = lone.num_malformed_frames
    lone.wait_for("telemetry", lambda: controller.poll(0))
    route, frame = controller.recv_multipart()
    assert isinstance(
        msgspec.msgpack.decode(frame, type=control.ServerToController), control.Telemetry
    )
    messages = bad_messages(PLAN, TELEMETRY)
    for frames in messages.values():
        controller.send_multipart([route, *frames])
    lone.wait_for("counted", lambda: lone.num_malformed_frames == before + len(messages))
    assert lone.heartbeat is not None
    assert not lone.heartbeat.controller_alive
    controller.send_multipart([route, encode(PLAN)])
    lone.wait_for("the plan", lambda: lone.heartbeat and lone.heartbeat.controller_alive)
    lone.send(generate(10, [20, 21, 22], 5))
    assert len(finish_answer(lone, 10)) == 5


def test_garbage_from_a_decode_server(lone: LoneServer) -> None:
    """A prefill server counts what it cannot read of a decode server, and reports a hand-off that
    failed."""
    before = lone.num_malformed_frames
    messages = bad_messages(PONG, PING)
    with RawReceiver() as receiver:
        prompt = list(range(100, 140))
        target = HandoffTarget(
            transfer_id=1, server_id="d0", host=HOST, control_ports=(receiver.port,)
        )
        lone.send(r.OpenStream(stream_id=11, attempt=1, mode=StreamMode.APPEND))
        lone.send(
            r.Splice(stream_id=11, attempt=1, seq=1, keep_tokens=0, token_ids=pack_ids(prompt))
        )
        lone.send(
            r.Commit(
                stream_id=11,
                attempt=1,
                seq=2,
                num_prompt_tokens=len(prompt),
                sampling=Sampling(temperature=0.0, max_new_tokens=9),
                handoff=target,
            )
        )
        receiver.welcome()
        offer = receiver.receive()
        assert isinstance(offer, handoff.Offer)
        for frames in messages.values():
            receiver.send_frames(*frames)
        receiver.send(handoff.Refuse(transfer_id=1, epoch=1, reason="enough of this"))
        (report,) = lone.wait_for("the report", lambda: lone.take(s.HandoffReport, 11))
    assert (report.ok, report.reason) == (False, "enough of this")
    lone.wait_for("counted", lambda: lone.num_malformed_frames == before + len(messages))
    lone.send(generate(12, prompt, 5))
    assert len(finish_answer(lone, 12)) == 5


# Asking the cluster.


def config_of(cluster: RunningCluster, name: str) -> Path:
    """The file that a process was configured with."""
    return Path(cluster.state.run_dir) / "config" / f"{name}.json"


def log_of(cluster: RunningCluster, name: str) -> str:
    """All that a process has logged."""
    return Path(cluster.process(name).log_file).read_text(encoding="utf-8", errors="replace")


async def server(client: Client, server_id: str) -> Server:
    """One server, as the router sees it."""
    info = await client.server_info()
    return next(server for server in info.servers if server.server_id == server_id)


async def router_count(client: Client) -> int:
    """Malformed frames that the router counted."""
    return (await client.server_info()).num_malformed_frames


async def controller_count(endpoint: str) -> int:
    """Malformed frames that the controller counted."""
    return (await asyncio.to_thread(fetch_status, endpoint, COUNTED_S)).num_malformed_frames


async def server_count(client: Client, server_id: str) -> int:
    """Malformed frames that a server counted."""
    return (await server(client, server_id)).counters["num_malformed_frames"]


async def counted(whose: str, least: int, ask: Callable[[], Awaitable[int]]) -> None:
    """Wait until a counter has come so far. It may go further: some of what is no ZeroMQ at all
    passes for frames of ZeroMQ's first version."""

    async def is_there() -> bool:
        return await ask() >= least

    await until(f"{whose} count is {least}", is_there, COUNTED_S)
