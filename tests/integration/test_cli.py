"""The command ``streamfill`` against a running cluster, and against none."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from streamfill.api import Client
from streamfill.cli.main import COMMANDS
from tests.support.cli import TIMEOUT_S, run_cli
from tests.support.cluster import RunningCluster

pytestmark = pytest.mark.integration

HEAVY_MODULES = ("torch", "sglang", "transformers", "tokenizers", "sentencepiece", "numpy")
"""None of these is needed to print a help text."""

PARTS = ("The first part tells of a river.\n", "The second part tells of the sea.\n", "Fin.\n")
QUESTION = "What does the second part tell of?"


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three files."""
    files = [tmp_path / f"part-{number}.txt" for number in range(len(PARTS))]
    for file, content in zip(files, PARTS, strict=True):
        file.write_text(content, encoding="utf-8")
    return files


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(words: list[str]) -> None:
    """Every help text comes without an engine or a tokenizer in memory, the general one without a
    network library too."""
    heavy = HEAVY_MODULES if words else (*HEAVY_MODULES, "grpc", "rich")
    program = (
        "import sys\n"
        "from streamfill.cli.main import main\n"
        "try:\n"
        f"    main({[*words, '--help']!r})\n"
        "finally:\n"
        f"    heavy = [m for m in {heavy!r} if m in sys.modules]\n"
        "    print('loaded:', *heavy, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "loaded:"
    assert done.stdout.startswith(f"usage: streamfill{''.join(f' {word}' for word in words)}")
    if not words:
        for name, text in COMMANDS.items():
            assert name in done.stdout
            assert text.split()[0] in done.stdout


def test_unknown_command_and_option() -> None:
    """Exit code 2, the usage, and what is wrong."""
    for words in (["fly"], ["status", "--fly"], []):
        done = run_cli(*words)
        assert done.returncode == 2
        assert "usage: streamfill" in done.stderr
        assert "Traceback" not in done.stderr


async def test_run(cluster: RunningCluster, parts: list[Path]) -> None:
    """The answer to the files and the question is on standard output, and nothing else is there."""
    words = ["--question", QUESTION, "--raw", "--max-tokens", "20", "--address", cluster.address]
    done = run_cli("run", *parts, *words)
    assert done.returncode == 0, done.stderr
    async with Client(cluster.address) as client:
        prompt = "".join(PARTS) + "\n\n" + QUESTION
        whole = await client.complete(prompt, max_tokens=20, temperature=0.0)
    assert done.stdout == whole.text + "\n"
    assert f"prompt {whole.usage.num_prompt_tokens} tokens" in done.stderr
    assert "prefill-0 -> decode-0, hand-off done" in done.stderr


async def test_run_in_update_mode(cluster: RunningCluster, parts: list[Path]) -> None:
    """Each file replaces the one before, so the answer is to the last one."""
    words = ["--mode", "update", "--raw", "--max-tokens", "20", "--address", cluster.address]
    done = run_cli("run", *parts, *words)
    assert done.returncode == 0, done.stderr
    async with Client(cluster.address) as client:
        whole = await client.complete(PARTS[-1], max_tokens=20, temperature=0.0)
    assert done.stdout == whole.text + "\n"


async def test_run_as_a_chat(cluster: RunningCluster, parts: list[Path]) -> None:
    """Without ``--raw`` the files are one message of a chat, in both modes."""
    content = "".join(PARTS) + "\n\n" + QUESTION
    async with Client(cluster.address) as client:
        messages = [{"role": "user", "content": content}]
        whole = await client.complete(messages=messages, max_tokens=20, temperature=0.0)
    common = ("--question", QUESTION, "--max-tokens", "20", "--address", cluster.address)
    appended = run_cli("run", *parts, *common)
    assert (appended.returncode, appended.stdout) == (0, whole.text + "\n"), appended.stderr
    joined = parts[0].with_name("joined.txt")
    joined.write_text("".join(PARTS), encoding="utf-8")
    updated = run_cli("run", parts[0], joined, "--mode", "update", *common)
    assert (updated.returncode, updated.stdout) == (0, whole.text + "\n"), updated.stderr


def test_run_with_bad_values(cluster: RunningCluster, parts: list[Path]) -> None:
    """What the router refuses comes out as one line with its code and the value."""
    done = run_cli("run", parts[0], "--temperature", "-1", "--address", cluster.address)
    assert done.returncode == 2
    assert done.stderr.startswith("error: INVALID_ARGUMENT: ")
    assert "temperature is -1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_run_with_bad_files(cluster: RunningCluster, parts: list[Path]) -> None:
    """A file that is missing, a folder, one that is no UTF-8 and an empty one are named, before
    anything is sent."""
    latin = parts[0].with_name("latin.txt")
    latin.write_bytes("Überfluß".encode("latin-1"))
    empty = parts[0].with_name("empty.txt")
    empty.touch()
    missing = parts[0].with_name("missing.txt")
    for file, reason in (
        (missing, "No such file"),
        (parts[0].parent, "Is a directory"),
        (latin, "is no UTF-8 text (byte 0)"),
        (empty, "is empty"),
    ):
        done = run_cli("run", parts[0], file, "--address", cluster.address)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"error: FILE = '{file}': "), done.stderr
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["run", "status", "top", "down"])
def test_no_cluster_of_that_name(parts: list[Path], tmp_path: Path, command: str) -> None:
    """Exit code 2 and one line that says how to start one."""
    words = [parts[0]] if command == "run" else []
    done = run_cli(command, *words, "--name", "nobody", home=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --name = 'nobody': ")
    assert "streamfill up" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["run", "status", "top"])
def test_nobody_at_that_address(parts: list[Path], command: str) -> None:
    """Exit code 2, and the address is named."""
    words = [parts[0]] if command == "run" else []
    done = run_cli(command, *words, "--address", "127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: UNAVAILABLE: ")
    assert "127.0.0.1:9" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_status(cluster: RunningCluster) -> None:
    """Found by name, the table has a line for each server."""
    done = run_cli("status", "--name", cluster.name, home=cluster.folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{cluster.address} serves ")
    for name, role in (("prefill-0", "prefill"), ("decode-0", "decode")):
        (row,) = (line.split() for line in lines if line.startswith(name))
        assert row[:4] == [name, role, "alive", str(cluster.process(name).pid)]


async def test_top_shows_a_stream_that_is_there(cluster: RunningCluster) -> None:
    """With its tokens and what the scheduler decided, beside the servers."""
    async with Client(cluster.address) as client, client.stream(mode="append") as stream:
        await stream.append("A river and the sea. " * 20)
        await stream.wait_computed()
        words = ("top", "--once", "--name", cluster.name)
        done = await asyncio.to_thread(run_cli, *words, home=cluster.folder)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        number = str(stream.stream_id)
        (row,) = (line for line in lines if line and line[0] == number)
        assert row[1:3] == ["prefill-0", "open"]
        assert row[3] == row[4] != "0"
        assert {"prefill-0", "decode-0"} <= {line[0] for line in lines if line}


def test_status_as_json(cluster: RunningCluster) -> None:
    """One JSON object with everything, and nothing besides."""
    done = run_cli("status", "--address", cluster.address, "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert (status["address"], status["ready"]) == (cluster.address, True)
    assert {server["server_id"] for server in status["servers"]} == {"prefill-0", "decode-0"}
    assert all("num_free_tokens" in server["counters"] for server in status["servers"])
