"""Traces: requests whose context arrives piece by piece, as files.

* ``format``: the records of a trace file, schema 1.
* ``files``: reads and writes them, one line at a time.
* ``script``: one request as what a client has to send, and when.
* ``describe``: what is in a file; ``generate``: files of the published workloads, at any scale.
* ``importers``, ``collect``: traces of others as ours, and real ones anew.

`docs/traces.md` documents the format for people who write files of their own.
"""
