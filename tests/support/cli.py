"""The command ``streamfill``, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 120.0
"""Importing and answering takes about a second; a busy machine may need more."""


def run_cli(
    *words: str | Path, home: Path | None = None, timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end and return its exit code and what it wrote.

    Args:
        home: its ``STREAMFILL_HOME``; by default one without any cluster.
    """
    return subprocess.run(
        [sys.executable, "-m", "streamfill.cli.main", *map(str, words)],
        env={**os.environ, "STREAMFILL_HOME": str(home or "/nonexistent/streamfill")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
