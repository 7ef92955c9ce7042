"""The gRPC server of the router: transport, health, reflection. The border to gRPC's errors.

Health, by ``grpc.health.v1``: the empty name says that this process lives; the name of the service
says that new streams are served (`readiness`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from router.access.grpc_guard import KeyInterceptor
from router.access.guarded import GuardedManager
from router.access.key_ring import KeyRing
from router.interface import StreamManager
from router.refusals import Api, Note, not_counted, note_error
from router.service import StreamfillService
from router.service_decode import Undecodable, decoder
from router.tls import RouterTls
from router.traces import MAX_TRACE_PARENT_CHARS, TRACE_PARENT, TRACE_PARENT_KEY
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.status_details import short_message, status_code, trailing_metadata
from streamfill.errors import ConfigError, InternalError, StreamError
from streamfill.observability.logging import log_event
from streamfill.unix_sockets import UNIX_PREFIX, check_unix_path, unix_target

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Streamfill"]
LIVENESS = ""
READINESS = SERVICE.full_name

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A long document in one piece, far below what could fill a memory."""

PING_INTERVAL_MS = 10_000
"""Clients may ping this often without data, and are pinged this often: a stream may be silent for
minutes, and a client whose machine went away must be noticed all the same."""
PING_TIMEOUT_MS = 10_000
HANDSHAKE_MS = 10_000
"""From the connection to the first frames. Who says nothing would else be kept for two minutes."""

MAX_PENDING_CALLS = 10_000
"""That have come and were not begun. gRPC cancels some of what is beyond, and all beyond twice as
many, without a word. Its own limit of 1,000 is reached when so many clients come at once."""

_OPTIONS = (
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING_CALLS),
    ("grpc.so_reuseport", 0),  # or a second router would share the port without a word
    # A call that is not read takes 64 KiB from its client. With the probe that grows to 6 MiB on a
    # fast network, and a client that is to be held back would not notice.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    # Of the ping itself; gRPC's own minute holds whatever is said of keepalive.
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL_MS),
)

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class GrpcServer:
    """Serves one core. ``start``, perhaps ``begin_drain``, ``stop``, in this order."""

    def __init__(
        self,
        manager: StreamManager,
        host: str,
        port: int,
        *,
        keys: KeyRing | None = None,
        tls: RouterTls | None = None,
        on_refused: Note = not_counted,
    ) -> None:
        """Args:
        manager: the core.
        host: an address of this machine, or ``unix:PATH`` for a socket that only its owner may
            use.
        port: 0 for any free one.
        keys: that are asked for. None: none are.
        tls: None: in the clear.
        on_refused: called for each refusal.
        """
        self._manager = manager
        self._host = host
        self._port = port
        self._tls = tls
        self._on_refused = on_refused
        self._service = StreamfillService(
            manager if keys is None else GuardedManager(manager), on_refused
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._readiness_task: asyncio.Task[None] | None = None
        guards = () if keys is None else (KeyInterceptor(keys, on_refused),)
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=guards)

    async def start(self) -> int:
        """Bind and serve. Returns the port, which differs from the wanted one only if that was 0.

        Raises:
            ConfigError: the address cannot be bound.
        """
        handlers = {
            method.name: _handler(method, self._service, self._on_refused)
            for method in SERVICE.methods
        }
        generic = grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        port = self._bind()
        await self._set_readiness(self._manager.info().ready)
        await self._server.start()
        self._readiness_task = asyncio.create_task(self._follow_readiness())
        return port

    async def begin_drain(self) -> None:
        """Readiness is NOT_SERVING from now on; calls go on."""
        await self._stop_following()
        await self._set_readiness(False)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, give those that are open ``grace_s``, then cancel them."""
        await self._stop_following()
        self._service.begin_stop()
        await self._server.stop(grace_s)
        await self._service.close()

    def _bind(self) -> int:
        if self._host.startswith(UNIX_PREFIX):
            return self._bind_unix()
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            address = f"{host}:{self._port}"
            if self._tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, self._tls.grpc_credentials())
        except RuntimeError as error:
            remedy = (
                f"cannot be bound on {self._host}; choose a free port, or 0 for any, "
                "and a router.host that is an address of this machine"
            )
            raise ConfigError("router.grpc_port", self._port, remedy) from error

    def _bind_unix(self) -> int:
        path, key = self._host.removeprefix(UNIX_PREFIX), "router.operator_socket"
        check_unix_path(path, key)
        mask = os.umask(0o177)  # at no moment may anybody else connect
        try:
            return self._server.add_insecure_port(unix_target(path))
        except RuntimeError as error:
            remedy = "cannot be made; the folder must be there and writable: see STREAMFILL_HOME"
            raise ConfigError(key, path, remedy) from error
        finally:
            os.umask(mask)

    async def _follow_readiness(self) -> None:
        told: bool | None = None
        while True:
            ready = self._manager.info().ready
            if ready == told:  # nothing awaits in between, so no change is missed
                ready = await self._manager.wait_readiness_change()
            told = ready
            await self._set_readiness(ready)

    async def _set_readiness(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set(READINESS, status.SERVING if ready else status.NOT_SERVING)

    async def _stop_following(self) -> None:
        if self._readiness_task is not None:
            self._readiness_task.cancel()
            await asyncio.wait({self._readiness_task})


class _Writer:
    """An ``EventWriter`` or ``StreamsWriter`` over a call."""

    def __init__(self, context: _Context) -> None:
        self._context = context

    async def write(self, event: Message) -> None:
        await self._context.write(event)


def _handler(
    method: MethodDescriptor, service: StreamfillService, on_refused: Note
) -> grpc.RpcMethodHandler[Any, Any]:
    """How gRPC calls the service's method for ``method``."""
    behaviour = getattr(service, re.sub("(?<!^)(?=[A-Z])", "_", method.name).lower())
    request = GetMessageClass(method.input_type)
    response = GetMessageClass(method.output_type)
    codecs = (decoder(request), response.SerializeToString)
    run = (behaviour, method.name, on_refused)
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(_streaming(*run), *codecs)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_streaming(*run), *codecs)
    return grpc.unary_unary_rpc_method_handler(_unary(*run), *codecs)


def _unary(
    behaviour: Callable[[Message], Awaitable[Message]], name: str, on_refused: Note
) -> Callable[[Message | Undecodable[Message], _Context], Awaitable[Message]]:
    async def run(request: Message | Undecodable[Message], context: _Context) -> Message:
        try:
            _note_trace_parent(context)
            if isinstance(request, Undecodable):
                raise request.error
            return await behaviour(request)
        except Exception as error:  # noqa: BLE001 - the edge of a call, which answers it
            await _fail(context, name, error, on_refused, request)

    return run


_Request: TypeAlias = Message | Undecodable[Message] | AsyncIterator[Message | Undecodable[Message]]


def _streaming(
    behaviour: Callable[[Any, _Writer], Awaitable[None]], name: str, on_refused: Note
) -> Callable[[_Request, _Context], Awaitable[None]]:
    async def run(request: _Request, context: _Context) -> None:
        try:
            _note_trace_parent(context)
            if isinstance(request, Undecodable):
                raise request.error
            await behaviour(request, _Writer(context))
        except Exception as error:  # noqa: BLE001 - the edge of a call, which answers it
            await _fail(context, name, error, on_refused, request)

    return run


def _note_trace_parent(context: _Context) -> None:
    """A call runs in a task of its own, so what is set here ends with it."""
    for key, value in context.invocation_metadata() or ():
        if key == TRACE_PARENT_KEY and isinstance(value, str):
            TRACE_PARENT.set(value[:MAX_TRACE_PARENT_CHARS])


async def _fail(
    context: _Context, name: str, error: Exception, on_refused: Note, request: Any
) -> NoReturn:
    """End the call with the status of ``error``."""
    stream_id: int | None = getattr(request, "stream_id", None) or None
    if not isinstance(error, StreamError):
        is_gone = context.done()
        log_event(
            logger,
            "client_gone" if is_gone else "call_failed",
            stream_id=stream_id,
            level=logging.DEBUG if is_gone else logging.ERROR,
            call=name,
            error=error,
        )
        if is_gone:
            raise error
        error = InternalError(f"{name} failed: {error!r}")
    note_error(on_refused, Api.GRPC, error)
    await context.abort(status_code(error.code), short_message(error), trailing_metadata(error))
