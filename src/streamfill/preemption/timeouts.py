"""Every interval between prefill servers and the controller, and what follows from it."""

from __future__ import annotations

REPORT_S = 0.5
"""A server reports this often, also when nothing changed. Segments of one stream typically come
0.7 s apart, so a plan is about one segment old at most."""

REFRESH_S = 1.0
"""A plan that did not change is sent again after this long, in answer to the next report: it is the
controller's sign of life, and makes good for a plan that got lost."""

CONTROLLER_ALIVE_S = 3.0
"""Two lost plans, or a forward pass of a second. A server that heard none for this long uses the
local rule."""

SERVER_TIMEOUT_S = 10.0
"""Longer than any forward pass: reports come from the scheduler's thread. A server silent for this
long is forgotten; its next report introduces it anew."""
