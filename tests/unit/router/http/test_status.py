"""The status page and its events, through the real server over a fake core."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from router.access.account import CALLER
from router.access.guarded import GuardedManager
from router.http import status
from router.watch.frames import ClusterView, Frame, Selected
from router.watch.wish import MAX_LIMIT, MAX_SEARCH_CHARS, Show, Sort, WatchWish
from streamfill.access.keys import KeyEntry
from streamfill.errors import ResourceExhaustedError, UnauthenticatedError, UnavailableError
from tests.unit.router.access.keys_for_tests import TestKeys
from tests.unit.router.fake_manager import STEP_S, FakeManager
from tests.unit.router.http.serving import app_client, connected, http_client, serve_http, until

EVENTS = status.EVENTS_PATH
CLUSTER = ClusterView(
    model="m", ready=True, num_open=1, num_by_outcome={}, sees_all=True, uses_tenants=False
)


@pytest.fixture
def keys(tmp_path: Path) -> TestKeys:
    """A key file without keys, in force."""
    return TestKeys(tmp_path)


def events_of(body: str) -> list[tuple[str, Any]]:
    """Kind and data of each event, checked to be framed as such."""
    *events, rest = body.split("\n\n")
    assert rest == ""
    found = []
    for event in events:
        kind, data = event.split("\n")
        assert kind.startswith("event: ")
        assert data.startswith("data: ")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_the_page_is_one_document_under_a_strict_policy() -> None:
    """The browser runs the script and the style of the page, known by their hashes, and nothing
    else; it loads nothing, and speaks with its own router only."""
    async with app_client(FakeManager()) as client:
        reply = await client.get(status.PAGE_PATH)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert reply.headers["x-content-type-options"] == "nosniff"
    policy = dict(
        each.strip().split(" ", 1)
        for each in reply.headers["content-security-policy"].split(";")
        if " " in each.strip()
    )
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
        assert len(content) > 1000
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=\"(?!data:,|#)", reply.text)
    assert not re.findall(r"\son\w+=|style=\"|innerHTML|insertAdjacentHTML|eval\(", reply.text)


async def test_every_file_is_in_the_page() -> None:
    """No script lies there unused, and all that is used is there."""
    names = {path.name for path in status._FOLDER.iterdir()}
    assert names == {*status._SCRIPTS, "page.html", "style.css"}


async def test_events_are_a_snapshot_and_changes() -> None:
    """Each frame as an event of its kind; nobody between may store them."""
    manager = FakeManager()
    manager.frames = [
        Frame(
            now_ms=5,
            epoch_ms=7,
            cluster=CLUSTER,
            selected=Selected(order=["1"], num_matching=1, num_visible=1),
            streams=[msgspec.Raw(b'{"id":"1"}')],
        ),
        Frame(now_ms=6, epoch_ms=7),
    ]
    async with http_client(manager) as client:
        reply = await client.get(EVENTS)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    (first, snapshot), (second, delta) = events_of(reply.text)
    assert (first, second) == ("snapshot", "delta")
    assert snapshot["streams"] == [{"id": "1"}]
    assert snapshot["selected"]["order"] == ["1"]
    assert delta == {"now_ms": 6, "epoch_ms": 7}


async def test_the_wish_is_in_the_query() -> None:
    """Each field comes to the core; without any, the newest hundred of all."""
    manager = FakeManager()
    async with http_client(manager) as client:
        await client.get(EVENTS)
        query = {"show": "open", "sort": "waiting", "search": " a&b ", "limit": "7"}
        await client.get(EVENTS, params=query)
    assert manager.wishes == [
        WatchWish(),
        WatchWish(show=Show.OPEN, sort=Sort.WAITING, search="a&b", limit=7),
    ]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"limit": "0"}, f"limit is 0; it must be from 1 to {MAX_LIMIT}"),
        ({"limit": str(MAX_LIMIT + 1)}, f"from 1 to {MAX_LIMIT}"),
        ({"limit": "many"}, "limit is wrong"),
        ({"show": "some"}, "one of all, live, open"),
        ({"sort": "best"}, "one of newest, oldest"),
        ({"search": "x" * (MAX_SEARCH_CHARS + 1)}, f"at most {MAX_SEARCH_CHARS} characters"),
        ({"tenant": "other"}, "tenant is no known field"),
    ],
)
async def test_a_wrong_wish_is_refused(query: dict[str, str], words: str) -> None:
    """With the field, its value and what it may be."""
    manager = FakeManager()
    async with app_client(manager) as client:
        reply = await client.get(EVENTS, params=query)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
    assert not manager.wishes


async def test_an_error_before_the_first_event_has_its_status() -> None:
    """As when too many look already."""
    manager = FakeManager(frames=[])
    manager.watch_error = ResourceExhaustedError("32 pages are open", details={"retry_after_s": 5})
    async with app_client(manager) as client:
        reply = await client.get(EVENTS)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "5")


async def test_a_later_error_is_the_last_event() -> None:
    """In the words of the other endpoints."""
    manager = FakeManager(watch_error=UnavailableError("the router is shutting down"))
    async with app_client(manager) as client:
        reply = await client.get(EVENTS)
    kinds = [kind for kind, _ in events_of(reply.text)]
    assert kinds == ["snapshot", "end"]
    assert events_of(reply.text)[1][1]["error"]["message"] == "the router is shutting down"


async def test_a_reader_who_goes_ends_the_view() -> None:
    """Nothing goes on for a page that was closed."""
    manager = FakeManager(hold_frames=True)
    async with serve_http(manager) as url:
        async with (
            httpx.AsyncClient(timeout=STEP_S) as client,
            client.stream("GET", url + EVENTS) as reply,
        ):
            await anext(reply.aiter_lines())
            assert manager.num_watching == 1
        await until(lambda: manager.num_watching == 0)


async def test_a_reader_who_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, and what waits for it meanwhile is one frame."""
    monkeypatch.setattr(status, "SLOW_S", 0.3)
    num_made = 0

    class Endless(FakeManager):
        async def watch(self, wish: WatchWish) -> Any:
            nonlocal num_made
            self.num_watching += 1
            try:
                while True:
                    num_made += 1
                    yield Frame(now_ms=num_made, epoch_ms=0, streams=[msgspec.Raw(b'"%s"' % BULK)])
            finally:
                self.num_watching -= 1

    manager = Endless()
    async with serve_http(manager) as url, connected(url) as (_, writer):
        writer.write(f"GET {EVENTS} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        await until(lambda: manager.num_watching == 1)
        await until(lambda: manager.num_watching == 0)
        made = num_made
        await asyncio.sleep(0.1)
        assert num_made == made
        assert num_made * len(BULK) < 64 * 2**20


BULK = b"x" * 2**20


async def test_head_sends_no_events() -> None:
    """And takes no place."""
    manager = FakeManager(hold_frames=True)
    async with http_client(manager) as client:
        reply = await client.head(EVENTS)
        assert reply.status_code == 200
    assert not manager.wishes


async def test_the_page_can_be_switched_off() -> None:
    """Then neither path is there."""
    async with http_client(FakeManager(), status_page=False) as client:
        for path in (status.PAGE_PATH, EVENTS):
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/health")).status_code == 200


async def test_pages_of_other_origins_see_nothing() -> None:
    """Where they are not allowed, as on all paths."""
    async with app_client(FakeManager(), allow_origins=["https://a.example"]) as client:
        for origin, expected in (("https://b.example", 403), ("http://app", 200)):
            reply = await client.get(EVENTS, headers={"origin": origin})
            assert reply.status_code == expected


async def test_the_page_is_open_and_its_events_ask_for_a_key(keys: TestKeys) -> None:
    """The page holds no data. A key in the URL is none."""
    key = await keys.add("a")
    manager = FakeManager()
    async with http_client(manager, keys=keys.ring) as client:
        assert (await client.get(status.PAGE_PATH)).status_code == 200
        for path in (EVENTS, f"{EVENTS}?key={key}", f"{EVENTS}?authorization=Bearer+{key}"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get(EVENTS, headers=bearer(key))).status_code == 200
    assert len(manager.wishes) == 1


async def test_a_key_sees_its_tenant_and_an_operator_all(keys: TestKeys) -> None:
    """Whatever the query says."""
    own = await keys.add("a", tenant="acme")
    operator = await keys.add("root", is_operator=True)
    manager = FakeManager()
    async with http_client(manager, keys=keys.ring) as client:
        await client.get(EVENTS, headers=bearer(own))
        await client.get(EVENTS, headers=bearer(operator))
    assert [wish.tenant for wish in manager.wishes] == ["acme", None]


@pytest.mark.parametrize("is_removed", [True, False])
async def test_a_view_ends_with_its_key(keys: TestKeys, is_removed: bool) -> None:
    """When it was removed, and when it became one of another kind."""
    key = await keys.add("a", is_operator=True)
    account = keys.ring.authenticate([f"Bearer {key}"])
    CALLER.set(account)
    manager = FakeManager(frames=[Frame(now_ms=1, epoch_ms=1)] * 2)
    frames: AsyncIterator[Frame] = GuardedManager(manager).watch(WatchWish())
    await anext(frames)
    if is_removed:
        account.is_removed = True
    else:
        entry: KeyEntry = msgspec.structs.replace(account.entry, is_operator=False)
        account.replace_entry(entry)
    with pytest.raises(UnauthenticatedError):
        await anext(frames)
    assert manager.num_watching == 0
