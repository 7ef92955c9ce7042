"""Restart policy, ready line and log files."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamfill.launcher.log_files import NUM_OLD_LOGS, last_lines, log_file, open_log
from streamfill.launcher.plan import ProcessKind
from streamfill.launcher.ready_line import ReadyLineScanner, parse_ready_line
from streamfill.launcher.restart_policy import RestartPolicy
from streamfill.launcher.supervisor import restart_policy


def test_pauses_double_up_to_a_bound() -> None:
    """Each death in a row makes the pause longer, until the process is given up."""
    policy = RestartPolicy(max_restarts=7)
    pauses = [policy.delay_s(n) for n in range(1, 9)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, None]


def test_no_restarts_at_all() -> None:
    """With max_restarts 0 the first death is the last."""
    assert RestartPolicy(max_restarts=0).delay_s(1) is None


def test_the_controller_comes_back_soon_and_always() -> None:
    """Nobody waits for it; only a cluster without restarts gives it up."""
    policy = restart_policy(ProcessKind.CONTROLLER, 5)
    assert [policy.delay_s(n) for n in (1, 2, 3, 100)] == [1.0, 2.0, 2.0, 2.0]
    assert [policy.delay_s(n) for n in (1025, 1_000_000)] == [2.0, 2.0]
    assert restart_policy(ProcessKind.CONTROLLER, 0).delay_s(1) is None
    assert restart_policy(ProcessKind.PREFILL, 5).delay_s(6) is None


def test_the_router_comes_back_at_once() -> None:
    """Nobody is served without it; a router that keeps dying is given up like a server."""
    policy = restart_policy(ProcessKind.ROUTER, 3)
    assert [policy.delay_s(n) for n in (1, 2, 3, 4)] == [0.25, 0.5, 1.0, None]


def test_long_life_begins_a_new_row() -> None:
    """A process that ran for a minute starts over; one that ran for less does not."""
    policy = RestartPolicy(max_restarts=5)
    assert policy.next_row(4, ran_s=59.9) == 5
    assert policy.next_row(4, ran_s=60.0) == 1


def test_ready_line_in_pieces(tmp_path: Path) -> None:
    """The line is found when its end is written, whatever stands around it."""
    path = tmp_path / "log"
    scanner = ReadyLineScanner(path)
    with path.open("wb", buffering=0) as log:
        log.write(b"loading\nalready READY {}\nREADY soon\nREA")
        assert scanner.scan() is None
        log.write(b'DY {"port": 7}')
        assert scanner.scan() is None
        log.write(b"\nmore\n")
        assert scanner.scan() == {"port": 7}


@pytest.mark.parametrize("line", [b"READY", b"READY []", b"READY 1", b"ready {}", b""])
def test_no_ready_line(line: bytes) -> None:
    """Only the word and a JSON object say that a process is ready."""
    assert parse_ready_line(line) is None


def test_logs_rotate(tmp_path: Path) -> None:
    """The newest log has no number, older ones count up, and the oldest go."""
    for life in range(NUM_OLD_LOGS + 3):
        with open_log(tmp_path, "p") as log:
            log.write(b"life %d\n" % life)
    assert log_file(tmp_path, "p").read_bytes() == b"life 7\n"
    assert (tmp_path / "p.1.log").read_bytes() == b"life 6\n"
    assert (tmp_path / f"p.{NUM_OLD_LOGS}.log").read_bytes() == b"life 2\n"
    assert len(list(tmp_path.iterdir())) == NUM_OLD_LOGS + 1


def test_last_lines(tmp_path: Path) -> None:
    """The tail leaves empty lines out and bears bytes that are no UTF-8."""
    path = tmp_path / "log"
    assert last_lines(path, 3) == ()
    path.write_bytes(b"one\n\ntwo\n\xff three\n\n")
    assert last_lines(path, 2) == ("two", "\ufffd three")
