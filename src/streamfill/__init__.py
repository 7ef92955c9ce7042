"""streamfill: LLM serving that starts prefill while the prompt is still arriving.

Importing this package is free of weight: neither torch nor sglang nor grpc is loaded. The parts
are imported by their full names, e.g. `streamfill.errors` or `streamfill.api.client`.
"""

from __future__ import annotations

__version__ = "0.1.0"
"""Version of the distribution; a test keeps it equal to the one in pyproject.toml."""

__all__ = ["__version__"]
