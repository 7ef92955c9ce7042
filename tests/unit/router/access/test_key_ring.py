"""The keys that are in force, as their file changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.access import key_ring
from router.access.key_ring import KeyRing
from streamfill.access.key_file import change_keys
from streamfill.errors import ConfigError, UnauthenticatedError
from tests.unit.router.access.keys_for_tests import TestKeys
from tests.unit.router.http.serving import until


async def test_the_file_is_followed(keys: TestKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ring itself, while it is started."""
    monkeypatch.setattr(key_ring, "POLL_INTERVAL_S", 0.01)
    key = await keys.add("a")
    ring = KeyRing(keys.path)
    ring.start()
    account = ring.authenticate([f"Bearer {key}"])
    assert not account.is_removed
    change_keys(keys.path, lambda _: [], "--file")
    await until(lambda: account.is_removed)
    with pytest.raises(UnauthenticatedError):
        ring.authenticate([f"Bearer {key}"])
    await ring.close()
    await ring.close()


async def test_an_account_outlives_a_change_of_the_file(keys: TestKeys) -> None:
    """What was used of its limits is not forgotten when another key comes."""
    key = await keys.add("a", max_streams=1)
    account = keys.ring.authenticate([f"bearer {key}"])
    account.take_stream()
    await keys.add("b")
    assert keys.ring.authenticate([f"BEARER  {key} "]) is account


@pytest.mark.parametrize("content", [None, b"{", b"\xff\n"])
async def test_a_file_that_cannot_be_read_any_more_changes_nothing(
    keys: TestKeys, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    """The keys stay in force and the log says so, once for each change; a good file then counts."""
    key = await keys.add("a")
    good = keys.path.read_bytes()
    if content is None:
        keys.path.unlink()
    else:
        keys.path.write_bytes(content)
    await keys.ring.look()
    await keys.ring.look()
    assert caplog.text.count("keys_not_read") == 1
    keys.ring.authenticate([f"Bearer {key}"])
    keys.path.write_bytes(good.replace(b'"name":"a"', b'"name":"renamed"'))
    await keys.ring.look()
    assert keys.ring.authenticate([f"Bearer {key}"]).entry.name == "renamed"


def test_a_router_without_its_key_file_does_not_start(tmp_path: Path) -> None:
    """It would be open, or closed to everybody."""
    with pytest.raises(ConfigError, match="streamfill keys add") as caught:
        KeyRing(tmp_path / "missing")
    assert caught.value.key == "router.api_keys_file"
