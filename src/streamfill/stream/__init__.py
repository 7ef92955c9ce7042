"""The streaming core of the router: states, splices, incremental tokenisation, detokenisation.

Imports neither torch nor sglang nor transformers. Parts are imported by their full names.
"""
