"""KV slots in pages, allocated without Triton.

SGLang's `PagedTokenToKVPoolAllocator` calls Triton kernels to hand out slots, which a CPU does not
have. The same rules in plain Python: a sequence's token `t` lies in its page `t // page_size` at
place `t % page_size`; a started page is filled before a new one is taken; only whole pages change
owner.

| pages | owner | ends by |
| --- | --- | --- |
| `free_pages`, `release_pages` | the allocator | `alloc`, `alloc_extend`, `alloc_decode` |
| handed out | the request, then the radix tree | `free` by whoever holds them |
| page 0 | nobody: padded tokens write there | never handed out |

Dependences on SGLang 0.5.16: `free_pages`, `need_sort` and `merge_and_sort_free` of the base class.
"""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """Page allocator of one KV pool; used by the scheduler's thread only.

    A call either succeeds or returns None and leaves every page where it was.
    """

    free_pages: torch.Tensor
    """int64, the pages that the next call takes from, in this order."""

    def alloc_extend(  # noqa: PLR0917 - SGLang's signature
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the tokens `prefix_len` to `seq_len` of each sequence, in the sequences' order.

        Args:
            prefix_lens: not used; SGLang passes the lengths on the device and on the CPU.
            prefix_lens_cpu: integer [num_seqs], tokens that have a slot already.
            seq_lens: not used, see `prefix_lens`.
            seq_lens_cpu: integer [num_seqs], tokens that shall have one.
            last_loc: integer [num_seqs], the slot of the token before; not read where the prefix
                ends with its page.
            extend_num_tokens: the number of slots asked for, over all sequences.
            num_new_pages: not used; counted here.

        Returns:
            int64 [extend_num_tokens], or None where the pages do not suffice.

        Raises:
            ValueError: the lengths do not add up to `extend_num_tokens`.
        """
        page_size: int = self.page_size
        prefixes: list[int] = prefix_lens_cpu.tolist()
        ends: list[int] = seq_lens_cpu.tolist()
        num_asked = sum(ends) - sum(prefixes)
        if num_asked != extend_num_tokens:
            raise ValueError(f"lengths ask for {num_asked} slots, not {extend_num_tokens}")
        new_pages = [
            _num_pages(end, page_size) - _num_pages(prefix, page_size)
            for prefix, end in zip(prefixes, ends, strict=True)
        ]
        pages = self._take_pages(sum(new_pages))
        if pages is None:
            return None
        slots_of_pages = self._slots_of(pages)
        parts: list[torch.Tensor] = []
        first = 0
        for prefix, end, last, num_pages in zip(
            prefixes, ends, last_loc.tolist(), new_pages, strict=True
        ):
            num_rest = min(end, _num_pages(prefix, page_size) * page_size) - prefix
            if num_rest > 0:
                parts.append(torch.arange(last + 1, last + 1 + num_rest, device=self.device))
            num_more = end - prefix - num_rest
            parts.append(slots_of_pages[first : first + num_more])
            first += num_pages * page_size
        return torch.cat(parts) if parts else slots_of_pages

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One more slot for each sequence.

        Args:
            seq_lens: not used, see `alloc_extend`.
            seq_lens_cpu: integer [num_seqs], the length with the new token.
            last_loc: integer [num_seqs], the slot of the token before.

        Returns:
            int64 [num_seqs], or None where the pages do not suffice.
        """
        page_size: int = self.page_size
        ends: list[int] = seq_lens_cpu.tolist()
        pages = self._take_pages(sum(end % page_size == 1 % page_size for end in ends))
        if pages is None:
            return None
        fresh = iter((pages * page_size).tolist())
        slots = [
            next(fresh) if end % page_size == 1 % page_size else last + 1
            for end, last in zip(ends, last_loc.tolist(), strict=True)
        ]
        return torch.tensor(slots, dtype=torch.int64, device=self.device)

    def _take_pages(self, num_pages: int) -> torch.Tensor | None:
        """int64 [num_pages] that now belong to the caller, or None; takes all or nothing."""
        if self.need_sort and num_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if num_pages > len(self.free_pages):
            return None
        taken = self.free_pages[:num_pages]
        self.free_pages = self.free_pages[num_pages:]
        return taken

    def _slots_of(self, pages: torch.Tensor) -> torch.Tensor:
        """int64 [len(pages) * page_size]: the slots of `pages`, page by page."""
        page_size: int = self.page_size
        places = torch.arange(page_size, device=self.device)
        return (pages.unsqueeze(1) * page_size + places).view(-1)


def _num_pages(num_tokens: int, page_size: int) -> int:
    return (num_tokens + page_size - 1) // page_size
