"""The connection of a client: how it is encrypted, and what is sent with every call on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, cast

import grpc
import grpc.aio

from streamfill.errors import InvalidArgumentError
from streamfill.tls import TlsFiles, TlsOptions, read_tls

TLS_OPTIONS: Final = TlsOptions(
    cert_file="tls_cert_file", key_file="tls_key_file", ca_file="tls_ca_file"
)
HEADER: Final = "authorization"
_PLAIN: Final = re.compile(r"[!-~]*")
"""What may stand in a header without being written in another way."""


def credentials(files: TlsFiles) -> grpc.ChannelCredentials | None:
    """What a connection needs to be encrypted; None: it is not to be. Without a ``ca_file`` the
    authorities that gRPC comes with vouch for the router.

    Raises:
        ConfigError: a file cannot be read, or is not what it should be.
    """
    if not files:
        return None
    found = read_tls(files, TLS_OPTIONS)
    return grpc.ssl_channel_credentials(
        root_certificates=found.authorities,
        private_key=found.private_key,
        certificate_chain=found.certificate,
    )


def open_channel(
    target: str,
    options: Sequence[tuple[str, Any]],
    secured: grpc.ChannelCredentials | None,
) -> grpc.aio.Channel:
    """A connection, made when it is needed. To be called in the loop that will use it."""
    if secured is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, secured, options=options)


def with_key(channel: grpc.aio.Channel, api_key: str) -> grpc.aio.Channel:
    """The channel for a generated stub; its calls carry the key, if there is one."""
    return cast("grpc.aio.Channel", _KeyedChannel(channel, api_key)) if api_key else channel


class _KeyedChannel:
    """What a generated stub uses of a channel.

    gRPC's interceptors could do it too, but they put calls of another kind in the place of its own,
    which end and are cancelled in other ways.
    """

    def __init__(self, channel: grpc.aio.Channel, api_key: str) -> None:
        self._channel = channel
        self._metadata = ((HEADER, f"Bearer {api_key}"),)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """As of the channel."""
        return partial(self._channel.unary_unary(*args, **kwargs), metadata=self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """As of the channel."""
        return partial(self._channel.unary_stream(*args, **kwargs), metadata=self._metadata)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """As of the channel."""
        return partial(self._channel.stream_unary(*args, **kwargs), metadata=self._metadata)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """As of the channel."""
        return partial(self._channel.stream_stream(*args, **kwargs), metadata=self._metadata)


def checked_key(api_key: str) -> str:
    """The key, when it can be sent.

    Raises:
        InvalidArgumentError: it cannot; the error does not show it.
    """
    if _PLAIN.fullmatch(api_key) is None:
        place = next(n for n, char in enumerate(api_key) if not "!" <= char <= "~")
        raise InvalidArgumentError(
            f"the API key has a blank, a line end or another character at place {place} that no "
            "key has; give it as `streamfill keys add` printed it"
        )
    return api_key


def checked_target(target: str) -> str:
    """The target, when it may be one of gRPC.

    Raises:
        InvalidArgumentError: it is a URL of HTTP, which gRPC would take for a strange host.
    """
    if target.lower().startswith(("http://", "https://")):
        raise InvalidArgumentError(
            f"the address {target} is a URL of HTTP; give HOST:PORT of gRPC, as `streamfill up` "
            "prints it"
        )
    return target
