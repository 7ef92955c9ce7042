"""What is said of the served model and of the router."""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model."""

    id: str
    """Name of its folder; requests may also name its path."""
    root: str
    """Its path on the cluster's machine."""
    created: int
    """Seconds since 1970; when the router started."""
    max_model_len: int
    """Tokens of prompt and answer together."""
    object: Literal["model"] = "model"
    owned_by: Literal["streamfill"] = "streamfill"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models that are served: one."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class ReadyReply(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests can be served now."""

    ready: bool
    reason: str
    """Why not, or that prefill servers write whole answers since there is no decode server. Empty:
    neither."""
