"""The load generator: replays a trace against a cluster or another server, and measures.

* ``target``: what can be measured, as one Protocol; ``targets/`` holds the implementations.
* ``modes``: what a client does with a request: ``oneshot``, ``warmup``, ``stream``.
* ``arrivals``, ``runner``: when requests start, and the loop that starts them.
* ``records``: what is known of each request afterwards.
* ``metrics``: figures of a run, pure functions over its records.
* ``compare``: several modes on the same arrivals, from cold caches, in alternating order.
* ``report``: one self-contained page of it all.
"""
