"""Identifiers of the streaming core, told apart by the type checker."""

from __future__ import annotations

from typing import NewType

StreamId = NewType("StreamId", int)
"""One stream. 64 bits, minted by the router, never used twice."""

SeqNo = NewType("SeqNo", int)
"""Position of a message or splice within its stream; the first one is 1."""

ServerId = NewType("ServerId", str)
"""One prefill or decode server of the cluster, as the cluster file names it."""

TokenId = NewType("TokenId", int)
"""Index into the model's vocabulary."""

TransferId = NewType("TransferId", int)
"""One attempt to move KV. A retry gets a new one."""

Epoch = NewType("Epoch", int)
"""Generation of a link between two servers; blocks of an older one are thrown away."""
