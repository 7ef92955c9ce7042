"""The server's link, with a real socket at its other end."""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamfill.links import server_link
from streamfill.links.faults import VARIABLE as LINK_FAULTS
from streamfill.links.server_link import Inbound, RouterLost, ServerLink
from streamfill.messages import PROTOCOL_VERSION
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.batch import BatchDecoder
from streamfill.messages.codec import MAX_FRAME_BYTES, encode
from streamfill.messages.common import Role, ServerCounters, StreamMode
from tests.support.shifted_time import shifted_time

PATIENCE_S = 20.0
REGISTER = s.Register(
    server_id="p0",
    incarnation=11,
    role=Role.PREFILL,
    protocol_version=PROTOCOL_VERSION,
    pid=1,
    model_id="m",
    vocab_size=10,
    context_tokens=100,
    pool_tokens=100,
    page_size=1,
    tp_size=1,
    kv_host="127.0.0.1",
    kv_control_ports=(),
    engine_version="fake",
)

M = TypeVar("M")


class Router:
    """The other end."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._decoder: BatchDecoder[s.ServerToRouter] = BatchDecoder(s.ServerToRouter)
        self._unheard: deque[s.ServerToRouter] = deque()
        self.num_by_frame: list[int] = []
        """How many messages each frame had."""
        self.identity = b""
        """Of the connection that spoke last."""

    def hear(self, kind: type[M]) -> M:
        """The next message of this kind; others are passed over."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            while self._unheard:
                message = self._unheard.popleft()
                if isinstance(message, kind):
                    return message
            if not self._socket.poll(max(0, round((deadline_s - time.monotonic()) * 1000))):
                raise AssertionError(f"no {kind.__name__} came")
            self.identity, frame = self._socket.recv_multipart()
            messages = self._decoder.decode(frame)
            self.num_by_frame.append(len(messages))
            self._unheard.extend(messages)

    def say(self, *messages: r.RouterToServer) -> None:
        for message in messages:
            self.say_frames(encode(message))

    def say_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart([self.identity, *frames])

    def register(self, incarnation: int = 1) -> s.Register:
        """Answer the server's registration."""
        register = self.hear(s.Register)
        self.say(r.Registered(router_incarnation=incarnation, heartbeat_interval_s=0.1))
        return register

    def register_anew(self, old: bytes) -> None:
        """Answer the connection that takes the place of an old one, whose own registrations may
        still lie here: it repeats them until they are answered."""
        while self.identity == old:
            self.hear(s.Register)
        self.say(r.Registered(router_incarnation=1, heartbeat_interval_s=0.1))

    def until_closed(self, identity: bytes) -> None:
        """Returns when there is no such connection any more."""
        self._socket.router_mandatory = True
        deadline_s = time.monotonic() + PATIENCE_S
        with contextlib.suppress(zmq.ZMQError):  # EHOSTUNREACH
            while time.monotonic() < deadline_s:
                beat = encode(r.RouterHeartbeat(router_incarnation=1))
                self._socket.send_multipart([identity, beat])
                time.sleep(0.005)
            pytest.fail("the connection is still there")
        self._socket.router_mandatory = False

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router()
    yield router
    router.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_link, "HEARTBEAT_INTERVAL_S", 0.02)
    monkeypatch.setattr(server_link, "REGISTER_RETRY_S", 0.05)


@pytest.fixture
def ends() -> list[str]:
    """Reasons why the link said that it ended."""
    return []


@pytest.fixture
def link(router: Router, ends: list[str]) -> Iterator[ServerLink]:
    link = ServerLink(router.endpoint, REGISTER, ends.append)
    link.start()
    yield link
    link.close()


def _drain(link: ServerLink, num_wanted: int) -> list[Inbound]:
    """The next so many messages, as the scheduler's loop gets them."""
    messages: list[Inbound] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while len(messages) < num_wanted:
        ready, _, _ = select.select([link.fileno()], [], [], deadline_s - time.monotonic())
        assert ready, f"only {messages} came"
        messages += link.drain()
    return messages


def _until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.005)


def _has_heard_since(link: ServerLink, at_s: float) -> bool:
    return link._router_heard > at_s


def _open(stream_id: int = 7, attempt: int = 1) -> r.OpenStream:
    return r.OpenStream(stream_id=stream_id, attempt=attempt, mode=StreamMode.APPEND)


def _splice(seq: int, stream_id: int = 7, attempt: int = 1) -> r.Splice:
    return r.Splice(
        stream_id=stream_id, attempt=attempt, seq=seq, keep_tokens=0, token_ids=b"\1\0\0\0"
    )


def test_it_registers_until_it_is_answered(router: Router, link: ServerLink) -> None:
    """And tells who it is; then come heartbeats."""
    assert router.hear(s.Register) == REGISTER
    assert not link.registered
    router.register()
    _until(lambda: link.registered)
    beat = router.hear(s.ServerHeartbeat)
    assert (beat.server_id, beat.incarnation) == ("p0", 11)


def test_heartbeats_carry_what_the_loop_said_last(router: Router, link: ServerLink) -> None:
    """And how long ago, so that a stuck loop is seen although its link is alive."""
    router.register()
    link.tick(ServerCounters(num_streams=5), controller_alive=True)
    _until(lambda: router.hear(s.ServerHeartbeat).counters.num_streams == 5)
    beat = router.hear(s.ServerHeartbeat)
    assert beat.controller_alive
    assert router.hear(s.ServerHeartbeat).loop_age_s > beat.loop_age_s


def test_a_loop_that_sleeps_over_a_change_is_woken(router: Router, link: ServerLink) -> None:
    """At the next heartbeat, again and again, until it says its counters."""
    router.register()
    _until(lambda: link.registered)
    for _ in range(2):
        link.note_change()
        assert select.select([link.fileno()], [], [], PATIENCE_S)[0]
        assert link.drain() == []
    link.tick(ServerCounters(num_streams=3), controller_alive=True)
    _until(lambda: router.hear(s.ServerHeartbeat).counters.num_streams == 3)
    link.drain()  # it may have been woken once more just before it said them
    assert select.select([link.fileno()], [], [], 0.1)[0] == []


def test_operations_are_acknowledged_and_come_in_order(router: Router, link: ServerLink) -> None:
    """Without the scheduler's loop having looked at them."""
    router.register()
    router.say(_open(), _splice(1), _splice(2))
    assert [router.hear(s.Received).seq for _ in range(3)] == [0, 1, 2]
    assert _drain(link, 3) == [_open(), _splice(1), _splice(2)]
    assert link.drain() == []
    assert select.select([link.fileno()], [], [], 0)[0] == []


def test_what_waits_leaves_in_one_frame(router: Router, link: ServerLink) -> None:
    """Answers to a batch, and what the scheduler says at once, in their order."""
    router.register()
    _until(lambda: link.registered)
    router.say_frames(msgspec.msgpack.encode([_open(), *(_splice(1 + seq) for seq in range(40))]))
    assert [router.hear(s.Received).seq for _ in range(41)] == list(range(41))
    assert router.num_by_frame[-1] >= 41
    assert _drain(link, 41)[0] == _open()

    router.num_by_frame.clear()
    closed = [s.Closed(stream_id=number, attempt=1) for number in range(300)]
    link._outbox.extend(closed[:-1])
    link.send(closed[-1])
    assert [router.hear(s.Closed) for _ in closed] == closed
    assert max(router.num_by_frame) > 100


def test_only_messages_of_some_kinds_are_taken(router: Router, link: ServerLink) -> None:
    """In order, up to the first of another kind, which waits with all behind it."""
    router.register()
    flush = r.FlushCache(request_id=1)
    router.say(_open(), _splice(1), flush, _splice(2))
    _until(lambda: len(link._inbox) == 4)
    kinds = (r.OpenStream, r.Splice)
    assert link.drain_while(kinds) == [_open(), _splice(1)]
    assert link.drain_while(kinds) == []
    assert link.drain() == [flush, _splice(2)]


def test_a_gap_is_asked_for(router: Router, link: ServerLink) -> None:
    """And an unknown stream."""
    router.register()
    router.say(_splice(1, stream_id=9), _open(), _splice(3))
    ask = router.hear(s.ResyncRequest)
    assert (ask.stream_id, ask.have_seq) == (9, -1)
    ask = router.hear(s.ResyncRequest)
    assert (ask.stream_id, ask.have_seq) == (7, 0)
    assert _drain(link, 1) == [_open()]


def test_messages_of_the_scheduler_are_sent_at_once(router: Router, link: ServerLink) -> None:
    """In their order; no heartbeat is waited for."""
    router.register()
    closed = [s.Closed(stream_id=n, attempt=1) for n in range(100)]
    for message in closed:
        link.send(message)
    assert [router.hear(s.Closed) for _ in closed] == closed


def test_the_loop_can_be_woken_without_a_message(link: ServerLink) -> None:
    """For what arrives elsewhere."""
    link.wake()
    assert select.select([link.fileno()], [], [], PATIENCE_S)[0]
    assert link.drain() == []
    assert select.select([link.fileno()], [], [], 0)[0] == []


_BAD_FRAMES = {
    "garbage": [b"\xff\x00 garbage"],
    "empty": [b""],
    "truncated": [encode(_splice(1))[:-3]],
    "trailing": [encode(_splice(1)) + b"x"],
    "unknown tag": [b"\x81\xa4type\xa3foo"],
    "for the router": [encode(REGISTER)],
    "two frames": [encode(_splice(1)), encode(_splice(2))],
    "oversized": [bytes(MAX_FRAME_BYTES + 1)],
}


@pytest.mark.parametrize("frames", _BAD_FRAMES.values(), ids=_BAD_FRAMES.keys())
def test_a_bad_frame_is_counted_and_answered(
    router: Router, link: ServerLink, frames: list[bytes]
) -> None:
    """The link lives, and so do the streams that it knows."""
    router.register()
    router.say(_open())
    router.say_frames(*frames)
    assert router.hear(s.MalformedByRouter).reason
    assert link.num_malformed_frames == 1
    router.say(_splice(1))
    assert _drain(link, 2) == [_open(), _splice(1)]
    assert router.hear(s.ServerHeartbeat).counters == ServerCounters()


@given(frame=st.binary(max_size=60))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_bytes_harm_the_link(router: Router, link: ServerLink, frame: bytes) -> None:
    """Whatever is sent, an honest message behind it arrives."""
    if not router.identity:
        router.register()
    router.say_frames(frame)
    router.say(r.FlushCache(request_id=1))
    assert _drain(link, 1)[-1] == r.FlushCache(request_id=1)


def test_a_connection_that_is_lost_for_good_is_replaced(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeroMQ closes it at a frame beyond all bounds, and does not open it again by itself."""
    monkeypatch.setattr(server_link, "MAX_FRAME_BYTES", 500)
    clock = shifted_time(monkeypatch, server_link)
    link = ServerLink(router.endpoint, REGISTER, lambda reason: None)
    link.start()
    try:
        router.register()
        old = router.identity
        router.say(_open())
        assert _drain(link, 1) == [_open()]
        router.say_frames(bytes(1001))
        router.until_closed(old)
        clock.shift_s += server_link.ROUTER_SILENT_S + 0.1
        (lost,) = _drain(link, 1)
        assert isinstance(lost, RouterLost)
        router.register_anew(old)
        router.say(_open())
        assert _drain(link, 1) == [_open()]
    finally:
        link.close()


def test_a_silent_router_is_given_up(
    router: Router, link: ServerLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its streams are dropped, and the server registers again."""
    clock = shifted_time(monkeypatch, server_link)
    router.register()
    old = router.identity
    router.say(_open())
    assert _drain(link, 1) == [_open()]
    clock.shift_s += server_link.ROUTER_SILENT_S + 0.1
    (lost,) = _drain(link, 1)
    assert isinstance(lost, RouterLost)
    router.register_anew(old)
    router.say(_splice(1))
    assert router.hear(s.ResyncRequest).have_seq == -1


def test_heartbeats_keep_the_router_alive(
    router: Router, link: ServerLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it has nothing else to say."""
    clock = shifted_time(monkeypatch, server_link)
    monkeypatch.setattr(server_link, "ROUTER_SILENT_S", 100.0)
    router.register()
    _until(lambda: link.registered)
    for _ in range(3):
        clock.shift_s += 60.0
        while router.hear(s.ServerHeartbeat).loop_age_s < clock.shift_s:
            pass  # it has not looked at its clock since
        sent_s = clock.monotonic()
        router.say(r.RouterHeartbeat(router_incarnation=1))
        _until(partial(_has_heard_since, link, sent_s))
    assert link.registered
    assert link.drain() == []


@pytest.mark.parametrize("how", ["heartbeat", "registered"])
def test_a_new_router_knows_nothing_of_old_streams(
    router: Router, link: ServerLink, how: str
) -> None:
    """They are dropped as soon as it shows itself, and its own are taken."""
    router.register(incarnation=1)
    router.say(_open(), r.RouterHeartbeat(router_incarnation=1))
    assert _drain(link, 1) == [_open()]
    if how == "heartbeat":
        router.say(r.RouterHeartbeat(router_incarnation=2))
        router.register(incarnation=2)
    else:
        router.say(r.Registered(router_incarnation=2, heartbeat_interval_s=0.1))
    (lost,) = _drain(link, 1)
    assert isinstance(lost, RouterLost)
    _until(lambda: link.registered)
    router.say(_open(), _splice(1))
    assert _drain(link, 2) == [_open(), _splice(1)]


def test_a_stream_that_failed_is_forgotten(router: Router, link: ServerLink) -> None:
    """Its operations still under way are not delivered, its successor's are."""
    router.register()
    router.say(_open(), _splice(1))
    _drain(link, 2)
    link.send(s.StreamFailed(stream_id=7, attempt=1, code="INTERNAL", message="for a test"))
    router.hear(s.StreamFailed)
    router.say(_splice(2), _open(attempt=2), _splice(1, attempt=2))
    assert router.hear(s.ResyncRequest).have_seq == -1
    assert _drain(link, 2) == [_open(attempt=2), _splice(1, attempt=2)]


def test_a_refusal_is_the_end(router: Router, link: ServerLink, ends: list[str]) -> None:
    """Whoever owns the link is told why."""
    router.hear(s.Register)
    router.say(r.RegistrationRefused(reason="another model"))
    _until(lambda: bool(ends))
    assert "refuses this server: another model" in ends[0]
    assert not link.registered


def test_an_endpoint_that_cannot_be_used_is_the_end(ends: list[str]) -> None:
    """Not a process that sits there without a link."""
    link = ServerLink("nonsense://here", REGISTER, ends.append)
    link.start()
    _until(lambda: bool(ends))
    assert "nonsense://here" in ends[0]
    assert isinstance(_drain(link, 1)[0], RouterLost)
    link.close()


def test_a_message_that_cannot_be_sent_is_the_end(
    router: Router, link: ServerLink, ends: list[str]
) -> None:
    """A bug of ours must not leave a server behind that looks alive and is deaf."""
    router.register()
    link.send(s.Closed(stream_id=1 << 70, attempt=1))
    _until(lambda: bool(ends))


def test_close_sends_what_is_queued_and_leaves_no_thread(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And can be repeated."""
    monkeypatch.setattr(server_link, "LINGER_MS", round(1000 * PATIENCE_S))
    monkeypatch.setattr(server_link, "CLOSE_TIMEOUT_S", PATIENCE_S)
    before = set(threading.enumerate())
    link = ServerLink(router.endpoint, REGISTER, lambda reason: None)
    link.start()
    router.register()
    last = s.Closed(stream_id=3, attempt=1)
    link.send(last)
    link.close()
    link.close()
    assert router.hear(s.Closed) == last
    assert set(threading.enumerate()) <= before


def test_close_without_a_router_is_quick() -> None:
    """Nobody reads the registration; it is given up."""
    link = ServerLink("tcp://127.0.0.1:9", REGISTER, lambda reason: None)
    link.start()
    link.close()
    assert not any(thread.name == "router-link" for thread in threading.enumerate())


@given(data=st.data(), num_splices=st.integers(1, 8))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_exactly_once_and_in_order_over_a_bad_wire(
    router: Router, link: ServerLink, data: st.DataObject, num_splices: int
) -> None:
    """Duplicates, drops and another order on the way: the scheduler sees each operation once."""
    if not router.identity:
        router.register()
        router.stream_id = 100  # type: ignore[attr-defined]
    router.stream_id += 1  # type: ignore[attr-defined]
    stream_id: int = router.stream_id  # type: ignore[attr-defined]
    log: list[r.OpenStream | r.Splice] = [
        _open(stream_id),
        *(_splice(seq, stream_id) for seq in range(1, num_splices + 1)),
    ]
    sent = data.draw(st.lists(st.sampled_from(log), max_size=20))
    router.say(*sent)
    acknowledged = -1
    while acknowledged < num_splices:
        router.say(*log[acknowledged + 1 :])
        acknowledged = max(acknowledged, router.hear(s.Received).seq)
    assert _drain(link, len(log)) == log


def test_link_faults_spoil_what_the_server_says(
    router: Router, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every frame duplicated, the router hears each twice, and the second one by itself."""
    monkeypatch.setenv(LINK_FAULTS, "every=1,seed=1,kinds=duplicated")
    link = ServerLink(router.endpoint, REGISTER, ends.append)
    link.start()
    try:
        router.register()
        link.send(s.Received(stream_id=4, attempt=1, seq=9))
        assert [router.hear(s.Received).seq for _ in range(2)] == [9, 9]
    finally:
        link.close()
