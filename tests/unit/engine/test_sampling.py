"""Seeds per request, SGLang's filters, and penalties of tokens that were sampled elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.sampling import penaltylib

from streamfill.engine import sampling
from streamfill.engine.scheduler_engine import _EosOnly

NO_TOP_K = 1 << 30


def _probs(num_rows: int, vocab_size: int = 50, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(num_rows, vocab_size, generator=generator), dim=-1)


def _sample(
    probs: torch.Tensor, seeds: list[int] | None, positions: list[int], **filters: float
) -> list[int]:
    """By the filtering function; without filters it keeps everything."""
    num_rows = len(probs)
    return sampling.sample_from_filtered_probs(
        probs,
        torch.full((num_rows,), int(filters.get("top_k", NO_TOP_K))),
        torch.full((num_rows,), filters.get("top_p", 1.0)),
        torch.full((num_rows,), filters.get("min_p", 0.0)),
        "min_p" in filters,
        None if seeds is None else torch.tensor(seeds),
        torch.tensor(positions),
    ).tolist()


# Seeds


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 10**6), data=st.data())
@settings(deadline=None, max_examples=30)
def test_a_seeded_draw_depends_on_weights_seed_and_position_only(
    seed: int, position: int, data: st.DataObject
) -> None:
    """Not on the batch around it, its place there, or what was drawn before."""
    row = _probs(1, seed=3)
    alone = sampling.sample_from_probs(row, torch.tensor([seed]), torch.tensor([position]))
    num_others = data.draw(st.integers(1, 4))
    place = data.draw(st.integers(0, num_others))
    others = _probs(num_others, seed=4)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch = torch.cat([others[:place], row, others[place:]])
    seeds = [sampling.UNSEEDED if index != place else seed for index in range(num_others + 1)]
    positions = [position if index == place else 7 for index in range(num_others + 1)]
    together = sampling.sample_from_probs(batch, torch.tensor(seeds), torch.tensor(positions))
    assert together[place] == alone[0]
    assert together.dtype == torch.int32


def test_a_seeded_draw_is_the_same_beside_filters() -> None:
    """A filter of another request of the batch sends all through the filtering function."""
    probs = _probs(50, vocab_size=200)
    seeds, positions = list(range(50)), [7] * 50
    plain = sampling.sample_from_probs(probs, torch.tensor(seeds), torch.tensor(positions))
    assert _sample(probs, seeds, positions) == plain.tolist()


def test_seeds_and_positions_make_different_draws() -> None:
    """Equal ones equal draws."""
    row = _probs(1, vocab_size=10_000).expand(3, -1)
    by_seed = _sample(row, [1, 2, 1], [5, 5, 5])
    assert by_seed[0] == by_seed[2] != by_seed[1]
    by_position = _sample(row, [1, 1, 1], [5, 6, 5])
    assert by_position[0] == by_position[2] != by_position[1]


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_draws_have_the_distribution(seeded: bool, filters: dict[str, float]) -> None:
    """Chi-square over 4,000 draws with fixed seeds; 0.999 quantile of 7 degrees is 24.3."""
    torch.manual_seed(0)
    num_draws, row = 4000, _probs(1, vocab_size=8, seed=1)
    seeds = list(range(num_draws)) if seeded else None
    drawn = _sample(row.expand(num_draws, -1), seeds, [9] * num_draws, **filters)
    kept = _kept(row, filters)[0]
    expected = torch.where(kept, row[0], 0.0)
    expected = expected / expected.sum() * num_draws
    counts = torch.bincount(torch.tensor(drawn), minlength=8)
    assert not counts[~kept].any()
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 24.3


def test_a_seed_is_kept_for_every_request_of_a_batch() -> None:
    """Always as a tensor, so that batches with and without seeds can be merged."""
    requests = [
        SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed))
        for seed in (None, 0, 5, -1, 2**64 + 3)
    ]
    info = SimpleNamespace(device="cpu", sampling_seed=None)
    sampling.attach_seeds(info, SimpleNamespace(reqs=requests))
    assert info.sampling_seed.tolist() == [sampling.UNSEEDED, 0, 5, 2**63 - 1, 3]
    assert info.sampling_seed.dtype == torch.int64


def test_without_seeds_the_global_generator_decides() -> None:
    """As in SGLang."""
    row = _probs(200, vocab_size=1000)
    torch.manual_seed(1)
    first = _sample(row, None, [0] * 200)
    torch.manual_seed(1)
    assert _sample(row, None, [0] * 200) == first
    assert _sample(row, None, [0] * 200) != first


# Filters


def _kept(probs: torch.Tensor, filters: dict[str, float]) -> torch.Tensor:
    """Which tokens SGLang's own function can draw: bool [batch, vocabulary]."""
    seen: list[torch.Tensor] = []
    original = torch.multinomial

    def spy(weights: torch.Tensor, num_samples: int) -> torch.Tensor:
        seen.append(weights.clone())
        return original(weights, num_samples=num_samples)

    num_rows = len(probs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", spy)
        top_k_top_p_min_p_sampling_from_probs_torch(
            probs.clone(),
            torch.full((num_rows,), int(filters.get("top_k", NO_TOP_K))),
            torch.full((num_rows,), filters.get("top_p", 1.0)),
            torch.full((num_rows,), filters.get("min_p", 0.0)),
            "min_p" in filters,
            None,
            torch.zeros(num_rows),
        )
    order = probs.sort(dim=-1, descending=True).indices
    return torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, seen[0] > 0)


@given(
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from([1, 3, NO_TOP_K]),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)
@settings(deadline=None, max_examples=60)
def test_filters_keep_what_sglangs_keep(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    """Seeded or not: exactly the tokens that SGLang's own function can draw."""
    probs = _probs(3, vocab_size=12, seed=seed)
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    kept = _kept(probs, filters)
    seen: list[torch.Tensor] = []

    def spy(weights: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(weights)
        return torch.zeros(len(weights), dtype=torch.int64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_sample_rows", spy)
        _sample(probs, None, [0, 0, 0], **filters)
    assert torch.equal(seen[0] > 0, kept)


def test_a_token_that_begins_exactly_at_top_p_is_kept() -> None:
    """As in SGLang, which drops what begins beyond it."""
    probs = torch.tensor([[0.5, 0.25, 0.25]]).expand(64, -1)
    assert _kept(probs, {"top_p": 0.5})[0].tolist() == [True, True, False]
    assert set(_sample(probs, list(range(64)), [0] * 64, top_p=0.5)) == {0, 1}


def test_top_k_1_is_the_most_likely_token() -> None:
    """So greedy requests stay greedy in a batch with others."""
    probs = _probs(20)
    assert _sample(probs, None, [0] * 20, top_k=1) == probs.argmax(dim=-1).tolist()
    assert _sample(probs, list(range(20)), [0] * 20, top_k=1) == probs.argmax(dim=-1).tolist()


# Penalties


def test_additive_penalties_come_first() -> None:
    """In every process, though SGLang keeps them in a set: the order changes the logits."""
    additive = penaltylib.BatchedFrequencyPenalizer, penaltylib.BatchedPresencePenalizer
    orchestrator = SimpleNamespace(
        penalizers={penaltylib.BatchedRepetitionPenalizer: 0, additive[1]: 1, additive[0]: 2}
    )
    sampling.order_penalizers(SimpleNamespace(penalizer_orchestrator=orchestrator))
    assert list(orchestrator.penalizers) == [*additive, penaltylib.BatchedRepetitionPenalizer]


_VOCAB = 12
_EOS = _EosOnly(frozenset({3, 5}), _VOCAB)


def _request(output_ids: list[int], **params: float) -> SimpleNamespace:
    defaults = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "stop_token_ids": None,
    }
    return SimpleNamespace(
        output_ids=output_ids,
        sampling_params=SimpleNamespace(**(defaults | params)),
        tokenizer=_EOS,
    )


class _Batch:
    """What the orchestrator needs of a batch; it keeps only a weak reference."""

    def __init__(self, requests: list[SimpleNamespace]) -> None:
        self.reqs = requests
        self.device = "cpu"

    def info(self) -> SimpleNamespace:
        orchestrator = penaltylib.BatchedPenalizerOrchestrator(
            vocab_size=_VOCAB,
            batch=self,
            penalizers={
                penaltylib.BatchedFrequencyPenalizer,
                penaltylib.BatchedPresencePenalizer,
                penaltylib.BatchedRepetitionPenalizer,
                penaltylib.BatchedMinNewTokensPenalizer,
            },
        )
        return SimpleNamespace(penalizer_orchestrator=orchestrator, device="cpu")


_PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "frequency_penalty": st.sampled_from([0.5, 1.5]),
        "presence_penalty": st.sampled_from([0.25, -0.5]),
        "repetition_penalty": st.sampled_from([0.5, 2.0]),
        "min_new_tokens": st.integers(1, 4),
    },
)


@given(
    rows=st.lists(
        st.tuples(_PARAMS, st.lists(st.integers(0, _VOCAB - 1), max_size=5)), min_size=1, max_size=4
    )
)
@settings(deadline=None, max_examples=80)
def test_replayed_outputs_weigh_as_if_they_had_been_sampled_here(
    rows: list[tuple[dict[str, float], list[int]]],
) -> None:
    """All four penalizers hold, row by row, what they would hold had they seen the tokens one by
    one; requests that brought nothing are not touched."""
    batch = _Batch([_request(output_ids, **params) for params, output_ids in rows])
    info = batch.info()
    sampling.replay_outputs(info, batch)
    for row, (params, output_ids) in enumerate(rows):
        logits = torch.linspace(-1.0, 1.0, _VOCAB).repeat(len(rows), 1)
        info.penalizer_orchestrator.apply(logits)
        alone = _Batch([_request([], **params)])
        expected = torch.linspace(-1.0, 1.0, _VOCAB).view(1, -1)
        watcher = alone.info().penalizer_orchestrator
        for token_id in output_ids:
            watcher.cumulate_output_tokens(torch.tensor([token_id]))
        watcher.apply(expected)
        torch.testing.assert_close(logits[row], expected[0])


def test_a_minimum_length_works_beside_requests_without_one() -> None:
    """SGLang's penalizer asks every request of the batch for its end-of-sequence ids."""
    batch = _Batch([_request([1], min_new_tokens=2), _request([1])])
    info = batch.info()
    sampling.replay_outputs(info, batch)
    logits = torch.zeros(2, _VOCAB)
    info.penalizer_orchestrator.apply(logits)
    assert logits[0].isinf().nonzero().view(-1).tolist() == [3, 5]
    assert not logits[1].any()


def test_a_model_without_an_end_of_sequence_has_none() -> None:
    """Its first token must not pass for one."""
    none = _EosOnly(frozenset(), _VOCAB)
    batch = _Batch([_request([], min_new_tokens=2)])
    batch.reqs[0].tokenizer = none
    logits = torch.zeros(1, _VOCAB)
    batch.info().penalizer_orchestrator.apply(logits)
    assert not logits.any()
    assert none.eos_token_id >= _VOCAB


def test_without_penalties_nothing_is_replayed() -> None:
    """Also where SGLang made no penalizers at all."""
    batch = _Batch([_request([1, 2])])
    sampling.replay_outputs(batch.info(), batch)
    sampling.replay_outputs(SimpleNamespace(penalizer_orchestrator=None), batch)


def test_an_unknown_penalizer_is_an_error() -> None:
    """A changed SGLang must not forget penalties in silence."""

    class Novel:
        def is_prepared(self) -> bool:
            return True

    orchestrator = SimpleNamespace(is_required=True, penalizers={Novel: Novel()})
    info = SimpleNamespace(penalizer_orchestrator=orchestrator, device="cpu")
    with pytest.raises(TypeError, match="Novel is not known"):
        sampling.replay_outputs(info, _Batch([_request([1])]))
