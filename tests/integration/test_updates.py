"""Contexts that are replaced, and commits that find nothing left to compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamfill.api import Client
from streamfill.models.tiny_corpus import CORPUS
from streamfill.stream.tokenizer import load_tokenizer
from tests.support.cluster import RunningCluster
from tests.support.comparing import assert_same
from tests.support.counters import empty_caches

pytestmark = pytest.mark.integration

_DOCUMENTS = [
    f"Document {number}: {' '.join(CORPUS[3 * number : 3 * number + 3])}\n" for number in range(4)
]
_WAIT_S = 20.0


@pytest.mark.parametrize("wait", [True, False], ids=["computed", "at once"])
async def test_final_update_with_nothing_left(cluster: RunningCluster, wait: bool) -> None:
    """A commit whose update says what is there already answers from what is there."""
    prompt = "".join(_DOCUMENTS)
    async with Client(cluster.address) as client:
        await empty_caches(client)
        async with client.stream(mode="update") as stream:
            await stream.update(prompt)
            if wait:
                await stream.wait_computed(_WAIT_S)
            streamed = await stream.commit(prompt, max_tokens=16, temperature=0.0).read()
        await empty_caches(client)
        whole = await client.complete(prompt, max_tokens=16, temperature=0.0)
    assert_same(streamed, whole)
    assert streamed.usage.num_invalidated_tokens == 0
    if wait:
        assert streamed.usage.num_cached_tokens >= streamed.usage.num_prompt_tokens - 1


async def test_empty_pieces(cluster: RunningCluster) -> None:
    """Empty text, bytes and token ids change nothing, first, in between, and at the commit."""
    async with Client(cluster.address) as client:
        await empty_caches(client)
        async with client.stream() as stream:
            await stream.append("")
            assert (await stream.append(token_ids=[])).num_received_tokens == 0
            before = await stream.append(_DOCUMENTS[0])
            assert (await stream.append("")).num_received_tokens == before.num_received_tokens
            await stream.append(b"")
            await stream.append(token_ids=())
            await stream.append(_DOCUMENTS[1])
            streamed = await stream.commit("", max_tokens=16, temperature=0.0).read()
        await empty_caches(client)
        whole = await client.complete("".join(_DOCUMENTS[:2]), max_tokens=16, temperature=0.0)
    assert_same(streamed, whole)


async def test_commit_of_what_is_entirely_cached(cluster: RunningCluster) -> None:
    """A prompt that other streams left in the cache is answered like one that is computed, streamed
    or at once, and computes next to nothing."""
    prompt = "".join(_DOCUMENTS)
    async with Client(cluster.address) as client:
        await empty_caches(client)
        cold = await client.complete(prompt, max_tokens=16, temperature=0.0)
        warm = await client.complete(prompt, max_tokens=16, temperature=0.0)
        async with client.stream() as stream:
            for document in _DOCUMENTS:
                await stream.append(document)
            streamed = await stream.commit(max_tokens=16, temperature=0.0).read()
    assert_same(warm, cold, "warm")
    assert_same(streamed, cold, "streamed")
    assert cold.usage.num_cached_tokens == 0
    for result in (warm, streamed):
        assert result.usage.num_cached_tokens >= result.usage.num_prompt_tokens - 1


async def test_prompt_that_grew_out_of_an_answer(cluster: RunningCluster) -> None:
    """A prompt that goes on behind an earlier answer finds that answer in the cache, rightly."""
    prompt = _DOCUMENTS[0]
    async with Client(cluster.address) as client:
        await empty_caches(client)
        first = await client.complete(prompt, max_tokens=16, temperature=0.0)
        longer = prompt + first.text + " And then?"
        async with client.stream() as stream:
            await stream.append(prompt + first.text)
            streamed = await stream.commit(" And then?", max_tokens=16, temperature=0.0).read()
        await empty_caches(client)
        whole = await client.complete(longer, max_tokens=16, temperature=0.0)
    assert_same(streamed, whole)


@pytest.mark.parametrize(
    ("versions", "is_invalidating"),
    [
        pytest.param([[0, 1, 2, 3], [0, 1]], True, id="shrinks"),
        pytest.param([[0, 1], [0, 1, 2]], False, id="grows"),
        pytest.param([[0, 1, 2], [2, 1, 0], [0, 1, 2]], True, id="goes back"),
        pytest.param([[0, 1, 2], [], [0, 1, 2]], True, id="is emptied in between"),
        pytest.param([[0, 1, 2, 3], [0, 2, 1, 3], [0, 2], [0, 2, 3, 1]], True, id="is ranked anew"),
        pytest.param([[0], [1], [2], [3]], True, id="is another each time"),
    ],
)
@pytest.mark.parametrize("wait", [True, False], ids=["computed", "at once"])
async def test_updated_context(
    cluster: RunningCluster, versions: list[list[int]], is_invalidating: bool, wait: bool
) -> None:
    """Whatever a context was before, the answer is that to its last version; what no longer fits is
    counted as invalidated."""
    texts = ["".join(_DOCUMENTS[number] for number in version) for version in versions]
    async with Client(cluster.address) as client:
        await empty_caches(client)
        async with client.stream(mode="update") as stream:
            for text in texts:
                await stream.update(text)
                if wait:
                    await stream.wait_computed(_WAIT_S)
            streamed = await stream.commit(max_tokens=16, temperature=0.0).read()
        await empty_caches(client)
        whole = await client.complete(texts[-1], max_tokens=16, temperature=0.0)
    assert_same(streamed, whole)
    if wait:
        assert (streamed.usage.num_invalidated_tokens > 0) == is_invalidating


async def test_shrinking_update_computes_nothing(cluster: RunningCluster) -> None:
    """What is left after a shrinking update was computed before."""
    async with Client(cluster.address) as client:
        await empty_caches(client)
        async with client.stream(mode="update") as stream:
            await stream.update("".join(_DOCUMENTS))
            await stream.wait_computed(_WAIT_S)
            streamed = await stream.commit(_DOCUMENTS[0], max_tokens=4, temperature=0.0).read()
    usage = streamed.usage
    assert usage.num_cached_tokens >= usage.num_prompt_tokens - 2, "a seam may move a token"
    assert usage.num_invalidated_tokens > 0


async def test_updates_between_text_and_ids(cluster: RunningCluster, tiny_model: Path) -> None:
    """A context may change from text to token ids and back."""
    tokenizer = load_tokenizer(tiny_model)
    ids = tokenizer.encode(_DOCUMENTS[0] + _DOCUMENTS[2], add_special_tokens=True)
    async with Client(cluster.address) as client:
        await empty_caches(client)
        async with client.stream(mode="update") as stream:
            await stream.update(_DOCUMENTS[0])
            await stream.update(token_ids=ids)
            to_ids = await stream.commit(max_tokens=16, temperature=0.0).read()
        async with client.stream(mode="update") as stream:
            await stream.update(token_ids=ids[:20])
            await stream.update(_DOCUMENTS[0] + _DOCUMENTS[2])
            to_text = await stream.commit(max_tokens=16, temperature=0.0).read()
        await empty_caches(client)
        whole = await client.complete(token_ids=ids, max_tokens=16, temperature=0.0)
    assert_same(to_ids, whole, "to ids")
    assert_same(to_text, whole, "to text")


async def test_update_while_the_old_version_is_computed(cluster: RunningCluster) -> None:
    """Updates that cut into tokens which are being computed at that moment leave nothing wrong
    behind."""
    long = "".join(CORPUS[:16])
    async with Client(cluster.address) as client:
        await empty_caches(client)
        for cut in range(40, len(long), len(long) // 4):
            async with client.stream(mode="update") as stream:
                await stream.update(long)
                await stream.update(long[:cut] + "|" + long[cut + 10 :])
                final = long[: cut // 2] + long[cut:]
                streamed = await stream.commit(final, max_tokens=8, temperature=0.0).read()
            await empty_caches(client)
            whole = await client.complete(final, max_tokens=8, temperature=0.0)
            assert_same(streamed, whole, f"cut at {cut}")
