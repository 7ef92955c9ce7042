"""Sampling means the same whether one server makes the answer or two share it.

Every answer of the shared cluster, whose first token comes from the prefill server and the rest
from the decode server, is compared with that of a cluster without a decode server.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from streamfill.api import Client
from streamfill.api.types import Result, SamplingOptions
from streamfill.models.tiny_corpus import CORPUS
from tests.support.cluster import RunningCluster
from tests.support.comparing import assert_same

pytestmark = pytest.mark.integration

_PROMPTS = [" ".join(CORPUS[start : start + 3]) for start in (0, 6, 15, 21, 27, 42)]
_PLAIN: SamplingOptions = {"max_tokens": 24, "temperature": 0.0}


@dataclass(frozen=True)
class Pair:
    """The same request to both clusters."""

    shared: Client
    lone: Client

    async def ask(self, prompt: str, sampling: SamplingOptions) -> Result:
        """Streamed to the shared cluster; the same at once must give the same on the lone one."""
        async with self.shared.stream() as stream:
            half = len(prompt) // 2
            await stream.append(prompt[:half])
            streamed = await stream.commit(prompt[half:], **sampling).read()
        alone = await self.lone.complete(prompt, **sampling)
        assert_same(streamed, alone, f"{sampling}")
        _assert_logprobs_close(streamed, alone)
        assert alone.metadata.decoded_by_prefill == (sampling["max_tokens"] != 1)
        assert not streamed.metadata.decoded_by_prefill
        if len(streamed.tokens) > 1:
            assert streamed.metadata.handoff == "done"
        return streamed


async def _ask_all(
    cluster: RunningCluster,
    lone_cluster: RunningCluster,
    sampling: SamplingOptions,
    num_prompts: int = len(_PROMPTS),
) -> list[Result]:
    async with Client(cluster.address) as shared, Client(lone_cluster.address) as lone:
        pair = Pair(shared, lone)
        return [await pair.ask(prompt, sampling) for prompt in _PROMPTS[:num_prompts]]


def _assert_logprobs_close(left: Result, right: Result) -> None:
    for ours, theirs in zip(left.tokens, right.tokens, strict=True):
        assert ours.text == theirs.text
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is None or theirs.logprob is None:
            continue
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [token_id for token_id, _ in ours.top_logprobs] == [
            token_id for token_id, _ in theirs.top_logprobs
        ]
        assert [logprob for _, logprob in ours.top_logprobs] == pytest.approx(
            [logprob for _, logprob in theirs.top_logprobs], abs=1e-3
        )


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 24])
async def test_max_tokens(
    cluster: RunningCluster, lone_cluster: RunningCluster, max_tokens: int
) -> None:
    """The answer has that many tokens and ended for its length; with one token nothing is handed
    over."""
    sampling: SamplingOptions = {**_PLAIN, "max_tokens": max_tokens}
    for result in await _ask_all(cluster, lone_cluster, sampling):
        assert len(result.token_ids) == result.usage.num_output_tokens == max_tokens
        assert result.finish_reason == "length"
        assert result.matched_stop is None
        assert result.metadata.handoff == ("none" if max_tokens == 1 else "done")


async def test_stop_string_across_first_and_second_token(
    cluster: RunningCluster, lone_cluster: RunningCluster
) -> None:
    """A stop string that begins in the prefill server's token and ends in the decode server's ends
    the answer before its beginning."""
    async with Client(cluster.address) as shared, Client(lone_cluster.address) as lone:
        pair = Pair(shared, lone)
        num_tried = 0
        for prompt in _PROMPTS:
            plain = await pair.ask(prompt, _PLAIN)
            first, second = (token.text for token in plain.tokens[:2])
            if not first or not second:
                continue  # a character of several tokens
            stop = first[-1] + second[0]
            if plain.text.index(stop) != len(first) - 1:
                continue
            num_tried += 1
            result = await pair.ask(prompt, {**_PLAIN, "stop": [stop]})
            assert result.text == first[:-1]
            assert (result.finish_reason, result.matched_stop) == ("stop", stop)
            assert result.token_ids == plain.token_ids[:2]
        assert num_tried >= 2, "other prompts are needed"


async def test_stop_string_inside_the_first_token(
    cluster: RunningCluster, lone_cluster: RunningCluster
) -> None:
    """A stop string within the prefill server's token ends the answer with it."""
    async with Client(cluster.address) as shared, Client(lone_cluster.address) as lone:
        pair = Pair(shared, lone)
        num_tried = 0
        for prompt in _PROMPTS:
            plain = await pair.ask(prompt, _PLAIN)
            first = plain.tokens[0].text
            if len(first) < 2:
                continue
            num_tried += 1
            result = await pair.ask(prompt, {**_PLAIN, "stop": ["never said", first[1:]]})
            assert result.text == first[: first.index(first[1:])]
            assert (result.finish_reason, result.matched_stop) == ("stop", first[1:])
            assert result.token_ids == plain.token_ids[:1]
        assert num_tried >= 2, "other prompts are needed"


@pytest.mark.parametrize("place", [2, 5, 11])
async def test_later_stop_string(
    cluster: RunningCluster, lone_cluster: RunningCluster, place: int
) -> None:
    """A stop string further on ends the answer; of what came before nothing is missing."""
    async with Client(cluster.address) as shared, Client(lone_cluster.address) as lone:
        pair = Pair(shared, lone)
        for prompt in _PROMPTS:
            plain = await pair.ask(prompt, _PLAIN)
            stop = "".join(token.text for token in plain.tokens[place : place + 2])
            result = await pair.ask(prompt, {**_PLAIN, "stop": [stop, "never said"]})
            assert result.text == plain.text[: plain.text.index(stop)]
            assert (result.finish_reason, result.matched_stop) == ("stop", stop)
            assert len(result.token_ids) <= place + 2


async def test_stop_string_that_only_begins(
    cluster: RunningCluster, lone_cluster: RunningCluster
) -> None:
    """Text that could have been the beginning of a stop string is shown in the end."""
    async with Client(cluster.address) as shared, Client(lone_cluster.address) as lone:
        pair = Pair(shared, lone)
        for prompt in _PROMPTS:
            plain = await pair.ask(prompt, {**_PLAIN, "max_tokens": 6})
            if not plain.text:
                continue
            stop = plain.text[-1] + "never said"
            result = await pair.ask(prompt, {**_PLAIN, "max_tokens": 6, "stop": [stop]})
            assert (result.text, result.finish_reason) == (plain.text, "length")


@pytest.mark.parametrize("place", [0, 1, 7])
async def test_stop_token(
    cluster: RunningCluster, lone_cluster: RunningCluster, place: int
) -> None:
    """A stop token ends the answer with its first occurrence and shows no text, on either
    server; with ignore_eos it is a token like others."""
    async with Client(cluster.address) as shared, Client(lone_cluster.address) as lone:
        pair = Pair(shared, lone)
        for prompt in _PROMPTS:
            plain = await pair.ask(prompt, _PLAIN)
            token_id = plain.token_ids[place]
            end = plain.token_ids.index(token_id)
            stops: SamplingOptions = {**_PLAIN, "stop_token_ids": [token_id, 0]}
            result = await pair.ask(prompt, stops)
            assert result.token_ids == plain.token_ids[: end + 1]
            assert (result.finish_reason, result.matched_stop) == ("stop", token_id)
            assert plain.text.startswith(result.text.rstrip("\ufffd"))
            ignored = await pair.ask(prompt, {**stops, "ignore_eos": True})
            assert ignored.token_ids == plain.token_ids
            assert ignored.finish_reason == "length"


@pytest.mark.parametrize("min_tokens", [1, 2, 5])
async def test_min_tokens(
    cluster: RunningCluster, lone_cluster: RunningCluster, min_tokens: int
) -> None:
    """A stop token is not even sampled before that many tokens are out, on either server."""
    async with Client(cluster.address) as shared, Client(lone_cluster.address) as lone:
        pair = Pair(shared, lone)
        for prompt in _PROMPTS:
            plain = await pair.ask(prompt, _PLAIN)
            stops = list(plain.token_ids[:1])
            result = await pair.ask(
                prompt, {**_PLAIN, "stop_token_ids": stops, "min_tokens": min_tokens}
            )
            assert not set(stops) & set(result.token_ids[:min_tokens])
            assert len(result.token_ids) > min_tokens


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({}, id="all"),
        pytest.param({"top_k": 8}, id="top_k"),
        pytest.param({"top_p": 0.8}, id="top_p"),
        pytest.param({"min_p": 0.05}, id="min_p"),
        pytest.param({"top_k": 20, "top_p": 0.9, "min_p": 0.02}, id="all filters"),
        pytest.param({"temperature": 0.6}, id="cool"),
        pytest.param({"temperature": 2.5, "top_k": 50}, id="hot"),
        pytest.param({"frequency_penalty": 1.0, "min_tokens": 4}, id="penalty"),
    ],
)
async def test_seed(
    cluster: RunningCluster, lone_cluster: RunningCluster, sampling: SamplingOptions
) -> None:
    """The same seed gives the same answer, streamed, at once, repeated, and beside others in one
    batch; another seed gives another."""
    given: SamplingOptions = {"max_tokens": 24, "temperature": 1.0, **sampling}
    answers = []
    for seed in (11, 12):
        seeded: SamplingOptions = {**given, "seed": seed}
        results = await _ask_all(cluster, lone_cluster, seeded)
        async with Client(cluster.address) as client:
            again = await asyncio.gather(
                *(client.complete(prompt, **seeded) for prompt in _PROMPTS)
            )
        answers.append([result.token_ids for result in results])
        assert [result.token_ids for result in again] == answers[-1]
    assert all(one != other for one, other in zip(*answers, strict=True))


async def test_seed_of_the_first_token(cluster: RunningCluster) -> None:
    """The first token, sampled elsewhere than the rest, depends on the seed as well."""
    async with Client(cluster.address) as client:
        firsts = {
            (await client.complete(_PROMPTS[0], max_tokens=1, temperature=2.0, seed=seed)).token_ids
            for seed in range(12)
        }
    assert len(firsts) > 1


async def test_no_seed(cluster: RunningCluster) -> None:
    """Without a seed each answer is another."""
    async with Client(cluster.address) as client:
        answers = {
            (await client.complete(_PROMPTS[0], max_tokens=24, temperature=1.0)).token_ids
            for _ in range(4)
        }
    assert len(answers) == 4


@pytest.mark.parametrize(
    "penalty",
    [
        pytest.param({"frequency_penalty": 2.0}, id="frequency"),
        pytest.param({"presence_penalty": 2.0}, id="presence"),
        pytest.param({"repetition_penalty": 1.6}, id="repetition"),
        pytest.param({"frequency_penalty": -2.0}, id="negative frequency"),
        pytest.param(
            {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.2}, id="all"
        ),
    ],
)
async def test_penalty(
    cluster: RunningCluster, lone_cluster: RunningCluster, penalty: SamplingOptions
) -> None:
    """A penalty counts every token of the answer, the first one too."""
    longer: SamplingOptions = {**_PLAIN, "max_tokens": 64}
    results = await _ask_all(cluster, lone_cluster, {**longer, **penalty, "logprobs": 3}, 3)
    async with Client(cluster.address) as client:
        plain = [await client.complete(prompt, **longer) for prompt in _PROMPTS[:3]]
    changed = [one.token_ids != other.token_ids for one, other in zip(results, plain, strict=True)]
    assert any(changed), "nothing in these answers is ever repeated"


async def test_penalty_on_the_first_token(
    cluster: RunningCluster, lone_cluster: RunningCluster
) -> None:
    """The decode server knows that the first token was said: a forbidding penalty keeps it from
    being said again."""
    harsh: SamplingOptions = {
        "max_tokens": 40,
        "temperature": 1.0,
        "top_k": 2,
        "seed": 5,
        "presence_penalty": 2.0,
        "frequency_penalty": 2.0,
        "repetition_penalty": 2.0,
        "logprobs": 2,
    }
    await _ask_all(cluster, lone_cluster, harsh)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
async def test_logprobs(
    cluster: RunningCluster, lone_cluster: RunningCluster, num_top: int
) -> None:
    """Every token has its log probability and those of the likeliest, most likely first."""
    for result in await _ask_all(cluster, lone_cluster, {**_PLAIN, "logprobs": num_top}):
        for token in result.tokens:
            assert token.logprob is not None
            assert len(token.top_logprobs) == num_top
            values = [logprob for _, logprob in token.top_logprobs]
            assert values == sorted(values, reverse=True)
            if num_top:
                assert token.top_logprobs[0][0] == token.token_id
                assert token.top_logprobs[0][1] == pytest.approx(token.logprob)


async def test_logprobs_of_a_sampled_token(
    cluster: RunningCluster, lone_cluster: RunningCluster
) -> None:
    """With temperature too, and for a token that is not among the likeliest."""
    sampling: SamplingOptions = {"max_tokens": 24, "temperature": 1.5, "seed": 3, "logprobs": 2}
    results = await _ask_all(cluster, lone_cluster, sampling)
    tokens = [token for result in results for token in result.tokens]
    assert any(token.token_id not in dict(token.top_logprobs) for token in tokens)


async def test_no_logprobs(cluster: RunningCluster) -> None:
    """Who does not ask for log probabilities gets none."""
    async with Client(cluster.address) as client:
        result = await client.complete(_PROMPTS[0], max_tokens=4, temperature=0.0)
    assert all(token.logprob is None and not token.top_logprobs for token in result.tokens)


async def test_many_kinds_in_one_batch(
    cluster: RunningCluster, lone_cluster: RunningCluster
) -> None:
    """Requests with all kinds of sampling in one batch get what each gets alone."""
    kinds: list[SamplingOptions] = [
        _PLAIN,
        {**_PLAIN, "logprobs": 3},
        {"max_tokens": 24, "temperature": 1.0, "seed": 1},
        {"max_tokens": 24, "temperature": 0.8, "seed": 2, "top_k": 5, "logprobs": 2},
        {"max_tokens": 24, "temperature": 1.0, "seed": 3, "top_p": 0.7, "min_p": 0.1},
        {**_PLAIN, "frequency_penalty": 1.5},
        {**_PLAIN, "repetition_penalty": 1.5, "min_tokens": 6, "logprobs": 1},
        {"max_tokens": 24, "temperature": 1.0, "seed": 4, "presence_penalty": 1.0},
        {**_PLAIN, "max_tokens": 1},
    ]
    requests = [(prompt, kind) for prompt in _PROMPTS for kind in kinds]
    async with Client(cluster.address) as client, Client(lone_cluster.address) as lone:
        together = await asyncio.gather(
            *(client.complete(prompt, **kind) for prompt, kind in requests)
        )
        for (prompt, kind), result in zip(requests, together, strict=True):
            alone = await lone.complete(prompt, **kind)
            assert_same(result, alone, f"{kind}")
            _assert_logprobs_close(result, alone)
