"""Makes the runtime of one rank; importable by the child processes of a tensor-parallel server."""

from __future__ import annotations

from streamfill.config import ServerConfig
from streamfill.serving.rank_mailbox import RankMailbox


def build(
    config: ServerConfig, model_id: str, rank: int, mailbox: RankMailbox, step_tokens: int
) -> object:
    """The runtime of one rank. sglang is imported here, after the environment was prepared."""
    from decode_server.runtime import DecodeRuntime

    return DecodeRuntime(config, model_id, rank, mailbox, step_tokens)
