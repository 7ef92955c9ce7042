"""Errors of the core as HTTP answers, in the form of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from streamfill.errors import ErrorCode, InternalError, InvalidArgumentError, StreamError

RETRY_AFTER_S = 1
"""What is too much now may fit as soon as another stream ends, and a restarted server is back
within seconds."""

_STATUSES: Mapping[ErrorCode, int] = MappingProxyType(
    {
        ErrorCode.INVALID_ARGUMENT: 400,
        ErrorCode.OUT_OF_RANGE: 400,
        ErrorCode.UNAUTHENTICATED: 401,
        ErrorCode.PERMISSION_DENIED: 403,
        ErrorCode.NOT_FOUND: 404,
        ErrorCode.ABORTED: 408,
        ErrorCode.FAILED_PRECONDITION: 409,
        ErrorCode.ALREADY_EXISTS: 409,
        ErrorCode.RESOURCE_EXHAUSTED: 429,
        ErrorCode.CANCELLED: 499,
        ErrorCode.UNIMPLEMENTED: 501,
        ErrorCode.UNAVAILABLE: 503,
        ErrorCode.DEADLINE_EXCEEDED: 504,
    }
)
"""Everything else is 500. 408: nobody touched the stream for too long."""

_TYPES: Mapping[int, str] = MappingProxyType(
    {
        408: "timeout_error",
        409: "conflict_error",
        429: "rate_limit_error",
        499: "cancelled_error",
        503: "service_unavailable_error",
        504: "timeout_error",
    }
)


class ErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    """The field that is wrong."""
    code: str | None = None
    details: dict[str, str | int | float] = {}
    """Further facts, such as limits."""


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is an error."""

    error: ErrorObject


def status_of(error: StreamError) -> int:
    """The HTTP status for ``error``."""
    return _STATUSES.get(error.code, 500)


def error_object(error: StreamError) -> ErrorObject:
    """``error`` in the words of the OpenAI API."""
    field = error.details.get("field")
    return ErrorObject(
        message=error.message,
        type=_type_of(status_of(error)),
        param=None if field is None else str(field),
        code=_code_of(error),
        details=dict(error.details),
    )


def error_response(error: StreamError) -> Response:
    """The answer to a request that failed before its answer began."""
    return _response(status_of(error), error_object(error))


async def on_stream_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of ``StreamError``."""
    assert isinstance(error, StreamError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler of ``HTTPException``: what has no counterpart in the core."""
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    message = error.detail
    if error.status_code in (404, 405) and message == HTTPStatus(error.status_code).phrase:
        message = f"there is no {request.method} {request.url.path}; GET /openapi.json lists all"
    found = ErrorObject(message=message, type=_type_of(error.status_code), code=code)
    return _response(error.status_code, found, error.headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """Starlette's handler of everything else. It raises the error again, so that it is logged."""
    return error_response(InternalError(f"{request.url.path} failed: {error!r}"))


def model_not_found(name: str, known: str) -> StreamError:
    """The request is for a model that is not served here."""
    return StreamError(
        f"model {name!r} is not served here; this cluster serves {known!r}",
        code=ErrorCode.NOT_FOUND,
        details={"field": "model"},
    )


def not_supported(name: str, value: object) -> InvalidArgumentError:
    """The request wants something that would change the answer and that is not there."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    return InvalidArgumentError(
        f"{name} is {shown}, which is not supported; leave {name} out", details={"field": name}
    )


def _response(
    status: int, found: ErrorObject, headers: Mapping[str, str] | None = None
) -> Response:
    more = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    return Response(
        msgspec.json.encode(ErrorReply(error=found)),
        status_code=status,
        headers={**more, **(headers or {})},
        media_type="application/json",
    )


def _type_of(status: int) -> str:
    return _TYPES.get(status, "internal_error" if status >= 500 else "invalid_request_error")


def _code_of(error: StreamError) -> str:
    if {"limit_tokens", "num_tokens"} <= set(error.details):
        return "context_length_exceeded"
    if error.code is ErrorCode.NOT_FOUND and error.details.get("field") == "model":
        return "model_not_found"
    return error.code.value.lower()
