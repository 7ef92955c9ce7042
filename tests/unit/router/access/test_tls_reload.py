"""Certificates that are renewed while the router serves, through the real servers."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from router import tls as router_tls_module
from router.tls import RouterTls
from streamfill.api import Client
from streamfill.errors import UnavailableError
from streamfill.tls import TlsFiles
from tests.support.certificates import Authority, make_authority
from tests.unit.router.fake_manager import STEP_S, FakeManager, serve
from tests.unit.router.http.serving import serve_http, until

NAMES = "IP:127.0.0.1,DNS:localhost"


@dataclass
class Served:
    """A router whose files may be replaced."""

    old: Authority
    new: Authority
    """Vouches for the second certificate, so that a client tells by its own check which is used."""
    files: TlsFiles
    tls: RouterTls
    grpc: str = ""
    url: str = ""

    def install(self, authority: Authority, *, ca: bool = False) -> None:
        """Put a certificate of ``authority`` in place, and perhaps the one that clients need."""
        cert, key = authority.certificate("router", NAMES)
        assert self.files.cert_file is not None
        assert self.files.key_file is not None
        _replace(cert, self.files.cert_file)
        _replace(key, self.files.key_file)
        if ca:
            assert self.files.ca_file is not None
            _replace(authority.ca_file, self.files.ca_file)

    def spoil(self, wrong: str) -> None:
        """Make the certificate's file useless in one of three ways."""
        assert self.files.cert_file is not None
        path = Path(self.files.cert_file)
        match wrong:
            case "gone":
                path.unlink()
            case "garbage":
                path.write_bytes(b"SECRET")
            case _:
                _replace(self.new.certificate("router", NAMES)[0], str(path))

    async def look(self) -> None:
        """Twice, since files must have settled."""
        await self.tls.look()
        await self.tls.look()


def _replace(source: str, target: str) -> None:
    part = Path(f"{target}.part")
    shutil.copy(source, part)
    part.replace(target)


@pytest.fixture(params=[False, True], ids=["tls", "mtls"])
async def served(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    old, new = make_authority(tmp_path, "old"), make_authority(tmp_path, "new")
    files = TlsFiles(
        cert_file=str(tmp_path / "router.pem"),
        key_file=str(tmp_path / "router.key"),
        ca_file=str(tmp_path / "clients.pem") if request.param else None,
    )
    cert, key = old.certificate("router", NAMES)
    shutil.copy(cert, tmp_path / "router.pem")
    shutil.copy(key, tmp_path / "router.key")
    shutil.copy(old.ca_file, tmp_path / "clients.pem")
    found = Served(old, new, files, RouterTls(files))
    async with (
        serve(FakeManager(), tls=found.tls) as found.grpc,
        serve_http(FakeManager(), tls=found.tls) as found.url,
    ):
        yield found


async def reached_by(served: Served, trusts: Authority, member_of: Authority) -> tuple[bool, bool]:
    """Whether a client with a certificate of ``member_of`` is served by gRPC, and by HTTP, if it
    trusts only ``trusts``."""
    cert, key = member_of.certificate("client")
    async with Client(
        served.grpc, tls_ca_file=trusts.ca_file, tls_cert_file=cert, tls_key_file=key
    ) as client:
        try:
            grpc = (await client.server_info()).ready
        except UnavailableError:
            grpc = False
    context = ssl.create_default_context(cafile=trusts.ca_file)
    context.load_cert_chain(cert, key)
    async with httpx.AsyncClient(verify=context, timeout=STEP_S) as http:
        try:
            reply = await http.get(f"{served.url}/health")
        except httpx.TransportError:
            return grpc, False
    return grpc, reply.status_code == 200


async def test_a_new_certificate_is_used_without_a_restart(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """By both services, also with another authority for clients; connections that are open stay."""
    old, new = served.old, served.new
    caplog.set_level("INFO")
    assert await reached_by(served, old, old) == (True, True)
    cert, key = old.certificate("open")
    async with Client(
        served.grpc, tls_ca_file=old.ca_file, tls_cert_file=cert, tls_key_file=key
    ) as open_before:
        assert (await open_before.server_info()).ready
        served.install(new, ca=served.tls.asks_clients)
        await served.look()
        assert "certificates_read file=" in caplog.text
        assert await reached_by(served, new, new) == (True, True)
        assert await reached_by(served, old, old) == (False, False)
        if served.tls.asks_clients:
            assert await reached_by(served, new, old) == (False, False)
        assert (await open_before.server_info()).ready


@pytest.mark.parametrize("wrong", ["gone", "garbage", "key of another"])
async def test_bad_files_change_nothing(
    served: Served, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    """The log says so, once for each change; good ones then count."""
    served.spoil(wrong)
    for _ in range(3):
        await served.look()
    assert caplog.text.count("certificates_not_read") == 1
    assert "SECRET" not in caplog.text
    assert await reached_by(served, served.old, served.old) == (True, True)
    served.install(served.new)
    await served.look()
    assert await reached_by(served, served.new, served.old) == (True, True)


async def test_files_are_read_when_they_have_settled(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the replacement of a certificate and that of its key nothing is said to be wrong."""
    assert served.files.cert_file is not None
    assert served.files.key_file is not None
    cert, key = served.new.certificate("router", NAMES)
    _replace(cert, served.files.cert_file)
    await served.tls.look()
    _replace(key, served.files.key_file)
    await served.look()
    assert "certificates_not_read" not in caplog.text
    assert await reached_by(served, served.new, served.old) == (True, True)


async def test_the_files_are_followed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, while it is started."""
    monkeypatch.setattr(router_tls_module, "POLL_INTERVAL_S", 0.01)
    served.tls.start()
    before = served.tls._material
    served.install(served.new)
    await until(lambda: served.tls._material is not before)
    await served.tls.close()
    await served.tls.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "router-certificates"]
