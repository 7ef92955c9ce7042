"""Which streams compute how much next: snapshot in, plan out.

* ``snapshot``: streams and memory as they are, plain data.
* ``plan``: ``StepPlan``, the decision, every field explained.
* ``policy``: the Protocol that all policies follow.
* ``fcfs``: first come, first served, committed streams before all others.

Pure Python: no SGLang, no sockets, no tensors and no clock, so that server, simulator and tests run
the same code.
"""
