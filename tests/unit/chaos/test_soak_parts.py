"""What the soak sees of a cluster: its log, its counters, its policies; and how it tells of it."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from streamfill.api import Client
from streamfill.api.types import ClusterInfo, PolicyResult
from streamfill.errors import InvalidArgumentError
from streamfill.launcher.managed_process import ProcessState, ProcessStatus
from streamfill.launcher.plan import ProcessKind
from streamfill.stream.state import StreamState
from tests.chaos import checks
from tests.chaos.judge import Rule, judge_stream
from tests.chaos.load import Played
from tests.chaos.options import SoakOptions, parse
from tests.chaos.policies import PolicySwitcher
from tests.chaos.progress import Progress
from tests.chaos.report import SoakReport, print_report
from tests.chaos.router_log import RouterLog, error_lines
from tests.unit.chaos.test_judge import GOOD, SCRIPT, tokens

_STAMP = "2026-11-21T05:00:00.123Z INFO router"
IDLE = ClusterInfo(
    model="m",
    vocab_size=1024,
    context_tokens=100,
    pool_tokens=100,
    ready=True,
    decode_available=True,
    num_open_streams=0,
    num_streams_by_outcome={},
    num_malformed_frames=0,
    servers=(),
)


class FakeClient:
    """Answers what it is told to."""

    def __init__(self, info: ClusterInfo = IDLE, policy: str | None = None) -> None:
        self._info = info
        self._policy = policy

    async def server_info(self) -> ClusterInfo:
        return self._info

    async def set_policy(
        self, name: str, options: Mapping[str, str], *, timeout_s: float
    ) -> Mapping[str, PolicyResult]:
        if self._policy is None:
            raise InvalidArgumentError(f"there is no policy {name}")
        is_it = self._policy == name
        return {"prefill-0": PolicyResult(ok=is_it, policy=self._policy, reason="no reason")}


def fake_client(info: ClusterInfo = IDLE, policy: str | None = None) -> Client:
    return cast("Client", FakeClient(info, policy))


async def test_counters_at_base() -> None:
    """A cluster at rest is fine."""
    assert not await checks.check_rest(fake_client())


async def test_counters_not_at_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that the router still holds is found when the time is over."""
    monkeypatch.setattr(checks, "REST_WITHIN_S", 0.2)
    found = await checks.check_rest(fake_client(replace(IDLE, num_open_streams=1)))
    assert [violation.rule for violation in found] == [Rule.COUNTERS]
    assert "1 open streams" in found[0].text


async def test_totals_of_the_log(tmp_path: Path) -> None:
    """The router's counts are compared with its log, less what was before."""
    path = tmp_path / "router.log"
    path.write_text(log_lines(1, "DONE"))
    info = replace(IDLE, num_streams_by_outcome={"DONE": 3, "ABORTED": 1})
    log = RouterLog(path, "soak-1-")
    before = {"DONE": 2, "ABORTED": 1}
    counted = Counter(before)
    assert not await checks.check_totals(fake_client(info), counted, log)
    late = replace(info, num_streams_by_outcome={"DONE": 3, "ABORTED": 2})
    found = await checks.check_totals(fake_client(late), counted, log)
    assert {violation.rule for violation in found} == {Rule.TOTALS}


def log_lines(number: int, outcome: str) -> str:
    return (
        f"{_STAMP} stream_opened stream=4{number} request_id=soak-1-{number} mode=append\n"
        f"{_STAMP} handoff_failed stream=4{number} outcome=failed\n"
        f"{_STAMP} stream_ended stream=4{number} request_id=soak-1-{number} outcome={outcome} "
        "reason=length num_prompt_tokens=3\n"
    )


def test_log_is_read_as_it_grows(tmp_path: Path) -> None:
    """Lines in pieces, lines of others and lines of other events do no harm."""
    path = tmp_path / "router.log"
    text = log_lines(1, "DONE") + log_lines(2, "ABORTED").replace("soak-1", "other")
    text += log_lines(3, "DEADLINE") + log_lines(3, "ABORTED")
    path.touch()
    log = RouterLog(path, "soak-1-")
    with path.open("a") as file:
        for place in range(0, len(text), 37):
            file.write(text[place : place + 37])
            file.flush()
            log.read_on()
    assert log.openings == {"soak-1-1": 1, "soak-1-3": 2}
    assert log.endings == {
        "soak-1-1": [StreamState.DONE],
        "soak-1-3": [StreamState.DEADLINE, StreamState.ABORTED],
    }
    assert log.outcomes == {"DONE": 1, "DEADLINE": 1, "ABORTED": 1}


def test_errors_in_logs(tmp_path: Path) -> None:
    """Errors of ours and tracebacks are found, ordinary lines are not."""
    (tmp_path / "router.log").write_text(log_lines(1, "DONE"))
    assert not error_lines(tmp_path)
    bad = f"{_STAMP} ok\n{_STAMP.replace('INFO', 'ERROR')} housekeeping_failed exception=x\n"
    (tmp_path / "decode-0.log").write_text(f"{bad}Traceback (most recent call last):\n")
    assert len(error_lines(tmp_path)) == 2


def test_processes(tmp_path: Path) -> None:
    """A process that was restarted, or is not there, is found."""
    fine = ProcessStatus(
        name="router",
        kind=ProcessKind.ROUTER,
        state=ProcessState.READY,
        pid=1,
        num_restarts=0,
        ready_after_s=1.0,
        detail="",
        log_file=tmp_path / "router.log",
    )
    assert not checks.check_processes([fine], tmp_path)
    assert checks.check_processes([fine, replace(fine, num_restarts=1)], tmp_path)
    assert checks.check_processes([replace(fine, state=ProcessState.BACKING_OFF)], tmp_path)


@pytest.mark.parametrize("in_force", [None, "fcfs"])
async def test_policy_that_is_not_changed(in_force: str | None) -> None:
    """A switch that the router refuses, or that a server does not make, is found."""
    switcher = PolicySwitcher(fake_client(policy=in_force), 1.0)
    await switcher.switch("lcas", {})
    assert [violation.rule for violation in switcher.violations] == [Rule.POLICY]
    assert switcher.num_switches == 0


async def test_policy_that_is_changed() -> None:
    """A switch that was made is counted."""
    switcher = PolicySwitcher(fake_client(policy="lcas"), 1.0)
    await switcher.switch("lcas", {})
    assert (switcher.num_switches, switcher.seen) == (1, {"lcas"})
    assert not switcher.violations


def test_report_tells_the_story() -> None:
    """A violation is printed with its stream's story and how to play it again."""
    history = replace(GOOD, tokens=tokens(7, 8), notes=("0.1 s  opened, stream 4",))
    report = SoakReport(
        options=SoakOptions(seed=42),
        played=[Played(script=SCRIPT, history=history)],
        violations=judge_stream(SCRIPT, history),
        num_opened=1,
        by_outcome={"DONE": 1},
        num_compared=1,
        num_bursts=0,
        num_switches=0,
        policies=[],
        num_evicted_tokens=0,
        rss_start_mb={"router": 100.0},
        rss_end_mb={"router": 110.0},
        wall_s=1.0,
        interrupted=False,
    )
    out = io.StringIO()
    print_report(report, out)
    text = out.getvalue()
    assert "0.1 s  opened, stream 4" in text
    assert "--seed 42 --only 17" in text
    facts = json.loads(text.splitlines()[-1].removeprefix("RESULT "))
    assert facts["ok"] is False
    assert facts["violations"] == {"TOKENS": 1}
    assert facts["router_growth"] == 1.1


def test_progress_without_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no terminal, a line comes now and then, not each time."""
    out = io.StringIO()
    progress = Progress(out)
    progress.show(0.1, "early")
    monkeypatch.setattr("tests.chaos.progress.LINE_EVERY_S", 0.0)
    progress.show(0.5, "half")
    assert out.getvalue() == " 50% half\n"


def test_command_line() -> None:
    """Minutes, streams and scripts arrive; nonsense is refused."""
    command = parse(["--minutes", "0.5", "--streams", "3", "--only", "4,17", "--seed", "9"], 1)
    assert command.soak.load_s == 30.0
    assert (command.soak.num_streams, command.soak.only, command.soak.seed) == (3, (4, 17), 9)
    assert parse([], 77).soak.seed == 77
    with pytest.raises(SystemExit):
        parse(["--minutes", "0"], 1)
