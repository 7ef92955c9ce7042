"""How KV may be made smaller on its way, and when that pays.

None by default. A cast to a smaller type is lossy: an answer that rests on such KV need not be the
one of the exact KV, and is marked. Further codecs go into `CODECS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from streamfill.errors import ConfigError
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.source import KvSource, StagedKv

NO_CODEC: Final = "none"
SAMPLE_BYTES: Final = 1 << 22
"""Of KV, for measuring what a codec costs: a few milliseconds."""


class Codec(Protocol):
    """One way of writing KV. Encoded pieces of whole elements are independent of each other."""

    @property
    def name(self) -> str:
        """In `CODECS`, and on the wire."""
        ...

    @property
    def is_lossy(self) -> bool:
        """Whether what comes out may differ from what went in."""
        ...

    def problem(self, layout: KvLayout) -> str | None:
        """Why KV of this layout cannot be written so; None if it can."""
        ...

    def num_bytes(self, num_bytes: int, layout: KvLayout) -> int:
        """Encoded bytes for so many bytes of KV."""
        ...

    def encode(self, kv: KvSource, layout: KvLayout) -> KvSource:
        """The same KV, encoded as it is read."""
        ...

    def decode(self, encoded: Tensor, out: Tensor, layout: KvLayout) -> None:
        """Write what ``encoded``, uint8, stands for into ``out``, uint8."""
        ...


@dataclass(frozen=True)
class Cast:
    """Each number as one of a smaller type; numbers beyond its range become its largest."""

    name: str
    dtype: torch.dtype
    is_lossy: bool = True

    def problem(self, layout: KvLayout) -> str | None:
        """See `Codec`."""
        dtype: torch.dtype = getattr(torch, layout.dtype)
        if not dtype.is_floating_point or dtype.itemsize <= self.dtype.itemsize:
            return f"KV of {layout.dtype} would not become smaller by {self.name}"
        return None

    def num_bytes(self, num_bytes: int, layout: KvLayout) -> int:
        """See `Codec`."""
        return num_bytes // layout.item_bytes * self.dtype.itemsize

    def encode(self, kv: KvSource, layout: KvLayout) -> KvSource:
        """See `Codec`."""
        return _CastKv(kv, getattr(torch, layout.dtype), self.dtype)

    def decode(self, encoded: Tensor, out: Tensor, layout: KvLayout) -> None:
        """See `Codec`."""
        out.view(getattr(torch, layout.dtype)).copy_(encoded.view(self.dtype))


class _CastKv:
    """A `KvSource` whose numbers are of another type."""

    def __init__(self, kv: KvSource, dtype: torch.dtype, target: torch.dtype) -> None:
        self._kv = kv
        self._dtype = dtype
        self._target = target
        self._limit = torch.finfo(target).max

    @property
    def num_bytes(self) -> int:
        """See `KvSource`."""
        return self._kv.num_bytes // self._dtype.itemsize * self._target.itemsize

    @property
    def cuts(self) -> tuple[int, ...]:
        """See `KvSource`."""
        return ()

    def piece(self, begin: int, end: int) -> None:
        """See `KvSource`."""
        del begin, end

    def read(self, begin: int, out: Tensor) -> None:
        """See `KvSource`. Pieces that cut a number in two are read with all of it."""
        size = self._target.itemsize
        first, last = begin // size, -(-(begin + out.numel()) // size)
        num_bytes = (last - first) * self._dtype.itemsize
        exact = torch.empty(num_bytes, dtype=torch.uint8, device=out.device)
        self._kv.read(first * self._dtype.itemsize, exact)
        numbers = exact.view(self._dtype).clamp_(-self._limit, self._limit)
        encoded = numbers.to(self._target).view(torch.uint8)
        skip = begin - first * size
        out.copy_(encoded[skip : skip + out.numel()])


CODECS: Final[dict[str, Codec]] = {
    codec.name: codec
    for codec in (
        Cast("float16", torch.float16),
        Cast("bfloat16", torch.bfloat16),
        Cast("float8_e4m3fn", torch.float8_e4m3fn),
    )
}
NAMES: Final = (NO_CODEC, *CODECS)


def codec_for(name: str, layout: KvLayout) -> Codec | None:
    """The codec of this name; None for ``none``.

    Raises:
        ConfigError: there is no such codec, or it is of no use for this KV.
    """
    if name == NO_CODEC:
        return None
    codec = CODECS.get(name)
    if codec is None:
        raise ConfigError("kv_codec", name, f"must be one of {', '.join(NAMES)}")
    problem = codec.problem(layout)
    if problem is not None:
        raise ConfigError("kv_codec", name, f"{problem}; choose another, or {NO_CODEC}")
    return codec


def codec_of_parts(names: Iterable[str]) -> str:
    """What KV is said to be written in whose parts are written in these codecs, at least one: a
    lossy one, if there is any."""

    def loss(name: str) -> int:
        return 0 if name == NO_CODEC else 1 + CODECS[name].is_lossy

    return max(names, key=loss)


@dataclass(frozen=True)
class CodecCost:
    """What a codec costs on this machine, in seconds per byte of KV."""

    encode_s: float
    decode_s: float

    def pays(self, codec: Codec, layout: KvLayout, link_s: float) -> bool:
        """Whether KV is sooner there encoded than as it is.

        Args:
            codec: whose cost this is.
            layout: of the KV.
            link_s: seconds that the link needs for a byte, measured.
        """
        share = codec.num_bytes(SAMPLE_BYTES, layout) / SAMPLE_BYTES
        # Encoding goes on beside sending; decoding waits for the last byte.
        return max(self.encode_s, share * link_s) + self.decode_s < link_s


def measure_codec(codec: Codec, layout: KvLayout, device: torch.device) -> CodecCost:
    """Encode and decode some KV on ``device``, and see how long it takes."""
    numbers = torch.randn(SAMPLE_BYTES // layout.item_bytes, device=device)
    numbers = numbers.to(getattr(torch, layout.dtype))
    source = codec.encode(StagedKv(numbers.view(torch.uint8)), layout)
    encoded = torch.empty(source.num_bytes, dtype=torch.uint8, device=device)
    exact = torch.empty(SAMPLE_BYTES, dtype=torch.uint8, device=device)
    return CodecCost(
        encode_s=_best_s(lambda: source.read(0, encoded), device) / SAMPLE_BYTES,
        decode_s=_best_s(lambda: codec.decode(encoded, exact, layout), device) / SAMPLE_BYTES,
    )


def _best_s(work: Callable[[], None], device: torch.device) -> float:
    """The shortest of three times."""
    seconds: list[float] = []
    for _ in range(3):
        begun_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun_s)
    return min(seconds)


def relative_error(codec: Codec, exact: Tensor, layout: KvLayout) -> float:
    """Root of the mean square of what a codec changes, over that of the numbers.

    Args:
        codec: to be tried.
        exact: numbers of the layout's type, of any shape.
        layout: of KV that holds such numbers.
    """
    flat = exact.contiguous().view(-1)
    source = codec.encode(StagedKv(flat.view(torch.uint8)), layout)
    encoded = torch.empty(source.num_bytes, dtype=torch.uint8)
    source.read(0, encoded)
    again = torch.empty_like(flat)
    codec.decode(encoded, again.view(torch.uint8), layout)
    difference = (again.double() - flat.double()).square().mean()
    return float((difference / flat.double().square().mean()).sqrt())
