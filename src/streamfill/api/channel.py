"""The connection of a client: what is sent with every call on it."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Final, cast

import grpc.aio

from streamfill.errors import InvalidArgumentError

HEADER: Final = "authorization"
_PLAIN: Final = re.compile(r"[!-~]*")
"""What may stand in a header without being written in another way."""


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
