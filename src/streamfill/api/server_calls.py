"""The calls of operators about single servers: emptied, and taken back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc.aio

from streamfill.api import replies
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.requests import sendable
from streamfill.api.status_details import from_rpc_error
from streamfill.api.types import Server

if TYPE_CHECKING:
    from streamfill.api.streamfill_pb2_grpc import StreamfillStub

REPLY_TIMEOUT_S = 10.0
"""The router answers at once; a loaded machine may take seconds."""


async def drain_server(
    stub: StreamfillStub, server_id: str, move_answers_after_s: float | None, *, force: bool
) -> Server:
    """As ``Client.drain_server``."""
    with sendable("the server's id"):
        request = pb.DrainServerRequest(
            server_id=server_id, move_answers_after_s=move_answers_after_s, force=force
        )
    try:
        return replies.server(await stub.DrainServer(request, timeout=REPLY_TIMEOUT_S))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def resume_server(stub: StreamfillStub, server_id: str) -> Server:
    """As ``Client.resume_server``."""
    with sendable("the server's id"):
        request = pb.ResumeServerRequest(server_id=server_id)
    try:
        return replies.server(await stub.ResumeServer(request, timeout=REPLY_TIMEOUT_S))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
