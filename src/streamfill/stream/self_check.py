"""A look at a freshly loaded tokenizer: do its cuts hold on a sample of many scripts?

The cut rules are proved, not guessed; this guards against a library that behaves otherwise than it
is described. What fails tokenises whole texts from then on, which is slow and right.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from itertools import pairwise

from streamfill.stream.cut_rule import CutRule
from streamfill.stream.incremental import IncrementalTokenizer
from streamfill.stream.text_decoder import TextDecoder
from streamfill.stream.tokenizer import TextTokenizer

_log = logging.getLogger(__name__)

SAMPLE = (
    "The quick brown fox can't jump; they're 12345 years old!  It's 3.14159 o'clock.\n\n"
    "def f(x):\n\treturn x ** 2  # squared\n\n    indented   text \r\n\r\n end\n"
    "Größe, naïve café, Ångström, e\u0301tude \u1e9b\u0323. Привет, мир! Ελλάδα.\n"
    "你好,世界。今天天气很好!我们去公园吧,好吗? こんにちは、世界。 안녕하세요 세계, 한국어.\n"
    "مرحبا بالعالم، كيف حالك؟ नमस्ते दुनिया, आप कैसे हैं। สวัสดีชาวโลก ภาษาไทย שלום עולם.\n"
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ☺\ufe0f ½ ﬁ Ⅷ \u3000 \xa0 <|im_start|>user\n"
    "<s>[INST] x </s> a_b-c=d/e\\f {g}"
)
_NUM_ROUNDS = 6
_NUM_CUTS = 12


class WholeOnly:
    """A tokenizer whose cuts are not used. Passes all else on."""

    def __init__(self, tokenizer: TextTokenizer, reason: str) -> None:
        self._tokenizer = tokenizer
        self.whole_only_reason = reason
        self.vocab_size = tokenizer.vocab_size
        self.eos_ids = tokenizer.eos_ids
        self.bos_id = tokenizer.bos_id
        self.special_ids = tokenizer.special_ids
        self.cut_rule: CutRule | None = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `TextTokenizer`."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def affixes(self) -> tuple[list[int], list[int]] | None:
        """See `TextTokenizer`."""
        return self._tokenizer.affixes()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """See `TextTokenizer`."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """See `TextTokenizer`."""
        return self._tokenizer.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """See `TextTokenizer`."""
        return self._tokenizer.is_special(token_id)

    def new_decoder(self, *, skip_special_tokens: bool) -> TextDecoder:
        """See `TextTokenizer`."""
        return self._tokenizer.new_decoder(skip_special_tokens=skip_special_tokens)


def without_wrong_cuts(tokenizer: TextTokenizer) -> TextTokenizer:
    """`tokenizer` itself if its cuts hold, otherwise one that encodes whole texts only."""
    reason = tokenizer.whole_only_reason or wrong_cut(tokenizer)
    if not reason:
        return tokenizer
    _log.warning("tokenizer is not incremental, each segment re-tokenises its prompt: %s", reason)
    return WholeOnly(tokenizer, reason)


def wrong_cut(tokenizer: TextTokenizer) -> str:
    """What is wrong with the cuts of `tokenizer`; empty when nothing is."""
    expected = tokenizer.encode(SAMPLE, add_special_tokens=True)
    for seed in range(_NUM_ROUNDS):
        rng = random.Random(seed)
        cuts = sorted(rng.sample(range(1, len(SAMPLE)), _NUM_CUTS))
        stream = IncrementalTokenizer(tokenizer, add_special_tokens=True)
        for begin, end in pairwise([0, *cuts, len(SAMPLE)]):
            stream.append(SAMPLE[begin:end])
        if list(stream.ids) != expected:
            return f"cuts at {cuts} of the built-in sample give other ids than the whole"
        if not stream.is_incremental:
            return "what it puts before and behind a text is not constant"
    return ""
