"""What each peer's environment is made of. Plain data, and the digest that names it."""

from __future__ import annotations

import enum
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import streamfill
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.models.home import streamfill_home

TORCH_REQUIREMENT: Final = "torch==2.13.0+cpu"
TORCH_CPU_INDEX: Final = "https://download.pytorch.org/whl/cpu"
_FORMAT: Final = 1
"""Of the environments; another number has all of them made again."""

_FIX_TORCHVISION: Final = "import streamfill.engine.torchvision_fix as fix; fix.install()"
_PACKAGE: Final = Path(streamfill.__file__).resolve().parent
_CHECKOUT: Final = _PACKAGE.parent.parent


class PeerName(enum.Enum):
    """A peer, by the name that tables and options use."""

    SGLANG_PD = "sglang-pd"
    VLLM = "vllm"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the environment of a peer is made.

    Attributes:
        requirements: lock files, complete, so that they are installed without dependencies.
        imports: a module that must be importable in the finished environment.
        is_platform_shared: whether SGLang there finds streamfill's CPU platform.
        debian_packages: shared libraries that no Python package brings.
        needed_bytes: room on the disk.
    """

    name: PeerName
    requirements: tuple[Path, ...]
    imports: str
    is_platform_shared: bool
    debian_packages: tuple[str, ...]
    needed_bytes: int

    @property
    def folder(self) -> Path:
        """The environment, finished or not."""
        return streamfill_home() / "peers" / self.name.value

    @property
    def log_file(self) -> Path:
        """What pip and its like said while it was made."""
        return self.folder.parent / f"{self.name.value}.install.log"

    @property
    def lock_file(self) -> Path:
        """Held by the process that makes it."""
        return self.folder.parent / f"{self.name.value}.lock"

    @property
    def package_folder(self) -> Path:
        """Our own package, which the environment sees."""
        return _PACKAGE

    @property
    def start_line(self) -> str:
        """Executed by each Python of the environment when it starts."""
        return _FIX_TORCHVISION

    def digest(self) -> str:
        """Changes with everything that decides what is installed.

        Raises:
            PeerUnavailable: a list of requirements is missing.
        """
        state = hashlib.sha256(f"{_FORMAT} {sys.version_info[:2]} {_PACKAGE}".encode())
        state.update(f"{TORCH_REQUIREMENT} {self.debian_packages} {self.start_line}".encode())
        for path in self.requirements:
            try:
                state.update(path.read_bytes())
            except OSError as error:
                raise PeerUnavailable(
                    f"{path} is missing; peers are installed from a checkout of the repository"
                ) from error
        return state.hexdigest()


_SETUP: Final = _CHECKOUT / "deploy" / "setup"
_PEERS: Final = _CHECKOUT / "deploy" / "peers"
_GIB: Final = 1 << 30

RECIPES: Final = {
    PeerName.SGLANG_PD: Recipe(
        name=PeerName.SGLANG_PD,
        requirements=(
            _SETUP / "requirements-cpu.lock",
            _SETUP / "requirements-cpu-nodeps.lock",
            _PEERS / "requirements-sglang-pd.lock",
        ),
        imports="mooncake.engine",
        is_platform_shared=True,
        # What mooncake.engine links to; libnl is what the first two link to.
        debian_packages=(
            "libibverbs1",
            "librdmacm1",
            "libnuma1",
            "liburing2",
            "libnl-3-200",
            "libnl-route-3-200",
        ),
        needed_bytes=4 * _GIB,
    ),
    PeerName.VLLM: Recipe(
        name=PeerName.VLLM,
        requirements=(_PEERS / "requirements-vllm.lock",),
        imports="vllm",
        is_platform_shared=False,
        debian_packages=(),
        needed_bytes=5 * _GIB,
    ),
}
"""Sizes seen: 2.9 GB and 3.5 GB, plus what pip unpacks on the way."""


def recipe_of(name: str) -> Recipe:
    """The recipe of a peer.

    Raises:
        PeerUnavailable: there is no such peer.
    """
    try:
        return RECIPES[PeerName(name)]
    except ValueError as error:
        known = ", ".join(peer.value for peer in PeerName)
        raise PeerUnavailable(f"no peer is named {name!r}; there are {known}") from error
