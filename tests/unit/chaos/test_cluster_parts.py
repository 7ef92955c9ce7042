"""The parts of a chaos run that need no cluster: plans, streams, evidence, options, the summary."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from streamfill.kv_transfer.faults import FaultPlan
from streamfill.links.faults import LinkFaultPlan
from streamfill.models.tiny import make_tiny_model
from streamfill.stream.state import StreamState
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from tests.chaos.cluster import KILL_FIRST_S
from tests.chaos.cluster_evidence import read_evidence, shifts_s
from tests.chaos.cluster_options import KILL_EVERY_S, KILL_ORDER, parse
from tests.chaos.cluster_plan import (
    LONGEST_PAUSE_S,
    PROCESSES,
    FaultKind,
    draw_plan,
    kill_plan,
    role_of,
)
from tests.chaos.cluster_report import ChaosReport, summary
from tests.chaos.cluster_streams import Fate, Form, StreamWriter
from tests.chaos.judge import Rule, Violation
from tests.support.wall_clock import WallClock
from tests.unit.chaos.test_cluster_judge import KILL, PLANNED, evidence, history

PLANS = [draw_plan(seed, 25.0) for seed in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Of a tiny model."""
    return load_tokenizer(make_tiny_model(tmp_path_factory.mktemp("model"), tokenizer="bpe"))


def test_a_plan_is_its_seeds() -> None:
    """The same seed gives the same plan."""
    assert draw_plan(3, 25.0) == PLANS[3]
    assert len(set(PLANS)) == len(PLANS)


def test_every_plan_kills_pauses_and_spoils() -> None:
    """At most one server of a role dies, nobody both dies and stands still, all within the load."""
    for plan in PLANS:
        killed = [fault.target for fault in plan.of(FaultKind.KILL)]
        paused = [fault.target for fault in plan.of(FaultKind.PAUSE)]
        assert killed
        assert paused
        assert plan.of(FaultKind.LINKS) or plan.of(FaultKind.KV)
        assert len(set(map(role_of, killed))) == len(killed)
        assert not set(killed) & set(paused)
        for fault in plan.faults:
            assert 0 <= fault.at_s < plan.load_s
            assert fault.kind is not FaultKind.PAUSE or 0.2 <= fault.lasts_s <= LONGEST_PAUSE_S


def test_twenty_seeds_have_everything() -> None:
    """Each process killed and paused, each kind of fault, pauses beyond what counts as death."""
    faults = [fault for plan in PLANS[:20] for fault in plan.faults]
    for kind in (FaultKind.KILL, FaultKind.PAUSE):
        assert {fault.target for fault in faults if fault.kind is kind} == set(PROCESSES)
    assert {fault.kind for fault in faults} == set(FaultKind)
    assert max(fault.lasts_s for fault in faults if fault.kind is FaultKind.PAUSE) > 5.0
    assert {fault.jump_s > 0 for fault in faults if fault.kind is FaultKind.CLOCK} == {True, False}


def test_the_variables_of_a_plan_can_be_read() -> None:
    """By the processes that get them."""
    for plan in PLANS[:10]:
        links = LinkFaultPlan.parse(plan.link_variable(Path("/tmp/on")))
        assert (links.every, links.kinds) == (plan.link_every, plan.link_kinds)
        assert FaultPlan.parse(plan.kv_variable(Path("/tmp/on"))).every == plan.kv_every


def test_a_plan_of_kills_has_them_in_turn() -> None:
    """And nothing else."""
    plan = kill_plan(1, PROCESSES, KILL_FIRST_S, KILL_EVERY_S)
    assert [fault.target for fault in plan.faults] == list(PROCESSES)
    assert {fault.kind for fault in plan.faults} == {FaultKind.KILL}
    times_s = [fault.at_s for fault in plan.faults]
    assert times_s == sorted(times_s)
    assert times_s[-1] < plan.load_s


def test_segments_carry_their_identity(tokenizer: TextTokenizer) -> None:
    """Every segment of every stream differs from all others, and the model of the prompt is that of
    the text."""
    writer = StreamWriter(tokenizer, 5, longest_tokens=400)
    streams = [writer.stream(number) for number in range(60)]
    assert streams == [writer.stream(number) for number in range(60)]
    assert {stream.form for stream in streams} == set(Form)
    assert {stream.fate for stream in streams} == set(Fate)
    assert {stream.mode for stream in streams} == {"append", "update"}
    for stream in streams:
        assert len(stream.prompt_ids) == stream.num_received[-1] < 3000
        assert list(stream.prompt_ids) == tokenizer.encode(stream.text, add_special_tokens=True)
        assert len(stream.segments) == len(stream.gaps_s) == len(stream.num_received)
        for place, segment in enumerate(stream.segments):
            assert f"[{stream.number}/{place}]" in segment
    assert len({segment for x in streams for segment in x.segments}) == sum(
        len(x.segments) for x in streams
    )


def test_evidence_is_read_from_all_lives(tmp_path: Path) -> None:
    """Faults, events, openings and endings of each log of the folder."""
    stamp = "2026-11-21T05:00:00.123Z"
    (tmp_path / "router.1.log").write_text(
        f"{stamp} WARNING router link_fault_injected kind=dropped message=Commit\n"
        f"{stamp} WARNING router server_lost server_id=prefill-0\n"
        f"{stamp} INFO router stream_opened stream=4 request_id=chaos-7.0 mode=append\n"
    )
    (tmp_path / "router.log").write_text(
        f"{stamp} WARNING router link_fault_injected kind=slow message=Splice\n"
        f"{stamp} INFO router stream_ended stream=4 request_id=chaos-7.0 outcome=DONE\n"
    )
    (tmp_path / "decode-0.log").write_text(
        f"{stamp} WARNING decode-0 kv_fault_injected kind=damaged transfer_id=5\nnot a line\n"
    )
    found = read_evidence(tmp_path)
    assert found.link_faults == Counter(dropped=1, slow=1)
    assert found.kv_faults == Counter(damaged=1)
    assert found.events == Counter(server_lost=1)
    assert found.openings == Counter({"chaos-7.0": 1})
    assert found.endings == {"chaos-7.0": [StreamState.DONE]}


def test_a_shifted_clock_shows_in_a_log(tmp_path: Path) -> None:
    """In the lines behind a place."""
    log = tmp_path / "router.log"
    now = datetime.now(UTC)
    log.write_text(f"{now:%Y-%m-%dT%H:%M:%S}.000Z INFO router before\n")
    position = log.stat().st_size
    with log.open("a") as file:
        file.write(f"{now - timedelta(hours=1):%Y-%m-%dT%H:%M:%S}.000Z INFO router after\nodd\n")
    (shift_s,) = shifts_s(log, position)
    assert shift_s == pytest.approx(-3600, abs=5)


def test_the_wall_clock_of_a_process_is_set_while_it_runs(tmp_path: Path) -> None:
    """Forward and back; its monotonic clock stays as it is."""
    clock = WallClock(tmp_path / "clock")
    code = (
        "import sys, time\n"
        "for _ in sys.stdin:\n"
        "    print(time.time(), time.time_ns(), time.monotonic(), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **clock.environment},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for by_s, shift_s in ((0.0, 0.0), (3_600.0, 3_600.0), (-90_000.0, -86_400.0)):
            clock.jump(by_s)
            process.stdin.write("now\n")
            process.stdin.flush()
            wall_s, wall_ns, monotonic_s = map(float, process.stdout.readline().split())
            assert wall_s - time.time() == pytest.approx(shift_s, abs=5)
            assert wall_ns / 1e9 - time.time() == pytest.approx(shift_s, abs=5)
            assert monotonic_s == pytest.approx(time.monotonic(), abs=5)
        process.stdin.close()


def test_the_command_line_is_read() -> None:
    """Seeds as a range, as one, or in a row; kills of all or of some."""
    assert parse(["--seeds", "3:6"]).seeds == (3, 4, 5)
    assert parse(["--seed", "8"]).seeds == (8,)
    assert parse(["--seed", "8", "--runs", "2"]).seeds == (8, 9)
    assert len(parse([]).seeds) == 1
    assert parse([]).kills is None
    assert parse(["--kills"]).kills == KILL_ORDER
    assert set(KILL_ORDER) == set(PROCESSES)
    assert parse(["--kills", "--kill-every", "40"]).kill_every_s == 40.0
    assert parse(["--kills", "router, decode-1"]).kills == ("router", "decode-1")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "3"],
        ["--seeds", "5:5"],
        ["--seeds", "0:9999"],
        ["--seeds", "0:2", "--runs", "2"],
        ["--kills", "launcher"],
        ["--kills", ""],
        ["--load", "0"],
        ["--rate", "-1"],
        ["--kill-every", "0"],
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With a word about what is wrong."""
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "error:" in capsys.readouterr().err


def test_a_report_tells_the_story_of_what_is_wrong() -> None:
    """The faults, the violation, the stream, and a line for programs; and the sum of all seeds."""
    plan = kill_plan(1, ["prefill-0"], 1.0, 2.0)
    bad = history()
    bad.note("something odd")
    wrong = Violation(rule=Rule.ANSWER, text="another answer", number=7)
    reports = [
        ChaosReport(
            plan=plan,
            planned=[PLANNED],
            histories=[bad],
            violations=violations,
            inflicted=[KILL],
            services=[],
            evidence=evidence(),
            num_compared=1,
            num_probes=3,
            base={},
            used={},
            load_wall_s=2.0,
            wall_s=5.0,
        )
        for violations in ([wrong], [])
    ]
    out = io.StringIO()
    reports[0].tell(out)
    text = out.getvalue()
    for words in ("kill prefill-0", "another answer", "stream 7", "something odd"):
        assert words in text
    facts = json.loads(text.splitlines()[-1].removeprefix("SEED "))
    assert not facts["ok"]
    assert facts["violations"] == {"ANSWER": 1}
    total = summary(reports, [])
    assert (total["ok"], total["num_streams"], total["num_different"]) == (False, 2, 1)
    assert summary(reports[1:], [])["ok"]
    assert not summary(reports[1:], [9])["ok"]
    assert not summary([], [])["ok"]
