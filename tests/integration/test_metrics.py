"""`/metrics` of all processes of a real cluster."""

from __future__ import annotations

import asyncio
import json

import pytest

from streamfill.api import Client
from streamfill.launcher.metrics_targets import TARGETS_FILE
from streamfill.observability.metrics import Metric, Owner
from tests.support.cli import run_cli
from tests.support.cluster import RunningCluster
from tests.support.counters import wait_until_at_rest
from tests.support.metrics import Scrape, scrape_url
from tests.support.waiting import until

pytestmark = pytest.mark.integration

PATIENCE_S = 30.0
OWNERS = {
    "router": Owner.ROUTER,
    "controller": Owner.CONTROLLER,
    "prefill-0": Owner.SERVER,
    "decode-0": Owner.SERVER,
}
ONLY_IN_USE = {Metric.WAITING_SEGMENTS, Metric.REFUSED_SEGMENTS, Metric.OVER_CAP_SEGMENTS}
NUM_TOKENS = 12


def urls(cluster: RunningCluster) -> dict[str, str]:
    """As `streamfill status --json` tells them."""
    done = run_cli("status", "--name", cluster.name, "--json", home=cluster.folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)["metrics"]
    return found


async def pages(cluster: RunningCluster) -> dict[str, Scrape]:
    addresses = await asyncio.to_thread(urls, cluster)
    scraped = [asyncio.to_thread(scrape_url, url) for url in addresses.values()]
    return dict(zip(addresses, await asyncio.gather(*scraped), strict=True))


async def test_a_stream_moves_the_metrics_of_every_process(cluster: RunningCluster) -> None:
    """Router, both servers and the controller tell of the same stream."""
    async with Client(cluster.address) as client:
        await wait_until_at_rest(client, PATIENCE_S)  # what the test before left is counted by then
        before = await pages(cluster)
        assert set(before) == set(OWNERS)
        async with client.stream(mode="append") as stream:
            # Cut in front of spaces: no last token becomes another when the next piece comes.
            await stream.append(" A river rises in the hills," * 8)
            await stream.append(" and comes to the sea." * 8)
            answer = stream.commit(
                " Where does it rise?", max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
            )
            tokens = [token async for token in answer]
        assert len(tokens) == NUM_TOKENS
        usage = answer.result.usage

    async def told() -> dict[str, Scrape] | None:
        now = await pages(cluster)
        ended = now["router"].count(Metric.STREAM_TIME) > before["router"].count(Metric.STREAM_TIME)
        done = moved(now, "decode-0", Metric.RUNS) and moved(now, "prefill-0", Metric.HANDOFF_BYTES)
        return now if ended and done and moved(now, "controller", Metric.REPORTS) else None

    def moved(now: dict[str, Scrape], process: str, metric: Metric, **labels: str) -> float:
        return now[process].total(metric, **labels) - before[process].total(metric, **labels)

    now = await until("every process tells of the stream", told, PATIENCE_S)
    assert now is not None
    assert moved(now, "router", Metric.STREAMS_ENDED, outcome="DONE") == 1
    assert moved(now, "router", Metric.SEGMENTS, mode="append") == 3
    assert moved(now, "router", Metric.TOKENS_IN) >= usage.num_prompt_tokens
    assert moved(now, "router", Metric.TOKENS_OUT) == NUM_TOKENS
    assert moved(now, "router", Metric.HANDOFFS, outcome="done") == 1
    gaps = now["router"].count(Metric.INTER_TOKEN) - before["router"].count(Metric.INTER_TOKEN)
    assert gaps == NUM_TOKENS - 1
    ttft_s = now["router"].sum(Metric.TTFT_COMMIT) - before["router"].sum(Metric.TTFT_COMMIT)
    assert 0 < ttft_s < PATIENCE_S
    assert moved(now, "prefill-0", Metric.COMPUTED) == usage.num_computed_tokens
    assert moved(now, "prefill-0", Metric.STEPS) >= 1
    assert now["prefill-0"].total(Metric.KV_TOTAL) > 0
    assert now["router"].value(Metric.SERVERS, role="prefill", state="alive") == 1
    assert now["controller"].value(Metric.KNOWN_SERVERS) == 1


async def test_every_metric_is_exported_where_it_belongs(cluster: RunningCluster) -> None:
    """And no other of ours; those of a server that had no stream yet may be missing."""
    now = await pages(cluster)
    for process, owner in OWNERS.items():
        ours = {name for name in now[process].names if name.startswith("streamfill_")}
        belong = {metric for metric in Metric if metric.spec.owner in (owner, Owner.EVERY)}
        names = {metric.spec.name.removesuffix("_total") for metric in belong}
        late = {m.spec.name.removesuffix("_total") for m in belong if m in ONLY_IN_USE}
        late |= {m.spec.name for m in (Metric.UNCOMMITTED_TOKENS, Metric.UNCOMMITTED_LIMIT)}
        assert ours <= names
        assert names - ours <= late


def test_prometheus_finds_all_of_them(cluster: RunningCluster) -> None:
    """The file in the run folder names the same addresses as the status."""
    groups = json.loads((cluster.folder / "run" / cluster.name / TARGETS_FILE).read_text())
    found = {
        group["labels"]["process"]: f"http://{group['targets'][0]}/metrics" for group in groups
    }
    assert found == urls(cluster)


def test_status_shows_where_they_are(cluster: RunningCluster) -> None:
    """One line a process."""
    done = run_cli("status", "--name", cluster.name, home=cluster.folder)
    for name, url in urls(cluster).items():
        assert f"metrics of {name}: {url}" in done.stdout.splitlines()
