"""Every time constant of the router's core, with its reason."""

from __future__ import annotations

HEARTBEAT_INTERVAL_S = 0.25
"""Both ways. Four in the second after which a server is suspected."""

SUSPECT_AFTER_S = 1.0
"""Silent for so long: no new work for it while another server is alive."""

DEAD_AFTER_S = 5.0
"""Silent for so long: its streams go elsewhere. Heartbeats come from a thread of their own, so a
long forward pass never takes that long."""

UNREACHABLE_DEAD_AFTER_S = 1.5
"""As `DEAD_AFTER_S`, when its connection is closed as well: a live server reconnects within 0.1 s,
so the process is gone."""

RETRANSMIT_AFTER_S = 1.0
"""Servers acknowledge from a thread of their own, in milliseconds."""

RETRANSMIT_AT_MOST_EVERY_S = 8.0
"""Upper end of the doubling pause between repetitions that carry a whole prompt."""

PROBE_AFTER_S = 2.0
"""An answer that stands still for so long is asked for again; its last message may be lost."""

GAP_REPEAT_S = 0.25
"""Between two requests for the same missing output."""

HOUSEKEEPING_INTERVAL_S = 0.1
"""Resolution of all of these."""

PLACE_WAIT_S = 0.8
"""`open` and `commit` wait so long for a prefill server; the client hears within a second."""

RESTART_PLACE_WAIT_S = 15.0
"""As `PLACE_WAIT_S`, of a stream that outlived a restart: servers register anew meanwhile, and may
be busy."""

REPLACE_WAIT_S = 30.0
"""A stream that lost its server waits so long for another; the launcher restarts one in less."""

ATTEMPT_HEALTHY_AFTER_S = 30.0
"""An attempt that lived so long does not count towards `MAX_ATTEMPTS` any more."""

RETRY_PAUSE_S = 0.2
"""Before the third attempt in a row, doubled before each further one. The second is at once."""

POLICY_REPEAT_S = 5.0
"""A server changes its policy between two forward passes, which on a CPU may take seconds. What was
lost with a connection is said again after so long."""

MAX_ATTEMPTS = 5
"""A stream whose servers fail so often in a row is likely the cause."""

FINISHED_RETENTION_S = 60.0
"""Late unary calls about an ended stream get its state instead of NOT_FOUND."""

RESUME_WAIT_S = 60.0
"""A restarted router keeps streams without a client for so long. Clients look for it for half of
this time by default."""

MAX_FINISHED_STREAMS = 10_000
"""Ended streams remembered at the same time. Each takes about 10 kB, and 130 bytes for each token
of its answer, whose times are part of the `Done` that a late call is told."""

REGISTER_REPEAT_S = 4.0
"""A server gives the router up after 5 s of silence, so a registration repeated within this time
was sent before the answer to the first one arrived, and means nothing new."""

DRAIN_CANCEL_WAIT_S = 2.0
"""After a drain's time is over, servers get so long to confirm the cancellations."""
