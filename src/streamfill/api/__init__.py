"""The client API: ``Client`` for asyncio, its twin ``SyncClient``, and what they return.

Needs nothing but grpcio and protobuf.
"""

from __future__ import annotations

from streamfill.api.answer import Answer
from streamfill.api.client import Client
from streamfill.api.stream import Stream
from streamfill.api.sync import SyncClient
from streamfill.api.sync_stream import SyncAnswer, SyncStream
from streamfill.api.types import (
    ClusterInfo,
    Metadata,
    Mode,
    PolicyResult,
    Progress,
    Result,
    SamplingOptions,
    Server,
    ServerStreams,
    StreamDecision,
    Timing,
    Token,
    Usage,
)

__all__ = [
    "Client",
    "SyncClient",
    "Stream",
    "SyncStream",
    "Answer",
    "SyncAnswer",
    "Token",
    "Progress",
    "Result",
    "Usage",
    "Metadata",
    "Timing",
    "ClusterInfo",
    "Server",
    "PolicyResult",
    "ServerStreams",
    "StreamDecision",
    "Mode",
    "SamplingOptions",
]
