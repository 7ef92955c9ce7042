"""Which streams compute how much next, and who gives up memory for it: snapshot in, plan out.

* ``snapshot``: streams and memory as they are, plain data, and what changed about them.
* ``plan``: ``StepPlan``, the decision, every field explained.
* ``policy``: the Protocol that all policies follow; ``registry`` has them by name.
* ``step``: who still fits into a step. ``turns``: streams in the order of their turn, kept up to
  date at the cost of what changed. ``turn_policy``: a policy made of both and three keys.
* ``published`` (default, fcfs, lcas, mcps), ``laps``, ``edf``, ``adaptive``: the policies.
* ``learning``: what a step costs and when a commit may be expected, from what was seen.
* ``harness``: one server in virtual time. ``bench``: what a decision costs.

Pure Python: no SGLang, no sockets, no tensors and no clock, so that server, harness and tests run
the same code.
"""
