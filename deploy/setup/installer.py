"""The steps of the set-up, standard library only; started by `bootstrap.py`.

1. Compare the stamp inside `.venv` with the lock files, `pyproject.toml` and the Python version.
   Equal: nothing to do.
2. Take the lock, so that two set-ups do not write to one environment; look at the stamp again.
3. Make `.venv`. One that works is kept, whoever made it. One of the set-up's own is made again when
   a killed set-up left it half written, when it is broken, or for the other kind of machine;
   a broken one of somebody else is never touched.
4. Install the locked packages, torch, the packages that must come without their own lists, the
   tools, and streamfill itself as an editable package.
5. Write the stamp.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy.setup.console import Console, StepError

_HERE: Final = Path(__file__).resolve().parent
ROOT: Final = _HERE.parent.parent

OLDEST_PYTHON: Final = (3, 11)
TOO_NEW_PYTHON: Final = (3, 13)

TORCH_VERSION: Final = "2.13.0"
TORCH_CPU_INDEX: Final = "https://download.pytorch.org/whl/cpu"
_NETWORK_REMEDY: Final = (
    "Look at the lines above; most often the package index cannot be reached or pip is not "
    "configured for it. Then run the same command again: what is installed stays."
)
_VENV_REMEDY: Final = (
    "Python's venv module must work: on Debian and Ubuntu install the package python3-venv."
)


@dataclass(frozen=True)
class Options:
    """What to install.

    Attributes:
        has_dev: with the tools for tests and checks.
        has_gpu: SGLang's own list for NVIDIA GPUs in place of the locked CPU set.
    """

    has_dev: bool
    has_gpu: bool


@dataclass(frozen=True)
class Environment:
    """One virtual environment of the repository at `root`."""

    root: Path

    @property
    def folder(self) -> Path:
        """The environment itself."""
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """Present only when the set-up went through; says with what."""
        return self.folder / ".streamfill-setup.json"

    @property
    def unfinished(self) -> Path:
        """Present while packages are written; found at the start: a set-up was killed."""
        return self.folder / ".streamfill-unfinished"

    def fingerprint(self) -> str:
        """Changes with anything that decides what is installed."""
        digest = hashlib.sha256(str(self.root).encode())
        for file in (
            self.folder / "pyvenv.cfg",
            self.root / "pyproject.toml",
            *sorted(_HERE.glob("requirements*")),
        ):
            if not file.is_file():  # no environment yet
                continue
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        digest.update(Path(__file__).read_bytes())
        return digest.hexdigest()

    def is_ours(self) -> bool:
        """Whether a set-up made it, finished or not; nothing else may be deleted."""
        return self.unfinished.exists() or self.stamp.exists()

    def is_ready(self, options: Options) -> bool:
        """Whether the environment already holds what `options` ask for."""
        stamp = self._read_stamp()
        return (
            self.python.exists()
            and not self.unfinished.exists()
            and stamp.get("fingerprint") == self.fingerprint()
            and stamp.get("gpu") is options.has_gpu
            and (stamp.get("dev") is True or not options.has_dev)
        )

    def is_for_gpu(self) -> bool | None:
        """Which of the two package sets is inside; None where no set-up was finished."""
        return self._read_stamp().get("gpu")

    def _read_stamp(self) -> dict[str, Any]:
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # never finished, or damaged: it is set up again
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def write_stamp(self, options: Options) -> None:
        """Notes that everything is installed."""
        content = {
            "fingerprint": self.fingerprint(),
            "dev": options.has_dev,
            "gpu": options.has_gpu,
        }
        self.stamp.write_text(json.dumps(content) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Runs the set-up; returns the exit code."""
    options = _parse(arguments)
    environment = Environment(ROOT)
    if options.has_gpu and not has_nvidia_gpu():
        sys.stderr.write("set-up: --gpu, but no NVIDIA GPU answers; leave the option out\n")
        return 2
    if environment.is_ready(options):
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _exclusive(ROOT / ".setup.lock"):
            if not environment.is_ready(options):
                _install(environment, options)
    except KeyboardInterrupt:
        sys.stderr.write("\nset-up: interrupted; run the same command again to go on\n")
        return 130
    except _SetupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # no driver, or one that hangs: no usable GPU
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


class _SetupError(Exception):
    """A step failed; the text says which, with what output, and what to do."""


def _parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="bootstrap.py",
        description="Makes .venv with everything that streamfill needs. Done once; repeating it "
        "does nothing until the lock files or pyproject.toml change.",
    )
    parser.add_argument(
        "--dev",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with the tools for tests and checks (default: yes)",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="for servers on an NVIDIA GPU: SGLang's own package list in place of the CPU set",
    )
    parsed = parser.parse_args(arguments)
    return Options(has_dev=parsed.dev, has_gpu=parsed.gpu)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file `path`; waits for another set-up, says so.

    Children inherit the lock: where this process is killed outright, a pip that it started still
    keeps the next set-up out until it ends.
    """
    with path.open("a") as handle:
        os.set_inheritable(handle.fileno(), True)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stdout.write("set-up: another one is running here; waiting for it\n")
            sys.stdout.flush()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def _install(environment: Environment, options: Options) -> None:
    console = Console(num_steps=6 + options.has_dev - options.has_gpu)
    if not options.has_gpu and has_nvidia_gpu():
        console.say("set-up: there is an NVIDIA GPU; `make setup GPU=1` installs for it")
    _make_environment(environment, options, console)
    environment.stamp.unlink(missing_ok=True)
    environment.unfinished.touch()
    installer = _Installer(environment, console)
    if options.has_gpu:
        installer.install_list("SGLang's list for GPUs", "requirements-gpu.txt", is_complete=False)
        installer.install_list("The default model", "requirements-gpu-nodeps.txt", is_complete=True)
    else:
        installer.install_list("Locked packages", "requirements-cpu.lock", is_complete=True)
        installer.install_torch()
        installer.install_list(
            "SGLang and the default model", "requirements-cpu-nodeps.lock", is_complete=True
        )
    installer.install_list("Traces and reports", "requirements-bench.lock", is_complete=True)
    if options.has_dev:
        installer.install_list(
            "Tools for tests", "requirements-dev.lock", is_complete=not options.has_gpu
        )
    installer.install_streamfill()
    environment.unfinished.unlink()
    environment.write_stamp(options)


def _make_environment(environment: Environment, options: Options, console: Console) -> None:
    console.begin("Virtual environment")
    was_killed = environment.unfinished.exists()
    is_of_kind = environment.is_for_gpu() in (None, options.has_gpu)
    if not was_killed and is_of_kind and _is_usable(environment.python):
        console.end("already there")
        return
    if environment.folder.exists():
        if not environment.is_ours():
            raise _SetupError(
                f"\nset-up: {environment.folder} does not work, and no set-up made it. "
                "Move it away, then run the same command again."
            )
        shutil.rmtree(environment.folder)
    environment.folder.mkdir()
    environment.unfinished.touch()
    try:
        console.run([sys.executable, "-m", "venv", str(environment.folder)])
    except StepError as error:
        raise _failure("Virtual environment", error, _VENV_REMEDY) from error
    console.end("made again, the last set-up was killed" if was_killed else sys.version.split()[0])


def _is_usable(python: Path) -> bool:
    """Whether `python` runs, is of a version that streamfill supports, and has pip."""
    code = f"import pip, sys; print({OLDEST_PYTHON} <= sys.version_info[:2] < {TOO_NEW_PYTHON})"
    try:
        answer = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # absent or broken
        return False
    return answer.stdout.strip() == "True"


class _Installer:
    """Runs pip inside `environment`, one method per step."""

    def __init__(self, environment: Environment, console: Console) -> None:
        self._environment = environment
        self._console = console
        # No --upgrade anywhere: what is installed in the right version is left alone.
        self._pip = [
            str(environment.python),
            *("-m", "pip", "install", "--disable-pip-version-check", "--no-input"),
        ]

    def install_list(self, title: str, name: str, *, is_complete: bool) -> None:
        """Installs a file of requirements; pip follows dependencies where it is not complete."""
        self._console.begin(title)
        path = _HERE / name
        command = [*self._pip, *(["--no-deps"] if is_complete else []), "-r", str(path)]
        self._run_or_stop(title, command, _count_requirements(path) if is_complete else 0)
        self._console.end()

    def install_torch(self) -> None:
        """Installs torch, the CPU build where it is to be had, and says which it took."""
        title = f"torch {TORCH_VERSION}"
        self._console.begin(title)
        cpu_build = f"torch=={TORCH_VERSION}+cpu"
        # Few retries: without a way to that index the next choice should come soon.
        from_torch = ("--index-url", TORCH_CPU_INDEX, "--retries", "1", "--timeout", "15")
        for taken, arguments in (
            ("CPU build from pip's own index", [cpu_build]),
            ("CPU build from PyTorch's index", [*from_torch, cpu_build]),
        ):
            try:
                self._console.run([*self._pip, *arguments])
            except StepError as error:
                self._console.say(f"      no {taken}: {_last_error(error)}")
            else:
                self._console.end(f"took the {taken}")
                return
        self._run_or_stop(title, [*self._pip, f"torch=={TORCH_VERSION}"], 0)
        self._console.end("took the plain build, which may bring CUDA packages")

    def install_streamfill(self) -> None:
        """Installs this repository as an editable package."""
        title = "streamfill"
        self._console.begin(title)
        editable = ["--no-deps", "--no-build-isolation", "-e", str(self._environment.root)]
        self._run_or_stop(title, [*self._pip, *editable], 0)
        self._console.end()

    def _run_or_stop(self, title: str, command: Sequence[str], num_items: int) -> None:
        try:
            self._console.run(command, num_items)
        except StepError as error:
            # pip ended by itself and took back what it had begun: the environment is sound.
            self._environment.unfinished.unlink(missing_ok=True)
            raise _failure(title, error, _NETWORK_REMEDY) from error


def _count_requirements(path: Path) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    older = sys.version_info < (3, 11)
    wrong_marker = '>= "3.11"' if older else '< "3.11"'
    return sum(
        1 for line in lines if line and not line.startswith("#") and wrong_marker not in line
    )


def _last_error(error: StepError) -> str:
    errors = [line for line in error.tail if line.startswith("ERROR: ")]
    return errors[-1].removeprefix("ERROR: ") if errors else error.tail[-1]


def _failure(title: str, error: StepError, remedy: str) -> _SetupError:
    shown = "\n".join(f"    {line}" for line in error.tail)
    return _SetupError(f"\nset-up: the step {title!r} failed.\n{shown}\n\n{remedy}")
