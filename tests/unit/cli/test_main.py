"""The command line as a whole: what it imports, how it fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from streamfill.cli.main import COMMANDS, EXIT_INTERRUPTED, EXIT_NO_READER, Command, main

RUN_MAIN = "from streamfill.cli.main import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A STREAMFILL_HOME of its own for each test."""
    monkeypatch.setenv("STREAMFILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a model until a server looks into it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(2048))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself."""
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: streamfill {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "usage", "problem"),
    [
        (["status", "--jsn"], "status [-h]", "--jsn (did you mean --json?)"),
        (["policy", "set", "lcas", "--server-ids=a"], "policy set [-h]", "--server-ids=a"),
        (["down", "--xyzzy", "now"], "down [-h]", "--xyzzy now\n"),
        (["--jsn"], "[-h] [--version] COMMAND", "COMMAND\n"),
    ],
)
def test_an_unknown_option_is_refused_by_its_command(
    words: list[str], usage: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the usage of the command, not with that of `streamfill`, and with what may be meant."""
    with pytest.raises(SystemExit, match="2"):
        main(words)
    shown = capsys.readouterr().err
    assert shown.startswith(f"usage: streamfill {usage}")
    assert problem in shown


@pytest.mark.parametrize("words", ["--version", "--help", "doctor"])
@pytest.mark.parametrize("redirection", ["| true", ">&-"])
def test_nobody_reads_the_output(words: str, redirection: str) -> None:
    """A closed pipe or a closed output is no reason for a traceback."""
    command = f"{sys.executable} -m streamfill.cli.main {words} {redirection}"
    done = subprocess.run(
        command, shell=True, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    """Runs `script` in an interpreter of its own."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_help_imports_nothing_heavy() -> None:
    """`streamfill --help` needs neither torch nor sglang, nor grpc, rich or msgspec."""
    script = (
        "import sys\n"
        "from streamfill.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'sglang', 'grpc', 'rich', 'msgspec', 'zmq'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "command",
    ["up", "down", "status", "top", "policy_list", "policy_set", "run", "demo", "model", "doctor"],
)
def test_commands_import_neither_torch_nor_sglang(command: str) -> None:
    """The launcher and the client side run without torch and sglang."""
    script = (
        f"import sys, streamfill.cli.{command}\n"
        "heavy = {'torch', 'sglang', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = run_script(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["up", "--nonsense"],
        ["up", "--prefill", "two"],
        ["run"],
        ["run", "f", "--mode", "replace"],
        ["demo", "--segments", "x"],
    ],
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage ends with exit code 2 and a usage line."""
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: streamfill" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--version"], ["policy", "list"]])
def test_a_reader_that_went_away(words: list[str], unbuffered: str) -> None:
    """`streamfill … | head` ends without a word, as if by SIGPIPE, whenever it is written."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; {RUN_MAIN}", *words],
            check=False,
            stdout=writer,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_NO_READER, b"")


def test_ctrl_c_before_a_command_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command imports takes a while; Ctrl-C ends that as it ends the rest."""

    def interrupted(name: str) -> Command:
        raise KeyboardInterrupt(name)

    monkeypatch.setattr("streamfill.cli.main._load", interrupted)
    assert main(["status"]) == EXIT_INTERRUPTED


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on the standard error of a command that ends with exit code 2."""
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_wrong_model_path(capsys: pytest.CaptureFixture[str]) -> None:
    """`up` and `demo` with a folder that is not there say so in one line, before any start."""
    for command in ("up", "demo"):
        line = fails(capsys, command, "--model", "/nowhere")
        assert line.startswith("error: model = '/nowhere': no such folder")


def test_port_in_use(capsys: pytest.CaptureFixture[str], model: Path, home: Path) -> None:
    """`up` on a port that is in use names key, value and remedy, and starts nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = fails(capsys, "up", "--model", str(model), "--port", str(port))
    assert line.startswith(f"error: router.grpc_port = {port}: is in use on 127.0.0.1; choose")
    assert not list((home / "run" / "local" / "logs").iterdir())


def test_unknown_option_in_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`up` with an unknown key in the cluster file names it."""
    file = tmp_path / "c.toml"
    file.write_text("[prefill]\ncuont = 2\n")
    line = fails(capsys, "up", "--config", str(file))
    assert line.startswith("error: prefill.cuont = 2: is no known option; known here: count")


def test_run_dir_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    """A run folder below a file is refused by its key."""
    (tmp_path / "file").write_text("")
    run_dir = f"launcher.run_dir={tmp_path / 'file' / 'x'}"
    for extra in ((), ("--detach",)):
        line = fails(
            capsys,
            "up",
            "--model",
            str(model),
            "--port",
            "0",
            "--http-port",
            "0",
            "--set",
            run_dir,
            *extra,
        )
        assert line.startswith("error: launcher.run_dir = ")


@pytest.mark.parametrize("command", ["down", "status"])
def test_no_such_cluster(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Commands on a cluster that does not run say how to start one."""
    line = fails(capsys, command, "--name", "ghost")
    assert line == (
        "error: --name = 'ghost': no cluster of this name runs here; start one with `streamfill up`"
    )


def test_status_of_an_address_without_a_router(capsys: pytest.CaptureFixture[str]) -> None:
    """An address where nobody listens is an error of one line."""
    with socket.socket() as held:  # so that nobody else does
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        assert "UNAVAILABLE" in fails(capsys, "status", "--address", address)


def test_run_checks_all_files_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`run` refuses files that are missing, no UTF-8 or empty before it connects to anything."""
    good, latin, empty = tmp_path / "good", tmp_path / "latin", tmp_path / "empty"
    good.write_text("text")
    latin.write_bytes("größe".encode("latin-1"))
    empty.write_text("")
    for bad, remedy in (
        (tmp_path / "missing", "cannot be read (No such file or directory)"),
        (latin, "is no UTF-8 text (byte 2)"),
        (empty, "is empty"),
        (tmp_path, "cannot be read (Is a directory)"),
    ):
        line = fails(capsys, "run", str(good), str(bad), "--address", "127.0.0.1:1")
        assert line.startswith(f"error: FILE = {str(bad)!r}: {remedy}")


def test_demo_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    """Values that no demo can have are refused before the cluster starts."""
    assert "--segments = 0" in fails(capsys, "demo", "--segments", "0")
    assert "--delay = -1.0" in fails(capsys, "demo", "--delay=-1")
    assert "--max-tokens = 0" in fails(capsys, "demo", "--max-tokens", "0")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the installed version."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("streamfill ")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    """The report names SGLang with its pin, the cores and the model's state."""
    main(["doctor"])
    output = capsys.readouterr().out
    for word in ("sglang", "torch", "cores", "memory", "default model", "converted on first use"):
        assert word in output


def test_model_command(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """`model --model PATH` checks a folder and prints it."""
    assert main(["model", "--model", str(model)]) == 0
    assert capsys.readouterr().out == f"{model}\n"


@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--delay", ["run", "no-such-file"]),
        ("--delay", ["demo"]),
        ("--seconds", ["bench", "router"]),
    ],
)
def test_a_wait_without_an_end_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], option: str, value: str
) -> None:
    """By the option and the value, before anything starts."""
    assert main([*words, f"{option}={value}"]) == 2
    assert f"{option} = {float(value)}" in capsys.readouterr().err
