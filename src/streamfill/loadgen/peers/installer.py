"""Makes the environment of a peer, once. Nothing else of this machine is touched.

1. Compare the stamp in the peer's folder with the recipe's digest. Equal: nothing to do.
2. Take the lock and look again. What an unfinished or an older install left is deleted.
3. ``venv``; the CPU build of torch; the locked requirements.
4. A link to our own package with a line that mends torchvision, and for SGLang the entry point of
   our CPU platform. Our scheduler plugin has no entry point there, so SGLang's scheduler is stock.
5. Shared libraries that no Python package brings are unpacked into the folder, without root.
6. The peer is imported once, then the stamp is written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from streamfill.launcher import guard
from streamfill.launcher.log_files import last_lines
from streamfill.loadgen.peers.environment import peer_variables
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.loadgen.peers.recipes import TORCH_CPU_INDEX, TORCH_REQUIREMENT, Recipe
from streamfill.models.home import exclusive

Say = Callable[[str], None]

STEP_TIMEOUT_S: Final = 900.0
"""All steps together took about two minutes on two cores with a near package index."""
_NEWS_S: Final = 30.0
"""How often a long step says that it still works."""
_STAMP: Final = "finished.json"


def is_installed(recipe: Recipe) -> bool:
    """Whether the environment is there and made by this recipe.

    Raises:
        PeerUnavailable: the recipe's files are missing.
    """
    try:
        stamp = json.loads((recipe.folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stamp, dict) and stamp.get("digest") == recipe.digest()


def install(recipe: Recipe, say: Say) -> None:
    """Makes the environment where it is not there. To be called in a process's main thread.

    Raises:
        PeerUnavailable: it cannot be made here; what was made stays until the next try.
    """
    digest = recipe.digest()
    if is_installed(recipe):
        return
    if sys.platform != "linux":
        raise PeerUnavailable(f"{recipe.name.value} is installed on Linux only")
    with exclusive(recipe.lock_file):
        if is_installed(recipe):
            return
        started = time.monotonic()
        free = shutil.disk_usage(recipe.folder.parent).free
        if free < recipe.needed_bytes:
            raise PeerUnavailable(
                f"{recipe.folder.parent} has {free >> 20} MiB free, "
                f"{recipe.needed_bytes >> 20} MiB are needed"
            )
        shutil.rmtree(recipe.folder, ignore_errors=True)
        recipe.folder.mkdir(parents=True, exist_ok=True)
        recipe.log_file.write_bytes(b"")
        _Steps(recipe, say).all()
        stamp = {"digest": digest, "seconds": round(time.monotonic() - started, 1)}
        part = recipe.folder / f"{_STAMP}.part"
        part.write_text(json.dumps(stamp), encoding="utf-8")
        part.replace(recipe.folder / _STAMP)
        say(f"{recipe.name.value}: installed in {time.monotonic() - started:.0f} s")


class _Steps:
    """The steps of one install, in order."""

    def __init__(self, recipe: Recipe, say: Say) -> None:
        self._recipe = recipe
        self._say = say
        self._python = recipe.folder / "bin" / "python"
        self._pip = (
            str(self._python),
            *("-m", "pip", "install", "--disable-pip-version-check", "--no-input"),
        )

    def all(self) -> None:
        """Everything but the stamp."""
        name = self._recipe.name.value
        self._say(f"{name}: installing into {self._recipe.folder} (log: {self._recipe.log_file})")
        self._run("virtual environment", (sys.executable, "-m", "venv", str(self._recipe.folder)))
        self._torch()
        for path in self._recipe.requirements:
            self._run(path.name, (*self._pip, "--no-deps", "-r", str(path)))
        self._link_package()
        if self._recipe.debian_packages and not self._imports():
            self._unpack_libraries()
        if not self._imports():
            raise self._failure(f"{self._recipe.imports} cannot be imported")

    def _torch(self) -> None:
        # Not the plain build: it brings gigabytes of CUDA packages.
        if self._tries("torch, CPU build", (*self._pip, TORCH_REQUIREMENT)):
            return
        # Few retries: without a way to that index the answer should come soon.
        from_torch = ("--index-url", TORCH_CPU_INDEX, "--retries", "1", "--timeout", "15")
        self._run("torch, CPU build", (*self._pip, *from_torch, TORCH_REQUIREMENT))

    def _link_package(self) -> None:
        [site_packages] = self._recipe.folder.glob("lib/python3*/site-packages")
        link = self._recipe.folder / "link"
        link.mkdir()
        (link / "streamfill").symlink_to(self._recipe.package_folder, target_is_directory=True)
        lines = f"{link}\n{self._recipe.start_line}\n"
        (site_packages / "streamfill_link.pth").write_text(lines, encoding="utf-8")
        if self._recipe.is_platform_shared:
            info = site_packages / "streamfill_platform-1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                "Metadata-Version: 2.1\nName: streamfill-platform\nVersion: 1\n", encoding="utf-8"
            )
            (info / "entry_points.txt").write_text(
                "[sglang.srt.platforms]\nstreamfill_cpu = streamfill.engine.platform:activate\n",
                encoding="utf-8",
            )

    def _unpack_libraries(self) -> None:
        packages = self._recipe.debian_packages
        listed = ", ".join(packages)
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise PeerUnavailable(
                f"{self._recipe.name.value} needs the shared libraries of Debian's {listed}, and "
                "apt-get is not here to fetch them; install them by hand"
            )
        debs = self._recipe.folder / "debs"
        debs.mkdir()
        try:
            self._run("shared libraries", ("apt-get", "download", *packages), cwd=debs)
        except PeerUnavailable as error:
            raise PeerUnavailable(
                f"apt-get could not download {listed}; run `apt-get update` as root or install "
                f"them by hand (log: {self._recipe.log_file})"
            ) from error
        for deb in sorted(debs.glob("*.deb")):
            self._run(deb.name, ("dpkg-deb", "-x", str(deb), str(self._recipe.folder / "root")))

    def _imports(self) -> bool:
        return self._tries(
            f"import of {self._recipe.imports}",
            (str(self._python), "-c", f"import {self._recipe.imports}"),
        )

    def _tries(self, title: str, command: Sequence[str]) -> bool:
        try:
            self._run(title, command)
        except PeerUnavailable:
            return False
        return True

    def _run(self, title: str, command: Sequence[str], cwd: Path | None = None) -> None:
        """Runs a step. Raises ``PeerUnavailable`` when it fails or takes too long."""
        started = time.monotonic()
        self._say(f"  {title}")
        with self._recipe.log_file.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                (sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd or self._recipe.folder,
                env=peer_variables(self._recipe.folder, threads=1),
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    ran_s = time.monotonic() - started
                    if ran_s > STEP_TIMEOUT_S:
                        raise self._failure(f"{title} took more than {STEP_TIMEOUT_S:.0f} s")
                    try:
                        process.wait(_NEWS_S)
                    except subprocess.TimeoutExpired:
                        self._say(f"  {title}: {time.monotonic() - started:.0f} s so far")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if process.returncode != 0:
            raise self._failure(f"{title} failed")

    def _failure(self, what: str) -> PeerUnavailable:
        errors = [line for line in last_lines(self._recipe.log_file, 40) if "error" in line.lower()]
        said = f": {errors[-1].strip()[:200]}" if errors else ""
        return PeerUnavailable(
            f"{self._recipe.name.value}: {what}{said} (log: {self._recipe.log_file})"
        )
