"""``streamfill profile``: what recomputing, swapping and handing over cost on the machine at hand.

* ``fits``: measured points to coefficients with a physical meaning; pure.
* ``profile_file``: the result as a file that servers load.
* ``recompute``: points of a running cluster, by its own account of each forward pass.
* ``copies``: points of the swap engine and of the KV transport, with torch alone.
* ``page``: the curves, drawn.
"""
