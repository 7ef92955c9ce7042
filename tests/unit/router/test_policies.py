"""Policies are set on running servers, stay with those that start later, and are known by heart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from router import timing
from router.interface import PolicyOutcome
from streamfill.errors import (
    ErrorCode,
    InvalidArgumentError,
    StreamError,
    StreamNotFoundError,
    UnavailableError,
)
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Role, StreamDecision
from streamfill.stream.ids import ServerId
from tests.unit.router.cluster_for_tests import (
    PATIENCE_S,
    TestCluster,
    answer_of,
    commit_of,
    fast_timing,
    ids,
    until,
)
from tests.unit.router.fake_server import FakeServer

TIMEOUT_S: Final = PATIENCE_S
NEWEST: Final = {"order": "newest"}


@pytest.fixture
async def cluster(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestCluster]:
    fast_timing(monkeypatch)
    monkeypatch.setattr(timing, "POLICY_REPEAT_S", 0.1)
    async with TestCluster(tiny_model) as started:
        yield started


async def set_policy(
    cluster: TestCluster,
    policy: str,
    options: dict[str, str] | None = None,
    server: FakeServer | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, PolicyOutcome]:
    server_id = None if server is None else ServerId(server.server_id)
    outcomes = await cluster.manager.set_policy(policy, options or {}, server_id, timeout_s)
    return {str(name): outcome for name, outcome in outcomes.items()}


def new_prefill(cluster: TestCluster, number: int) -> FakeServer:
    """One that is not started yet."""
    port = cluster.manager.zmq_port
    server = FakeServer(port, f"prefill-{number}", Role.PREFILL, cluster.vocab_size)
    cluster.servers.append(server)
    return server


def policies(cluster: TestCluster) -> dict[str, str]:
    """As the router shows them."""
    return {server.server_id: server.policy for server in cluster.manager.info().servers}


def done(policy: str) -> PolicyOutcome:
    return PolicyOutcome(ok=True, policy=policy, reason="")


async def settled(server: FakeServer, kind: type[r.RouterToServer]) -> int:
    """How many messages of this kind a server has got once nobody sends it further ones, as must
    come to be. Some may be on their way when an answer comes."""
    before = -1
    async with asyncio.timeout(PATIENCE_S):
        while before != len(server.of_type(kind)):
            before = len(server.of_type(kind))
            await asyncio.sleep(3 * timing.POLICY_REPEAT_S)
    return before


async def test_every_prefill_server_changes_its_policy(
    cluster: TestCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """With the options; decode servers keep theirs; the router shows and logs it."""
    for number in range(2):
        await cluster.prefill(number)
    decode = await cluster.decode()
    with caplog.at_level(logging.INFO):
        outcomes = await set_policy(cluster, "lcas", NEWEST)
    now = "lcas(order=newest)"
    assert outcomes == {"prefill-0": done(now), "prefill-1": done(now)}
    later = await cluster.decode(1)
    await until(lambda: policies(cluster)["decode-0"] and policies(cluster)["decode-1"])
    await asyncio.sleep(2 * timing.POLICY_REPEAT_S)
    assert not decode.of_type(r.SetPolicy)
    assert not later.of_type(r.SetPolicy)
    prefill = dict.fromkeys(("prefill-0", "prefill-1"), now)
    assert policies(cluster) == {**prefill, "decode-0": "fcfs", "decode-1": "fcfs"}
    (line,) = [text for text in caplog.messages if text.startswith("policy_set ")]
    assert "policy=lcas" in line
    assert "'order': 'newest'" in line
    assert "'prefill-1': 'ok'" in line


async def test_the_policy_of_a_server_is_known_before_anybody_sets_one(
    cluster: TestCluster,
) -> None:
    """It is asked at registration, and again when the answer was lost."""
    server = new_prefill(cluster, 0)
    server.policy = "lcas(order=oldest)"
    lost: list[s.ServerToRouter] = []

    def lose_first(message: s.ServerToRouter) -> bool:
        if isinstance(message, s.StreamsDescribed) and not lost:
            lost.append(message)
            return True
        return False

    server.drop_outgoing = lose_first
    await server.start()
    assert policies(cluster) == {"prefill-0": ""}
    await until(lambda: policies(cluster)["prefill-0"] == "lcas(order=oldest)")
    assert await settled(server, r.DescribeStreams) >= 2


async def test_one_server_alone_can_be_changed(cluster: TestCluster) -> None:
    """The others keep their policy, also those that start later."""
    first, second = await cluster.prefill(0), await cluster.prefill(1)
    assert await set_policy(cluster, "lcas", server=second) == {"prefill-1": done("lcas")}
    third = await cluster.prefill(2)
    await until(lambda: policies(cluster)["prefill-2"])
    assert (first.policy, second.policy, third.policy) == ("fcfs", "lcas", "fcfs")
    assert not first.of_type(r.SetPolicy)


async def test_an_unknown_server_is_not_found(cluster: TestCluster) -> None:
    """The living prefill servers are named; a decode server is none of them."""
    await cluster.prefill(0)
    await cluster.prefill(1)
    decode = await cluster.decode()
    with pytest.raises(
        StreamError, match=r"'decode-0'; it must be .*: prefill-0, prefill-1"
    ) as got:
        await set_policy(cluster, "lcas", server=decode)
    assert got.value.code is ErrorCode.NOT_FOUND


async def test_without_a_prefill_server_no_policy_can_be_set(cluster: TestCluster) -> None:
    """It is said at once."""
    await cluster.decode()
    with pytest.raises(UnavailableError, match="no prefill server is alive"):
        await set_policy(cluster, "lcas")


async def test_a_policy_that_nobody_knows_is_refused_and_forgotten(cluster: TestCluster) -> None:
    """With the servers' reason; what was in force stays, also for servers that start later."""
    first = await cluster.prefill(0)
    await set_policy(cluster, "lcas")
    with pytest.raises(InvalidArgumentError, match="no policy 'lifo'; known: fcfs, lcas"):
        await set_policy(cluster, "lifo")
    second = await cluster.prefill(1)
    await until(lambda: second.policy == "lcas")
    assert first.policy == "lcas"


async def test_what_one_server_accepted_stays_and_the_others_say_why_not(
    cluster: TestCluster,
) -> None:
    """The refusal is a result, and a server that starts later gets the policy, once."""
    old, new = await cluster.prefill(0), await cluster.prefill(1)
    new.known_policies = ("fcfs", "edf")
    outcomes = await set_policy(cluster, "edf")
    reason = "there is no policy 'edf'; known: fcfs, lcas"
    assert outcomes["prefill-0"] == PolicyOutcome(ok=False, policy="fcfs", reason=reason)
    assert outcomes["prefill-1"] == done("edf")
    later = new_prefill(cluster, 2)
    later.known_policies = ("fcfs", "edf")
    await later.start()
    await until(lambda: policies(cluster)["prefill-2"])
    for server in (old, later):
        await settled(server, r.SetPolicy)
    assert {message.policy for message in policy_messages(later)} == {"edf"}


async def test_a_restarted_server_does_not_fall_back(cluster: TestCluster) -> None:
    """It gets the newest policy that was accepted, with its options."""
    server = await cluster.prefill()
    await set_policy(cluster, "fcfs")
    await set_policy(cluster, "lcas", NEWEST)
    await cluster.kill(server)
    again = await cluster.prefill()
    await until(lambda: policies(cluster)["prefill-0"] == "lcas(order=newest)")
    assert again.policy == "lcas(order=newest)"


async def test_the_policy_of_one_server_stays_with_its_id_until_all_get_another(
    cluster: TestCluster,
) -> None:
    """Whichever wish is newer counts."""
    server = await cluster.prefill()
    await set_policy(cluster, "fcfs")
    await set_policy(cluster, "lcas", server=server)
    await cluster.kill(server)
    again = await cluster.prefill()
    await until(lambda: again.policy == "lcas")
    await set_policy(cluster, "fcfs")
    await cluster.kill(again)
    third = await cluster.prefill()
    await until(lambda: policy_messages(third))
    assert third.policy == "fcfs"


async def test_a_slow_server_is_told_again(cluster: TestCluster) -> None:
    """What it did not hear is said again once another server has accepted it."""
    await cluster.prefill(0)
    slow = await cluster.prefill(1)
    slow.drop_incoming = lambda message: isinstance(message, r.SetPolicy)
    outcomes = await set_policy(cluster, "lcas", timeout_s=1.5)
    assert outcomes["prefill-0"] == done("lcas")
    assert not outcomes["prefill-1"].ok
    assert "did not answer within 1.5 s" in outcomes["prefill-1"].reason
    slow.drop_incoming = lambda message: False
    await until(lambda: policies(cluster)["prefill-1"] == "lcas")
    await settled(slow, r.SetPolicy)


async def test_an_answer_after_the_timeout_counts(cluster: TestCluster) -> None:
    """The policy is in force on a server, so it stays for those that start later."""
    server = await cluster.prefill(0)
    held: list[s.ServerToRouter] = []

    def hold(message: s.ServerToRouter) -> bool:
        if isinstance(message, s.PolicySet):
            held.append(message)
            return True
        return False

    server.drop_outgoing = hold
    outcomes = await set_policy(cluster, "lcas", timeout_s=0.05)
    assert not outcomes["prefill-0"].ok
    await until(lambda: held)
    server.drop_outgoing = lambda message: False
    await server.send(held[0])
    await until(lambda: policies(cluster)["prefill-0"] == "lcas")
    second = await cluster.prefill(1)
    await until(lambda: second.policy == "lcas")


async def test_a_server_that_starts_meanwhile_gets_the_policy_too(cluster: TestCluster) -> None:
    """It registered after the question went out and before anybody had accepted it."""
    first = await cluster.prefill(0)
    first.drop_outgoing = lambda message: isinstance(message, s.PolicySet)
    call = asyncio.create_task(set_policy(cluster, "lcas"))
    await until(lambda: policy_messages(first))
    second = await cluster.prefill(1)
    await until(lambda: policies(cluster)["prefill-1"] == "fcfs")
    first.drop_outgoing = lambda message: False
    sent = policy_messages(first)[0].request_id
    await first.send(s.PolicySet(request_id=sent, ok=True, policy="lcas"))
    assert (await call)["prefill-0"] == done("lcas")
    await until(lambda: second.policy == "lcas")


async def test_nobody_waits_for_a_server_that_died(cluster: TestCluster) -> None:
    """The outcome says so long before the time-out."""
    server = await cluster.prefill()
    server.drop_incoming = lambda message: isinstance(message, r.SetPolicy)
    call = asyncio.create_task(set_policy(cluster, "lcas", timeout_s=2 * TIMEOUT_S))
    await until(lambda: policy_messages(server))
    await cluster.kill(server)
    outcomes = await asyncio.wait_for(call, TIMEOUT_S)
    assert (outcomes["prefill-0"].ok, outcomes["prefill-0"].reason) == (
        *(False, "died before it answered"),
    )


def decision(stream_id: int) -> StreamDecision:
    return StreamDecision(
        stream_id=stream_id,
        state="open",
        num_known_tokens=1,
        num_computed_tokens=0,
        num_shared_tokens=0,
        priority=0,
        idle_s=0.5,
        expected_next_s=None,
        decision="yields",
        reason="a committed stream runs",
        victim_rank=None,
    )


async def test_schedulers_describe_their_streams(cluster: TestCluster) -> None:
    """Of all servers, or only what is said about one stream."""
    prefill, _ = await cluster.prefill(), await cluster.decode()
    stream_ids = [(await cluster.open()).stream_id for _ in range(2)]
    prefill.decisions = tuple(map(decision, stream_ids))
    described = await cluster.manager.describe_streams(None, TIMEOUT_S)
    told = described[ServerId("prefill-0")]
    assert (told.answered, told.role.value, told.policy) == (True, "prefill", "fcfs")
    assert [each.stream_id for each in told.streams] == stream_ids
    assert described[ServerId("decode-0")].streams == []
    described = await cluster.manager.describe_streams(stream_ids[1], TIMEOUT_S)
    assert described[ServerId("prefill-0")].streams == [decision(stream_ids[1])]
    with pytest.raises(StreamNotFoundError, match="no stream 77"):
        await cluster.manager.describe_streams(77, TIMEOUT_S)


async def test_a_server_that_does_not_describe_its_streams_is_shown_as_such(
    cluster: TestCluster,
) -> None:
    """With the policy that it was last heard to have."""
    server = await cluster.prefill()
    await until(lambda: policies(cluster)["prefill-0"])
    server.drop_incoming = lambda message: isinstance(message, r.DescribeStreams)
    told = (await cluster.manager.describe_streams(None, 0.05))[ServerId("prefill-0")]
    assert (told.answered, told.policy, told.streams) == (False, "fcfs", [])


async def test_the_wished_ttft_goes_to_each_server_of_the_stream(cluster: TestCluster) -> None:
    """To the first one, and to the one that takes over when it dies; None where none was said."""
    first = await cluster.prefill(0)
    handle = await cluster.open(ttft_slo_s=0.25)
    plain = await cluster.open()
    await handle.append(ids(20, 21))
    await until(lambda: len(first.of_type(r.OpenStream)) == 2)
    assert slo_of(first, handle.stream_id) == 0.25
    assert slo_of(first, plain.stream_id) is None
    second = await cluster.prefill(1)
    await cluster.kill(first)
    await until(lambda: len(second.of_type(r.OpenStream)) == 2)
    assert slo_of(second, handle.stream_id) == 0.25
    assert slo_of(second, plain.stream_id) is None
    await handle.commit(commit_of(1))
    assert len((await answer_of(handle))[0]) == 1


def slo_of(server: FakeServer, stream_id: int) -> float | None:
    (opened,) = [
        message for message in server.of_type(r.OpenStream) if message.stream_id == stream_id
    ]
    return opened.ttft_slo_s


def policy_messages(server: FakeServer) -> list[r.SetPolicy]:
    return server.of_type(r.SetPolicy)
