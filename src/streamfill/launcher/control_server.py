"""The launcher's control socket: by which `streamfill servers` reaches a cluster that runs.

A Unix socket in the cluster's state folder, for the user who started the cluster: its file has mode
0600, and whoever connects is asked of the kernel as well. A request that is under way when its
client goes away is carried out all the same; when the cluster stops, it is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, assert_never

import msgspec

from streamfill.errors import ConfigError
from streamfill.launcher.control_messages import (
    CONTROL_SOCKET,
    MAX_LINE_BYTES,
    AddServer,
    Outcome,
    Progress,
    Refused,
    RemoveServer,
    Reply,
    Request,
)
from streamfill.launcher.roster import Roster, Tell, explained

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 10.0
"""A client says at once what it wants."""
_DECODER: Final[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(Request)


@contextmanager
def short_path(folder: Path) -> Iterator[str]:
    """The control socket in `folder` by a path that is short enough for a Unix socket (107 bytes,
    unix(7)), however long that of the folder is.

    Raises:
        OSError: there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{CONTROL_SOCKET}"
    finally:
        os.close(descriptor)


@asynccontextmanager
async def control_socket(folder: Path, roster: Roster) -> AsyncIterator[None]:
    """Serves inside the block. The caller holds the folder, so a file that is there is an old one.

    Raises:
        ConfigError: the socket cannot be made.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await _serve(roster, reader, writer)
        finally:
            tasks.discard(task)

    with _bound(folder) as listener:
        server = await asyncio.start_unix_server(serve, sock=listener, limit=MAX_LINE_BYTES)
        try:
            yield
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _bound(folder: Path) -> Iterator[socket.socket]:
    path = folder / CONTROL_SOCKET
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        mask = os.umask(0o177)  # at no moment may anybody else connect
        try:
            path.unlink(missing_ok=True)
            with short_path(folder) as short:
                listener.bind(short)
        except OSError as error:
            remedy = f"cannot be made ({error.strerror}); name another folder by STREAMFILL_HOME"
            raise ConfigError("STREAMFILL_HOME", str(path), remedy) from error
        finally:
            os.umask(mask)
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


async def _serve(
    roster: Roster, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    def tell(reply: Reply) -> None:
        if not writer.is_closing():
            writer.write(msgspec.json.encode(reply) + b"\n")

    try:
        outcome = await _outcome(roster, reader, writer, lambda text: tell(Progress(text=text)))
    except asyncio.CancelledError:
        outcome = Refused(reason="the cluster is being stopped")
    tell(outcome)
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):  # the client is gone, or does not read
        await asyncio.wait_for(writer.wait_closed(), REQUEST_TIMEOUT_S)


async def _outcome(
    roster: Roster,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    tell: Tell,
) -> Outcome:
    try:
        line = await asyncio.wait_for(reader.readline(), REQUEST_TIMEOUT_S)
        request = _DECODER.decode(line)
    except TimeoutError:
        return Refused(reason=f"no request came within {REQUEST_TIMEOUT_S:g} s")
    except (ValueError, msgspec.DecodeError) as error:
        return Refused(reason=f"the request cannot be read: {error}")
    if not _is_own_user(writer):
        return Refused(reason="only the user who started the cluster may change it")
    try:
        match request:
            case AddServer():
                return await roster.add(request, tell)
            case RemoveServer():
                return await roster.remove(request, tell)
            case _:
                assert_never(request)
    except Exception as error:  # noqa: BLE001 - the edge of a request, which answers it
        logger.warning("request failed request=%s: %r", request, error)
        return Refused(reason=explained(error))


def _is_own_user(writer: asyncio.StreamWriter) -> bool:
    """By the kernel's word: SO_PEERCRED, unix(7)."""
    peer = writer.get_extra_info("socket")
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return user in (0, os.getuid())
