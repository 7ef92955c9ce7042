"""Other servers, started by the tool to be measured beside streamfill.

* ``recipes``: what is installed for each peer; ``installer``: installs it, once.
* ``process``: one process of a peer, from its start to its end.
* ``sglang_pd``, ``vllm_engine``: start a peer and answer as a ``Target``.
* ``running``: ``running_peer``, the one way in.

Each peer has an environment of its own under ``STREAMFILL_HOME/peers``.
"""

from __future__ import annotations

from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.loadgen.peers.running import PEER_NAMES, running_peer

__all__ = ["PEER_NAMES", "PeerUnavailable", "running_peer"]
