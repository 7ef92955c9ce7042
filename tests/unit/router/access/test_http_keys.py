"""API keys on HTTP, through the real server."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.unit.router.access.keys_for_tests import TestKeys
from tests.unit.router.fake_manager import STEP_S, FakeManager
from tests.unit.router.http.serving import chat, http_client, serve_http


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


WRONG: tuple[dict[str, str], ...] = (
    {},
    bearer("none"),
    {"authorization": "Bearer"},
    {"authorization": "Basic dTpw"},
)


async def test_a_request_without_a_known_key_is_refused(keys: TestKeys) -> None:
    """With 401 in OpenAI's words, before its body is read, and nothing comes to the core."""
    await keys.add("a")
    manager = FakeManager()
    async with http_client(manager, keys=keys.ring) as client:
        for headers in (
            {},
            bearer("none"),
            {"authorization": "Basic dTpw"},
            {"authorization": "Bearer"},
        ):
            for path in ("/v1/chat/completions", "/v1/completions", "/v1/streams", "/nowhere"):
                reply = await client.post(path, content=b"no JSON" * 1000, headers=headers)
                assert reply.status_code == 401
                error = reply.json()["error"]
                assert (error["type"], error["code"]) == (
                    "invalid_request_error",
                    "invalid_api_key",
                )
                assert reply.headers["www-authenticate"].startswith("Bearer")
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
            assert (await client.get("/openapi.json", headers=headers)).status_code == 401
    assert not manager.streams


async def test_probes_need_no_key(keys: TestKeys) -> None:
    """Health and readiness are open."""
    async with http_client(FakeManager(), keys=keys.ring) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).json() == {"ready": True, "reason": ""}


async def test_a_request_with_a_key_is_served(keys: TestKeys) -> None:
    """As before, and its stream is the tenant's; the same for an upload."""
    key = await keys.add("a", tenant="t")
    manager = FakeManager()
    async with http_client(manager, keys=keys.ring) as client:
        reply = await client.post("/v1/chat/completions", json=chat(), headers=bearer(key))
        assert reply.json()["choices"][0]["message"]["content"] == "Hello world!"
        reply = await client.post("/v1/streams", content=b"abc", headers=bearer(key))
        assert reply.status_code == 200
    assert [stream.tenant for stream in manager.streams.values()] == ["t", "t"]


async def test_the_official_client(keys: TestKeys) -> None:
    """Sends its ``api_key`` in just this way, and knows the refusal."""
    key = await keys.add("a")
    async with serve_http(FakeManager(), keys=keys.ring) as root:
        url = f"{root}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
            messages = [{"role": "user", "content": "Hi"}]
            made = await client.chat.completions.create(model="default", messages=messages)  # type: ignore[arg-type]
            assert made.choices[0].message.content == "Hello world!"
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


async def test_a_socket_is_refused_before_the_upgrade(keys: TestKeys) -> None:
    """With the same answer; with a key it is served."""
    key = await keys.add("a")
    manager = FakeManager()
    async with serve_http(manager, keys=keys.ring) as url:
        address = url.replace("http", "ws") + "/v1/streams"
        for headers in ({}, bearer("none")):
            with pytest.raises(InvalidStatus) as caught:
                async with connect(address, additional_headers=headers):
                    pass
            response = caught.value.response
            assert response.status_code == 401
            assert json.loads(response.body or b"")["error"]["code"] == "invalid_api_key"
            assert "www-authenticate" in response.headers
        assert not manager.streams
        async with connect(address, additional_headers=bearer(key)) as socket:
            await socket.send(json.dumps({"type": "open"}))
            assert json.loads(await socket.recv())["type"] == "opened"
    (stream,) = manager.streams.values()
    assert stream.tenant == "a"


async def test_browsers_can_read_a_refusal(keys: TestKeys) -> None:
    """The request that asks beforehand has no key and needs none; the refusal says whose page may
    read it."""
    async with http_client(FakeManager(), keys=keys.ring) as client:
        headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
        headers["access-control-request-headers"] = "authorization"
        reply = await client.options("/v1/chat/completions", headers=headers)
        assert reply.status_code == 200
        reply = await client.get("/v1/models", headers={"origin": "https://a.example"})
        assert reply.status_code == 401
        assert reply.headers["access-control-allow-origin"] == "*"


async def test_keys_are_never_logged(keys: TestKeys, caplog: pytest.LogCaptureFixture) -> None:
    """Nor told back, whatever goes wrong."""
    caplog.set_level("DEBUG", "router")
    caplog.set_level("DEBUG", "uvicorn")
    good = await keys.add("a")
    bad = good[:-4] + "zzzz"
    manager = FakeManager(open_error=RuntimeError("a bug"))
    told = ""
    async with serve_http(manager, keys=keys.ring) as url, httpx.AsyncClient() as client:
        for key in (good, bad):
            for body in (b"{", json.dumps(chat()).encode()):
                reply = await client.post(
                    f"{url}/v1/chat/completions",
                    content=body,
                    headers=bearer(key),
                    timeout=STEP_S,
                )
                assert reply.status_code in (400, 401, 500)
                told += reply.text + str(reply.headers)
    assert "unauthenticated" in caplog.text
    for key in (good, bad):
        assert key[-20:] not in caplog.text + told
