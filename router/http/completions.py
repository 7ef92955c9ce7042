"""Completions: what comes in."""

from __future__ import annotations

from collections.abc import Sequence

from router import request_checks as checks
from router.http.requests import AnswerPlan, CompletionFields, plan_answers
from router.interface import ClusterInfo, Segment
from streamfill.errors import InvalidArgumentError

DEFAULT_MAX_TOKENS = 16
"""As in the OpenAI API."""


class CompletionRequest(CompletionFields, frozen=True, kw_only=True):
    """The body of a request."""

    prompt: str | list[int | str | list[int]]
    """One prompt as text or token ids, or a list of prompts, each with answers of its own."""
    logprobs: int | None = None


def plan_completion(request: CompletionRequest, request_id: str, info: ClusterInfo) -> AnswerPlan:
    """What is to be done for ``request``.

    Raises:
        StreamError: as ``requests.plan_answers``.
    """
    return plan_answers(
        request,
        _prompts(request.prompt, info.vocab_size),
        request_id=request_id,
        info=info,
        num_logprobs=request.logprobs,
        max_tokens=DEFAULT_MAX_TOKENS,
    )


def _prompts(prompt: str | Sequence[int | str | list[int]], vocab_size: int) -> Sequence[Segment]:
    if isinstance(prompt, str):
        return [Segment(text=_not_empty(prompt, "prompt"))]
    if not prompt:
        raise checks.wrong("prompt", "an empty list", "a text, token ids, or a list of them")
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        checks.check_token_ids(ids, vocab_size, "prompt")
        return [Segment(token_ids=ids)]
    if ids:
        raise InvalidArgumentError(
            "prompt mixes token ids with texts or lists; it is one or the other",
            details={"field": "prompt"},
        )
    return [_one_of_many(item, f"prompt[{n}]", vocab_size) for n, item in enumerate(prompt)]


def _one_of_many(item: int | str | list[int], name: str, vocab_size: int) -> Segment:
    if isinstance(item, str):
        return Segment(text=_not_empty(item, name))
    assert isinstance(item, list)
    if not item:
        raise checks.wrong(name, "an empty list", "at least one token id")
    checks.check_token_ids(item, vocab_size, name)
    return Segment(token_ids=item)


def _not_empty(text: str, name: str) -> str:
    if not text:
        raise checks.wrong(name, "", "a text that is not empty")
    return text
