"""The environment variables of a peer's processes: ours, less our own Python, plus its threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from streamfill.launcher.plan import environment

_OF_OUR_PYTHON: Final = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")


def peer_variables(folder: Path, *, threads: int) -> dict[str, str]:
    """The whole environment of a process in the peer's environment at ``folder``.

    Threads and memory are set as for our own servers (``launcher.plan``, ``engine.process``), so
    that a comparison is of the servers.
    """
    variables = {
        name: value for name, value in os.environ.items() if name not in _OF_OUR_PYTHON
    } | environment(threads)
    variables |= {
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    unpacked = [str(path) for path in (folder / "root").glob("**/*-linux-gnu") if path.is_dir()]
    if unpacked:
        known = os.environ.get("LD_LIBRARY_PATH")
        variables["LD_LIBRARY_PATH"] = os.pathsep.join([*unpacked, *([known] if known else [])])
    return variables
