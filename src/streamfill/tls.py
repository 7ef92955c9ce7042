"""PEM files of TLS, read and checked, for routers and clients. Needs the standard library only.

They are read once, at the start. What gRPC would find wrong with them it says only when somebody
connects, and not to the one who wrote the configuration.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Of one side of a connection. All None: no TLS."""

    cert_file: str | None = None
    """Its certificate, the ones between it and a root behind it; PEM."""
    key_file: str | None = None
    """The private key, not encrypted."""
    ca_file: str | None = None
    """Certificates of those who vouch for the other side."""

    def __bool__(self) -> bool:
        return any((self.cert_file, self.key_file, self.ca_file))


NO_TLS: Final = TlsFiles()


@dataclass(frozen=True, kw_only=True)
class TlsOptions:
    """What the files are called where they were named, for errors."""

    cert_file: str
    key_file: str
    ca_file: str


@dataclass(frozen=True, kw_only=True, repr=False)
class TlsMaterial:
    """What is in the files. Without a representation: a private key is in it."""

    certificate: bytes | None
    private_key: bytes | None
    authorities: bytes | None


def read_tls(files: TlsFiles, options: TlsOptions) -> TlsMaterial:
    """The content of ``files``.

    Raises:
        ConfigError: one cannot be read, or is not what it should be, or certificate and key do not
            belong together; names the option. It never shows what is in a file.
    """
    check_pair(files, options)
    return TlsMaterial(
        certificate=_certificates(files.cert_file, options.cert_file),
        private_key=_private_key(files, options),
        authorities=_certificates(files.ca_file, options.ca_file),
    )


def check_pair(files: TlsFiles, options: TlsOptions) -> None:
    """A certificate and its key are given together.

    Raises:
        ConfigError: one of them is there alone.
    """
    if files.cert_file is not None and files.key_file is None:
        remedy = f"needs {options.key_file}, the file with its private key"
        raise ConfigError(options.cert_file, files.cert_file, remedy)
    if files.key_file is not None and files.cert_file is None:
        remedy = f"needs {options.cert_file}, the file with its certificate"
        raise ConfigError(options.key_file, files.key_file, remedy)


def _certificates(path: str | None, option: str) -> bytes | None:
    if path is None:
        return None
    data = _read(path, option)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        remedy = "has no certificates in PEM form (-----BEGIN CERTIFICATE-----)"
        raise ConfigError(option, path, remedy) from error
    return data


def _private_key(files: TlsFiles, options: TlsOptions) -> bytes | None:
    if files.cert_file is None or files.key_file is None:
        return None
    data = _read(files.key_file, options.key_file)
    try:
        # The password is asked for only where the key is encrypted; without one, on the terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.cert_file, files.key_file, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        remedy = (
            "is no unencrypted private key in PEM form that belongs to "
            f"{options.cert_file}, {files.cert_file}"
        )
        raise ConfigError(options.key_file, files.key_file, remedy) from error
    return data


def _read(path: str, option: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        remedy = f"cannot be read ({error.strerror}); name a file that this user may read"
        raise ConfigError(option, path, remedy) from error
