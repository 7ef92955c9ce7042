"""The HTTP API against its own description: schemathesis makes requests of it, well-formed and not,
for a whole router with fake servers, and each answer is one that the description has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from router.access.key_ring import KeyRing
from router.http.server import HttpServer
from streamfill.access.key_file import change_keys
from streamfill.access.keys import new_key
from streamfill.config import RouterConfig
from streamfill.models.tiny import make_tiny_model
from tests.fuzz.bounds import examples
from tests.unit.router.cluster_for_tests import TestCluster

START_S = 30.0
ANSWER_S = 30.0
MAX_BODY_BYTES = 64 * 1024
MAX_STREAMS = 8
BUSY = frozenset({501, 503, 504})
"""A description may have them; 500 never."""


class Served:
    """A router over HTTP, in a thread of its own."""

    def __init__(self, model: Path, keys: Path) -> None:
        self.url = ""
        self._model = model
        self._keys = keys
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(START_S)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # noqa: BLE001  told to whoever waits
            self._failure = error
            self._ready.set()
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        async with TestCluster(self._model, max_streams=MAX_STREAMS) as cluster:
            await cluster.prefill()
            await cluster.decode()
            config = RouterConfig(
                model_path=str(self._model),
                host="127.0.0.1",
                grpc_port=0,
                zmq_port=0,
                http_port=0,
                max_body_bytes=MAX_BODY_BYTES,
            )
            server = HttpServer(cluster.manager, config, keys=KeyRing(self._keys))
            self.url = f"http://127.0.0.1:{await server.start()}"
            self._ready.set()
            await self._stop.wait()
            await server.stop(0.5)


@pytest.fixture(scope="module")
def key_and_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    key, entry = new_key("fuzz")
    change_keys(path, lambda _: [entry], "--file")
    return key, path


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, key_and_file: tuple[str, Path]
) -> Iterator[Served]:
    model = make_tiny_model(tmp_path_factory.mktemp("models") / "bpe")
    with Served(model, key_and_file[1]) as found:
        yield found


@pytest.fixture(scope="module")
def schema(served: Served, key_and_file: tuple[str, Path]) -> Any:
    headers = {"authorization": f"Bearer {key_and_file[0]}"}
    document = httpx.get(f"{served.url}/openapi.json", headers=headers, timeout=ANSWER_S).json()
    return schemathesis.openapi.from_dict(document)


OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/streams"),
    ("POST", "/v1/streams"),
    ("PUT", "/v1/streams"),
]


def test_every_operation_is_tried(schema: Any) -> None:
    """Each of the description is in the list of these tests."""
    found = [(each.ok().method.upper(), each.ok().path) for each in schema.get_all_operations()]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "good"),
    [
        pytest.param(method, path, good, id=f"{method} {path} {'good' if good else 'bad'}")
        for method, path in OPERATIONS
        for good in (True, False)
        if good or method != "GET"  # there is nothing in it that could be otherwise
    ],
)
@given(data=st.data())
@settings(
    examples(15),
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    # How many of its drafts schemathesis throws away depends on the seed.
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_answers_are_those_of_the_description(  # noqa: PLR0917  fixtures
    served: Served,
    schema: Any,
    key_and_file: tuple[str, Path],
    method: str,
    path: str,
    good: bool,
    data: st.DataObject,
) -> None:
    """Status, type, headers and body; no bug; and the router lives on."""
    mode = schemathesis.GenerationMode.POSITIVE if good else schemathesis.GenerationMode.NEGATIVE
    operation = schema[path][method]
    case = data.draw(operation.as_strategy(generation_mode=mode))
    headers = {"authorization": f"Bearer {key_and_file[0]}"}
    response = case.call(base_url=served.url, headers=headers, timeout=ANSWER_S)
    checks = schemathesis.checks
    case.validate_response(
        response,
        checks=[
            checks.CHECKS.get_one(name)
            for name in (
                "status_code_conformance",
                "content_type_conformance",
                "response_headers_conformance",
                "response_schema_conformance",
            )
        ],
    )
    assert response.status_code < 500 or response.status_code in BUSY, response.text


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_without_a_key(served: Served, schema: Any, method: str, path: str) -> None:
    """401 in the form that is described, but for those that say that they need none."""
    url = f"{served.url}{path.replace('{model}', 'x')}"
    reply = httpx.request(method, url, timeout=ANSWER_S)
    is_open = schema.raw_schema["paths"][path][method.lower()].get("security") == []
    assert (reply.status_code == 401) is not is_open
    if not is_open:
        assert "www-authenticate" in reply.headers
