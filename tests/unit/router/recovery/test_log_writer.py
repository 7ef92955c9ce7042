"""The log as a file, and the thread that writes it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.recovery import log_file as log_file_module
from router.recovery.interface import Ticket
from router.recovery.log_file import LogDamagedError, LogFailedError, LogFile, Row
from router.recovery.log_writer import LogMetrics, LogWriter
from streamfill.errors import ConfigError
from streamfill.observability.metric_values import MetricSet

PATIENCE_S = 60.0


def opened(path: Path) -> LogFile:
    file = LogFile(path)
    file.open()
    return file


def writer_of(file: LogFile) -> LogWriter:
    writer = LogWriter(file, LogMetrics(MetricSet("router", lambda: 0.0)))
    writer.start({})
    return writer


async def durable(writer: LogWriter, ticket: Ticket) -> None:
    event = asyncio.Event()
    writer.when_durable(ticket, event.set)
    await asyncio.wait_for(event.wait(), PATIENCE_S)


def rows_of(path: Path) -> list[tuple[int, bytes]]:
    file = opened(path)
    try:
        return [(row.stream_id, row.body) for row in file.rows()]
    finally:
        file.close()


async def test_records_are_there_in_their_order(tmp_path: Path) -> None:
    """Hundreds from the loop, without waiting; those who wait are called in order."""
    path = tmp_path / "log"
    writer = writer_of(opened(path))
    called: list[int] = []
    for number in range(500):
        ticket = writer.append(number % 7, b"%d" % number)
        writer.when_durable(ticket, lambda number=number: called.append(number))  # type: ignore[misc]
    await durable(writer, ticket)
    writer.close()
    assert called == list(range(500))
    assert rows_of(path) == [(number % 7, b"%d" % number) for number in range(500)]


async def test_streams_are_rewritten_and_forgotten(tmp_path: Path) -> None:
    """Old rows go with the new ones' coming; a forgotten stream leaves nothing."""
    path = tmp_path / "log"
    writer = writer_of(opened(path))
    for stream_id in (1, 2, 3):
        writer.append(stream_id, b"a")
        writer.append(stream_id, b"b")
    writer.rewrite(1, [b"whole", b"more"])
    writer.forget(2)
    writer.forget(99)
    last = writer.append(1, b"c")
    await durable(writer, last)
    writer.close()
    assert rows_of(path) == [(3, b"a"), (3, b"b"), (1, b"whole"), (1, b"more"), (1, b"c")]


async def test_new_rows_are_not_in_the_way_of_bad_ones(tmp_path: Path) -> None:
    """Those leave the file together with the first new ones' coming."""
    path = tmp_path / "log"
    file = opened(path)
    file.insert([Row(1, 5, b"good"), Row(2, 6, b"bad"), Row(3, 6, b"worse")])
    writer = LogWriter(file, LogMetrics(MetricSet("router", lambda: 0.0)))
    writer.start({5: [1]})
    writer.remove([2, 3])
    for number in range(5):
        ticket = writer.append(5, b"%d" % number)
    await durable(writer, ticket)
    assert not writer.has_failed
    writer.close()
    assert rows_of(path) == [(5, b"good"), *((5, b"%d" % number) for number in range(5))]


async def test_a_new_process_goes_on_behind_the_old_rows(tmp_path: Path) -> None:
    """Row ids are not used twice, and old rows can be forgotten."""
    path = tmp_path / "log"
    file = opened(path)
    file.insert([Row(5, 1, b"old"), Row(9, 2, b"old")])
    writer = LogWriter(file, LogMetrics(MetricSet("router", lambda: 0.0)))
    writer.start({1: [5], 2: [9]})
    writer.append(3, b"new")
    writer.forget(1)
    writer.close()
    assert rows_of(path) == [(2, b"old"), (3, b"new")]


async def test_a_full_disk_is_given_up_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Everybody who waits goes on, later records are dropped, the file is gone, and all is told."""
    path = tmp_path / "log"
    file = opened(path)
    connection = file._connection
    assert connection is not None
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    metrics = LogMetrics(MetricSet("router", lambda: 0.0))
    writer = LogWriter(file, metrics)
    writer.start({})
    for _ in range(20):
        ticket = writer.append(1, b"x" * 4000)
    await durable(writer, ticket)
    assert writer.has_failed
    assert not metrics.is_on
    await durable(writer, writer.append(1, b"y"))
    await durable(writer, writer.rewrite(1, [b"z"]))
    writer.forget(1)
    writer.close()
    assert os.listdir(tmp_path) == []
    (record,) = [r for r in caplog.records if "stream_log_failed" in r.getMessage()]
    assert record.levelname == "ERROR"
    assert "full" in record.getMessage()


@pytest.mark.parametrize("can_be_emptied", [True, False])
async def test_a_failed_file_that_cannot_be_removed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    can_be_emptied: bool,
) -> None:
    """It is emptied, or a router that starts later would go on with streams as they were; who can
    do neither says so."""
    path = tmp_path / "log"
    file = opened(path)
    writer = writer_of(file)
    await durable(writer, writer.append(1, b"old"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    def fail(*_: object) -> None:
        raise LogFailedError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        patch.setattr(LogFile, "insert", fail)
        if not can_be_emptied:
            patch.setattr("router.recovery.log_file.os.truncate", refuse)
        await durable(writer, writer.append(1, b"new"))
        writer.close()
    assert writer.has_failed
    (record,) = [r for r in caplog.records if "stream_log_failed" in r.getMessage()]
    assert (f"remove {path}" in record.getMessage()) is not can_be_emptied
    assert rows_of(path) == ([] if can_be_emptied else [(1, b"old")])


@settings(max_examples=25, deadline=None)
@given(
    cut=st.floats(0.0, 1.0),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=12),
)
def test_a_crash_at_any_byte(
    tmp_path_factory: pytest.TempPathFactory, cut: float, batches: list[int]
) -> None:
    """The write-ahead log may end anywhere, as after a crash: what is found is a beginning of what
    was written, of whole batches."""
    folder = tmp_path_factory.mktemp("cut")
    path = folder / "log"
    file = opened(path)
    written: list[Row] = []
    ends = [0]
    for size in batches:
        rows = [Row(len(written) + n + 1, n, b"%d" % n * 50) for n in range(size)]
        file.insert(rows)
        written += rows
        ends.append(len(written))
    copy = folder / "copy"
    copy.write_bytes(path.read_bytes())
    wal = Path(f"{path}-wal").read_bytes()
    Path(f"{copy}-wal").write_bytes(wal[: int(cut * len(wal))])
    file.close()
    try:
        found = rows_of_any(copy)
    except LogDamagedError:
        assert cut < 1.0
        raise
    assert found == written[: len(found)]
    assert len(found) in ends
    if cut == 1.0:
        assert found == written


def rows_of_any(path: Path) -> list[Row]:
    file = opened(path)
    try:
        return list(file.rows())
    finally:
        file.close()


def test_files_that_are_not_ours_stop_the_start(tmp_path: Path) -> None:
    """Another version, another database, one in use, a folder, a file that nobody may write."""
    path = tmp_path / "log"
    opened(path).close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(ConfigError, match="schema version 99, this router writes 1"):
        LogFile(path).open()
    foreign = tmp_path / "foreign"
    with sqlite3.connect(foreign) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(ConfigError, match="no log of streamfill"):
        LogFile(foreign).open()
    with pytest.raises(ConfigError, match=r"router\.log_file"):
        LogFile(tmp_path).open()
    with pytest.raises(ConfigError, match="cannot be written"):
        LogFile(foreign / "below").open()


def test_a_file_in_use_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two routers never share one."""
    monkeypatch.setattr(log_file_module, "BUSY_S", 0.1)
    first = opened(tmp_path / "log")
    try:
        first.set_meta("a", "b")
        with pytest.raises(ConfigError, match="in use by another process"):
            LogFile(tmp_path / "log").open()
    finally:
        first.close()


def test_a_damaged_file_is_told_apart_and_set_aside(tmp_path: Path) -> None:
    """Both a head and a middle that are no database."""
    path = tmp_path / "log"
    file = opened(path)
    file.insert([Row(n, n, b"x" * 3000) for n in range(1, 200)])
    file.close()
    whole = path.read_bytes()
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(LogDamagedError):
        LogFile(path).open()
    path.write_bytes(whole[:8192] + b"\xff" * 100_000 + whole[108_192:])
    damaged = opened(path)
    with pytest.raises(LogDamagedError):
        list(damaged.rows())
    aside = damaged.set_aside()
    assert aside.exists()
    assert rows_of(path) == []


def test_space_is_given_back(tmp_path: Path) -> None:
    """After thousands of deleted rows the file is small again."""
    path = tmp_path / "log"
    file = opened(path)
    ids = range(1, 12_001)
    for begin in range(1, 12_001, 1000):
        file.insert([Row(n, n, b"x" * 4000) for n in range(begin, begin + 1000)])
    before = file.shrink()
    for begin in range(0, 12_000, 1000):
        file.delete(ids[begin : begin + 1000])
    for _ in range(30):
        after = file.shrink()
    file.close()
    assert before > 45_000_000
    assert after < 20_000_000 + log_file_module.WAL_LIMIT_BYTES
    assert path.stat().st_size < 20_000_000


def test_a_closed_file_says_so(tmp_path: Path) -> None:
    """No later write is taken in silently."""
    file = opened(tmp_path / "log")
    file.close()
    file.close()
    with pytest.raises(LogFailedError, match="closed"):
        file.insert([Row(1, 1, b"")])
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


async def test_facts_about_the_whole_file(tmp_path: Path) -> None:
    """Each in the place of the one before; written among records."""
    writer = writer_of(opened(tmp_path / "log"))
    for value in ("old", "new"):
        writer.append(1, b"x")
        ticket = writer.note("what", value)
    await durable(writer, ticket)
    writer.close()
    file = opened(tmp_path / "log")
    assert (file.meta("what"), file.meta("else")) == ("new", None)
    file.close()
