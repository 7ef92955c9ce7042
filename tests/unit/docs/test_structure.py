"""docs/structure.md and the README speak of things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from streamfill.cli.main import COMMANDS

ROOT = Path(__file__).parents[3]
STRUCTURE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("router", "prefill_server", "decode_server", "src/streamfill")


def modules_by_package() -> dict[str, list[str]]:
    """The folder of each heading with the files of its bullets."""
    found: dict[str, list[str]] = {}
    folder = ""
    for line in STRUCTURE.splitlines():
        if heading := re.fullmatch(r"### `(.+)/`", line):
            folder = heading[1]
            found[folder] = []
        elif line.startswith("## "):
            folder = ""
        elif folder and (bullet := re.match(r"- `([^`]+)`: \S", line)):
            found[folder].append(bullet[1])
    return found


def test_modules_exist() -> None:
    """Each module that the page lists is in the folder below whose name it stands."""
    listed = modules_by_package()
    assert len(listed) > 10
    missing = [
        f"{k}/{n}" for k, names in listed.items() for n in names if not (ROOT / k / n).exists()
    ]
    assert not missing


def test_no_package_is_missing() -> None:
    """Each package of the code has its place on the page."""
    packages = {
        folder.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for folder in (ROOT / name, *(ROOT / name).rglob("*"))
        if folder.is_dir() and any(folder.glob("*.py"))
    }
    assert packages == set(modules_by_package())


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT) for p in ROOT.glob("docs/structure.md"))
)
def test_paths_exist(page: Path) -> None:
    """Every path in code marks, and every link, leads to something."""
    for text in (STRUCTURE, README):
        paths = {p for p in re.findall(r"`([\w./-]+)`", text) if "/" in p}
        missing = sorted(p for p in paths if not (ROOT / p).exists())
        assert not missing
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link}
    assert links
    assert not sorted(link for link in links if not (ROOT / link).exists())


def test_readme_commands_exist() -> None:
    """The README names every sub-command, and no other."""
    named = set(re.findall(r"streamfill (\w+)(?=[ `\n])", "\n".join(code_of(README))))
    assert named <= set(COMMANDS)
    assert {"up", "status", "run", "demo"} <= named


def code_of(text: str) -> list[str]:
    """Everything in code marks and code blocks."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    return [*blocks, *(f"{mark}\n" for mark in re.findall(r"`([^`\n]+)`", text))]
