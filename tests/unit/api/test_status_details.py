"""What a client makes of the status of a call."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from streamfill.api.status_details import from_rpc_error, trailing_metadata
from streamfill.errors import ErrorCode, InternalError, StreamError, UnavailableError


def failed(
    code: grpc.StatusCode, message: str | None, said: StreamError | None = None
) -> grpc.aio.AioRpcError:
    trailing = () if said is None else trailing_metadata(said)
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), message, None
    )


def test_a_call_that_broke_while_it_wrote() -> None:
    """The connection is what failed, and another try may go well: gRPC calls it INTERNAL."""
    error = from_rpc_error(failed(grpc.StatusCode.INTERNAL, "Internal error from Core"))
    assert isinstance(error, UnavailableError)
    assert "broke" in error.message


@pytest.mark.parametrize("message", ["Stream failed: ZeroDivisionError()", None])
def test_what_the_router_says_stays_what_it_is(message: str | None) -> None:
    """With its details."""
    said = InternalError("it broke", details={"server_id": "prefill-0"})
    error = from_rpc_error(failed(grpc.StatusCode.INTERNAL, message, said))
    assert error.code is ErrorCode.INTERNAL
    assert error.message == (message or "no message")
    assert error.details == {"server_id": "prefill-0"}
