"""The API keys that are accepted now: those of a file, looked at again when it changes.

1. The file is read before the router serves; what is wrong with it stops the start.
2. ``authenticate`` finds a key's entry by its id and compares one hash: microseconds, no cache.
3. Each second the file's time, size and number are compared. A changed file is read in a thread. A
   key that is not in it any more is marked, which whoever holds its account sees at once.
4. A file that cannot be read any more changes nothing, and is said to be so, once for each change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from router.access.account import KeyAccount
from router.access.standing import SharingRules, standings
from router.file_version import version_of
from streamfill.access.key_file import read_keys
from streamfill.access.keys import KeyEntry, id_of, is_key_of
from streamfill.errors import ConfigError, UnauthenticatedError
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
"""A removed key is accepted for so long; a look costs microseconds."""
OPTION = "router.api_keys_file"
HEADER = "authorization"
"""Of HTTP, and key of gRPC metadata."""

_SCHEME = "bearer"


class KeyRing:
    """All keys of one file. ``start``, then ``close``, both in the router's loop."""

    def __init__(self, path: Path, rules: SharingRules | None = None) -> None:
        """Reads the file.

        Args:
            path: of the file.
            rules: what tenants share; None: as little as can be.

        Raises:
            ConfigError: it cannot be read, or is no key file.
        """
        self._path = path
        self._rules = rules or SharingRules()
        self._version = version_of(path)
        self._accounts: dict[str, KeyAccount] = {}
        self._watch: asyncio.Task[None] | None = None
        self._take(read_keys(path, OPTION))

    def start(self) -> None:
        """Look for changes from now on."""
        log_event(logger, "keys_read", file=self._path, num_keys=len(self._accounts))
        self._watch = asyncio.create_task(self._follow(), name="router-keys")

    async def close(self) -> None:
        """Look no more. Idempotent."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None

    def authenticate(self, headers: Sequence[str]) -> KeyAccount:
        """The account of the key in a call's ``authorization`` headers.

        Raises:
            UnauthenticatedError: there is no such header or more than one, or no such key. It
                shows nothing of what was sent.
        """
        if not headers:
            raise UnauthenticatedError("an API key is needed; send `authorization: Bearer KEY`")
        scheme, _, key = headers[0].strip().partition(" ")
        key = key.strip()
        if len(headers) > 1 or scheme.lower() != _SCHEME or not key:
            raise UnauthenticatedError(
                "the authorization is not of the form `Bearer KEY`, or is there more than once"
            )
        account = self._accounts.get(id_of(key) or "")
        if account is None or not is_key_of(key, account.entry):
            raise UnauthenticatedError("this API key is not known here, or was removed")
        return account

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001  keys must go on being looked after
                log_event(logger, "keys_watch_failed", level=logging.ERROR, exception=error)

    async def look(self) -> None:
        """Read the file again if it changed."""
        version = await asyncio.to_thread(version_of, self._path)
        if version == self._version:
            return
        self._version = version
        try:
            entries = await asyncio.to_thread(read_keys, self._path, OPTION)
        except ConfigError as error:
            log_event(
                *(logger, "keys_not_read"),
                level=logging.ERROR,
                file=self._path,
                error=error.remedy,
                consequence="the keys that were read last stay in force",
            )
            return
        added, removed = self._take(entries)
        log_event(
            *(logger, "keys_read"),
            file=self._path,
            num_keys=len(self._accounts),
            added=",".join(added),
            removed=",".join(removed),
        )

    def _take(self, entries: Sequence[KeyEntry]) -> tuple[list[str], list[str]]:
        """Names of the keys that came and of those that went. A key whose hash is another one is
        another key."""
        before, self._accounts = self._accounts, {}
        added: list[str] = []
        for entry in entries:
            account = before.get(entry.id)
            if account is None or account.entry.hash != entry.hash:
                account = KeyAccount(entry)
                added.append(entry.name)
            else:
                account.replace_entry(entry)
                del before[entry.id]
            self._accounts[entry.id] = account
        for key_id, standing in standings(entries, self._rules).items():
            self._accounts[key_id].standing = standing
        for account in before.values():
            account.is_removed = True
        return added, [account.entry.name for account in before.values()]
