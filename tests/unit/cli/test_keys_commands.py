"""`streamfill keys`."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from streamfill.access.key_file import read_keys
from streamfill.access.keys import is_key_of
from streamfill.cli.main import EXIT_ERROR, main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


def run(path: Path, *words: str) -> int:
    return main(["keys", *words, "--file", str(path)])


def test_add_prints_the_key_once_and_keeps_its_hash(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key is all of stdout; the file has its hash and limits, and nothing shows it again."""
    words = ("--tenant", "team", "--max-streams", "8", "--requests-per-s", "0.5")
    assert run(path, "add", "alice", *words, "--tokens-per-min", "9000", "--operator") == 0
    captured = capsys.readouterr()
    key = captured.out.strip()
    assert key not in captured.err
    (entry,) = read_keys(path, "--file")
    assert is_key_of(key, entry)
    assert (entry.name, entry.tenant, entry.is_operator) == ("alice", "team", True)
    limits = entry.limits
    assert (limits.max_streams, limits.requests_per_s, limits.tokens_per_min) == (8, 0.5, 9000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert run(path, "list") == 0
    assert run(path, "list", "--json") == 0
    shown = capsys.readouterr().out
    assert "alice" in shown
    assert not any(word in shown for word in (key, key.split("-", 2)[2], entry.hash, entry.salt))


def test_weight_and_cache_of_a_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As asked for, and shown; by default one like all others, with a cache of its tenant's own."""
    assert run(path, "add", "a") == 0
    assert run(path, "add", "b", "--shared-cache", "--weight", "2.5") == 0
    own, shared = read_keys(path, "--file")
    assert (own.shared_cache, own.weight) == (False, 1.0)
    assert (shared.shared_cache, shared.weight) == (True, 2.5)
    capsys.readouterr()
    assert run(path, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("own" in line and " 1 " in line for line in lines)
    assert any("shared" in line and "2.5" in line for line in lines)


def test_list_for_programs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty where there is no file; else an object for each key."""
    assert run(path, "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    run(path, "add", "a")
    capsys.readouterr()
    assert run(path, "list", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["tenant"], found["is_operator"]) == ("a", "a", False)


def test_remove(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Takes one away; the others stay; a name that is not there is an error that names those."""
    for name in ("a", "b"):
        run(path, "add", name)
    assert run(path, "remove", "a") == 0
    assert [entry.name for entry in read_keys(path, "--file")] == ["b"]
    assert run(path, "remove", "a") == EXIT_ERROR
    assert "there are: b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("add", "a/b"), "NAME = 'a/b'"),
        (("add", "b", "--tenant", "-"), "--tenant = '-'"),
        (("add", "taken"), "is there already"),
        (("add", "b", "--max-streams", "0"), "max_streams must be above 0"),
        (("add", "b", "--requests-per-s", "nan"), "requests_per_s must be above 0"),
        (("add", "b", "--tokens-per-min", "-1"), "tokens_per_min must be above 0"),
        (("add", "b", "--weight", "0"), "weight must be between 0.001 and 1000"),
        (("add", "b", "--weight", "nan"), "weight must be between"),
    ],
)
def test_wrong_words_change_nothing(
    path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    """The error says what and why, and no key is printed."""
    run(path, "add", "taken")
    before = path.read_bytes()
    capsys.readouterr()
    assert run(path, *words) == EXIT_ERROR
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert path.read_bytes() == before


def test_the_default_file_is_in_the_home_of_streamfill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is named when a key is made."""
    monkeypatch.setenv("STREAMFILL_HOME", str(tmp_path / "home"))
    assert main(["keys", "add", "a"]) == 0
    assert str(tmp_path / "home" / "api_keys.jsonl") in capsys.readouterr().err
    assert read_keys(tmp_path / "home" / "api_keys.jsonl", "--file")[0].name == "a"
