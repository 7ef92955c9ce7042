"""The version check of SGLang."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from streamfill.engine import version
from streamfill.errors import EngineVersionError


def _pretend(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(version, "version", lambda _name: found)


@pytest.mark.parametrize("found", ["0.5.16", "0.5.16+cpu"])
def test_the_pinned_version_passes(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """The pinned version is accepted, with or without a local build label."""
    _pretend(monkeypatch, found)
    version.check_sglang_version()


@pytest.mark.parametrize("found", ["0.5.15", "0.5.160", "0.5.16.post1", "0.5.16rc1"])
def test_another_version_names_both_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    """Any other version is refused with what was found, what is wanted and what to do."""
    _pretend(monkeypatch, found)
    with pytest.raises(EngineVersionError) as caught:
        version.check_sglang_version()
    message = str(caught.value)
    assert found in message
    assert version.PINNED_SGLANG_VERSION in message
    assert "make setup" in message


def test_a_missing_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No SGLang at all is the same error, not one of importlib's."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", missing)
    with pytest.raises(EngineVersionError, match="no sglang is installed"):
        version.check_sglang_version()
