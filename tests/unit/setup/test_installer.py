"""The set-up, without installing anything: what it keeps, what it makes again, what it refuses."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.setup import installer
from deploy.setup.console import Console, StepError
from deploy.setup.installer import Environment, Options

CPU = Options(has_dev=True, has_gpu=False)


class RecordingConsole(Console):
    """Runs nothing, remembers the commands."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(num_steps=9, out=io.StringIO())
        self.commands: list[list[str]] = []
        self._fails = fails

    def run(self, command: object, num_items: int = 0) -> None:
        assert isinstance(command, list)
        self.commands.append([str(word) for word in command])
        if self._fails:
            raise StepError(["ERROR: no network"])


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A repository of its own; nothing in this file may reach the real `.venv`."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return Environment(tmp_path)


def make_working_python(environment: Environment) -> None:
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    environment.python.chmod(0o755)


def test_ready_after_the_stamp(environment: Environment) -> None:
    """A finished set-up is ready, with fewer tools too, but not for the other kind of machine."""
    make_working_python(environment)
    assert not environment.is_ready(CPU)
    environment.write_stamp(CPU)
    assert environment.is_ready(CPU)
    assert environment.is_ready(Options(has_dev=False, has_gpu=False))
    assert not environment.is_ready(Options(has_dev=True, has_gpu=True))


def test_changed_project_file_is_noticed(environment: Environment) -> None:
    """A new dependency in pyproject.toml makes the environment stale."""
    make_working_python(environment)
    environment.write_stamp(CPU)
    (environment.root / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert not environment.is_ready(CPU)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_stamp_means_not_ready(environment: Environment, content: str) -> None:
    """A stamp that cannot be read counts as none."""
    make_working_python(environment)
    environment.stamp.write_text(content)
    assert not environment.is_ready(CPU)


def test_working_environment_is_kept(environment: Environment) -> None:
    """An environment that somebody else made and that works loses no file."""
    make_working_python(environment)
    (environment.folder / "mine").touch()
    console = RecordingConsole()
    installer._make_environment(environment, CPU, console)
    assert (environment.folder / "mine").exists()
    assert console.commands == []


def test_broken_foreign_environment_is_not_deleted(environment: Environment) -> None:
    """What no set-up made is left alone, and the message says what to do."""
    environment.folder.mkdir()
    (environment.folder / "mine").touch()
    with pytest.raises(installer._SetupError, match="Move it away"):
        installer._make_environment(environment, CPU, RecordingConsole())
    assert (environment.folder / "mine").exists()


def test_killed_set_up_is_made_again(environment: Environment) -> None:
    """A half written environment starts from nothing, although its Python works."""
    make_working_python(environment)
    (environment.folder / "half").touch()
    environment.unfinished.touch()
    console = RecordingConsole()
    installer._make_environment(environment, CPU, console)
    assert not (environment.folder / "half").exists()
    assert environment.unfinished.exists()
    assert console.commands == [[sys.executable, "-m", "venv", str(environment.folder)]]


def test_failed_install_keeps_the_environment(environment: Environment) -> None:
    """After an error of pip the next set-up goes on where this one stopped."""
    make_working_python(environment)
    environment.unfinished.touch()
    with pytest.raises(installer._SetupError, match=r"(?s)no network.*pip is not"):
        installer._Installer(environment, RecordingConsole(fails=True)).install_streamfill()
    assert not environment.unfinished.exists()


def test_torch_order(environment: Environment) -> None:
    """torch: the CPU build from pip's own index, then from PyTorch's, then the plain build."""
    console = RecordingConsole(fails=True)
    with pytest.raises(installer._SetupError):
        installer._Installer(environment, console).install_torch()
    own, pytorch, plain = console.commands
    assert own[-1] == pytorch[-1] == "torch==2.13.0+cpu"
    assert "--index-url" not in own
    assert pytorch[pytorch.index("--index-url") + 1] == installer.TORCH_CPU_INDEX
    assert plain[-1] == "torch==2.13.0"
    assert "--index-url" not in plain


def test_torch_says_what_it_took(environment: Environment) -> None:
    """The first choice that works is named in the output."""
    out = io.StringIO()
    console = RecordingConsole()
    console._out = out
    installer._Installer(environment, console).install_torch()
    assert "took the CPU build from pip's own index" in out.getvalue()
    assert len(console.commands) == 1


def test_failed_command_shows_its_last_lines() -> None:
    """The error carries the end of the output and the exit code, not the whole of it."""
    code = "import sys; [print('line', i) for i in range(100)]; sys.exit(3)"
    with pytest.raises(StepError) as caught:
        Console(1, io.StringIO()).run([sys.executable, "-c", code])
    assert "line 99" in caught.value.tail
    assert "line 10" not in caught.value.tail
    assert "exit code 3" in caught.value.tail[-1]


def test_missing_program_is_a_failed_step() -> None:
    """A command that cannot be started is reported like one that failed."""
    with pytest.raises(StepError, match="No such file"):
        Console(1, io.StringIO()).run(["/nonexistent/python"])


def test_without_terminal_there_are_plain_lines() -> None:
    """A log gets no control characters."""
    out = io.StringIO()
    console = Console(2, out)
    console.begin("First")
    console.run([sys.executable, "-c", "print('Collecting x')"], 1)
    console.end("fine")
    assert out.getvalue().startswith("[1/2] First\n      done: fine, ")
    assert "\033" not in out.getvalue()


def test_help_names_the_options() -> None:
    """`--help` ends well, before anything is written."""
    script = installer.ROOT / "deploy/setup/bootstrap.py"
    answer = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "--gpu" in answer.stdout
    assert "--no-dev" in answer.stdout
