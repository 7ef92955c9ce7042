"""The status page in a real browser, over the real router with servers that play their part.

Skipped where there is no Chromium. That the page is delivered under its policy, and what is sent to
it, is tested without a browser in `tests/unit/router/http/test_status.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from router.access.key_ring import KeyRing
from router.http.server import HttpServer
from router.interface import StreamHandle
from streamfill.config import RouterConfig
from streamfill.messages.common import ComputeRun, StreamAccount
from streamfill.models.tiny import make_tiny_model
from tests.support.browser import Page, browser_page, browser_path
from tests.unit.router.access.keys_for_tests import TestKeys
from tests.unit.router.cluster_for_tests import TestCluster, answer_of, commit_of, ids

BROWSER = browser_path()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on the PATH"),
]
MARKUP = "<img src=x onerror=document.title='owned'>"
ROWS = "document.querySelectorAll('.row').length"
LINK = "document.getElementById('link').textContent"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "bpe")


@asynccontextmanager
async def shown(
    model: Path, keys: KeyRing | None = None
) -> AsyncIterator[tuple[TestCluster, Page, str]]:
    """A cluster and a browser that has its page open."""
    assert BROWSER is not None
    async with TestCluster(model) as cluster:
        await cluster.prefill()
        await cluster.decode()
        values: dict[str, Any] = {"host": "127.0.0.1", "grpc_port": 0, "zmq_port": 0}
        http = HttpServer(
            cluster.manager, RouterConfig(model_path=str(model), http_port=0, **values), keys=keys
        )
        url = f"http://127.0.0.1:{await http.start()}/status"
        try:
            async with browser_page(BROWSER) as page:
                await page.resize(1200, 900)
                await page.open(url)
                yield cluster, page, url
        finally:
            await http.stop(0.2)


async def played(cluster: TestCluster) -> StreamHandle:
    """A stream that went through everything, with a name that is markup."""
    run = ComputeRun(start_age_s=0.3, end_age_s=0.1, num_tokens=4, reason="commit")
    cluster.servers[0].account = StreamAccount(
        num_computed_tokens=4,
        num_recomputed_tokens=0,
        num_reused_tokens=0,
        runs=(run,),
        preemptions=(),
    )
    handle = await cluster.open(request_id=MARKUP)
    await handle.append(ids(1, 2, 3))
    await asyncio.sleep(0.3)
    await handle.append(ids(4))
    decode = cluster.servers[1]
    decode.output_limit = 3
    await handle.commit(commit_of(5))
    await asyncio.sleep(0.6)
    decode.output_limit = 5
    await answer_of(handle)
    return handle


def pixels(colour: str) -> str:
    """How many pixels of the first row's drawing have this colour of the palette."""
    return (
        "(() => { const canvas = document.querySelector('.row canvas');"
        f"const probe = document.createElement('span'); probe.style.color = 'var(--{colour})';"
        "document.body.append(probe);"
        "const [r, g, b] = getComputedStyle(probe).color.match(/\\d+/g).map(Number);"
        "probe.remove(); if (!canvas?.width) return 0;"
        "const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        "let found = 0; for (let n = 0; n < data.length; n += 4)"
        " if (data[n] === r && data[n + 1] === g && data[n + 2] === b) found += 1;"
        "return found; })()"
    )


async def test_a_stream_is_drawn(model: Path) -> None:
    """Its arrivals, prefill, commit and answer have their colours on the canvas, in both themes and
    at 400 px; its name is text whatever it is; and the browser finds nothing wrong."""
    async with shown(model) as (cluster, page, _):
        await page.until("document.getElementById('empty').hidden === false")
        await page.value("document.getElementById('span').value = '15'")
        await played(cluster)
        await page.until(f"{ROWS} === 1")
        await page.until("document.querySelector('.row .badge').textContent === 'done'")
        name = "document.querySelector('.row .name').textContent"
        assert await page.value(name) == MARKUP
        assert await page.value("document.querySelectorAll('.row img').length") == 0
        for scheme, width in (("light", 1200), ("dark", 1200), ("light", 400)):
            await page.prefer(scheme)
            await page.resize(width, 900)
            for colour in ("compute", "decode", "text", "accent"):
                await page.until(f"{pixels(colour)} > 0")
            overflow = "document.documentElement.scrollWidth - innerWidth"
            assert await page.value(overflow) <= 0
        assert await page.value("document.title") == "streamfill: 0 open"
        assert page.problems == []


async def test_the_keyboard_is_enough(model: Path) -> None:
    """To find a stream, open its details, close them and pause."""
    async with shown(model) as (cluster, page, _):
        first = await cluster.open(request_id="first")
        second = await cluster.open(request_id="second")
        await second.append(ids(5, 6))
        await page.until(f"{ROWS} === 2")
        await page.press("ArrowDown")
        await page.press("ArrowDown")
        focused = "document.activeElement.parentElement.dataset.id"
        assert await page.value(focused) == str(first.stream_id)
        await page.press("ArrowUp")
        assert await page.value(focused) == str(second.stream_id)
        await page.press("Enter")
        await page.until("document.querySelector('.details table') !== null")
        assert str(second.stream_id) in await page.value(
            "document.querySelector('.details').textContent"
        )
        await page.press("Escape")
        assert await page.value("document.querySelectorAll('.details').length") == 0
        await page.press("/")
        for key in "fir":
            await page.press(key)
        await page.until(f"{ROWS} === 1")
        assert await page.value("document.querySelector('.row').dataset.id") == str(first.stream_id)
        await page.press("Escape")
        watches = cluster.manager._watches
        await page.press("p")
        await page.until(f"{LINK}.startsWith('paused')")
        async with asyncio.timeout(10):
            while watches.num_viewers:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await page.press("p")
        await page.until(f"{LINK}.startsWith('live')")
        assert page.problems == []


async def test_a_key_is_asked_for_and_kept_out_of_the_url(model: Path, tmp_path: Path) -> None:
    """Without one nothing is shown; with one, the streams of its tenant."""
    keys = TestKeys(tmp_path)
    key = await keys.add("a", tenant="a")
    async with shown(model, keys.ring) as (cluster, page, url):
        await cluster.open(request_id="theirs", tenant="b")
        await cluster.open(request_id="ours", tenant="a")
        await page.until("document.getElementById('key-form').hidden === false")
        assert await page.value(ROWS) == 0
        await page.value(f"document.getElementById('key').value = '{key}'")
        await page.value("document.querySelector('#key-form button').click()")
        await page.until(f"{ROWS} === 1")
        assert "ours" in await page.value("document.querySelector('.row').textContent")
        assert await page.value("location.href") == url
        asked = "JSON.stringify(performance.getEntriesByType('resource').map(e => e.name))"
        assert key not in await page.value(asked)
        assert await page.value("sessionStorage.getItem('key')") is None
        await keys.remove("a")
        await page.until("document.getElementById('key-form').hidden === false")


async def test_a_thousand_streams_do_not_make_it_slow(model: Path) -> None:
    """At the highest limit, with a hundred of them changing: the script of the page is at work for
    a small part of the time, and draws what is on the screen only."""
    async with shown(model) as (cluster, page, _):
        handles = [await cluster.open(request_id=f"agent-{n}") for n in range(1000)]
        for handle in handles:
            await handle.append(ids(*range(10, 20)))
        await page.value("document.getElementById('limit').value = '500'")
        await page.value("document.getElementById('limit').dispatchEvent(new Event('change'))")
        await page.until(f"{ROWS} === 500")
        await page.call("Performance.enable")

        async def busy_s() -> float:
            metrics = (await page.call("Performance.getMetrics"))["metrics"]
            values = {each["name"]: each["value"] for each in metrics}
            return float(values["TaskDuration"])

        before_s, loop = await busy_s(), asyncio.get_running_loop()
        started_s = loop.time()
        for _ in range(4):
            for handle in handles[-100:]:
                await handle.append(ids(7, 8, 9))
            await asyncio.sleep(0.5)
        share = (await busy_s() - before_s) / (loop.time() - started_s)
        assert share < 0.6
        drawn = "[...document.querySelectorAll('.row canvas')].filter(c => c.width > 0).length"
        assert 5 < await page.value(drawn) < 60
        assert page.problems == []
