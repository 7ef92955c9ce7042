"""Key files for tests of the router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from router.access.key_ring import KeyRing
from streamfill.access.key_file import change_keys
from streamfill.access.keys import KeyLimits, new_key


class TestKeys:
    """A key file in a folder of a test, and the ring that reads it."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys.jsonl"
        change_keys(self.path, lambda _: [], "--file")
        self.ring = KeyRing(self.path)

    async def add(self, name: str, **options: Any) -> str:
        """A new key, which the ring knows afterwards.

        Args:
            options: of ``new_key``, and those of ``KeyLimits``.
        """
        fields = {key: options.pop(key) for key in KeyLimits.__struct_fields__ if key in options}
        key, entry = new_key(name, limits=KeyLimits(**fields), **options)
        change_keys(self.path, lambda before: [*before, entry], "--file")
        await self.ring.look()
        return key

    async def remove(self, name: str) -> None:
        """The ring does not know it afterwards."""
        change_keys(self.path, lambda before: [e for e in before if e.name != name], "--file")
        await self.ring.look()
