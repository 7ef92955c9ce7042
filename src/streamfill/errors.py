"""Every error that streamfill raises on purpose.

::

    StreamfillError
    ├── ConfigError              a wrong value in the configuration; stops the start
    ├── ModelError               a model folder that cannot be read or served
    ├── TraceError               a trace file, or a source of one, that is wrong; says where
    ├── EngineVersionError       an SGLang other than the pinned one
    ├── LaunchError              a process of a cluster did not start (`launcher.errors`)
    ├── ProtocolError            a frame that is no message of ours; its sender is answered
    ├── TransportError           a link or a KV transfer failed; the work is done another way
    └── StreamError              a request was refused or ended; carries an `ErrorCode`
        ├── InvalidArgumentError     INVALID_ARGUMENT     the value can never be accepted
        ├── FailedPreconditionError  FAILED_PRECONDITION  right request, wrong state of the stream
        ├── UnauthenticatedError     UNAUTHENTICATED      no API key, or none that is known
        ├── PermissionDeniedError    PERMISSION_DENIED    this API key may not do that
        ├── StreamNotFoundError      NOT_FOUND            no such stream
        ├── UnavailableError         UNAVAILABLE          no server to do it; try again later
        ├── ResourceExhaustedError   RESOURCE_EXHAUSTED   a limit of this cluster or key is reached
        ├── DeadlineExceededError    DEADLINE_EXCEEDED    the stream's time is over
        ├── CancelledStreamError     CANCELLED            its client gave it up
        └── InternalError            INTERNAL             an invariant of ours is broken

Errors of zmq, grpc and torch.distributed are translated into these at one border each, with
`raise … from`. This module imports neither torch nor grpc, so that every process can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class ErrorCode(StrEnum):
    """Why a request failed. Names and meanings are gRPC's canonical status codes."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    ABORTED = "ABORTED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"
    UNKNOWN = "UNKNOWN"

    def __str__(self) -> str:
        return self.value

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may succeed later without any change by its sender."""
        return self in _RETRYABLE


_RETRYABLE = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.ABORTED})


class StreamfillError(Exception):
    """Root of all errors that streamfill raises on purpose."""


class ConfigError(StreamfillError):
    """A configuration value that cannot work.

    Attributes:
        key: the option, as the user wrote it (``model``, ``prefill[0].port``).
        value: what it was set to.
        remedy: what to do about it, as a sentence.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(f"{key} = {value!r}: {remedy}")
        self.key = key
        self.value = value
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        return type(self), (self.key, self.value, self.remedy)


class ModelError(StreamfillError):
    """A model folder cannot be read, converted or served."""


class TraceError(StreamfillError):
    """A trace file, or a file that is made into one, is wrong; the text names file, line and
    field."""


class EngineVersionError(StreamfillError):
    """The installed SGLang is not the pinned one, on whose insides `engine` depends."""


class ProtocolError(StreamfillError):
    """A frame that is no message of this protocol: garbage, truncated or oversized."""


class TransportError(StreamfillError):
    """A link or a KV transfer failed. Never shown to a client: what is missing is recomputed."""


class StreamError(StreamfillError):
    """A request on a stream was refused, or the stream ended without an answer.

    Attributes:
        code: the canonical code.
        message: one sentence that names the offending value.
        details: further fields for logs and programs, such as ``limit_tokens``.
    """

    code: ErrorCode = ErrorCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: ErrorCode | None = None,
        details: Mapping[str, str | int | float] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.details: Mapping[str, str | int | float] = MappingProxyType(dict(details or {}))

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    @classmethod
    def from_code(
        cls,
        code: ErrorCode,
        message: str,
        *,
        details: Mapping[str, str | int | float] | None = None,
    ) -> StreamError:
        """The error of the class that stands for `code`, as it is read off a wire."""
        return _CLASS_OF.get(code, StreamError)(message, code=code, details=details)


class InvalidArgumentError(StreamError):
    """The value can never be accepted, whatever the state of the stream."""

    code = ErrorCode.INVALID_ARGUMENT


class FailedPreconditionError(StreamError):
    """The request is well formed, but not in this state of the stream. The stream is unharmed."""

    code = ErrorCode.FAILED_PRECONDITION


class UnauthenticatedError(StreamError):
    """The call came without an API key, or with one that is not known here. Never shows the key."""

    code = ErrorCode.UNAUTHENTICATED


class PermissionDeniedError(StreamError):
    """The API key is known, and may not do this."""

    code = ErrorCode.PERMISSION_DENIED


class StreamNotFoundError(StreamError):
    """No stream of this id exists, or not any more."""

    code = ErrorCode.NOT_FOUND


class UnavailableError(StreamError):
    """No server can do this now."""

    code = ErrorCode.UNAVAILABLE


class ResourceExhaustedError(StreamError):
    """A limit of this cluster, or of the API key, is reached."""

    code = ErrorCode.RESOURCE_EXHAUSTED


class DeadlineExceededError(StreamError):
    """The stream's time is over."""

    code = ErrorCode.DEADLINE_EXCEEDED


class CancelledStreamError(StreamError):
    """The client cancelled the stream or went away."""

    code = ErrorCode.CANCELLED


class InternalError(StreamError):
    """An invariant of ours is broken; a bug."""

    code = ErrorCode.INTERNAL


_CLASS_OF: Mapping[ErrorCode, type[StreamError]] = MappingProxyType(
    {
        error.code: error
        for error in (
            InvalidArgumentError,
            FailedPreconditionError,
            UnauthenticatedError,
            PermissionDeniedError,
            StreamNotFoundError,
            UnavailableError,
            ResourceExhaustedError,
            DeadlineExceededError,
            CancelledStreamError,
            InternalError,
        )
    }
)
