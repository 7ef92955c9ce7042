"""A prefix cache of token pages, with tags, locks and an eviction order, as the fake engine needs.

It is a trie with one page per node. The content of a page is a function of the whole path to it, as
KV is of a prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Page = tuple[int, ...]


@dataclass(eq=False)
class CachedPage:
    """One page of the pool, owned by the cache."""

    parent: CachedPage | None
    tokens: Page
    children: dict[Page, CachedPage] = field(default_factory=dict)
    streams: set[int] = field(default_factory=set)
    num_locks: int = 0
    last_used: int = 0
    namespace: str = ""
    """Of a root."""


class FakeCache:
    """Owns ``num_pages`` pages; eviction by victim rank, then least recently used."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = 0
        self.num_locked_pages = 0
        self.num_evicted_tokens = 0
        self.ranks: Mapping[int, int] = {}
        self.on_evict: Callable[[CachedPage], None] | None = None
        """Called with each page that is about to go."""
        self._roots: dict[str, CachedPage] = {}
        """By namespace."""
        self._time = itertools.count(1)

    def match(self, token_ids: Sequence[int], namespace: str = "") -> list[CachedPage]:
        """Pages of the longest cached prefix, without touching them."""
        path: list[CachedPage] = []
        node = self._root(namespace)
        for page in self._pages_of(token_ids):
            child = node.children.get(page)
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def insert(self, token_ids: Sequence[int], namespace: str = "") -> list[CachedPage]:
        """Add the whole pages of ``token_ids``; returns all of them. The caller has the room."""
        now = next(self._time)
        path: list[CachedPage] = []
        node = self._root(namespace)
        for page in self._pages_of(token_ids):
            child = node.children.get(page)
            if child is None:
                child = CachedPage(node, page)
                node.children[page] = child
                self.num_pages += 1
            child.last_used = now
            path.append(child)
            node = child
        return path

    def lock(self, path: Sequence[CachedPage]) -> None:
        """Protect pages from eviction; to be undone by ``unlock``."""
        now = next(self._time)
        for page in path:
            page.last_used = now
            self.num_locked_pages += page.num_locks == 0
            page.num_locks += 1

    def unlock(self, path: Sequence[CachedPage]) -> None:
        """Undo one ``lock``."""
        for page in path:
            assert page.num_locks > 0
            page.num_locks -= 1
            self.num_locked_pages -= page.num_locks == 0

    def evict(self, num_pages: int) -> None:
        """Free this many pages; there have to be as many."""
        for _ in range(num_pages):
            victim = min(self._evictable_leaves(), key=self._victim_key)
            assert victim.parent is not None
            if self.on_evict is not None:
                self.on_evict(victim)
            del victim.parent.children[victim.tokens]
            self.num_pages -= 1
            self.num_evicted_tokens += self.page_size

    def all_pages(self) -> Iterator[CachedPage]:
        """Every page, parents first."""
        stack = [page for root in self._roots.values() for page in root.children.values()]
        while stack:
            page = stack.pop()
            yield page
            stack.extend(page.children.values())

    def all_paths(self) -> Iterator[list[int]]:
        """The tokens up to the end of every page."""
        roots = self._roots.values()
        stack = [(page, list(page.tokens)) for root in roots for page in root.children.values()]
        while stack:
            page, path = stack.pop()
            yield path
            stack += [(child, [*path, *child.tokens]) for child in page.children.values()]

    def clear(self) -> None:
        """Forget everything; nothing may be locked."""
        assert self.num_locked_pages == 0
        self._roots.clear()
        self.num_pages = 0

    def _root(self, namespace: str) -> CachedPage:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = CachedPage(None, (), namespace=namespace)
        return root

    def _pages_of(self, token_ids: Sequence[int]) -> Iterator[Page]:
        for start in range(0, len(token_ids) - self.page_size + 1, self.page_size):
            yield tuple(token_ids[start : start + self.page_size])

    def _evictable_leaves(self) -> Iterator[CachedPage]:
        return (page for page in self.all_pages() if not page.children and not page.num_locks)

    def _victim_key(self, page: CachedPage) -> tuple[int, int]:
        ranks = (self.ranks[stream] for stream in page.streams if stream in self.ranks)
        return max(ranks, default=-1), page.last_used
