"""The controller behind its real socket, and the server's client to it."""

from __future__ import annotations

import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zmq

from streamfill.config import ControllerConfig
from streamfill.errors import ConfigError, TransportError
from streamfill.messages.codec import MAX_FRAME_BYTES, FrameDecoder, encode
from streamfill.messages.control import (
    ControllerHello,
    ControllerStatus,
    ControllerToServer,
    Plan,
    PlanEntry,
    PreemptionAction,
    Telemetry,
)
from streamfill.preemption.client import ControllerClient, fetch_status
from streamfill.preemption.controller import Controller
from streamfill.preemption.timeouts import CONTROLLER_ALIVE_S
from tests.unit.preemption.builders import report, stream

WAIT_S = 30.0
"""Far more than anything here takes; only a failure waits so long."""


@contextmanager
def running(port: int = 0, epoch: int | None = None) -> Iterator[Controller]:
    controller = Controller(ControllerConfig(host="127.0.0.1", zmq_port=port), epoch=epoch)
    thread = threading.Thread(target=controller.run)
    thread.start()
    try:
        yield controller
    finally:
        controller.stop()
        thread.join(WAIT_S)
        controller.close()
    assert not thread.is_alive()


@pytest.fixture
def controller() -> Iterator[Controller]:
    with running() as started:
        yield started


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def connected(port: int, clock: Callable[[], float] = time.monotonic) -> Iterator[ControllerClient]:
    client = ControllerClient(endpoint(port), "prefill-0", 7, clock=clock)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def fake_controller() -> Iterator[tuple[zmq.Socket[bytes], int]]:
    """A bound ROUTER that says whatever a test wants."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        yield router, router.bind_to_random_port("tcp://127.0.0.1")
    finally:
        router.close(linger=0)
        context.term()


@contextmanager
def dealer(port: int) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(endpoint(port))
    try:
        yield socket
    finally:
        socket.close(linger=0)
        context.term()


def endpoint(port: int) -> str:
    return f"tcp://127.0.0.1:{port}"


def wait_for_plan(client: ControllerClient) -> Plan:
    """Reports as a server does until a new plan comes."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        plan = client.poll()
        if plan is not None:
            return plan
        client.report(report(stream(1, idle_s=1), stream(2, idle_s=2)))
        client.socket.poll(50)
    pytest.fail("no plan came")


def ask(socket: zmq.Socket[bytes], *frames: bytes) -> ControllerToServer:
    socket.send_multipart(frames)
    assert socket.poll(int(WAIT_S * 1000))
    decoder: FrameDecoder[ControllerToServer] = FrameDecoder(ControllerToServer)
    return decoder.decode(socket.recv())


def plan_of(epoch: int, version: int, server_id: str = "prefill-0") -> Plan:
    victims = (PlanEntry(stream_id=1, action=PreemptionAction.RECOMPUTE, reason=""),)
    return Plan(server_id=server_id, epoch=epoch, version=version, victims=victims)


def test_report_brings_a_plan(controller: Controller) -> None:
    """A server that reports gets its victims ranked, and knows that the controller lives."""
    with connected(controller.port) as client:
        assert not client.alive
        plan = wait_for_plan(client)
        assert [entry.stream_id for entry in plan.victims] == [2, 1]
        assert client.alive


def test_hello_brings_the_status(controller: Controller) -> None:
    """Anybody may ask how the controller is."""
    status = fetch_status(endpoint(controller.port), WAIT_S)
    assert (status.num_servers, status.num_malformed_frames) == (0, 0)
    assert status.epoch > 1_700_000_000_000


@pytest.mark.parametrize(
    "frames",
    [
        (b"",),
        (b"garbage",),
        (encode(ControllerHello())[:-1],),
        (encode(plan_of(1, 1)),),
        (encode(ControllerHello()), b"a second frame"),
        (bytes(MAX_FRAME_BYTES + 1),),
    ],
    ids=["empty", "garbage", "truncated", "wrong direction", "two frames", "oversized"],
)
def test_malformed_frame_is_counted_and_answered(
    controller: Controller, frames: tuple[bytes, ...]
) -> None:
    """A frame that cannot be read is counted and answered, and the controller goes on."""
    with dealer(controller.port) as socket:
        answer = ask(socket, *frames)
        assert isinstance(answer, ControllerStatus)
        assert answer.num_malformed_frames == 1
        assert isinstance(ask(socket, encode(ControllerHello())), ControllerStatus)
    with connected(controller.port) as client:
        wait_for_plan(client)


def test_controller_survives_strangers(controller: Controller) -> None:
    """Bytes that are not even ZeroMQ, or a frame far too large, end only their own connection."""
    with sockets.create_connection(("127.0.0.1", controller.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    with dealer(controller.port) as socket:
        socket.send(bytes(2 * MAX_FRAME_BYTES + 1))
    assert fetch_status(endpoint(controller.port), WAIT_S).num_malformed_frames == 0


def test_port_in_use_is_a_config_error(controller: Controller) -> None:
    """A port that is taken stops the start with key, value and remedy."""
    with pytest.raises(ConfigError, match="another port") as caught:
        Controller(ControllerConfig(host="127.0.0.1", zmq_port=controller.port))
    assert (caught.value.key, caught.value.value) == ("controller.zmq_port", controller.port)


def test_foreign_host_is_a_config_error() -> None:
    """An address of another machine stops the start, naming the host."""
    with pytest.raises(ConfigError) as caught:
        Controller(ControllerConfig(host="192.0.2.1", zmq_port=0))
    assert caught.value.key == "controller.host"


def test_restarted_controller_is_found_again() -> None:
    """The same client goes on with the plans of a controller that took the place of a dead one."""
    with running() as first:
        port, client = first.port, ControllerClient(endpoint(first.port), "prefill-0", 7)
        old = wait_for_plan(client)
    with running(port) as second:
        new = wait_for_plan(client)
        assert new.epoch == second.status.epoch > old.epoch
    client.close()


def test_dead_controller_never_blocks_a_server() -> None:
    """Reports to nobody make way for newer ones; the newest arrives once somebody is there."""
    with fake_controller() as (_, port):
        pass
    with connected(port) as client:
        for _ in range(1000):
            client.report(report(stream(1)))
        assert client.poll() is None
        assert not client.alive
        assert client.num_dropped_reports == 999
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router = context.socket(zmq.ROUTER)
        router.bind(endpoint(port))
        deadline_s = time.monotonic() + WAIT_S
        while not router.poll(20) and time.monotonic() < deadline_s:
            client.poll()
        decoder: FrameDecoder[Telemetry] = FrameDecoder(Telemetry)
        newest = decoder.decode(router.recv_multipart()[1])
        assert (newest.report, newest.server_id, newest.incarnation) == (1000, "prefill-0", 7)
        router.close(linger=0)
        context.term()


class Teller:
    """Says what a test wants said, as the controller of a client that has just reported."""

    def __init__(self, router: zmq.Socket[bytes], client: ControllerClient) -> None:
        self._router, self._client = router, client
        client.report(report(stream(1)))
        while not router.poll(20):
            client.poll()
        self._sender, _ = router.recv_multipart()

    def say(self, *plans: Plan) -> Plan | None:
        """What the client makes of them: the newest that it takes."""
        client = self._client
        for plan in plans:
            self._router.send_multipart((self._sender, encode(plan)))
        deadline_s = time.monotonic() + WAIT_S
        newest: Plan | None = None
        num_heard = client.num_malformed_frames
        self._router.send_multipart((self._sender, b"end of what a test says"))
        while client.num_malformed_frames == num_heard and time.monotonic() < deadline_s:
            client.socket.poll(100)
            newest = client.poll() or newest
        return newest


def test_only_newer_plans_are_taken() -> None:
    """Plans of an older epoch or version, or for another server, are refused and counted."""
    with fake_controller() as (router, port), connected(port) as client:
        teller = Teller(router, client)
        newest = plan_of(3, 2)
        assert teller.say(plan_of(3, 1), newest) == newest
        assert teller.say(newest) is None
        assert client.num_refused_plans == 0
        assert teller.say(plan_of(3, 1), plan_of(2, 9)) is None
        assert teller.say(plan_of(9, 9, server_id="prefill-1")) is None
        assert client.num_refused_plans == 3
        assert teller.say(plan_of(4, 1)) == plan_of(4, 1)


def test_a_controller_that_starts_after_the_clock_was_set_back_is_followed() -> None:
    """Its epoch is older than the dead one's; once that one is silent, its plans are taken."""
    clock = FakeClock()
    with fake_controller() as (router, port), connected(port, clock) as client:
        teller = Teller(router, client)
        assert teller.say(plan_of(9_000, 5)) == plan_of(9_000, 5)
        assert teller.say(plan_of(2_000, 1)) is None
        clock.now_s += CONTROLLER_ALIVE_S + 0.01
        assert teller.say(plan_of(9_000, 4)) is None
        assert teller.say(plan_of(2_000, 2)) == plan_of(2_000, 2)
        assert client.alive
        assert teller.say(plan_of(2_000, 1)) is None
        assert teller.say(plan_of(9_001, 1)) == plan_of(9_001, 1)


def test_alive_lasts_for_its_time_only() -> None:
    """The controller counts as alive for CONTROLLER_ALIVE_S after its last plan, not longer."""
    clock = FakeClock()
    with running() as controller, connected(controller.port, clock) as client:
        wait_for_plan(client)
        clock.now_s += CONTROLLER_ALIVE_S - 0.01
        assert client.alive
        clock.now_s += 0.02
        assert not client.alive


def test_fetch_status_of_nobody_fails() -> None:
    """Asking where nobody listens ends with a TransportError, not with a wait."""
    with fake_controller() as (_, port):
        pass
    with pytest.raises(TransportError, match="no preemption controller"):
        fetch_status(endpoint(port), 0.05)


def test_bad_endpoint_is_refused() -> None:
    """An endpoint that is no ZeroMQ address is named in the error."""
    with pytest.raises(TransportError, match="nonsense"):
        ControllerClient("nonsense", "prefill-0", 1)
