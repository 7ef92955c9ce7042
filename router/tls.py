"""TLS of the router: the same certificate, and the same check of clients, on gRPC and on HTTP."""

from __future__ import annotations

import ssl

import grpc

from streamfill.config import ROUTER_TLS_OPTIONS, RouterConfig, router_tls_files
from streamfill.tls import TlsFiles, TlsMaterial, read_tls


class RouterTls:
    """What both servers need. The files are read when it is made, and not again."""

    def __init__(self, files: TlsFiles) -> None:
        """
        Raises:
            ConfigError: a file is not what it should be.
        """
        self._files = files
        self._material: TlsMaterial = read_tls(files, ROUTER_TLS_OPTIONS)

    @property
    def asks_clients(self) -> bool:
        """Whether clients need certificates (mTLS)."""
        return self._files.ca_file is not None

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a port of gRPC."""
        found = self._material
        assert found.private_key is not None
        assert found.certificate is not None
        return grpc.ssl_server_credentials(
            [(found.private_key, found.certificate)],
            root_certificates=found.authorities,
            require_client_auth=self.asks_clients,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For a port of asyncio. TLS 1.2 and later, as Python has it by default."""
        assert self._files.cert_file is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._files.cert_file, self._files.key_file)
        if self._files.ca_file is not None:
            context.load_verify_locations(self._files.ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def router_tls(config: RouterConfig) -> RouterTls | None:
    """As the configuration has it; None: no TLS.

    Raises:
        ConfigError: as ``RouterTls``.
    """
    files = router_tls_files(config)
    return RouterTls(files) if files else None
