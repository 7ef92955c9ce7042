"""The router process: the client API, tokenisation, each stream's token log, placement, recovery.

Imports neither torch nor sglang.
"""
