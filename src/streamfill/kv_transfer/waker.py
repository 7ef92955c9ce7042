"""Waking a thread that waits on file descriptors."""

from __future__ import annotations

import socket
import threading


class Waker:
    """A file descriptor that is readable between `set` and `clear`.

    Owned by the waiting side, which closes it. Any thread may call `set`, also after `close`.
    """

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._lock = threading.Lock()
        self._is_set = False
        self._closed = False

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._read.fileno()

    def set(self) -> None:
        """Make the descriptor readable. Never blocks: at most one byte is under way."""
        with self._lock:
            if not self._is_set and not self._closed:
                self._write.send(b"\0")
                self._is_set = True

    def clear(self) -> None:
        """Make it unreadable. To be called *before* looking for what there is to do."""
        with self._lock:
            if self._is_set and not self._closed:
                self._read.recv(1)
                self._is_set = False

    def close(self) -> None:
        """Give both descriptors back."""
        with self._lock:
            self._closed = True
            self._read.close()
            self._write.close()
