"""Who gives up memory first: the preemption controller, and a prefill server's side of it.

* ``rule``: streams to victim order, a pure function; the controller and the servers use the same.
* ``state``: what the controller knows, telemetry in, plans out; no sockets and no clock.
* ``controller``: the process around it (``python -m streamfill.preemption --config-file F``).
* ``client``: how a prefill server reports, and hears of plans.
* ``standing``: the plan in force on a server, with the local rule behind it.
* ``timeouts``: every interval, with its reason.

A server never waits for the controller: it applies the newest plan that it has, and the local rule
without one.
"""
