"""TLS of the router: the same certificate, and the same check of clients, on gRPC and on HTTP.

1. The files are read before the router serves; what is wrong with them stops the start.
2. Each second their times, sizes and numbers are compared. Certificate and key are replaced one
   after the other, so changed files are read only once they have stayed the same for a second.
3. What was read is put in place at once for both services. Connections that are open stay as they
   are; the next handshake has the new certificate, and the new authority of clients.
4. Files that cannot be read, or do not belong together, change nothing, and are said to be so.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from router.file_version import FileVersion, version_of
from streamfill.config import ROUTER_TLS_OPTIONS, RouterConfig, router_tls_files
from streamfill.errors import ConfigError
from streamfill.observability.logging import log_event
from streamfill.tls import TlsFiles, TlsMaterial, read_tls

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
"""A look costs microseconds; a new certificate is in use after two of them."""

_Versions = tuple[FileVersion | None, ...]


class RouterTls:
    """What both servers need. ``start``, then ``close``, both in the router's loop; without them
    the files are read once."""

    def __init__(self, files: TlsFiles) -> None:
        """
        Raises:
            ConfigError: a file is not what it should be.
        """
        self._files = files
        self._versions = self._look_at_files()
        self._seen = self._versions
        """At the last look; differs from ``_versions`` while files are being replaced."""
        self._material: TlsMaterial = read_tls(files, ROUTER_TLS_OPTIONS)
        self._context = _SwitchingContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.switch_to(_context_of(files))
        self._given = self._material
        """What gRPC has."""
        self._watch: asyncio.Task[None] | None = None

    @property
    def asks_clients(self) -> bool:
        """Whether clients need certificates (mTLS)."""
        return self._files.ca_file is not None

    def start(self) -> None:
        """Look for changes from now on."""
        self._watch = asyncio.create_task(self._follow(), name="router-certificates")

    async def close(self) -> None:
        """Look no more. Idempotent."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a port of gRPC."""
        return grpc.dynamic_ssl_server_credentials(
            _grpc_configuration(self._material),
            self._changed_configuration,  # type: ignore[arg-type]  # gRPC takes None too
            require_client_authentication=self.asks_clients,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For a port of asyncio. TLS 1.2 and later, as Python has it by default."""
        return self._context

    async def look(self) -> None:
        """Read the files again if they changed, and have stayed the same since the last look."""
        versions = await asyncio.to_thread(self._look_at_files)
        settled, self._seen = versions == self._seen, versions
        if versions == self._versions or not settled:
            return
        self._versions = versions
        try:
            material, context = await asyncio.to_thread(self._read)
        except ConfigError as error:
            log_event(
                *(logger, "certificates_not_read"),
                level=logging.ERROR,
                key=error.key,
                file=error.value,
                error=error.remedy,
                consequence="those that were read last stay in force",
            )
            return
        self._material = material
        self._context.switch_to(context)
        log_event(logger, "certificates_read", file=self._files.cert_file)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001  certificates must go on being looked after
                log_event(logger, "certificates_watch_failed", level=logging.ERROR, exception=error)

    def _look_at_files(self) -> _Versions:
        files = self._files
        return tuple(
            None if path is None else version_of(Path(path))
            for path in (files.cert_file, files.key_file, files.ca_file)
        )

    def _read(self) -> tuple[TlsMaterial, ssl.SSLContext]:
        return read_tls(self._files, ROUTER_TLS_OPTIONS), _context_of(self._files)

    def _changed_configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake, in a thread of its own. None: nothing changed."""
        material = self._material
        if material is self._given:
            return None
        self._given = material
        return _grpc_configuration(material)


class _SwitchingContext(ssl.SSLContext):
    """Makes each connection with the context of that moment: a context that is in use cannot be
    changed as a whole, and none forgets an authority."""

    _current: ssl.SSLContext

    def switch_to(self, context: ssl.SSLContext) -> None:
        """From the next connection on."""
        self._current = context

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Called by asyncio for each connection."""
        return self._current.wrap_bio(*args, **options)


def router_tls(config: RouterConfig) -> RouterTls | None:
    """As the configuration has it; None: no TLS.

    Raises:
        ConfigError: as ``RouterTls``.
    """
    files = router_tls_files(config)
    return RouterTls(files) if files else None


def _context_of(files: TlsFiles) -> ssl.SSLContext:
    """
    Raises:
        ConfigError: the files were changed after they had been checked.
    """
    assert files.cert_file is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert_file, files.key_file)
        if files.ca_file is not None:
            context.load_verify_locations(files.ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        remedy = "changed while it was read; the files are read again when they have settled"
        raise ConfigError(ROUTER_TLS_OPTIONS.cert_file, files.cert_file, remedy) from error
    return context


def _grpc_configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    assert material.private_key is not None
    assert material.certificate is not None
    return grpc.ssl_server_certificate_configuration(
        [(material.private_key, material.certificate)], root_certificates=material.authorities
    )
