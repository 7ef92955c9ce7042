"""The whole wire protocol: frozen msgspec structs in msgpack, one tagged union per direction.

* ``router_to_server``: what the router sends to a prefill or decode server.
* ``server_to_router``: what comes back.
* ``control``: telemetry to the preemption controller, plans from it.
* ``handoff``: what two servers say to each other around a KV transfer.
* ``codec``: bytes to messages and back, with the limits that are checked first.
* ``batch``: several messages in one frame.

Nothing else crosses a socket of ours, and nothing is pickled.
"""

PROTOCOL_VERSION = 9
"""Two processes with different versions refuse each other at registration."""
