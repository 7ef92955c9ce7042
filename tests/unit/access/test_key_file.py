"""API keys and their file."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest

from streamfill.access.key_file import change_keys, read_keys
from streamfill.access.keys import KeyLimits, id_of, is_key_of, new_key
from streamfill.errors import ConfigError


def test_a_key_is_that_of_its_entry_and_of_no_other() -> None:
    """Two keys of one name have nothing in common, and nothing of a key is in its entry."""
    key, entry = new_key("a")
    other_key, other = new_key("a")
    assert is_key_of(key, entry)
    assert is_key_of(other_key, other)
    assert not is_key_of(key, other)
    assert not is_key_of(key[:-1], entry)
    assert not is_key_of(key + "x", entry)
    assert id_of(key) == entry.id
    secret = key.split("-", 2)[2]
    assert len(secret) == 43  # 256 bits in base64
    assert secret not in msgspec.json.encode(entry).decode()


@pytest.mark.parametrize("key", ["", "sf", "sf-a", "sk-a-b", "sf-a-" + "x" * 200, "Bearer sf-a-b"])
def test_what_is_no_key_has_no_id(key: str) -> None:
    """So nothing is hashed for it."""
    assert id_of(key) is None


def test_a_file_keeps_its_keys_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Through several changes, which leave nothing else behind but the lock."""
    path = tmp_path / "new" / "keys.jsonl"
    entries = [new_key(name, limits=KeyLimits(max_streams=3))[1] for name in ("a", "b")]
    change_keys(path, lambda before: [*before, entries[0]], "--file")
    path.chmod(0o644)
    change_keys(path, lambda before: [*before, entries[1]], "--file")
    assert read_keys(path, "--file") == tuple(entries)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {each.name for each in path.parent.iterdir()} == {"keys.jsonl", ".keys.jsonl.lock"}


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    """The file is replaced as a whole or not at all."""
    path = tmp_path / "keys.jsonl"
    change_keys(path, lambda _: [new_key("a")[1]], "--file")
    before = path.read_bytes()

    def refuse(_: object) -> list[object]:
        raise ConfigError("NAME", "a", "no")

    with pytest.raises(ConfigError):
        change_keys(path, refuse, "--file")  # type: ignore[arg-type]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: b"{}", "line 2 is no key entry"),
        (lambda line: b"sf-abc-SECRET-KEY", "line 2 is no key entry"),
        (lambda line: line.replace(b'"b"', b'"b/c"'), "line 2: name"),
        (lambda line: line.replace(b'"salt":"', b'"salt":"zz'), "line 2: salt"),
        (lambda line: line.replace(b'"b"', b'"a"'), "line 2: the name a is there twice"),
        (lambda line: line.replace(b'"max_streams":3', b'"max_streams":0'), "limits.max_streams"),
        (lambda line: line.replace(b'"max_streams"', b'"max_stream"'), "unknown field"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(tmp_path: Path, change: object, words: str) -> None:
    """Somebody may have written a key itself there."""
    path = tmp_path / "keys.jsonl"
    lines = [
        msgspec.json.encode(new_key(name, limits=KeyLimits(max_streams=3))[1])
        for name in ("a", "b")
    ]
    path.write_bytes(lines[0] + b"\n" + change(lines[1]) + b"\n")  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        read_keys(path, "router.api_keys_file")
    assert words in str(caught.value)
    assert caught.value.key == "router.api_keys_file"
    assert "SECRET" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    """Says how to make one."""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="streamfill keys add"):
            read_keys(path, "router.api_keys_file")
