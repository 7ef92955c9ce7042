"""The log of a router: found at its start with the streams that an earlier process left, and closed
at its end.

1. `open` reads the file. A damaged one is set aside, and the router starts without its streams.
2. The manager makes sessions of what was found.
3. `start` begins to write; `journal` gives each new stream its journal.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from router.events import EventQueue
from router.recovery.interface import Ticket
from router.recovery.journal import Journal
from router.recovery.left_drains import LeftDrain, read_drains, write_drains
from router.recovery.log_file import LogDamagedError, LogFailedError, LogFile
from router.recovery.log_writer import LogMetrics, LogWriter
from router.recovery.replay import LoggedStream, replay
from streamfill.errors import ConfigError
from streamfill.observability.logging import log_event
from streamfill.stream.ids import ServerId, StreamId

logger = logging.getLogger(__name__)

TRY_AGAIN_S = 10.0
"""Between two tries to begin a log again that has failed. Each takes a millisecond or two."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Keeper:
    """Owned by the manager. `open`, then `start`; `close` at the end."""

    def __init__(self, path: Path, model_facts: str, metrics: LogMetrics) -> None:
        """
        Args:
            path: of the file.
            model_facts: what tells the model from others: token ids of another one mean nothing.
            metrics: of the router.
        """
        self._file = LogFile(path)
        self._model_facts = model_facts
        self._metrics = metrics
        self._writer: LogWriter | None = None
        self._found: Mapping[int, LoggedStream] = {}
        self._bad_rows: list[int] = []
        self._is_same_boot = True
        self._drains: Mapping[ServerId, LeftDrain] = {}
        self._drains_ticket = Ticket(0)
        self._try_again_s = 0.0

    def open(self) -> list[LoggedStream]:
        """The streams that an earlier process left, in the order of their opening.

        Raises:
            ConfigError: the file cannot be opened or written, is in use, or of another version.
        """
        began_s = time.monotonic()
        try:
            try:
                self._open()
            except LogDamagedError as error:
                self._set_aside(error)
                self._open()
            self._is_same_boot = self._file.meta("boot_id") == _boot_id()
            self._drains = read_drains(self._file.meta("drains"))
            self._sign(self._file)
        except (LogDamagedError, LogFailedError) as error:
            self._file.close()
            remedy = f"cannot be used ({error}); make room on the disk, or name another file"
            raise ConfigError("router.log_file", str(self._file.path), remedy) from error
        log_event(
            logger,
            "stream_log_opened",
            path=self._file.path,
            num_streams=len(self._found),
            num_bad_records=len(self._bad_rows),
            seconds=round(time.monotonic() - began_s, 3),
        )
        return list(self._found.values())

    def opened_s(self, found: LoggedStream) -> float:
        """When the stream was opened, by the clock of this process. The clock begins anew with the
        machine, and with it the stream's deadline."""
        now_s = time.monotonic()
        return min(found.opened.opened_s, now_s) if self._is_same_boot else now_s

    def drains(self) -> Mapping[ServerId, LeftDrain]:
        """That an earlier process left. A clock that began anew tells no times: what answers had is
        over then."""
        if self._is_same_boot:
            return self._drains
        return {
            server_id: drain
            if drain.move_answers_at_s is None
            else msgspec.structs.replace(drain, move_answers_at_s=0.0)
            for server_id, drain in self._drains.items()
        }

    def keep_drains(self, drains: Mapping[ServerId, LeftDrain]) -> None:
        """These are in force now."""
        self._drains = drains
        if self._writer is not None:
            self._drains_ticket = self._writer.note("drains", write_drains(drains))

    async def drains_kept(self) -> None:
        """Returns when what `keep_drains` was told last outlives this process."""
        if self._writer is not None:
            kept = asyncio.Event()
            self._writer.when_durable(self._drains_ticket, kept.set)
            await kept.wait()

    def start(self) -> None:
        """Begin to write, in the running loop."""
        writer = self._writer = LogWriter(self._file, self._metrics)
        writer.start({stream_id: each.row_ids for stream_id, each in self._found.items()})
        writer.remove(self._bad_rows)
        self._found, self._bad_rows = {}, []

    def journal(self, stream_id: StreamId, events: EventQueue) -> Journal | None:
        """Of a new stream, or one that was found; None while the log does not work."""
        if self._writer is None or (self._writer.has_failed and not self._begin_again()):
            return None
        return Journal(self._writer, stream_id, events)

    def forget(self, stream_id: StreamId) -> None:
        """An ended stream need not be found any more."""
        if self._writer is not None:
            self._writer.forget(stream_id)

    def close(self) -> None:
        """Write what is there. Blocks for seconds at most. Idempotent."""
        if self._writer is not None:
            self._writer.close()
        else:
            self._file.close()

    def _open(self) -> None:
        self._file.open()
        if self._file.meta("model") not in (None, self._model_facts):
            log_event(
                logger,
                "stream_log_of_another_model",
                level=logging.WARNING,
                path=self._file.path,
                consequence="its streams are dropped",
            )
            # Before the file is signed for this model: a router that dies now takes none up.
            self._file.clear()
            return
        found = replay(self._file.rows())
        self._found, self._bad_rows = found.streams, found.bad_rows
        if found.lost_streams:
            self._metrics.failures.inc(len(found.lost_streams))
            log_event(
                logger,
                "streams_unreadable",
                level=logging.ERROR,
                num_streams=len(found.lost_streams),
                stream_ids=sorted(found.lost_streams)[:10],
            )

    def _sign(self, file: LogFile) -> None:
        file.set_meta("boot_id", _boot_id())
        file.set_meta("model", self._model_facts)
        file.set_meta("drains", write_drains(self._drains))

    def _begin_again(self) -> bool:
        """Whether the log works once more, for streams from now on. Tried now and then."""
        now_s = time.monotonic()
        if now_s < self._try_again_s:
            return False
        self._try_again_s = now_s + TRY_AGAIN_S
        file = LogFile(self._file.path)
        try:
            file.open()
            file.clear()  # of a log that failed and could not be removed
            self._sign(file)
        except (ConfigError, LogDamagedError, LogFailedError) as error:
            if not isinstance(error, ConfigError):  # else it may be somebody else's
                file.remove()
            log_event(logger, "stream_log_still_failing", level=logging.WARNING, error=str(error))
            return False
        self._file = file
        self._drains_ticket = Ticket(0)  # signed with them; a ticket of the old log means nothing
        writer = self._writer = LogWriter(file, self._metrics)
        writer.start({})
        log_event(logger, "stream_log_began_again", level=logging.WARNING, path=file.path)
        return True

    def _set_aside(self, error: LogDamagedError) -> None:
        self._metrics.failures.inc()
        log_event(
            logger,
            "stream_log_damaged",
            level=logging.ERROR,
            error=str(error),
            set_aside=self._file.set_aside(),
            consequence="starting without the streams that were in it",
        )


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # then deadlines go by a clock that may have begun anew
        return "unknown"
