"""Certificates for tests, made by ``openssl`` in a folder of the test."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

TIMEOUT_S = 30.0
DAYS = "2"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True)
class Authority:
    """Vouches for certificates."""

    folder: Path
    ca_file: str

    def certificate(self, name: str, subject_alternatives: str = "") -> tuple[str, str]:
        """Files of a new certificate and its key.

        Args:
            name: of its owner and its files.
            subject_alternatives: such as ``IP:127.0.0.1,DNS:localhost``.
        """
        key, request, cert = (self.folder / f"{name}.{kind}" for kind in ("key", "csr", "pem"))
        _openssl("req", *_NEW_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={subject_alternatives or f'DNS:{name}'}\n"
            "basicConstraints=critical,CA:FALSE\n"
        )
        authority = ("-CA", self.ca_file, "-CAkey", self.folder / "ca.key", "-CAcreateserial")
        _openssl(
            *("x509", "-req", "-in", request, *authority, "-days", DAYS),
            *("-extfile", extensions, "-out", cert),
        )
        return str(cert), str(key)


def make_authority(folder: Path, name: str = "ca") -> Authority:
    """A new one, whose files are in a new folder in ``folder``."""
    if shutil.which("openssl") is None:
        pytest.skip("makes certificates with the program openssl, which is not here")
    own = folder / name
    own.mkdir()
    cert = own / "ca.pem"
    _openssl(
        *("req", "-x509", *_NEW_KEY, "-keyout", own / "ca.key", "-out", cert, "-days", DAYS),
        *("-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign"),
    )
    return Authority(own, str(cert))


def _openssl(*words: str | Path) -> None:
    done = subprocess.run(
        ["openssl", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
