"""API keys on gRPC: calls without a good one are refused before their messages are read."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import grpc.aio

from router.access.account import CALLER
from router.access.key_ring import HEADER, KeyRing
from router.refusals import Api, Note, not_counted, note_error
from streamfill.api.status_details import short_message, status_code, trailing_metadata
from streamfill.errors import StreamError, UnauthenticatedError
from streamfill.observability.logging import RateLimited, log_event

logger = logging.getLogger(__name__)

OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
"""Probes of orchestrators carry no keys, and what reflection tells is in the repository."""

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

if TYPE_CHECKING:  # the stubs are generic, the class is not
    _ServerInterceptor: TypeAlias = grpc.aio.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = grpc.aio.ServerInterceptor


class KeyInterceptor(_ServerInterceptor):
    """Lets calls through that carry a key, and notes whose they are."""

    def __init__(self, keys: KeyRing, on_refused: Note = not_counted) -> None:
        self._keys = keys
        self._on_refused = on_refused
        self._refusals = RateLimited()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Called by gRPC for each call, in the task that will serve it."""
        details = handler_call_details
        if details.method.startswith(OPEN_SERVICES):
            return await continuation(details)
        headers = [
            value if isinstance(value, str) else value.decode("latin-1")
            for key, value in details.invocation_metadata or ()
            if key == HEADER
        ]
        try:
            account = self._keys.authenticate(headers)
            account.take_request()
        except StreamError as error:
            return self._refusal(error, details.method)
        CALLER.set(account)
        return await continuation(details)

    def _refusal(self, error: StreamError, method: str) -> _Handler:
        async def refuse(messages: AsyncIterator[bytes], context: _Context) -> None:
            note_error(self._on_refused, Api.GRPC, error)
            if isinstance(error, UnauthenticatedError) and self._refusals.allow():
                log_event(
                    *(logger, "unauthenticated"),
                    level=logging.WARNING,
                    call=method[:100],
                    peer=context.peer(),
                    reason=error.message,
                    num_suppressed=self._refusals.num_suppressed,
                )
            code, message = status_code(error.code), short_message(error)
            await context.abort(code, message, trailing_metadata(error))

        # Of this kind whatever the call is: no message is waited for, and none is parsed.
        return grpc.stream_stream_rpc_method_handler(refuse)
