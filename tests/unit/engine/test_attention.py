"""Our CPU attention against SGLang's `torch_native`, on random batches over real KV pools."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType

from streamfill.engine.attention import StreamfillCpuAttention
from streamfill.engine.attention_cases import AttentionShape, build_case
from streamfill.engine.attention_masks import TILE_ROWS, TileMasks

_TOLERANCE = 1e-4

_BASE = AttentionShape(num_heads=9, num_kv_heads=3, head_dim=64, lengths=((37, 20),))


def _difference(shape: AttentionShape, seed: int = 0) -> float:
    """The largest difference between the two backends' outputs, each on pools of its own."""
    ours, stock = build_case(shape, seed), build_case(shape, seed)
    expected = stock.run(TorchNativeAttnBackend(stock.model_runner))
    computed = ours.run(StreamfillCpuAttention(ours.model_runner))
    assert computed.shape == expected.shape
    assert computed.dtype == expected.dtype
    return float((computed - expected).abs().max())


_HEADS = st.sampled_from([(4, 4), (9, 3), (8, 2), (6, 1)])
_CACHED = st.one_of(st.just(0), st.integers(1, 200))
_NEW = st.one_of(st.just(1), st.integers(2, 3 * TILE_ROWS))


@settings(deadline=None, max_examples=60)
@given(
    heads=_HEADS,
    head_dim=st.sampled_from([16, 64]),
    lengths=st.lists(st.tuples(_CACHED, _NEW), min_size=1, max_size=5),
    window=st.one_of(st.none(), st.integers(1, 150)),
    page_size=st.sampled_from([1, 4, 16]),
    scattered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_an_extend_equals_torch_native(  # noqa: PLR0917 - drawn by hypothesis
    heads: tuple[int, int],
    head_dim: int,
    lengths: list[tuple[int, int]],
    window: int | None,
    page_size: int,
    scattered: bool,
    seed: int,
) -> None:
    """Any batch of extends gives SGLang's numbers: grouped heads, windows, pages, sequences."""
    shape = AttentionShape(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        lengths=tuple(lengths),
        window=window,
        page_size=page_size,
        scattered=scattered,
    )
    assert _difference(shape, seed) < _TOLERANCE


@settings(deadline=None, max_examples=40)
@given(
    heads=_HEADS,
    cached=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    window=st.one_of(st.none(), st.integers(1, 150)),
    scattered=st.booleans(),
)
def test_a_decode_equals_torch_native(
    heads: tuple[int, int], cached: list[int], window: int | None, scattered: bool
) -> None:
    """One token for each of many sequences, windows included, gives SGLang's numbers."""
    shape = AttentionShape(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=32,
        lengths=tuple((length, 1) for length in cached),
        decode=True,
        window=window,
        scattered=scattered,
    )
    assert _difference(shape) < _TOLERANCE


@pytest.mark.parametrize(
    "lengths",
    [((0, 1),), ((0, 700),), ((1500, 50),), ((1500, 1),), ((300, 256), (0, 1), (0, 65), (64, 64))],
)
def test_shapes_of_the_default_model(lengths: tuple[tuple[int, int], ...]) -> None:
    """The lengths that streaming makes, on the head shape of SmolLM2."""
    assert _difference(replace(_BASE, lengths=lengths)) < _TOLERANCE


def test_a_prompt_in_pieces_equals_the_prompt_at_once() -> None:
    """Computed in pieces or at once, the rows of a prompt differ by rounding only."""
    whole = build_case(replace(_BASE, lengths=((0, 300),)))
    at_once = whole.run(StreamfillCpuAttention(whole.model_runner))
    backend = StreamfillCpuAttention(whole.model_runner)
    slots = whole.batch.out_cache_loc
    for start, stop in ((0, 90), (90, 91), (91, 217), (217, 300)):
        piece = SimpleNamespace(
            **{
                **vars(whole.batch),
                "seq_lens": torch.tensor([stop]),
                "extend_prefix_lens": torch.tensor([start]),
                "extend_seq_lens": torch.tensor([stop - start]),
                "out_cache_loc": slots[start:stop],
            }
        )
        rows = backend.forward(
            whole.query[start:stop],
            whole.key[start:stop],
            whole.value[start:stop],
            whole.layers[0],
            piece,
        )
        torch.testing.assert_close(rows, at_once[start:stop], rtol=0, atol=2e-6)


def test_the_same_forward_gives_the_same_bits() -> None:
    """Nothing depends on an earlier batch: a repeated forward is equal to the last bit."""
    case = build_case(replace(_BASE, lengths=((200, 100), (0, 70))))
    other = build_case(replace(_BASE, lengths=((3000, 10),)))
    backend = StreamfillCpuAttention(case.model_runner)
    first = case.run(backend)
    masked = StreamfillCpuAttention(other.model_runner)
    other.run(masked)
    assert torch.equal(case.run(backend), first)


def test_new_keys_and_values_reach_their_slots() -> None:
    """A forward writes its tokens' keys and values, unless it is told not to."""
    case = build_case(replace(_BASE, lengths=((5, 3),)))
    pool, slots = case.model_runner.token_to_kv_pool, case.batch.out_cache_loc
    before = pool.get_key_buffer(0)[slots].clone()
    backend = StreamfillCpuAttention(case.model_runner)
    backend.forward(
        case.query, case.key, case.value, case.layers[0], case.batch, save_kv_cache=False
    )
    assert torch.equal(pool.get_key_buffer(0)[slots], before)
    case.run(backend)
    assert torch.equal(pool.get_key_buffer(0)[slots], case.key)
    assert torch.equal(pool.get_value_buffer(0)[slots], case.value)


def test_encoder_layers_go_to_sglang() -> None:
    """An encoder-only layer sees later tokens too, as in SGLang's backend."""
    shape = replace(_BASE, lengths=((0, 40),))
    ours, stock = build_case(shape), build_case(shape)
    for case in (ours, stock):
        case.layers[0].attn_type = AttentionType.ENCODER_ONLY
    expected = stock.run(TorchNativeAttnBackend(stock.model_runner))
    computed = ours.run(StreamfillCpuAttention(ours.model_runner))
    assert torch.equal(computed, expected)


def test_capped_logits_are_refused() -> None:
    """A layer with logit soft-capping is refused instead of being computed wrongly."""
    case = build_case(_BASE)
    case.layers[0].logit_cap = 30.0
    with pytest.raises(NotImplementedError, match=r"caps its logits at 30\.0"):
        case.run(StreamfillCpuAttention(case.model_runner))


@pytest.mark.parametrize("window", [None, 5, 64, 100])
@pytest.mark.parametrize(("num_rows", "num_before"), [(1, 0), (64, 0), (3, 5), (64, 4), (2, 5000)])
def test_a_mask_shows_each_row_its_own_past(
    window: int | None, num_rows: int, num_before: int
) -> None:
    """Row r sees the keys up to its own, and no further back than the window."""
    num_before = num_before if window is None else min(num_before, window)
    mask = TileMasks().tile_mask(window, num_rows, num_before, torch.float32, torch.device("cpu"))
    assert mask.shape == (num_rows, num_before + num_rows)
    for row in range(num_rows):
        own = num_before + row
        oldest = 0 if window is None else max(0, own - window)
        seen = torch.nonzero(mask[row] == 0).view(-1).tolist()
        assert seen == list(range(oldest, own + 1))
