"""What it costs to get KV back: the cost model of preemption, as plain data and pure functions.

Three things are priced, each with a form that says what it physically is:

===========  =======================================================  =========================
recompute    ``fixed + n * per_token + n * (p + n / 2) * per_pair``   ``n`` new tokens behind a
                                                                      prefix of ``p``: start of
                                                                      each forward pass, matrices,
                                                                      and the attention of each
                                                                      new token to all before it
swap out,    ``fixed + bytes * per_byte``                             start of a copy, and the
swap in                                                               link
===========  =======================================================  =========================

All are evaluated at the *victim*: its tokens, behind the prefix that stays. (The published cost
model, Stream2LLM, MLSys 2026, prices the tokens of the stream that needs the memory.) Where the
coefficients come from: ``streamfill profile`` measures them, ``BUILT_IN`` has some for every
platform, and ``Corrected`` follows what a server observes.
"""

from __future__ import annotations

import enum
import math
from typing import Final

import msgspec


class RecomputeCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of the engine."""

    fixed_s: float
    per_token_s: float
    per_pair_s: float = 0.0
    pass_tokens: int = 0
    """Most tokens of one forward pass; more take several. 0: no limit."""

    def seconds(self, num_tokens: int, prefix_tokens: int = 0) -> float:
        """To compute ``num_tokens`` behind a prefix; 0 for none."""
        if num_tokens <= 0:
            return 0.0
        num_pairs = num_tokens * (prefix_tokens + num_tokens / 2)
        return (
            self.start_seconds(num_tokens)
            + num_tokens * self.per_token_s
            + num_pairs * self.per_pair_s
        )

    def start_seconds(self, num_tokens: int) -> float:
        """Of that, what does not depend on the tokens of each pass."""
        if num_tokens <= 0:
            return 0.0
        num_passes = -(-num_tokens // self.pass_tokens) if self.pass_tokens > 0 else 1
        return num_passes * self.fixed_s

    def share_seconds(self, num_tokens: int, prefix_tokens: int = 0) -> float:
        """Likewise beside other tokens that are computed anyway: of each pass's start they pay the
        part that they are of a full one."""
        seconds = self.seconds(num_tokens, prefix_tokens)
        if num_tokens <= 0 or self.pass_tokens <= 0:
            return seconds
        num_passes = -(-num_tokens // self.pass_tokens)
        return seconds - (num_passes - num_tokens / self.pass_tokens) * self.fixed_s


class CopyCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one copy between device and host memory."""

    fixed_s: float
    per_byte_s: float

    def seconds(self, num_bytes: int) -> float:
        """To copy so many bytes; 0 for none."""
        return self.fixed_s + num_bytes * self.per_byte_s if num_bytes > 0 else 0.0


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that preemption is priced with, of one model on one machine."""

    recompute: RecomputeCost
    swap_out: CopyCost
    swap_in: CopyCost
    copies_overlap: bool
    """Copies run beside the engine's work (a GPU's copy engines); else the engine waits for
    them."""


BUILT_IN: Final = {
    "cpu": CostModel(
        # SmolLM2-135M in float32 on one core: docs/benchmarks/preemption.md, "What things cost".
        recompute=RecomputeCost(fixed_s=0.0535, per_token_s=0.0021, per_pair_s=9.5e-7),
        swap_out=CopyCost(fixed_s=5e-4, per_byte_s=7.8e-11),
        swap_in=CopyCost(fixed_s=3e-4, per_byte_s=8.1e-11),
        copies_overlap=False,
    ),
    "cuda": CostModel(
        # An 8-billion-parameter model in bfloat16 on an H200: docs/benchmarks/gpu.md.
        recompute=RecomputeCost(fixed_s=0.0242, per_token_s=1e-5, per_pair_s=4e-9),
        swap_out=CopyCost(fixed_s=3.7e-4, per_byte_s=1.83e-11),
        swap_in=CopyCost(fixed_s=1.5e-4, per_byte_s=1.89e-11),
        copies_overlap=True,
    ),
}
"""By ``torch.device.type``. A server has a model from its first moment, and corrects it."""


class CostKind(enum.Enum):
    """What is observed."""

    RECOMPUTE = "recompute"
    SWAP_OUT = "swap_out"
    SWAP_IN = "swap_in"


_MEMORY: Final = 0.95
"""Weight that an observation keeps with each new one: the last twenty count."""
_MOST: Final = 30.0
"""A single observation counts as at most so many times too dear or too cheap."""
_MOST_APART: Final = 4.0
"""Neither part of a cost is off by more than so many times the other's common factor."""
_WILD: Final = 3.0
"""For telling the parts apart, an observation is at most so many times off what is expected."""
_PULL: Final = 0.1
"""How much the parts hold together: as much as observations of which this is the sum of squares."""


class _Parts:
    """By how much the start of a forward pass and the rest of it are off, each on its own: a host
    may be slow at one and not at the other. Least squares of relative errors, and where all
    observations have the same mixture of both, the common factor for either."""

    def __init__(self) -> None:
        self._starts = self._rests = self._both = 0.0  # sums of products
        self._start = self._rest = 0.0

    def observe(self, start_s: float, rest_s: float, observed_s: float, factor: float) -> None:
        """The uncorrected parts of something that took ``observed_s``."""
        expected_s = factor * (start_s + rest_s)
        observed_s = max(expected_s / _WILD, min(expected_s * _WILD, observed_s))
        start, rest = start_s / observed_s, rest_s / observed_s
        self._starts = self._starts * _MEMORY + start * start
        self._rests = self._rests * _MEMORY + rest * rest
        self._both = self._both * _MEMORY + start * rest
        self._start = self._start * _MEMORY + start
        self._rest = self._rest * _MEMORY + rest

    def factors(self, factor: float) -> tuple[float, float]:
        """Of the start and of the rest.

        Args:
            factor: by how much the whole is off.
        """
        pull = _PULL / factor
        starts, rests = self._starts + pull / factor, self._rests + pull / factor
        start, rest = self._start + pull, self._rest + pull
        determinant = starts * rests - self._both * self._both
        return (
            _within(factor, (start * rests - rest * self._both) / determinant),
            _within(factor, (rest * starts - start * self._both) / determinant),
        )


def _within(factor: float, part: float) -> float:
    return max(factor / _MOST_APART, min(factor * _MOST_APART, part))


class Corrected:
    """A cost model that follows what is observed: one factor for each kind, the geometric mean of
    observed by predicted, and for recomputing one for each of two parts. Deterministic."""

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self._factors = dict.fromkeys(CostKind, 1.0)
        self._logs = dict.fromkeys(CostKind, 0.0)
        self._weights = dict.fromkeys(CostKind, 1.0)  # the model itself counts as one observation
        self._recompute = _Parts()

    @property
    def factors(self) -> dict[CostKind, float]:
        """By how much the model is off, by kind; 1 before anything was observed."""
        return dict(self._factors)

    def observe(self, kind: CostKind, predicted_s: float, observed_s: float) -> None:
        """Something that the *uncorrected* model puts at ``predicted_s`` took ``observed_s``."""
        if predicted_s <= 0.0 or observed_s <= 0.0:
            return
        error = math.log(observed_s / predicted_s)
        limit = math.log(_MOST)
        error = max(-limit, min(limit, error))
        weight = self._weights[kind] = self._weights[kind] * _MEMORY + 1.0
        self._logs[kind] += (error - self._logs[kind]) / weight
        self._factors[kind] = math.exp(self._logs[kind])

    def observe_recompute(self, num_tokens: int, prefix_tokens: int, observed_s: float) -> None:
        """A forward pass."""
        predicted_s = self._model.recompute.seconds(num_tokens, prefix_tokens)
        if predicted_s <= 0.0 or observed_s <= 0.0:
            return
        self.observe(CostKind.RECOMPUTE, predicted_s, observed_s)
        start_s = self._model.recompute.start_seconds(num_tokens)
        factor = self._factors[CostKind.RECOMPUTE]
        self._recompute.observe(start_s, predicted_s - start_s, observed_s, factor)

    def observe_copy(self, *, out: bool, num_bytes: int, observed_s: float) -> None:
        """A copy to (``out``) or from host memory."""
        kind = CostKind.SWAP_OUT if out else CostKind.SWAP_IN
        cost = self._model.swap_out if out else self._model.swap_in
        self.observe(kind, cost.seconds(num_bytes), observed_s)

    def model(self) -> CostModel:
        """As corrected so far."""
        model, factors = self._model, self._factors
        start, rest = self._recompute.factors(factors[CostKind.RECOMPUTE])
        return CostModel(
            recompute=RecomputeCost(
                fixed_s=model.recompute.fixed_s * start,
                per_token_s=model.recompute.per_token_s * rest,
                per_pair_s=model.recompute.per_pair_s * rest,
                pass_tokens=model.recompute.pass_tokens,
            ),
            swap_out=_scaled(model.swap_out, factors[CostKind.SWAP_OUT]),
            swap_in=_scaled(model.swap_in, factors[CostKind.SWAP_IN]),
            copies_overlap=model.copies_overlap,
        )


def _scaled(cost: CopyCost, factor: float) -> CopyCost:
    return CopyCost(fixed_s=cost.fixed_s * factor, per_byte_s=cost.per_byte_s * factor)
