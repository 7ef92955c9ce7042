"""The limits of each key: the bucket and the account alone, then through the whole router."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from router.access.account import KeyAccount
from router.access.bucket import Bucket
from streamfill.access.keys import KeyLimits, new_key
from streamfill.api import Client
from streamfill.errors import ResourceExhaustedError
from tests.unit.router.access.keys_for_tests import TestKeys, whole_router
from tests.unit.router.cluster_for_tests import until
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve
from tests.unit.router.http.serving import chat, http_client


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def account(clock: Clock | None = None, **limits: float) -> KeyAccount:
    made = KeyLimits(**limits)  # type: ignore[arg-type]
    return KeyAccount(new_key("a", limits=made)[1], clock or Clock())


def test_a_bucket_is_refilled_up_to_its_capacity() -> None:
    """What is missing takes its time; a long pause gives no more than it holds."""
    clock = Clock()
    bucket = Bucket(per_s=2.0, capacity=4.0, clock=clock)
    assert [bucket.take(1.0) for _ in range(4)] == [0.0] * 4
    assert bucket.take(1.0) == pytest.approx(0.5)
    clock.now_s += 0.5
    assert bucket.take(1.0) == 0.0
    clock.now_s += 1000.0
    bucket.owe(14.0)
    assert bucket.wait_s() == pytest.approx(5.0)
    clock.now_s += 5.0
    assert bucket.wait_s() == 0.0


def test_requests_per_second() -> None:
    """A second's worth at once, then one after the other; the refusal says which limit and when."""
    clock = Clock()
    limited = account(clock, requests_per_s=2.0)
    for _ in range(2):
        limited.take_request()
    with pytest.raises(ResourceExhaustedError, match="requests_per_s = 2") as caught:
        limited.take_request()
    assert caught.value.details == {
        "limit": "requests_per_s",
        "limit_value": 2.0,
        "retry_after_s": 0.5,
    }
    clock.now_s += 0.5
    limited.take_request()


def test_a_rate_below_one_lets_one_through() -> None:
    """And the next one when its time has come."""
    clock = Clock()
    limited = account(clock, requests_per_s=0.1)
    limited.take_request()
    with pytest.raises(ResourceExhaustedError):
        limited.take_request()
    clock.now_s += 10.0
    limited.take_request()


def test_tokens_are_paid_afterwards() -> None:
    """What was used above the limit is waited for; an account without a limit never waits."""
    clock = Clock()
    limited = account(clock, tokens_per_min=600)
    limited.use_tokens(600)
    limited.check_tokens()
    limited.use_tokens(100)
    with pytest.raises(ResourceExhaustedError, match="tokens_per_min = 600") as caught:
        limited.check_tokens()
    assert caught.value.details["retry_after_s"] == pytest.approx(10.0)
    clock.now_s += 10.0
    limited.check_tokens()
    free = account(clock)
    free.use_tokens(10**9)
    free.check_tokens()


def test_places_of_streams_are_given_back_once() -> None:
    """However often the end of a stream is told."""
    limited = account(max_streams=2)
    first, _ = limited.take_stream(), limited.take_stream()
    with pytest.raises(ResourceExhaustedError, match="max_streams = 2"):
        limited.take_stream()
    first.ended()
    first.ended()
    limited.take_stream()
    with pytest.raises(ResourceExhaustedError):
        limited.take_stream()


def test_new_limits_count_at_once() -> None:
    """Those of the file as it is now; streams that are open stay counted."""
    limited = account(max_streams=2, requests_per_s=1.0)
    limited.take_request()
    limited.take_stream()
    entry = limited.entry
    limited.replace_entry(new_key("a", limits=KeyLimits(max_streams=1, requests_per_s=5.0))[1])
    for _ in range(5):
        limited.take_request()
    with pytest.raises(ResourceExhaustedError, match="max_streams = 1"):
        limited.take_stream()
    limited.replace_entry(entry)
    limited.take_stream()


async def test_a_call_above_the_rate_is_refused_on_grpc(keys: TestKeys) -> None:
    """With RESOURCE_EXHAUSTED, and the limit among its details; other keys are not concerned."""
    slow, free = await keys.add("slow", requests_per_s=0.001), await keys.add("free")
    async with serve(FakeManager(), keys.ring) as target:
        async with Client(target, api_key=slow) as client:
            await client.server_info()
            with pytest.raises(ResourceExhaustedError) as caught:
                await client.server_info()
            assert caught.value.details["limit"] == "requests_per_s"
            assert 900 < float(caught.value.details["retry_after_s"]) <= 1000
        async with Client(target, api_key=free) as client:
            for _ in range(3):
                await client.server_info()


async def test_a_request_above_the_rate_is_refused_on_http(keys: TestKeys) -> None:
    """With 429 and the seconds to wait, rounded up."""
    key = await keys.add("slow", requests_per_s=0.001)
    headers = {"authorization": f"Bearer {key}"}
    async with http_client(FakeManager(), keys=keys.ring) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        reply = await client.post("/v1/chat/completions", json=chat(), headers=headers)
        assert reply.status_code == 429
        error = reply.json()["error"]
        assert (error["type"], error["details"]["limit"]) == ("rate_limit_error", "requests_per_s")
        wait_s = error["details"]["retry_after_s"]
        assert 900 < wait_s <= 1000
        assert reply.headers["retry-after"] == str(math.ceil(wait_s))
        assert (await client.get("/health")).status_code == 200


async def test_open_streams_of_a_key(tiny_model: Path, keys: TestKeys) -> None:
    """One more than its limit is refused on both services; each end makes room, also a bad one."""
    key, other = await keys.add("a", max_streams=2), await keys.add("b")
    async with (
        whole_router(tiny_model, keys) as (address, url, cluster),
        Client(address, api_key=key) as client,
        httpx.AsyncClient(base_url=url, timeout=STEP_S) as http,
    ):
        headers = {"authorization": f"Bearer {key}"}
        body = {"prompt": "The quick", "max_tokens": 2}
        async with client.stream() as first, client.stream() as second:
            with pytest.raises(ResourceExhaustedError, match="max_streams = 2"):
                await client.complete("x", max_tokens=1)
            reply = await http.post("/v1/completions", json=body, headers=headers)
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
            async with Client(address, api_key=other) as free:
                await free.complete("x", max_tokens=1)
            await second.cancel("enough")
            await until(lambda: cluster.manager.info().num_open_streams == 1)
            assert (await http.post("/v1/completions", json=body, headers=headers)).is_success
            await first.append("The quick")
        await until(lambda: cluster.manager.info().num_open_streams == 0)
        for _ in range(3):
            with pytest.raises(Exception, match="context"):
                await client.complete("word " * 100_000)
        async with client.stream(), client.stream():
            pass


async def test_tokens_per_minute_of_a_key(tiny_model: Path, keys: TestKeys) -> None:
    """Prompts and answers count. In debt, segments and new streams are refused and a commit is not;
    what is refused does the stream no harm."""
    key = await keys.add("a", tokens_per_min=20)
    async with (
        whole_router(tiny_model, keys) as (address, url, cluster),
        Client(address, api_key=key) as client,
    ):
        first = [7] * 18
        async with client.stream() as stream:
            await stream.append(token_ids=first)
            await stream.append(token_ids=[8] * 12)
            with pytest.raises(ResourceExhaustedError, match="tokens_per_min = 20") as caught:
                await stream.append(token_ids=[9])
            # Ten are owed, of which one comes back every three seconds.
            assert 20 < float(caught.value.details["retry_after_s"]) <= 30
            answer = await stream.commit(max_tokens=6).read()
            assert len(answer.token_ids) == 6
            assert answer.usage.num_prompt_tokens == 30
        with pytest.raises(ResourceExhaustedError) as caught:
            await client.complete("x", max_tokens=1)
        assert 38 < float(caught.value.details["retry_after_s"]) <= 48
        async with httpx.AsyncClient(base_url=url, timeout=STEP_S) as http:
            headers = {"authorization": f"Bearer {key}"}
            reply = await http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
            assert reply.status_code == 429
            assert reply.json()["error"]["details"]["limit"] == "tokens_per_min"
            assert 38 < int(reply.headers["retry-after"]) <= 48
        assert cluster.manager.info().num_open_streams == 0
