"""Servers of a real cluster come and go by `streamfill servers`, under clients that stream.

The tests are in an order: each finds the cluster as the one before left it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from streamfill.api import Client, Result
from streamfill.launcher.state import start_ticks
from tests.support.cli import run_cli
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.counters import wait_until_at_rest
from tests.support.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.clusters, pytest.mark.slow]

COMMAND_S = 120.0
"""A server is ready after ten seconds on two quiet cores."""
NUM_CLIENTS = 8
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningCluster]:
    """One prefill and one decode server to begin with."""
    running = start_cluster(
        tmp_path_factory.mktemp("servers"),
        tiny_model,
        "coming",
        settings=[
            *("prefill.threads=1", "decode.threads=1"),
            *("prefill.pool_tokens=8000", "decode.pool_tokens=8000"),
        ],
    )
    yield running
    assert running.stop() == 0


@pytest.fixture
async def client(cluster: RunningCluster) -> AsyncIterator[Client]:
    async with Client(cluster.address) as client:
        yield client


async def servers(cluster: RunningCluster, *words: str) -> CompletedProcess[str]:
    """`streamfill servers WORDS` as its user runs it."""
    return await asyncio.to_thread(
        run_cli,
        *("servers", *words, "--name", cluster.name),
        home=cluster.folder,
        timeout_s=COMMAND_S,
    )


async def states(cluster: RunningCluster) -> dict[str, str]:
    """By server id, as `streamfill servers list` says."""
    listed = await servers(cluster, "list", "--json")
    return {each["server_id"]: each["state"] for each in json.loads(listed.stdout)["servers"]}


async def stream(client: Client, seed: int) -> tuple[list[int], Result]:
    """A context that comes in pieces for a second or two, and its answer."""
    generator, prompt = random.Random(seed), list[int]()
    async with client.stream() as stream:
        for _ in range(12):
            piece = [generator.randrange(20, 900) for _ in range(generator.randrange(5, 40))]
            prompt += piece
            await stream.append(token_ids=piece)
            await asyncio.sleep(generator.random() * 0.3)
        answer = stream.commit(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        return prompt, await answer.read()


async def one_shot(client: Client, prompt: list[int]) -> tuple[int, ...]:
    whole = await client.complete(
        token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
    )
    return whole.token_ids


async def test_the_list_shows_what_there_is(cluster: RunningCluster) -> None:
    """Each server with its process, pool and version."""
    listed = await servers(cluster, "list")
    assert listed.returncode == 0
    header, first, second, verdict = listed.stdout.splitlines()
    assert header.split()[:5] == ["server", "role", "state", "address", "pid"]
    pid = str(cluster.process("prefill-0").pid)
    words = f"prefill-0 prefill alive 127.0.0.1 {pid} launcher 0 0"
    *facts, pool, engine, version = first.split()
    assert (" ".join(facts), engine, version) == (words, "sglang", "0.5.16")
    assert 7_900 < int(pool.replace(",", "")) <= 8_000  # SGLang keeps some for itself
    assert second.split()[:3] == ["decode-0", "decode", "alive"]
    assert verdict == "ready"


async def test_bad_wishes_are_refused(cluster: RunningCluster, tmp_path: Path) -> None:
    """In one line that says what is wrong and what would help; nothing changes."""
    for words, text in (
        (("drain", "prefill-7"), "'prefill-7'; living are: decode-0, prefill-0"),
        (("resume", "prefill-7"), "'prefill-7'; living are"),
        (("remove", "prefill-7"), "there is no such server; there are: decode-0, prefill-0"),
        (("drain", "prefill-0"), "last prefill server that takes streams"),
        (("remove", "prefill-0"), "add another one first (`streamfill servers add prefill`)"),
        (("add", "prefill", "--set", "threadz=2"), "threadz = 2: is no known option"),
        (("add", "decode", "--set", "page_size=7"), "decode.page_size = 7: must equal"),
        (("drain", "decode-0", "--timeout", "-1"), "--timeout = '-1': must be seconds"),
    ):
        refused = await servers(cluster, *words)
        assert (refused.returncode, refused.stdout) == (2, ""), refused
        assert text in refused.stderr
        assert refused.stderr.startswith("error: ")
    assert await states(cluster) == {"prefill-0": "alive", "decode-0": "alive"}
    nowhere = await asyncio.to_thread(run_cli, "servers", "add", "prefill", home=tmp_path)
    assert nowhere.returncode == 2
    assert "no cluster of this name runs here" in nowhere.stderr


async def test_a_server_that_cannot_start_leaves_nothing(cluster: RunningCluster) -> None:
    """The reason is in its last lines, which are shown."""
    refused = await servers(cluster, "add", "prefill", "--set", "sglang={no_such_argument=7}")
    assert refused.returncode == 2, refused
    assert "prefill-1" in refused.stderr
    assert sorted(record.name for record in cluster.state.processes) == [
        *("controller", "decode-0", "prefill-0", "router")
    ]


async def test_a_server_is_added_and_gets_streams(cluster: RunningCluster, client: Client) -> None:
    """It is the next one of its role, and takes its share."""
    added = await servers(cluster, "add", "prefill", "--set", "pool_tokens=7000")
    assert added.returncode == 0, added.stderr
    (name,) = {record.name for record in cluster.state.processes} - {
        *("controller", "decode-0", "prefill-0", "router")
    }
    assert f"{name} is ready after" in added.stdout
    assert cluster.process(name).state == "ready"
    infos = {each.server_id: each for each in (await client.server_info()).servers}
    assert infos[name].state == "alive"
    assert 6_900 < infos[name].pool_tokens <= 7_000
    results = await asyncio.gather(*(stream(client, seed) for seed in range(4)))
    assert {result.metadata.prefill_server for _, result in results} == {"prefill-0", name}


async def test_a_drain_under_load_loses_nothing(cluster: RunningCluster, client: Client) -> None:
    """Every answer is that of one shot; afterwards nothing is on the drained server."""
    (other,) = {name for name in await states(cluster) if name.startswith("prefill-")} - {
        "prefill-0"
    }
    clients = [asyncio.ensure_future(stream(client, 100 + n)) for n in range(NUM_CLIENTS)]

    async def has_many() -> bool:
        infos = {each.server_id: each for each in (await client.server_info()).servers}
        return infos["prefill-0"].num_assigned_streams >= 2

    await until("streams on prefill-0", has_many, 30.0)
    drained = await servers(cluster, "drain", "prefill-0")
    assert drained.returncode == 0, drained
    lines = drained.stdout.splitlines()
    assert lines[0].startswith("prefill-0 takes nothing new; ")
    assert lines[-1] == "prefill-0 is empty"
    results = await asyncio.gather(*clients)
    num_moved = (await client.server_info()).num_moves["drain"]
    assert num_moved >= 1
    for prompt, result in results:
        assert result.token_ids == await one_shot(client, prompt)
        assert result.metadata.prefill_server == other or result.metadata.num_attempts == 1
    assert (await states(cluster))["prefill-0"] == "draining"
    listed = await servers(cluster, "list")
    assert "prefill-0: an operator drains it" in listed.stdout
    assert f"streams moved between servers: {num_moved} drain" in listed.stdout


async def test_a_drain_is_taken_back(cluster: RunningCluster, client: Client) -> None:
    """Streams come to the server again."""
    resumed = await servers(cluster, "resume", "prefill-0")
    assert (resumed.returncode, resumed.stdout) == (0, "prefill-0 is alive\n")
    results = await asyncio.gather(*(stream(client, 200 + seed) for seed in range(4)))
    assert "prefill-0" in {result.metadata.prefill_server for _, result in results}


async def test_answers_move_when_their_time_is_over(
    cluster: RunningCluster, client: Client
) -> None:
    """A decode server that is drained with no time for answers: they go on at a prefill server,
    without a missing token."""
    prompt = [token % 900 + 20 for token in range(400)]
    expected = await client.complete(
        token_ids=prompt, max_tokens=1500, temperature=0.0, ignore_eos=True
    )
    answer = client.generate(token_ids=prompt, max_tokens=1500, temperature=0.0, ignore_eos=True)
    tokens = [await anext(answer) for _ in range(20)]
    drained = await servers(cluster, "drain", "decode-0", "--timeout", "0")
    assert drained.returncode == 0, drained
    tokens += [token async for token in answer]
    assert tuple(token.token_id for token in tokens) == expected.token_ids
    assert answer.result.metadata.decoded_by_prefill
    info = await client.server_info()
    assert info.ready
    assert info.ready_reason.startswith("prefill servers answer by themselves: no decode server")
    assert (await servers(cluster, "resume", "decode-0")).returncode == 0


async def test_a_server_is_removed_under_load(cluster: RunningCluster, client: Client) -> None:
    """Its streams go on elsewhere, its process ends in order and is not started again."""
    pid = cluster.process("prefill-0").pid
    assert pid is not None
    clients = [asyncio.ensure_future(stream(client, 300 + n)) for n in range(NUM_CLIENTS)]
    await asyncio.sleep(0.5)
    removed = await servers(cluster, "remove", "prefill-0")
    assert removed.returncode == 0, removed
    assert removed.stdout.splitlines()[-1] == (
        "prefill-0 ended with exit code 0, and will not be started again."
    )
    assert start_ticks(pid) is None
    for prompt, result in await asyncio.gather(*clients):
        assert result.token_ids == await one_shot(client, prompt)

    async def is_forgotten() -> bool:
        return "prefill-0" not in await states(cluster)

    await until("the router forgets prefill-0", is_forgotten, 30.0)
    assert "prefill-0" not in {record.name for record in cluster.state.processes}
    again = await servers(cluster, "remove", "prefill-0")
    assert again.returncode == 2
    assert "there is no such server" in again.stderr
    await wait_until_at_rest(client)


async def test_the_last_one_goes_by_force_only(cluster: RunningCluster, client: Client) -> None:
    """Then nothing is served until one is added, with a fresh id."""
    (last,) = {name for name in await states(cluster) if name.startswith("prefill-")}
    assert (await servers(cluster, "remove", last)).returncode == 2
    assert (await servers(cluster, "remove", last, "--force")).returncode == 0
    listed = await servers(cluster, "list")
    assert listed.returncode == 1
    assert "NOT READY: no prefill server" in listed.stdout
    added = await servers(cluster, "add", "prefill")
    assert added.returncode == 0, added
    assert {"prefill-0", last}.isdisjoint(await states(cluster))
    prompt, result = await stream(client, 400)
    assert result.token_ids == await one_shot(client, prompt)
