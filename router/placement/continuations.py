"""Whether what follows a beginning is mostly the same: a document, or instructions that many share.

Of each block it is known which one came behind it last, how often it was the same one as before,
and how often another. Instructions have another continuation with every stream; a document has the
same one with every reader.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple

from streamfill.stream.prefix_blocks import BlockKey

MAX_BLOCKS: Final = 1 << 15
"""Remembered, the least recently continued forgotten first; some 6 MB."""


class _Seen(NamedTuple):
    last: BlockKey
    num_same: int
    num_other: int


class Continuations:
    """Owned by a policy."""

    def __init__(self) -> None:
        self._seen: OrderedDict[BlockKey, _Seen] = OrderedDict()

    def note(self, after: BlockKey | None, keys: Iterable[BlockKey]) -> None:
        """A prompt went on with these blocks behind the block ``after``. None: it began."""
        seen = self._seen
        for key in keys:
            if after is not None:
                known = seen.get(after)
                if known is None:
                    seen[after] = _Seen(key, 0, 0)
                    if len(seen) > MAX_BLOCKS:
                        seen.popitem(last=False)
                else:
                    same = known.last == key
                    seen[after] = _Seen(key, known.num_same + same, known.num_other + (not same))
                    seen.move_to_end(after)
            after = key

    def share(self, key: BlockKey) -> float:
        """How likely it is that the next prompt that has this block goes on as one before. 1 where
        nothing speaks against it."""
        known = self._seen.get(key)
        if known is None:
            return 1.0
        return (known.num_same + 1) / (known.num_same + known.num_other + 1)
