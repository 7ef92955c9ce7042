"""The server around the endpoints: models, health, its description, ports, origins, its end."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import jsonschema
import pytest

from router.http.server import HttpServer
from streamfill.config import RouterConfig
from streamfill.errors import ConfigError
from tests.unit.router.fake_manager import FakeManager
from tests.unit.router.http.serving import app_client, chat, events_of, http_client, until


def config(**values: Any) -> RouterConfig:
    """Of a router with nothing but HTTP."""
    defaults = {"host": "127.0.0.1", "grpc_port": 0, "zmq_port": 0, "http_port": 0}
    return RouterConfig(model_path="fake", **{**defaults, **values})


async def test_models() -> None:
    """The one that is served, in the list and by its name."""
    async with app_client(FakeManager()) as client:
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 100)
        assert (await client.get("/v1/models/fake")).json() == card


async def test_health_and_readiness() -> None:
    """The process lives in any case; it is ready while a prefill server is alive."""
    manager = FakeManager()
    async with app_client(manager) as client:
        for ready in (True, False, True):
            manager.ready = ready
            assert (await client.get("/health")).status_code == 200
            reply = await client.get("/ready")
            reason = "" if ready else "no prefill server is there"
            assert reply.status_code == (200 if ready else 503)
            assert reply.json() == {"ready": ready, "reason": reason}


async def test_the_description_is_true() -> None:
    """Every reference leads somewhere, every path is served, and requests and replies are as
    described."""
    async with app_client(FakeManager()) as client:
        document = (await client.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        assert document["security"] == [], "no keys are asked for here"
        schemas = document["components"]["schemas"]

        def check(data: object, name: str) -> None:
            schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
            jsonschema.Draft202012Validator.check_schema(schema)
            jsonschema.validate(data, schema, jsonschema.Draft202012Validator)

        for path, item in document["paths"].items():
            for method in item:
                reply = await client.request(method, path.replace("{model}", "fake"))
                assert reply.status_code not in (404, 405), (method, path)
        body = chat(n=2, logprobs=True, top_logprobs=1, stop=["a"])
        check(body, "ChatRequest")
        url = "/v1/chat/completions"
        check((await client.post(url, json=body)).json(), "ChatReply")
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        check(body, "ChatRequest")
        for chunk in events_of((await client.post(url, json=body)).text)[:-1]:
            check(chunk, "ChatChunk")
        for prompt in ("a", ["a"], [1], [[1]]):
            check({"prompt": prompt, "logprobs": 1}, "CompletionRequest")
            reply = await client.post("/v1/completions", json={"prompt": prompt, "logprobs": 1})
            check(reply.json(), "CompletionReply")
        check((await client.get("/v1/models")).json(), "ModelList")
        check((await client.get("/ready")).json(), "ReadyReply")
        check((await client.get("/nowhere")).json(), "ErrorReply")
        with pytest.raises(jsonschema.ValidationError):
            check({"messages": [], "nonsense": 1}, "ChatRequest")


async def test_browsers() -> None:
    """All pages may use it by default; the request that asks beforehand is answered."""
    async with app_client(FakeManager()) as client:
        headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
        reply = await client.options("/v1/chat/completions", headers=headers)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://a.example", 200),
        ("https://b.example", 403),
        ("http://[", 403),
        ("http://app", 200),
        (None, 200),
    ],
)
async def test_pages_of_other_origins(origin: str | None, status: int) -> None:
    """Are refused where they are not allowed. Programs have no origin."""
    headers = {} if origin is None else {"origin": origin}
    async with app_client(FakeManager(), allow_origins=["https://a.example"]) as client:
        reply = await client.post("/v1/chat/completions", json=chat(), headers=headers)
    assert reply.status_code == status


async def test_a_port_in_use_stops_the_start() -> None:
    """With the key and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match="choose a free port, 0 for any, or off") as caught:
            await HttpServer(FakeManager(), config(http_port=port)).start()
    assert (caught.value.key, caught.value.value) == ("router.http_port", port)


@pytest.mark.parametrize("key", ["host", "http_host"])
async def test_a_host_of_another_machine_stops_the_start(key: str) -> None:
    """It is named by the key that it came from."""
    with pytest.raises(ConfigError, match="no address of this machine") as caught:
        await HttpServer(FakeManager(), config(**{key: "192.0.2.1"})).start()
    assert (caught.value.key, caught.value.value) == (f"router.{key}", "192.0.2.1")


async def test_a_stop_lets_requests_end() -> None:
    """Within the grace; connections without a request are closed at once."""
    manager = FakeManager(hold_answer=True)
    server = HttpServer(manager, config())
    port = await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PUT /v1/streams HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
    idle, idle_writer = await asyncio.open_connection("127.0.0.1", port)
    await manager.any_commit.wait()
    stopping = asyncio.create_task(server.stop(10.0))
    assert await idle.read() == b""
    assert not stopping.done()
    manager.hold_answer = False
    for stream in manager.streams.values():
        stream.compute()
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"Hello world!" in answer
    await stopping
    for each in (writer, idle_writer):
        each.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_stop_ends_what_does_not_end() -> None:
    """Behind the grace, with an answer, and cancels its stream."""
    manager = FakeManager(hold_answer=True)
    server = HttpServer(manager, config())
    port = await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PUT /v1/streams HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
    await manager.any_commit.wait()
    await server.stop(0.0)
    (stream,) = manager.streams.values()
    await until(lambda: stream.cancelled_because)
    try:
        assert b"the router is shutting down" in await reader.read()
    finally:
        writer.close()


async def test_signals_stay_those_of_the_router() -> None:
    """The server of the library would take them."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with http_client(FakeManager()) as client:
        await client.get("/health")
        during = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert during == before
