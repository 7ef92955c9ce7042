"""Sampling on SGLang's ``pytorch`` backend: seeds per request, and answers that began elsewhere.

SGLang 0.5.16 honours a request's seed only with ``enable_deterministic_inference``, whose compiled
kernels a CPU machine may not have, and forgets penalties for tokens that were sampled before a
request (re)entered a batch. Both matter to a decode server, whose requests all begin with a token
that another process sampled.

Depends on ``sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch``, on the two
functions of ``layers.sampler`` that are replaced, and on the attributes of the penalizers in
``sampling.penaltylib``.
"""

from __future__ import annotations

from typing import Any

import torch

UNSEEDED = -1
"""In the seed tensor: this row uses torch's global generator."""

_MAX_SEED = 2**63 - 1


def attach_seeds(info: Any, batch: Any) -> None:
    """Give ``info.sampling_seed`` a row per request of ``batch``: its seed, or ``UNSEEDED``.

    Always a tensor, so that batches with and without seeds can be merged.
    """
    info.sampling_seed = torch.tensor(
        [_seed_of(request) for request in batch.reqs], dtype=torch.int64, device=info.device
    )


def _seed_of(request: Any) -> int:
    seed = request.sampling_params.sampling_seed
    return UNSEEDED if seed is None else int(seed) & _MAX_SEED


def sample_from_probs(
    probs: torch.Tensor,
    sampling_seed: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """In place of ``layers.sampler.sampling_from_probs_torch``.

    Args:
        probs: [batch, vocabulary], each row sums to 1.
        sampling_seed: int64 [batch], or None for all unseeded.
        positions: int64 [batch], position of the token that is sampled from.

    Returns:
        int32 [batch], token ids.
    """
    return _sample_rows(probs, sampling_seed, positions).to(torch.int32)


def sample_from_filtered_probs(  # noqa: PLR0917 - SGLang's signature
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor,
) -> torch.Tensor:
    """In place of ``layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch``: the same filters,
    seeds per row.

    Args:
        probs: [batch, vocabulary].
        top_ks: int [batch].
        top_ps: float [batch].
        min_ps: float [batch].
        need_min_p_sampling: whether any ``min_ps`` is above 0.
        sampling_seed: int64 [batch], or None.
        positions: int64 [batch].

    Returns:
        int32 [batch], token ids.
    """
    sorted_probs, token_ids = probs.sort(dim=-1, descending=True, stable=True)
    before = sorted_probs.cumsum(dim=-1) - sorted_probs
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    drop = (ranks >= top_ks.view(-1, 1)) | (before > top_ps.view(-1, 1))
    if need_min_p_sampling:
        drop |= sorted_probs < sorted_probs[:, :1] * min_ps.view(-1, 1)
    # Back in the vocabulary's order: a seeded draw must not depend on whether another request of
    # the batch has a filter.
    kept = torch.zeros_like(probs).scatter_(1, token_ids, sorted_probs.masked_fill(drop, 0.0))
    return _sample_rows(kept, sampling_seed, positions).to(torch.int32)


def _sample_rows(
    weights: torch.Tensor, sampling_seed: torch.Tensor | None, positions: torch.Tensor | None
) -> torch.Tensor:
    """One column per row, with probability proportional to its weight: int64 [batch]."""
    columns = torch.multinomial(weights, num_samples=1).view(-1)
    if sampling_seed is None or positions is None:
        return columns
    for row, (seed, position) in enumerate(
        zip(sampling_seed.tolist(), positions.tolist(), strict=True)
    ):
        if seed != UNSEEDED:
            columns[row] = _sample_seeded(weights[row], seed, position)
    return columns


def _sample_seeded(weights: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    """A draw that depends only on the weights, the seed and the position, not on the server or the
    batch.

    The exponential race: argmax of weight / Exp(1) has the categorical distribution.
    """
    generator = torch.Generator(device="cpu")
    generator.manual_seed((seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) & _MAX_SEED)
    race = torch.empty(weights.shape, dtype=torch.float64).exponential_(generator=generator)
    return (weights.to(device="cpu", dtype=torch.float64) / race).argmax()


def order_penalizers(info: Any) -> None:
    """Apply additive penalties before the multiplicative one, in every process.

    SGLang takes them out of a set of classes, whose order is another one in each process.
    """
    orchestrator = info.penalizer_orchestrator
    if orchestrator is not None:
        orchestrator.penalizers = dict(
            sorted(
                orchestrator.penalizers.items(),
                key=lambda item: (item[0].is_multiplicative, item[0].__name__),
            )
        )


def replay_outputs(info: Any, batch: Any) -> None:
    """Tell the penalizers of ``info`` the output tokens that the requests of ``batch`` bring along.

    SGLang tells them each token when it is sampled; a request that continues an answer was sampled
    elsewhere.
    """
    orchestrator = info.penalizer_orchestrator
    if orchestrator is None or not orchestrator.is_required:
        return
    for penalizer in orchestrator.penalizers.values():
        if not penalizer.is_prepared():
            continue
        for row, request in enumerate(batch.reqs):
            if len(request.output_ids):
                _replay_row(
                    penalizer, row, torch.tensor(list(request.output_ids), device=info.device)
                )


def _replay_row(penalizer: Any, row: int, output_ids: torch.Tensor) -> None:
    match type(penalizer).__name__:
        case "BatchedFrequencyPenalizer":
            penalties = penalizer.frequency_penalties[row].expand(len(output_ids))
            penalizer.cumulated_frequency_penalties[row].scatter_add_(0, output_ids, penalties)
        case "BatchedPresencePenalizer":
            penalizer.cumulated_presence_penalties[row][output_ids] = penalizer.presence_penalties[
                row
            ]
        case "BatchedRepetitionPenalizer":
            penalizer.cumulated_repetition_penalties[row][output_ids] = (
                penalizer.repetition_penalties[row]
            )
        case "BatchedMinNewTokensPenalizer":
            penalizer.len_output_tokens[row] += len(output_ids)
        case unknown:
            raise TypeError(f"penalizer {unknown} is not known to streamfill; SGLang was changed")
