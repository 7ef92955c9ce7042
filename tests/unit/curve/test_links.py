"""The links of a cluster with CURVE: router and servers, controller, control of hand-offs."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from router.manager import Manager
from streamfill.config import ControllerConfig, RouterConfig
from streamfill.curve.keys import ConnectKeys, read_connect_keys, read_listen_keys
from streamfill.errors import ConfigError, TransportError
from streamfill.kv_transfer.interface import TransferStatus
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.sender import KvSender
from streamfill.links import server_link
from streamfill.links.server_link import ServerLink
from streamfill.messages.common import Role, StreamMode
from streamfill.models.tiny import make_tiny_model
from streamfill.preemption.client import ControllerClient, fetch_status
from streamfill.preemption.controller import Controller
from tests.unit.kv_transfer.builders import (
    CALM,
    HOST,
    LAYOUT,
    QUICK,
    address_of,
    arrivals_of,
    bytes_of,
    outcomes_of,
    transfer,
)
from tests.unit.preemption.builders import report, stream
from tests.unit.router.cluster_for_tests import TestCluster, answer_of, commit_of, text, until
from tests.unit.router.fake_server import FakeServer, expected_answer

PATIENCE_S = 10.0
NEVER_S = 0.5
"""In which a stranger must get nothing."""
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "bpe")


def page(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def refused_by(registry: CollectorRegistry) -> set[str]:
    """Reasons that were counted at least once."""
    return set(re.findall(r'refused_handshakes_total\{reason="(\w+)"\} [1-9]', page(registry)))


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.01)


async def test_a_router_with_fake_servers(model: Path, folder: str) -> None:
    """Streams are prefilled, handed off and answered as ever."""
    keys = read_connect_keys(folder)
    async with TestCluster(model, zmq_keys_dir=folder) as cluster:
        await cluster.prefill(keys=keys)
        await cluster.decode(keys=keys)
        handle = await cluster.open(StreamMode.APPEND)
        await handle.append(text(PROMPT))
        await handle.commit(commit_of(16))
        tokens, _ = await answer_of(handle)
        wanted = expected_answer(cluster.encode(PROMPT), 16, cluster.vocab_size)
        assert [token.token_id for token in tokens] == wanted
        assert not refused_by(cluster.manager.metrics.set.registry)


@pytest.mark.parametrize("has_key", [True, False], ids=["another cluster's key", "no key"])
async def test_the_router_is_deaf_to_strangers(
    model: Path, folder: str, other_folder: str, *, has_key: bool
) -> None:
    """They cannot be servers, and are counted."""
    ours, theirs = read_connect_keys(folder), read_connect_keys(other_folder)
    keys = ConnectKeys(public=theirs.public, secret=theirs.secret, listener=ours.listener)
    async with TestCluster(model, zmq_keys_dir=folder) as cluster:
        stranger = FakeServer(
            *(cluster.manager.zmq_port, "prefill-0", Role.PREFILL, cluster.vocab_size),
            keys=keys if has_key else None,
        )
        cluster.servers.append(stranger)
        with pytest.raises(TimeoutError):
            await stranger.start()
        assert not stranger.received
        assert not cluster.manager.info().servers
        await until(lambda: refused_by(cluster.manager.metrics.set.registry))
        reasons = refused_by(cluster.manager.metrics.set.registry)
        assert reasons <= ({"unknown_key"} if has_key else {"broken_off", "not_curve"})


def test_a_router_that_others_can_reach_needs_keys(model: Path) -> None:
    """It does not even start to listen."""
    config = RouterConfig(model_path=str(model), host="0.0.0.0", grpc_port=0, zmq_port=0)
    with pytest.raises(ConfigError, match="zmq_keys_dir"):
        Manager(config)


async def test_a_real_servers_link(
    model: Path,
    folder: str,
    other_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It registers with the right keys. With others it says that nobody answers, and what to look
    at."""
    silent_s = server_link.ROUTER_SILENT_S
    monkeypatch.setattr(server_link, "ROUTER_SILENT_S", 0.3)
    monkeypatch.setattr(server_link, "HEARTBEAT_INTERVAL_S", 0.05)
    async with TestCluster(model, zmq_keys_dir=folder) as cluster:
        endpoint = f"tcp://127.0.0.1:{cluster.manager.zmq_port}"
        register = FakeServer(1, "prefill-0", Role.PREFILL, cluster.vocab_size)
        await register.stop()
        for keys in (read_connect_keys(other_folder), None):
            link = ServerLink(endpoint, register.register, lambda reason: None, keys=keys)
            link.start()
            try:
                await until(lambda: "router_does_not_answer" in caplog.text)
                assert f"with_keys={str(keys is not None).lower()}" in caplog.text
                assert not link.registered
            finally:
                link.close()
            caplog.clear()
        monkeypatch.setattr(server_link, "ROUTER_SILENT_S", silent_s)
        link = ServerLink(
            *(endpoint, register.register, lambda reason: None), keys=read_connect_keys(folder)
        )
        link.start()
        try:
            await until(lambda: link.registered)
        finally:
            link.close()


@contextmanager
def controller_of(folder: str) -> Iterator[Controller]:
    config = ControllerConfig(host="127.0.0.1", zmq_port=0, zmq_keys_dir=folder)
    controller = Controller(config)
    thread = threading.Thread(target=controller.run)
    thread.start()
    try:
        yield controller
    finally:
        controller.stop()
        thread.join(PATIENCE_S)
        controller.close()


def test_the_controller_plans_for_members_only(folder: str, other_folder: str) -> None:
    """A server with keys gets plans; others get no answer, and are counted."""
    with controller_of(folder) as controller:
        endpoint = f"tcp://127.0.0.1:{controller.port}"
        keys = read_connect_keys(folder)
        for wrong in (None, read_connect_keys(other_folder)):
            with pytest.raises(TransportError, match="no preemption controller answers"):
                fetch_status(endpoint, NEVER_S, wrong)
        assert fetch_status(endpoint, PATIENCE_S, keys).num_servers == 0
        with closing(ControllerClient(endpoint, "prefill-0", 7, keys=keys)) as client:

            def hears() -> bool:
                client.report(report(stream(1, idle_s=1), stream(2, idle_s=2)))
                return client.poll() is not None

            wait_for(hears)

        def is_counted() -> bool:
            """Also where so short a call was over before the handshake was."""
            if "wrong_server_key" in refused_by(controller.metrics.set.registry):
                return True
            with pytest.raises(TransportError):
                fetch_status(endpoint, NEVER_S, read_connect_keys(other_folder))
            return False

        wait_for(is_counted)


def test_a_controller_that_others_can_reach_needs_keys() -> None:
    """By the same rule."""
    with pytest.raises(ConfigError, match=r"controller\.host"):
        Controller(ControllerConfig(host="0.0.0.0", zmq_port=0))


@pytest.mark.parametrize("same_host", [True, False], ids=["shared memory", "gloo"])
def test_hand_offs_between_members(folder: str, other_folder: str, *, same_host: bool) -> None:
    """KV of a sender with keys arrives; others get no session, and are counted."""
    receiver = KvReceiver(
        *("d0", LAYOUT, HOST),
        memory_limit_bytes=1 << 24,
        timeouts=CALM,
        same_host=same_host,
        keys=read_listen_keys(folder),
    )
    with closing(receiver):
        for wrong in (None, read_connect_keys(other_folder)):
            stranger = KvSender("p1", LAYOUT, timeouts=QUICK, same_host=same_host, keys=wrong)
            with closing(stranger):
                stranger.submit(address_of(receiver), transfer(1, 5))
                assert outcomes_of(stranger)[1].status is TransferStatus.FAILED
        assert not receiver.poll()
        wait_for(lambda: receiver.stats().num_refused_handshakes > 0)
        sender = KvSender(
            *("p0", LAYOUT), timeouts=CALM, same_host=same_host, keys=read_connect_keys(folder)
        )
        with closing(sender):
            sent = transfer(2, 400)
            sender.submit(address_of(receiver), sent)
            assert outcomes_of(sender)[2].ok
            incoming = arrivals_of(receiver)[2]
            assert torch.equal(incoming.staging, bytes_of(sent))
            receiver.release(incoming)
