"""The log as a file: one SQLite database in WAL mode. Blocks; used by one thread at a time.

Rows are only put behind each other, many with one statement: each statement is one change of
thread for Python, and one transaction for SQLite. Pages of deleted rows are used again, and given
back to the disk when they become many.

With ``synchronous = NORMAL`` a row outlives the process as soon as it is written, but not a power
failure; after one the file is as it was a moment earlier.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from streamfill.errors import ConfigError, StreamfillError

SCHEMA_VERSION: Final = 1
"""In the file's ``user_version``. Another version is another form of the rows or records."""
APPLICATION_ID: Final = 0x53466C67
"""Tells our files from other databases."""
BUSY_S: Final = 5.0
"""A router that was just killed may hold its lock for a moment."""
MAX_ROWS_PER_STATEMENT: Final = 1024
"""Three variables each; SQLite takes 32,766."""
MAX_FREE_PAGES: Final = 4096
"""Of 4 KiB: 16 MiB that nothing uses."""
VACUUM_PAGES: Final = 1024
"""Given back at a time, which takes some milliseconds."""
WAL_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""The write-ahead log is cut to this size when it has been copied into the file."""

_KEY: Final = "router.log_file"
_NOT_OURS: Final = "is no log of streamfill; name another file, or remove it"


class Row(NamedTuple):
    """One record of a stream."""

    row_id: int
    stream_id: int
    """As SQLite has it: a signed number of 64 bits."""
    body: bytes


class LogFailedError(StreamfillError):
    """The file cannot be written any more: a full or broken disk."""


class LogDamagedError(StreamfillError):
    """What is in the file cannot be read."""


class LogFile:
    """An open log. `open` first, `close` last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Make the file, or check the one that is there.

        Raises:
            ConfigError: it cannot be opened, is in use, or of another version or kind.
            LogDamagedError: it cannot be read.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Prompts are in it: nobody else may read them.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            remedy = f"cannot be written ({error.strerror}); name a file in a folder that can"
            raise ConfigError(_KEY, str(self.path), remedy) from error
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._prepare(self._connection)
        except sqlite3.DatabaseError as error:
            self.close()
            raise self._open_error(error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):  # what is not written now is lost anyway
                connection.close()

    def rows(self) -> Iterator[Row]:
        """Everything, in the order of writing.

        Raises:
            LogDamagedError: it cannot be read.
        """
        try:
            found = self._open().execute("SELECT id, stream_id, body FROM records ORDER BY id")
            yield from map(Row._make, found)
        except sqlite3.Error as error:
            raise LogDamagedError(f"{self.path} cannot be read: {error}") from error

    def meta(self, name: str) -> str | None:
        """A fact about the whole file.

        Raises:
            LogDamagedError: it cannot be read.
        """
        try:
            found = self._open().execute("SELECT value FROM meta WHERE name = ?", (name,))
            row = found.fetchone()
        except sqlite3.Error as error:
            raise LogDamagedError(f"{self.path} cannot be read: {error}") from error
        return None if row is None else str(row[0])

    def set_meta(self, name: str, value: str) -> None:
        """Raises LogFailedError."""
        with self._writing() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def insert(self, rows: Sequence[Row]) -> None:
        """Write rows, all or none of each `MAX_ROWS_PER_STATEMENT`. Raises LogFailedError."""
        with self._writing() as connection:
            for begin in range(0, len(rows), MAX_ROWS_PER_STATEMENT):
                some = rows[begin : begin + MAX_ROWS_PER_STATEMENT]
                values = ",".join(["(?,?,?)"] * len(some))
                flat = [value for row in some for value in row]
                connection.execute(f"INSERT INTO records VALUES {values}", flat)

    def replace(self, old_ids: Sequence[int], rows: Sequence[Row]) -> None:
        """Write rows in the place of others, at one moment. Raises LogFailedError."""
        with self._writing() as connection:
            connection.execute("BEGIN")
            try:
                self.insert(rows)
                self.delete(old_ids)
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite may have done it itself
                    connection.execute("ROLLBACK")
                raise

    def delete(self, row_ids: Sequence[int]) -> None:
        """Remove rows. Raises LogFailedError."""
        if row_ids:
            ids = "[" + ",".join(map(str, row_ids)) + "]"
            with self._writing() as connection:
                connection.execute(
                    "DELETE FROM records WHERE id IN (SELECT value FROM json_each(?))", (ids,)
                )

    def shrink(self) -> int:
        """Give some space back to the disk if much is free. Returns the size of the file and of its
        write-ahead log in bytes. Raises LogFailedError."""
        with self._writing() as connection:
            free = connection.execute("PRAGMA freelist_count").fetchone()[0]
            if free > MAX_FREE_PAGES:
                # As a script: its steps are one change of thread together.
                connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
            return sum(file.stat().st_size for file in self._files() if file.exists())

    def remove(self) -> bool:
        """Close it and delete the file: what is in it is not the truth any more. Returns whether
        nothing of it is left that the next one who opens it would take for the truth."""
        self.close()
        gone = [_discard(file) for file in self._files()]
        return all(gone)

    def clear(self) -> None:
        """Remove what there is of streams. Raises LogFailedError, LogDamagedError."""
        self.delete([row.row_id for row in self.rows()])

    def set_aside(self) -> Path:
        """Close it and give the file another name; returns that. One that had it is replaced."""
        self.close()
        aside = self.path.with_name(self.path.name + ".damaged")
        with contextlib.suppress(OSError):
            self.path.replace(aside)
        for file in self._files()[1:]:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        return aside

    def _files(self) -> list[Path]:
        return [self.path, *(Path(f"{self.path}{end}") for end in ("-wal", "-shm"))]

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # One router at a time; with the lock held for good there is no shared memory file either.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        is_new = not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if not is_new and application != APPLICATION_ID:
            raise ConfigError(_KEY, str(self.path), _NOT_OURS)
        if not is_new and version != SCHEMA_VERSION:
            raise ConfigError(
                _KEY,
                str(self.path),
                f"has schema version {version}, this router writes {SCHEMA_VERSION}; start the "
                "router that wrote it, or remove the file and with it the streams that are open",
            )
        if is_new:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        if is_new:
            connection.executescript(
                "BEGIN;"
                "CREATE TABLE records (id INTEGER PRIMARY KEY, stream_id INTEGER NOT NULL,"
                " body BLOB NOT NULL);"
                "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);"
                f"PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {SCHEMA_VERSION};"
                "COMMIT;"
            )

    def _open_error(self, error: sqlite3.DatabaseError) -> StreamfillError:
        if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            remedy = "is in use by another process; each router needs a file of its own"
            return ConfigError(_KEY, str(self.path), remedy)
        if error.sqlite_errorcode in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            remedy = f"cannot be written ({error}); name a file in a folder that can"
            return ConfigError(_KEY, str(self.path), remedy)
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            remedy = f"cannot be written ({error}); make room on the disk, or name another file"
            return ConfigError(_KEY, str(self.path), remedy)
        return LogDamagedError(f"{self.path} cannot be read: {error}")

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LogFailedError(f"{self.path} is closed")
        return self._connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._open()
        except sqlite3.Error as error:
            raise LogFailedError(f"{self.path} cannot be written: {error}") from error
        except OSError as error:
            raise LogFailedError(f"{self.path} cannot be looked at: {error}") from error


def _discard(file: Path) -> bool:
    """A file that cannot be deleted, as in a folder that was locked, is emptied."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        try:
            os.truncate(file, 0)
        except FileNotFoundError:
            return True
        except OSError:
            return False
    return True
