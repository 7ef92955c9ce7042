"""The folder with the CURVE keys of a cluster: one pair of those that listen, one of those that
connect.

::

    server.public   what is connected to proves that it has the other half
    server.secret   of the router, the controller and decode servers only
    client.public   who connects proves that it has the other half
    client.secret   of prefill and decode servers

Each file is one key in Z85 (ZeroMQ RFC 32), 40 characters. A secret is readable for its owner only,
and is in no error, log or representation.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zmq

from streamfill.curve.exposure import LinkSettings, check_listening
from streamfill.errors import ConfigError

OPTION: Final = "zmq_keys_dir"
SERVER_PUBLIC: Final = "server.public"
SERVER_SECRET: Final = "server.secret"
CLIENT_PUBLIC: Final = "client.public"
CLIENT_SECRET: Final = "client.secret"
KEY_CHARS: Final = 40
"""Of 32 bytes in Z85."""
_REMAKE: Final = "copy the folder anew, or make new keys with `streamfill zmq-keys create DIR`"
_SECRET_MODE: Final = 0o600
_PUBLIC_MODE: Final = 0o644


@dataclass(frozen=True, kw_only=True)
class ListenKeys:
    """Of a socket that is connected to. Without a representation of its secret."""

    secret: KeySecret
    admitted: frozenset[bytes]
    """Public keys of those that may connect, in Z85."""


@dataclass(frozen=True, kw_only=True)
class ConnectKeys:
    """Of a socket that connects."""

    public: bytes
    secret: KeySecret
    listener: bytes
    """Public key that the other side has to own; all in Z85."""

    def secure(self, socket: zmq.Socket[Any]) -> None:
        """Encrypt what ``socket`` sends, and talk only to who owns ``listener``. Before it
        connects."""
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret.reveal()
        socket.curve_serverkey = self.listener


class KeySecret:
    """Half of a pair that nobody may see, in Z85."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """For ZeroMQ only."""
        return self._value

    def __repr__(self) -> str:
        return "KeySecret(hidden)"

    def __reduce__(self) -> Any:
        raise TypeError("a secret key is not written anywhere")


def create_keys(folder: Path) -> tuple[Path, ...]:
    """New pairs in ``folder``, which is made if need be. Returns the files, secrets last.

    Raises:
        ConfigError: there are keys already, or the folder cannot be written.
    """
    server_public, server_secret = zmq.curve_keypair()
    client_public, client_secret = zmq.curve_keypair()
    contents = {
        SERVER_PUBLIC: (server_public, _PUBLIC_MODE),
        CLIENT_PUBLIC: (client_public, _PUBLIC_MODE),
        SERVER_SECRET: (server_secret, _SECRET_MODE),
        CLIENT_SECRET: (client_secret, _SECRET_MODE),
    }
    made: list[Path] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in contents:
            if (folder / name).exists():
                remedy = f"has {name} already; name another folder, or remove its keys first"
                raise ConfigError("DIR", str(folder), remedy)
        for name, (key, mode) in contents.items():
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(folder / name)
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, mode)  # whatever the umask
                file.write(key + b"\n")
                os.fsync(handle)
    except OSError as error:
        for path in made:
            path.unlink(missing_ok=True)
        remedy = f"cannot be written ({error.strerror}); name a folder of yours"
        raise ConfigError("DIR", str(folder), remedy) from error
    return tuple(made)


def read_listen_keys(folder: str) -> ListenKeys:
    """What a process needs that listens.

    Raises:
        ConfigError: a file is not there, is no key, or is a secret that others may read.
    """
    return ListenKeys(
        secret=_secret(Path(folder) / SERVER_SECRET),
        admitted=frozenset({_key(Path(folder) / CLIENT_PUBLIC)}),
    )


def read_connect_keys(folder: str) -> ConnectKeys:
    """What a process needs that connects.

    Raises:
        ConfigError: as ``read_listen_keys``; or the halves do not belong together.
    """
    path = Path(folder)
    keys = ConnectKeys(
        public=_key(path / CLIENT_PUBLIC),
        secret=_secret(path / CLIENT_SECRET),
        listener=_key(path / SERVER_PUBLIC),
    )
    if zmq.curve_public(keys.secret.reveal()) != keys.public:
        remedy = f"has a {CLIENT_SECRET} that does not belong to its {CLIENT_PUBLIC}; {_REMAKE}"
        raise ConfigError(OPTION, folder, remedy)
    return keys


def keys_to_listen(settings: LinkSettings, option: str, host: str) -> ListenKeys | None:
    """For a socket that will listen at ``host``. None: it does so in the clear.

    Raises:
        ConfigError: it may not, see `exposure`; or the keys cannot be read.
    """
    check_listening(settings, option, host)
    return None if settings.zmq_keys_dir is None else read_listen_keys(settings.zmq_keys_dir)


def keys_to_connect(settings: LinkSettings) -> ConnectKeys | None:
    """For sockets that connect. None: in the clear. Raises ConfigError."""
    return None if settings.zmq_keys_dir is None else read_connect_keys(settings.zmq_keys_dir)


def _secret(path: Path) -> KeySecret:
    key = _key(path)
    mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        remedy = f"may be read or changed by others (mode {stat.S_IMODE(mode):04o}); run chmod 600"
        raise ConfigError(OPTION, str(path), remedy)
    return KeySecret(key)


def _key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            key = file.read(KEY_CHARS + 3).rstrip(b"\r\n")
    except OSError as error:
        remedy = f"cannot be read ({error.strerror}); {_REMAKE}"
        raise ConfigError(OPTION, str(path), remedy) from error
    try:
        if len(key) != KEY_CHARS:
            raise ValueError
        zmq.curve_public(key)
    except (ValueError, zmq.ZMQError):
        remedy = f"is no key of {KEY_CHARS} characters; {_REMAKE}"
        raise ConfigError(OPTION, str(path), remedy) from None
    return key
