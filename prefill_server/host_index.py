"""Which KV pages are in host memory. Plain Python: no torch, no copies.

A page is known by its *key*: a digest of all tokens up to its end. Two streams with the same prefix
have the same keys, so a shared page is kept once, and an updated context finds again whatever it
still has in common with the old one.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

PageKey = bytes

ROOT: PageKey = b""
"""Key of the empty prefix."""


def page_keys(token_ids: array[int], page_size: int, previous: PageKey = ROOT) -> list[PageKey]:
    """Keys of all whole pages of ``token_ids`` (type code ``q``), which stand behind a prefix whose
    last page has the key ``previous``."""
    view = memoryview(token_ids).cast("B")
    page_bytes = page_size * token_ids.itemsize
    keys: list[PageKey] = []
    for start in range(0, len(token_ids) // page_size * page_bytes, page_bytes):
        page = view[start : start + page_bytes]
        previous = blake2b(page, key=previous, digest_size=16).digest()
        keys.append(previous)
    return keys


class HostIndex:
    """Host pages by key, the least recently used given up first.

    A prefix is of use without what follows, but not the other way round: pages are touched from the
    last to the first, so that the end of a sequence goes before its beginning.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_dropped = 0
        """Pages given up to make room."""
        self._free = list(range(num_pages))  # a heap: low numbers first, so that runs come together
        self._pages: OrderedDict[PageKey, int] = OrderedDict()
        self._demoted: set[PageKey] = set()

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_demoted(self) -> int:
        """Pages that nobody is expected to need."""
        return len(self._demoted)

    def num_present(self, keys: Sequence[PageKey]) -> int:
        """How many of ``keys`` are here without a gap, from the first one on."""
        pages = self._pages
        for number, key in enumerate(keys):
            if key not in pages:
                return number
        return len(keys)

    def num_present_total(self, keys: Sequence[PageKey]) -> int:
        """How many of ``keys`` are here, with or without gaps."""
        return sum(key in self._pages for key in keys)

    def find(self, keys: Sequence[PageKey]) -> list[int]:
        """Host pages of ``keys``, which are used now.

        Raises:
            KeyError: one is not here.
        """
        pages = [self._pages[key] for key in keys]
        self.touch(keys)
        return pages

    def touch(self, keys: Sequence[PageKey]) -> None:
        """They are used now. Unknown ones are passed over."""
        for key in reversed(keys):
            if key in self._pages:
                self._pages.move_to_end(key)
                self._demoted.discard(key)

    def put(self, keys: Sequence[PageKey]) -> list[tuple[PageKey, int]]:
        """Make room for those of ``keys`` that are not here, giving up others.

        Returns:
            (key, host page to be written) of each new one, in order. Where there is too little room
            for all, the last ones are left out.
        """
        here = [key for key in keys if key in self._pages]
        self.touch(here)
        wanted = [key for key in dict.fromkeys(keys) if key not in self._pages]
        room = self.num_pages - len(here)
        wanted = wanted[: max(0, room)]
        for _ in range(len(wanted) - len(self._free)):
            key, page = self._pages.popitem(last=False)
            self._demoted.discard(key)
            heapq.heappush(self._free, page)
            self.num_dropped += 1
        new = [(key, heapq.heappop(self._free)) for key in wanted]
        for key, page in reversed(new):
            self._pages[key] = page
        return new

    def demote(self, keys: Sequence[PageKey] | None) -> None:
        """Nobody is expected to need them: they are given up first, the last one before all. None:
        this holds for all pages, whose order stays."""
        if keys is None:
            self._demoted.update(self._pages)
            return
        for key in keys:
            if key in self._pages:
                self._pages.move_to_end(key, last=False)
                self._demoted.add(key)

    def clear(self) -> None:
        """Forget all."""
        self._pages.clear()
        self._demoted.clear()
        self._free = list(range(self.num_pages))
