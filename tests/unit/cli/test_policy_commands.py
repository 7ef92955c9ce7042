"""`streamfill policy`, `streamfill status --streams`, and what `streamfill run` says of its stream.

All against the real gRPC service over a core without servers.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest

from router.interface import OpenOptions, PolicyOutcome, ServerStreams
from streamfill.cli.main import main
from streamfill.errors import InvalidArgumentError
from streamfill.messages.common import Role, StreamDecision
from streamfill.stream.ids import ServerId
from tests.unit.router.fake_manager import STEP_S, FakeManager, FakeStream, serve

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager()


@pytest.fixture
async def address(manager: FakeManager) -> AsyncIterator[str]:
    async with serve(manager) as target:
        yield target


async def command(*words: str) -> int:
    """Runs a command line as a program of its own would; returns its exit code."""
    return await asyncio.wait_for(asyncio.to_thread(main, words), STEP_S)


def described(
    *streams: StreamDecision, role: Role = Role.PREFILL, answered: bool = True
) -> ServerStreams:
    return ServerStreams(answered=answered, role=role, policy="lcas", streams=streams)


def decision(stream_id: int, **changes: Any) -> StreamDecision:
    fields: dict[str, Any] = {
        "stream_id": stream_id,
        "state": "open",
        "num_known_tokens": 4096,
        "num_computed_tokens": 3000,
        "num_shared_tokens": 1024,
        "priority": 2,
        "idle_s": 1.5,
        "expected_next_s": None,
        "decision": "no_budget",
        "reason": "streams before it [all] used the tokens",
        "victim_rank": None,
    }
    return StreamDecision(**{**fields, **changes})


async def test_a_policy_is_set_with_its_options(
    manager: FakeManager, address: str, capsys: Capture
) -> None:
    """Values are passed on as they were written, an equals sign in them included."""
    words = ("--option", "order=newest", "--option", " key =a=b ", "--server", "prefill-0")
    assert await command("policy", "set", "lcas", *words, "--address", address) == 0
    options = {"order": "newest", "key": "a=b"}
    assert manager.policy_calls == [("lcas", options, "prefill-0", 10.0)]
    assert capsys.readouterr().out == "prefill-0: lcas\n"


async def test_a_server_that_keeps_its_policy_is_exit_code_1(
    manager: FakeManager, address: str, capsys: Capture
) -> None:
    """The line says what is in force, and why."""
    manager.policy_outcome = PolicyOutcome(ok=False, policy="fcfs", reason="no such order")
    assert await command("policy", "set", "lcas", "--address", address) == 1
    assert manager.policy_calls == [("lcas", {}, None, 10.0)]
    assert capsys.readouterr().out == "prefill-0: still fcfs: no such order\n"


async def test_a_policy_that_nobody_knows_is_exit_code_2(
    manager: FakeManager, address: str, capsys: Capture
) -> None:
    """With the servers' reason in one line."""
    manager.policy_outcome = InvalidArgumentError("there is no policy 'x'; known: fcfs")
    assert await command("policy", "set", "x", "--address", address) == 2
    assert capsys.readouterr().err == (
        "error: INVALID_ARGUMENT: there is no policy 'x'; known: fcfs\n"
    )


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["newest"], "--option = 'newest': write KEY=VALUE"),
        (["=newest"], "--option = '=newest': write KEY=VALUE"),
        (["a=1", "a=2"], "--option = 'a=2': a is given twice"),
    ],
)
def test_an_option_that_is_none(options: list[str], remedy: str, capsys: Capture) -> None:
    """Refused with its text before anything is connected."""
    words = [word for option in options for word in ("--option", option)]
    assert main(["policy", "set", "lcas", *words, "--address", "127.0.0.1:1"]) == 2
    assert f"error: {remedy}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["policy"], ["policy", "fly"], ["policy", "set"]])
def test_wrong_usage_of_policy(words: list[str], capsys: Capture) -> None:
    """Exit code 2 and a usage line."""
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: streamfill policy" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["'policy', 'list'", "'policy', 'set', '--help'"])
def test_policy_commands_import_nothing_heavy(words: str) -> None:
    """Neither the help nor the list of policies waits for numpy or torch."""
    script = (
        "import sys\n"
        "from streamfill.cli.main import main\n"
        f"try:\n    main([{words}])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'numpy', 'torch', 'sglang', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["list", "show", "set"])
def test_help_of_each_policy_command(what: str, capsys: Capture) -> None:
    """Every one explains itself."""
    with pytest.raises(SystemExit, match="0"):
        main(["policy", what, "--help"])
    assert f"usage: streamfill policy {what}" in capsys.readouterr().out


async def test_the_policy_of_each_server_is_shown(
    manager: FakeManager, address: str, capsys: Capture
) -> None:
    """By `policy show` as a table and as data, and by `status`; a dash where it is not known."""
    manager.policy = "lcas(order=newest)"
    assert await command("policy", "show", "--address", address) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["server", "role", "state", "policy"]
    assert row.split() == ["prefill-0", "prefill", "alive", "lcas(order=newest)"]
    assert await command("policy", "show", "--json", "--address", address) == 0
    assert json.loads(capsys.readouterr().out) == {"prefill-0": "lcas(order=newest)"}
    assert await command("status", "--address", address) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" lcas(order=newest)")
    manager.policy = ""
    assert await command("policy", "show", "--address", address) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "-"


async def test_no_server_to_show_is_exit_code_1(manager: FakeManager, address: str) -> None:
    """A cluster without servers has no policy."""
    manager.ready = False
    assert await command("policy", "show", "--address", address) == 1


def test_policies_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Names, what they do, their options below them, and whose they are; the same as data."""
    registry = ModuleType("streamfill.scheduling.registry")
    long_text = "tokens of uncommitted streams in one step; " * 3 + "default: all"
    policies = [
        SimpleNamespace(
            name="fcfs",
            summary="first come, first served",
            options={"segment_tokens": long_text},
            source="streamfill",
        ),
        SimpleNamespace(name="house-rule", summary="ours", options={}, source="acme-policies"),
    ]
    monkeypatch.setattr(registry, "describe_policies", lambda: policies, raising=False)
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    assert main(["policy", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fcfs        first come, first served"
    assert lines[1].startswith(f"{' ' * 12}segment_tokens  tokens of uncommitted streams")
    assert all(len(line) <= 100 for line in lines)
    assert " ".join(" ".join(lines[1:-1]).split()) == f"segment_tokens {long_text}"
    assert lines[-1] == "house-rule  ours (from the package acme-policies)"
    assert main(["policy", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {
        "name": "house-rule",
        "summary": "ours",
        "options": {},
        "source": "acme-policies",
    }


def test_the_policies_of_streamfill_are_listed(capsys: Capture) -> None:
    """The default one is among them."""
    assert main(["policy", "list"]) == 0
    assert any(line.split()[:1] == ["fcfs"] for line in capsys.readouterr().out.splitlines())


async def test_status_shows_why_streams_wait(
    manager: FakeManager, address: str, capsys: Capture
) -> None:
    """A heading and a table per server, decode servers only where they have streams."""
    first = decision(7, expected_next_s=0.5, victim_rank=0)
    second = decision(11, state="committed", decision="commit", reason="computed")
    manager.described = {
        ServerId("prefill-1"): described(answered=False),
        ServerId("prefill-0"): described(first, second),
        ServerId("prefill-2"): described(),
        ServerId("decode-0"): described(role=Role.DECODE),
        ServerId("decode-1"): described(decision(5, state="answering"), role=Role.DECODE),
    }
    assert await command("status", "--streams", "--address", address) == 0
    assert manager.describe_calls == [(None, 10.0)]
    blocks = [block.splitlines() for block in capsys.readouterr().out.split("\n\n")[2:]]
    assert [block[0] for block in blocks] == [
        "decode-1: policy lcas, 1 stream",
        "prefill-0: policy lcas, 2 streams",
        "prefill-1 did not answer in time; policy lcas",
        "prefill-2: policy lcas, no streams",
    ]
    header, row, other = blocks[1][1:]
    assert " ".join(header.split()) == (
        "stream state known computed shared priority idle next in victim decision reason"
    )
    assert " ".join(row.split()) == (
        "7 open 4,096 3,000 1,024 2 1.5 s 0.5 s 0 no_budget streams before it [all] used the tokens"
    )
    assert " ".join(other.split()) == "11 committed 4,096 3,000 1,024 2 1.5 s - - commit computed"


async def test_status_of_one_stream(manager: FakeManager, address: str, capsys: Capture) -> None:
    """Only the servers that have it are shown; one that none has is said to be nowhere."""
    stream_id = 2**63
    manager.described = {
        ServerId("prefill-0"): described(decision(stream_id)),
        ServerId("prefill-1"): described(),
    }
    words = ("status", "--stream", str(stream_id), "--address", address)
    assert await command(*words) == 2
    assert f"no stream {stream_id}" in capsys.readouterr().err
    manager.streams[stream_id] = FakeStream(manager, stream_id, OpenOptions())
    assert await command(*words) == 0
    output = capsys.readouterr().out
    assert "prefill-0: policy lcas, 1 stream\n" in output
    assert "prefill-1: " not in output
    manager.described = {ServerId("prefill-0"): described()}
    assert await command(*words) == 0
    assert f"no server has stream {stream_id} now" in capsys.readouterr().out


async def test_streams_as_data(manager: FakeManager, address: str, capsys: Capture) -> None:
    """All fields of each stream by server, and only where they were asked for."""
    manager.described = {ServerId("prefill-0"): described(decision(7))}
    assert await command("status", "--json", "--address", address) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["servers"][0]["policy"] == "fcfs"
    assert "streams" not in data
    assert await command("status", "--json", "--streams", "--address", address) == 0
    told = json.loads(capsys.readouterr().out)["streams"]["prefill-0"]
    assert (told["answered"], told["role"], told["policy"]) == (True, "prefill", "lcas")
    assert told["streams"] == [msgspec.structs.asdict(decision(7))]


async def test_on_a_terminal_words_of_servers_are_no_markup(
    manager: FakeManager, address: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in brackets is shown, however the table is drawn."""
    manager.described = {ServerId("prefill-0"): described(decision(7, reason="[all] others"))}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert await command("status", "--streams", "--address", address) == 0
    assert "[all] others" in capsys.readouterr().out


async def test_run_says_how_urgent_it_is(
    manager: FakeManager, address: str, tmp_path: Path, capsys: Capture
) -> None:
    """Priority and the wished time to the first token reach the core; a wrong one is named."""
    file = tmp_path / "a.txt"
    file.write_text("abc")
    words = ("run", str(file), "--raw", "--address", address)
    assert await command(*words, "--priority", "3", "--ttft-slo-ms", "250") == 0
    (stream,) = manager.streams.values()
    assert (stream.options.priority, stream.options.ttft_slo_s) == (3, 0.25)
    assert await command(*words, "--ttft-slo-ms", "0") == 2
    assert "open.ttft_slo_ms is 0.0; it must be greater than 0" in capsys.readouterr().err
