"""Other people's programs of the measurement: SGLang's router, and the profiler py-spy.

They are installed into an environment of their own, below `STREAMFILL_HOME`, as the peers of
`streamfill bench compare` are, and never into ours. Where that cannot be done, what needs them is
left out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from streamfill.loadgen.peers.environment import peer_variables
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.models.home import exclusive, streamfill_home

PACKAGES: Final = ("sglang-router==0.3.2", "py-spy==0.4.3")
INSTALL_TIMEOUT_S: Final = 300.0
"""It took 11 s from a near package index."""
_STAMP: Final = "finished.txt"


def tools_folder() -> Path:
    """The environment, finished or not."""
    return streamfill_home() / "peers" / "router-tools"


def install_tools(say: Callable[[str], None]) -> Path:
    """Makes the environment where it is not there; returns its folder.

    Raises:
        PeerUnavailable: it cannot be made here.
    """
    folder = tools_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = f"{sys.version_info[:2]} {' '.join(PACKAGES)}"
    with exclusive(folder.parent / "router-tools.lock"):
        stamp = folder / _STAMP
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return folder
        say(f"Installing {' and '.join(PACKAGES)} into {folder}")
        log = folder.parent / "router-tools.install.log"
        pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--no-input")
        with log.open("wb") as output:
            for command in (
                (sys.executable, "-m", "venv", "--clear", str(folder)),
                (*pip, "--disable-pip-version-check", *PACKAGES),
            ):
                _run(command, output.fileno(), log, folder)
        stamp.write_text(wanted, encoding="utf-8")
    return folder


def _run(command: tuple[str, ...], output: int, log: Path, folder: Path) -> None:
    try:
        subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=INSTALL_TIMEOUT_S,
            env=peer_variables(folder, threads=1),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PeerUnavailable(f"{' '.join(command[:4])} failed: {error} (log: {log})") from error
