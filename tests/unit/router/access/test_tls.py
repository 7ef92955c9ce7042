"""TLS and mTLS on gRPC and HTTP, through the real servers."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from websockets.asyncio.client import connect

from router.http import protocol
from router.tls import RouterTls, router_tls
from streamfill.api import Client, SyncClient
from streamfill.config import RouterConfig
from streamfill.errors import ConfigError, UnauthenticatedError, UnavailableError
from streamfill.tls import TlsFiles
from tests.support.certificates import Authority, make_authority
from tests.unit.router.access.keys_for_tests import TestKeys
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve
from tests.unit.router.http.serving import chat, serve_http


@dataclass(frozen=True)
class Certificates:
    ours: Authority
    """Vouches for the router and its clients."""
    foreign: Authority
    server: tuple[str, str]
    client: tuple[str, str]
    stranger: tuple[str, str]
    """A client of the foreign authority."""

    @property
    def tls(self) -> RouterTls:
        return RouterTls(TlsFiles(cert_file=self.server[0], key_file=self.server[1]))

    @property
    def mtls(self) -> RouterTls:
        cert, key = self.server
        return RouterTls(TlsFiles(cert_file=cert, key_file=key, ca_file=self.ours.ca_file))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    ours, foreign = make_authority(folder, "ours"), make_authority(folder, "foreign")
    return Certificates(
        ours=ours,
        foreign=foreign,
        server=ours.certificate("router", "IP:127.0.0.1,DNS:localhost"),
        client=ours.certificate("client"),
        stranger=foreign.certificate("stranger"),
    )


async def test_grpc_is_encrypted(made: Certificates, keys: TestKeys) -> None:
    """Who trusts its authority is served, and needs a key all the same; the synchronous client
    too."""
    key = await keys.add("a")
    ca = made.ours.ca_file
    async with serve(FakeManager(), keys.ring, made.tls) as target:
        async with (
            Client(target, api_key=key, tls_ca_file=ca) as client,
            client.stream() as stream,
        ):
            await stream.append("abc")
            assert (await stream.commit("?").read()).text == "Hello world!"
        async with Client(target, api_key="", tls_ca_file=ca) as client:
            with pytest.raises(UnauthenticatedError):
                await client.server_info()

        def synchronous() -> bool:
            with SyncClient(target, api_key=key, tls_ca_file=ca) as client:
                return client.server_info().ready

        assert await asyncio.to_thread(synchronous)


async def test_grpc_refuses_who_does_not_belong(made: Certificates) -> None:
    """A client in the clear, and one that trusts another authority; nothing of their calls comes to
    the core."""
    manager = FakeManager()
    async with serve(manager, tls=made.tls) as target:
        for ca_file in (None, made.foreign.ca_file):
            async with Client(target, tls_ca_file=ca_file) as client:
                with pytest.raises(UnavailableError):
                    await client.complete("x")
        port = target.rpartition(":")[2]
        async with Client(f"localhost:{port}", tls_ca_file=made.ours.ca_file) as client:
            assert (await client.server_info()).ready
    assert not manager.streams


def identity(pair: tuple[str, str]) -> dict[str, Any]:
    return {"tls_cert_file": pair[0], "tls_key_file": pair[1]}


async def test_grpc_asks_clients_for_certificates(made: Certificates) -> None:
    """Those of its authority are served; without one, or with a stranger's, there is no call."""
    ca = made.ours.ca_file
    async with serve(FakeManager(), tls=made.mtls) as target:
        async with Client(target, tls_ca_file=ca, **identity(made.client)) as client:
            assert (await client.complete("x")).text == "Hello world!"
        others: tuple[dict[str, Any], ...] = ({}, identity(made.stranger))
        for files in others:
            async with Client(target, tls_ca_file=ca, **files) as client:
                with pytest.raises(UnavailableError):
                    await client.server_info()


def context_of(authority: Authority, pair: tuple[str, str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca_file)
    if pair is not None:
        context.load_cert_chain(*pair)
    return context


async def test_http_is_encrypted(made: Certificates) -> None:
    """Requests, server-sent events and WebSockets; who trusts another authority goes away, and who
    speaks in the clear gets no answer."""
    async with serve_http(FakeManager(), tls=made.tls) as url:
        trusting = context_of(made.ours)
        async with httpx.AsyncClient(base_url=url, verify=trusting, timeout=STEP_S) as client:
            reply = await client.post("/v1/chat/completions", json=chat())
            assert reply.json()["choices"][0]["message"]["content"] == "Hello world!"
            reply = await client.post("/v1/chat/completions", json=chat(stream=True))
            assert reply.text.endswith("data: [DONE]\n\n")
        address = url.replace("https", "wss") + "/v1/streams"
        async with connect(address, ssl=trusting) as socket:
            await socket.send(json.dumps({"type": "open"}))
            assert json.loads(await socket.recv())["type"] == "opened"
        async with httpx.AsyncClient(verify=context_of(made.foreign), timeout=STEP_S) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(f"{url}/health")
        async with httpx.AsyncClient(timeout=STEP_S) as client:
            with pytest.raises(httpx.TransportError):
                await client.get(f"{url.replace('https', 'http')}/health")


async def test_http_asks_clients_for_certificates(made: Certificates) -> None:
    """For health too: without one there is no connection."""
    async with serve_http(FakeManager(), tls=made.mtls) as url:
        known = context_of(made.ours, made.client)
        async with httpx.AsyncClient(verify=known, timeout=STEP_S) as client:
            assert (await client.get(f"{url}/health")).status_code == 200
        for pair in (None, made.stranger):
            context = context_of(made.ours, pair)
            async with httpx.AsyncClient(verify=context, timeout=STEP_S) as client:
                with pytest.raises(httpx.TransportError):
                    await client.get(f"{url}/health")


async def test_a_slow_head_is_given_up_under_tls_too(
    made: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bounds of the protocol hold on an encrypted connection."""
    monkeypatch.setitem(protocol._LIMITS_S, protocol._Wait.HEAD, 0.2)
    async with serve_http(FakeManager(), tls=made.tls) as url:
        port = httpx.URL(url).port
        context = context_of(made.ours)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert await asyncio.wait_for(reader.read(), STEP_S) == b""
        writer.close()


def config(**files: Any) -> RouterConfig:
    values = {"host": "127.0.0.1", "grpc_port": 0, "zmq_port": 0}
    return RouterConfig(model_path="fake", **values, **files)  # type: ignore[arg-type]


def test_no_files_no_tls() -> None:
    """As before."""
    assert router_tls(config()) is None


@pytest.mark.parametrize("field", ["tls_cert_file", "tls_key_file", "tls_client_ca_file"])
@pytest.mark.parametrize("content", [None, b"", b"SECRET", b"\xff\xfe"])
def test_a_file_that_is_wrong_stops_the_start(
    made: Certificates, tmp_path: Path, field: str, content: bytes | None
) -> None:
    """By the key of the configuration and the path; what is in it is not shown."""
    path = tmp_path / "wrong.pem"
    if content is not None:
        path.write_bytes(content)
    files = {
        "tls_cert_file": made.server[0],
        "tls_key_file": made.server[1],
        "tls_client_ca_file": made.ours.ca_file,
        field: str(path),
    }
    with pytest.raises(ConfigError) as caught:
        router_tls(config(**files))
    assert (caught.value.key, caught.value.value) == (f"router.{field}", str(path))
    assert "SECRET" not in str(caught.value)


def test_a_key_of_another_certificate_or_with_a_password_stops_the_start(
    made: Certificates, tmp_path: Path
) -> None:
    """Nobody is asked for the password on the terminal."""
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:word", "-out", str(locked)],
        input=Path(made.server[1]).read_bytes(),
        capture_output=True,
        timeout=STEP_S,
        check=True,
    )
    for key in (made.client[1], str(locked)):
        with pytest.raises(ConfigError, match=r"belongs to router\.tls_cert_file") as caught:
            router_tls(config(tls_cert_file=made.server[0], tls_key_file=key))
        assert caught.value.key == "router.tls_key_file"


@pytest.mark.parametrize(
    ("files", "key"),
    [
        ({"tls_ca_file": "/nowhere.pem"}, "tls_ca_file"),
        ({"tls_cert_file": "/nowhere.pem"}, "tls_cert_file"),
        ({"tls_key_file": "/nowhere.pem"}, "tls_key_file"),
    ],
)
def test_a_client_names_its_wrong_file(files: dict[str, Any], key: str) -> None:
    """When it is made, and not when it connects."""
    with pytest.raises(ConfigError) as caught:
        Client("127.0.0.1:1", **files)
    assert caught.value.key == key


def test_a_private_key_has_no_representation(made: Certificates) -> None:
    """So that it cannot come into a log by mistake."""
    tls = made.mtls
    assert "PRIVATE KEY" not in repr(tls) + repr(tls._material) + repr(tls.__dict__)
    assert isinstance(tls.grpc_credentials(), grpc.ServerCredentials)
