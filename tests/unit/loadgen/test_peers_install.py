"""Environments of peers: made once, made again when they are not whole, refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import namedtuple
from pathlib import Path

import pytest

from deploy.setup import installer as setup
from streamfill.engine.version import PINNED_SGLANG_VERSION
from streamfill.loadgen.peers import installer
from streamfill.loadgen.peers.__main__ import main
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.loadgen.peers.installer import install, is_installed
from streamfill.loadgen.peers.recipes import (
    RECIPES,
    TORCH_CPU_INDEX,
    TORCH_REQUIREMENT,
    PeerName,
    Recipe,
    recipe_of,
)

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A peer that needs nothing but Python, in a home of its own."""
    monkeypatch.setenv("STREAMFILL_HOME", str(tmp_path / "home"))
    lock = tmp_path / "peer.lock"
    lock.write_text("# nothing\n")
    return dataclasses.replace(
        RECIPES[PeerName.VLLM], requirements=(lock,), imports="json", needed_bytes=1
    )


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the steps. pip is not called; the environment is empty, without pip."""
    titles: list[str] = []
    run = installer._Steps._run

    def fake(
        self: installer._Steps, title: str, command: tuple[str, ...], cwd: object = None
    ) -> None:
        titles.append(title)
        if title == "virtual environment":
            run(self, title, (*command[:3], "--without-pip", *command[3:]))
        elif title.startswith("import of"):
            run(self, title, command)

    monkeypatch.setattr(installer._Steps, "_run", fake)
    return titles


def test_made_once(recipe: Recipe, commands: list[str]) -> None:
    """The second call finds what the first one made; a changed list has it made again."""
    lines: list[str] = []
    install(recipe, lines.append)
    assert commands == ["virtual environment", "torch, CPU build", "peer.lock", "import of json"]
    assert lines[-1].startswith("vllm: installed in ")
    assert is_installed(recipe)
    install(recipe, lines.append)
    assert len(commands) == 4
    recipe.requirements[0].write_text("new==1\n")
    assert not is_installed(recipe)
    install(recipe, lines.append)
    assert len(commands) == 8


def test_environment_sees_our_package(recipe: Recipe, commands: list[str]) -> None:
    """Its Python imports streamfill and arms the fix for torchvision, but has no plugin of ours."""
    shared = dataclasses.replace(recipe, is_platform_shared=True)
    install(shared, lambda line: None)
    code = (
        "import importlib.metadata as m, sys, streamfill\n"
        "found = [f for f in sys.meta_path if type(f).__name__ == '_OperatorSchemaFinder']\n"
        "names = ('sglang.srt.platforms', 'sglang.srt.plugins')\n"
        "groups = [p.value for name in names for p in m.entry_points(group=name)]\n"
        "print(len(found), groups)"
    )
    python = shared.folder / "bin" / "python"
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "1 ['streamfill.engine.platform:activate']"


def test_unfinished_is_made_again(recipe: Recipe, commands: list[str]) -> None:
    """What an install without a stamp left behind is swept away."""
    leftover = recipe.folder / "half.txt"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("x")
    (recipe.folder / "finished.json").write_text("{")
    install(recipe, lambda line: None)
    assert not leftover.exists()
    assert json.loads((recipe.folder / "finished.json").read_text())["digest"] == recipe.digest()


def test_failed_step(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed step names itself, the last error of its log and the log, in one line."""
    code = "print('ERROR: no such package'); raise SystemExit(1)"
    steps = installer._Steps(recipe, lambda line: None)
    recipe.folder.mkdir(parents=True)
    with pytest.raises(PeerUnavailable) as caught:
        steps._run("the step", (sys.executable, "-c", code))
    text = str(caught.value)
    assert "vllm: the step failed: ERROR: no such package" in text
    assert str(recipe.log_file) in text
    assert "\n" not in text


def test_slow_step(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes too long is ended; until then it says now and then that it works."""
    monkeypatch.setattr(installer, "_NEWS_S", 0.1)
    recipe.folder.mkdir(parents=True)
    lines: list[str] = []

    def hear(line: str) -> None:
        """The step's time is over once it was heard of."""
        lines.append(line)
        if "so far" in line:
            monkeypatch.setattr(installer, "STEP_TIMEOUT_S", 0.0)

    with pytest.raises(PeerUnavailable, match="took more than"):
        installer._Steps(recipe, hear)._run(
            "sleep", (sys.executable, "-c", "import time; time.sleep(60)")
        )
    assert any("so far" in line for line in lines)


def test_full_disk(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is said before anything is downloaded."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
    with pytest.raises(PeerUnavailable, match="0 MiB free"):
        install(recipe, lambda line: None)


def test_no_apt(recipe: Recipe, commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing shared libraries are named where nothing can fetch them."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    needy = dataclasses.replace(
        recipe, imports="not_a_module", debian_packages=("libibverbs1", "liburing2")
    )
    with pytest.raises(PeerUnavailable, match="libibverbs1, liburing2"):
        install(needy, lambda line: None)
    assert not is_installed(needy)


def test_missing_list(recipe: Recipe) -> None:
    """Outside a checkout there are no lists; that is said."""
    absent = dataclasses.replace(recipe, requirements=(Path("/nowhere/x.lock"),))
    with pytest.raises(PeerUnavailable, match="checkout"):
        install(absent, lambda line: None)


def test_command_line(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with one line and exit code 2 where the peer cannot be had."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
    assert main(["install", "vllm"]) == 2
    assert capsys.readouterr().out.startswith("error: ")


@pytest.mark.parametrize("peer", list(PeerName))
def test_lists_are_exact(peer: PeerName) -> None:
    """Each list of a peer is there and pins every version, and none brings a torch of its own."""
    for path in recipe_of(peer.value).requirements:
        lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
        assert lines
        for line in lines:
            assert re.match(r"[a-z0-9-]+==[A-Za-z0-9.+]+( ;.*)?$", line), line
            assert not line.startswith("torch==")


def test_same_software_as_ours() -> None:
    """SGLang and torch of the peers are the versions that our servers run on."""
    assert f"{setup.TORCH_VERSION}+cpu" == TORCH_REQUIREMENT.removeprefix("torch==")
    assert setup.TORCH_CPU_INDEX == TORCH_CPU_INDEX
    text = "".join(each.read_text() for each in RECIPES[PeerName.SGLANG_PD].requirements)
    assert f"sglang=={PINNED_SGLANG_VERSION}\n" in text
    assert sysconfig.get_python_version() in {"3.11", "3.12"}
