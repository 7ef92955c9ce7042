"""`python -m streamfill.models`: converts the default model; part of `make setup`."""

from __future__ import annotations

import sys

from streamfill.errors import StreamfillError
from streamfill.models.default import (
    DEFAULT_MODEL_NAME,
    ensure_default_model,
    is_default_model_ready,
)
from streamfill.models.progress import show_progress


def main() -> int:
    """Converts the default model where that was not done yet; returns the exit code."""
    try:
        if not is_default_model_ready():
            with show_progress(f"Converting {DEFAULT_MODEL_NAME}") as progress:
                ensure_default_model(progress)
    except StreamfillError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
