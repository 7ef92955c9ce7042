"""What both completion endpoints understand, and how many answers are made of a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from router import request_checks as checks
from router.http.choices import Choice, committed_choices
from router.http.errors import model_not_found, not_supported
from router.http.fields import Fields, RequestFields
from router.http.sampling import commit_options, open_options
from router.interface import ClusterInfo, CommitOptions, Segment, StreamHandle

MAX_CHOICES = 128
"""Of one request: n times the number of prompts."""


class StreamOptions(Fields, frozen=True, kw_only=True):
    """``stream_options``"""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Of no effect here: nothing is padded."""
    continuous_usage_stats: bool | None = None


class CompletionFields(RequestFields, frozen=True, kw_only=True):
    """Fields of both endpoints."""

    model: str | None = None
    """None: the one that is served."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    rid: str | None = None
    """SGLang's name for ``request_id``."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The names of the one model of a cluster."""

    name: str
    """Of its folder."""
    path: str

    @classmethod
    def of(cls, info: ClusterInfo) -> ServedModel:
        """The model of a cluster."""
        return cls(name=info.model.rstrip("/").rpartition("/")[2] or info.model, path=info.model)

    def check(self, wanted: str | None) -> None:
        """Raises StreamError NOT_FOUND: it is another one."""
        if wanted not in (None, "", "default", self.name, self.path):
            raise model_not_found(str(wanted), self.name)


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """What is to be done for one request, everything checked."""

    choices: Sequence[Choice]
    streams: bool
    """As server-sent events."""
    includes_usage: bool
    """In the events."""


def plan_answers(
    fields: CompletionFields,
    prompts: Sequence[Segment],
    *,
    request_id: str,
    info: ClusterInfo,
    num_logprobs: int | None,
    max_tokens: int,
) -> AnswerPlan:
    """The choices of a request.

    Args:
        fields: of the request.
        prompts: at least one.
        request_id: when the client gave none.
        info: the cluster.
        num_logprobs: as ``Sampling.num_logprobs``.
        max_tokens: when the client gave none.

    Raises:
        StreamError: INVALID_ARGUMENT, names the field and its value; NOT_FOUND, another model.
    """
    ServedModel.of(info).check(fields.model)
    n = 1 if fields.n is None else fields.n
    if not 1 <= n <= MAX_CHOICES:
        raise checks.wrong("n", n, f"between 1 and {MAX_CHOICES}")
    if n * len(prompts) > MAX_CHOICES:
        many = f"{n} for each of {len(prompts)} prompts"
        raise checks.wrong("n", many, f"at most {MAX_CHOICES} answers in all")
    if fields.best_of not in (None, 1, n):
        raise not_supported("best_of", fields.best_of)
    options = fields.stream_options or StreamOptions()
    if options.continuous_usage_stats:
        raise not_supported("stream_options.continuous_usage_stats", True)
    opening = open_options(fields, fields.rid or request_id)
    commit = commit_options(
        fields, vocab_size=info.vocab_size, num_logprobs=num_logprobs, max_tokens=max_tokens
    )
    feeds = [
        [_commit(replace(_seeded(commit, number), final_segment=prompt)) for number in range(n)]
        for prompt in prompts
    ]
    return AnswerPlan(
        choices=committed_choices([opening] * len(prompts), feeds),
        streams=bool(fields.stream),
        includes_usage=bool(options.include_usage),
    )


def _commit(options: CommitOptions) -> Callable[[StreamHandle], Awaitable[None]]:
    async def feed(handle: StreamHandle, options: CommitOptions) -> None:
        await handle.commit(options)

    return partial(feed, options=options)


def _seeded(options: CommitOptions, number: int) -> CommitOptions:
    """With a seed of its own: two choices of one prompt with one seed would be the same text."""
    seed = options.sampling.seed
    if seed is None or number == 0:
        return options
    sampling = msgspec.structs.replace(options.sampling, seed=(seed + number) % checks.MAX_INT)
    return replace(options, sampling=sampling)
