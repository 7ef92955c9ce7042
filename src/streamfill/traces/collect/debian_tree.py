"""HTML documentation from a Debian package, fetched without root and without installing it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.errors import ConfigError
from streamfill.models.home import exclusive, replacing_folder, streamfill_home

DEFAULT_PACKAGE: Final = "python3-doc"
"""The documentation of the Python that the distribution ships; about 13 MB."""
_REMEDY: Final = "use --tree with a folder of HTML pages (for `crawl` also --url)"
_QUERY_TIMEOUT_S: Final = 60.0
"""Reading apt's lists takes seconds on a slow disk."""
_DOWNLOAD_TIMEOUT_S: Final = 600.0
"""A documentation package has tens of megabytes."""
_PACKAGE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.\-]+")
_ORIGIN_FILE: Final = "origin.txt"


@dataclass(frozen=True, kw_only=True)
class DocumentationTree:
    """A folder of HTML pages.

    Attributes:
        folder: holds ``index.html``.
        origin: what it is, for the header of a trace.
    """

    folder: Path
    origin: str


def documentation_tree(package: str = DEFAULT_PACKAGE) -> DocumentationTree:
    """The pages that a Debian package brings; downloaded once into ``STREAMFILL_HOME``.

    A package without pages that depends on one named ``*-doc`` stands for that one.

    Raises:
        ConfigError: there is no apt here, it cannot download the package, or the package has no
        HTML pages.
    """
    if not _PACKAGE_NAME.fullmatch(package):
        raise ConfigError("--package", package, "is no name of a Debian package")
    cache = streamfill_home() / "documentation"
    target = cache / package
    with exclusive(cache / f"{package}.lock"):
        if not (target / _ORIGIN_FILE).exists():
            with replacing_folder(target) as part:
                _download(package, part)
    origin = (target / _ORIGIN_FILE).read_text(encoding="utf-8").strip()
    return DocumentationTree(folder=_page_folder(target, package), origin=origin)


def folder_as_tree(folder: Path) -> DocumentationTree:
    """A folder that the user names.

    Raises:
        ConfigError: there is no HTML page in it.
    """
    if not folder.is_dir() or next(folder.rglob("*.html"), None) is None:
        raise ConfigError("--tree", str(folder), "name a folder with HTML pages in it")
    return DocumentationTree(folder=folder, origin=f"folder {folder.absolute().name}")


def _download(package: str, folder: Path) -> None:
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(program) is None:
            raise ConfigError("--package", package, f"{program} is not here; {_REMEDY}")
    listed = _run(["apt-cache", "depends", package], package, folder, _QUERY_TIMEOUT_S)
    found = re.search(r"^\s*\|?Depends: (\S+-doc)$", listed, re.MULTILINE)
    real_package = found.group(1) if found else package
    _run(["apt-get", "download", real_package], package, folder, _DOWNLOAD_TIMEOUT_S)
    archive = next(folder.glob("*.deb"))
    tree = folder / "tree"
    _run(["dpkg-deb", "-x", str(archive), str(tree)], package, folder, _DOWNLOAD_TIMEOUT_S)
    _page_folder(folder, package)
    version = archive.stem.split("_")[1].replace("%3a", ":")
    archive.unlink()
    (folder / _ORIGIN_FILE).write_text(f"Debian package {real_package} {version}\n", "utf-8")


def _run(command: list[str], package: str, folder: Path, timeout_s: float) -> str:
    """
    Raises:
        ConfigError: the command failed; says how.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        problem = f"`{command[0]}` took over {timeout_s:g} s; {_REMEDY}"
        raise ConfigError("--package", package, problem) from error
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            "--package",
            package,
            f"`{' '.join(command[:2])}` failed ({last_line}); run `apt-get update` as root, "
            f"or {_REMEDY}",
        )
    return done.stdout


def _page_folder(folder: Path, package: str) -> Path:
    """The folder nearest to the top that holds ``index.html``."""
    documentation = folder / "tree" / "usr" / "share" / "doc"
    starts = sorted(documentation.rglob("index.html"), key=lambda page: (len(page.parts), page))
    if not starts:
        raise ConfigError("--package", package, f"brings no HTML pages; {_REMEDY}")
    return starts[0].parent
