"""Which server gets a stream: policies by name, ours and those of other packages.

Pure: plain data in, plain data out, no sockets and no clock. docs/placement.md explains them.
"""

from router.placement.loads import (
    PREFER_SLACK,
    STREAM_WEIGHT_TOKENS,
    ServerLoad,
    ServerState,
    choose_server,
)

__all__ = [
    "PREFER_SLACK",
    "STREAM_WEIGHT_TOKENS",
    "ServerLoad",
    "ServerState",
    "choose_server",
]
