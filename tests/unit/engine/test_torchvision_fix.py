"""torchvision without compiled operators imports after `install`; with them it is untouched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_FAKE_EXTENSION = "def _has_ops():\n    return {has_ops}\n"
_FAKE_INIT = "from . import extension\nfrom torchvision import _registrations\n"
_FAKE_REGISTRATIONS = """
import torch
declared = [name for name in ("nms", "qnms") if hasattr(torch.ops.torchvision, name)]
"""


def _run(code: str, *path: Path) -> str:
    """Runs `code` in a fresh interpreter, with `path` in front of its import path."""
    lines = ["import sys", *(f"sys.path.insert(0, {str(entry)!r})" for entry in path), code]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_SRC = Path(__file__).resolve().parents[3] / "src"


def _fake_torchvision(folder: Path, *, has_ops: bool) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(_FAKE_INIT)
    (package / "extension.py").write_text(_FAKE_EXTENSION.format(has_ops=has_ops))
    (package / "_registrations.py").write_text(_FAKE_REGISTRATIONS)
    return folder


_SHOW = """
from streamfill.engine.torchvision_fix import install
install()
install()
import torchvision
print(torchvision._registrations.declared)
"""


def test_install_imports_nothing_and_installs_one_finder() -> None:
    """Arming the fix twice leaves one finder and costs no import of torch."""
    code = """
before = len(sys.meta_path)
from streamfill.engine.torchvision_fix import install
install()
install()
print(len(sys.meta_path) - before, "torch" in sys.modules, "torchvision" in sys.modules)
"""
    assert _run(code, _SRC) == "1 False False"


def test_schemas_are_declared_where_the_operators_do_not_load(tmp_path: Path) -> None:
    """A torchvision that reports no operators finds both schemas when its Python parts load."""
    assert _run(_SHOW, _SRC, _fake_torchvision(tmp_path, has_ops=False)) == "['nms', 'qnms']"


def test_nothing_is_declared_where_the_operators_load(tmp_path: Path) -> None:
    """A torchvision that reports its operators is left alone."""
    assert _run(_SHOW, _SRC, _fake_torchvision(tmp_path, has_ops=True)) == "[]"


def test_the_installed_torchvision_imports() -> None:
    """The torchvision of this environment imports after `install`, and transformers sees it."""
    pytest.importorskip("transformers")
    code = """
from streamfill.engine.torchvision_fix import install
install()
import torchvision
from transformers import LlamaConfig
print(LlamaConfig(hidden_size=64).hidden_size)
"""
    assert _run(code, _SRC) == "64"
