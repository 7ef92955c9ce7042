"""What servers are told of tenants: whose KV a stream may find, and on whose account it runs."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from router.access.key_ring import KeyRing
from router.access.standing import SharingRules, sharing_rules, standings
from streamfill.access.keys import KeyEntry, new_key
from streamfill.api import Client
from streamfill.config import RouterConfig
from streamfill.messages import router_to_server as r
from streamfill.messages.common import MAX_NAMESPACE_CHARS, NO_SHARE, SHARED_NAMESPACE
from tests.unit.router.access.keys_for_tests import TestKeys, whole_router
from tests.unit.router.cluster_for_tests import TestCluster
from tests.unit.router.fake_manager import STEP_S

RULES = SharingRules()


def _entries(*names: str, **options: bool | float | str) -> list[KeyEntry]:
    return [new_key(name, **options)[1] for name in names]  # type: ignore[arg-type]


def test_each_tenant_has_a_namespace_of_its_own() -> None:
    """Also those whose key has the same name in another file."""
    (a, b), (other_a,) = _entries("a", "b"), _entries("a")
    made = standings([a, b], RULES)
    elsewhere = standings([other_a], RULES)
    names = {made[a.id].namespace, made[b.id].namespace, elsewhere[other_a.id].namespace}
    assert len(names) == 3
    assert SHARED_NAMESPACE not in names
    assert all(len(name) <= MAX_NAMESPACE_CHARS for name in names)


def test_keys_of_one_tenant_share_one_that_outlives_further_keys() -> None:
    """And is the same whenever the file is read again, as by a router that starts anew."""
    first, second = _entries("laptop", "server", tenant="alice")
    before = standings([first], RULES)[first.id]
    made = standings([first, second, *_entries("bob")], RULES)
    assert made[first.id] == made[second.id] == before


def test_what_servers_are_told_does_not_show_the_name() -> None:
    (entry,) = _entries("alice")
    made = standings([entry], RULES)[entry.id]
    assert "alice" not in made.namespace + made.share.tenant


def test_a_shared_cache_is_shared_by_those_who_want_it() -> None:
    """Their shares of the cluster stay apart."""
    open_1, open_2 = _entries("a", "b", shared_cache=True)
    (own,) = _entries("c")
    made = standings([open_1, open_2, own], RULES)
    assert made[open_1.id].namespace == made[open_2.id].namespace == SHARED_NAMESPACE
    assert made[own.id].namespace != SHARED_NAMESPACE
    assert made[open_1.id].share.tenant != made[open_2.id].share.tenant


def test_the_cluster_file_may_say_otherwise() -> None:
    """Both rules by themselves."""
    config = RouterConfig(model_path="m", host="h", grpc_port=0, zmq_port=0)
    assert sharing_rules(config) == SharingRules(isolates_caches=True, is_fair=True)
    (entry,) = _entries("a", weight=3.0)
    shared = standings([entry], SharingRules(isolates_caches=False))[entry.id]
    assert (shared.namespace, shared.share.weight) == (SHARED_NAMESPACE, 3.0)
    unfair = standings([entry], SharingRules(is_fair=False))[entry.id]
    assert unfair.namespace != SHARED_NAMESPACE
    assert unfair.share == NO_SHARE


async def test_a_change_of_the_file_counts_for_what_is_opened_next(keys: TestKeys) -> None:
    """Keys that stay keep their account."""
    key = await keys.add("a")
    account = keys.ring.authenticate([f"Bearer {key}"])
    before = account.standing
    await keys.add("b", weight=2.0)
    assert account.standing == before
    again = KeyRing(keys.path).authenticate([f"Bearer {key}"])
    assert again.standing == before


def _told(cluster: TestCluster, kind: type[r.OpenStream | r.Generate]) -> set[tuple[str, str]]:
    return {
        (message.namespace, message.share.tenant)
        for server in cluster.servers
        for message in server.received
        if isinstance(message, kind)
    }


@pytest.mark.parametrize("over_http", [False, True])
async def test_every_server_is_told(tiny_model: Path, keys: TestKeys, over_http: bool) -> None:
    """With the prompt on the prefill server, and with the answer on the decode server, whichever
    way the request came."""
    made = {name: await keys.add(name, weight=2.5) for name in ("a", "b")}
    async with whole_router(tiny_model, keys) as (address, url, cluster):
        for key in made.values():
            if over_http:
                async with httpx.AsyncClient(base_url=url, timeout=STEP_S) as http:
                    headers = {"authorization": f"Bearer {key}"}
                    body = {"prompt": "The quick", "max_tokens": 4}
                    reply = await http.post("/v1/completions", json=body, headers=headers)
                    assert reply.is_success
            else:
                async with Client(address, api_key=key) as client:
                    await client.complete("The quick", max_tokens=4)
        standing = {
            (account.standing.namespace, account.standing.share.tenant)
            for account in (keys.ring.authenticate([f"Bearer {key}"]) for key in made.values())
        }
        assert len(standing) == 2
        assert _told(cluster, r.OpenStream) == _told(cluster, r.Generate) == standing
        weights = {
            message.share.weight
            for server in cluster.servers
            for message in server.received
            if isinstance(message, r.OpenStream | r.Generate)
        }
        assert weights == {2.5}


async def test_without_keys_there_is_one_namespace(tiny_model: Path) -> None:
    async with TestCluster(tiny_model) as cluster:
        await cluster.prefill()
        await cluster.open()
        assert _told(cluster, r.OpenStream) <= {(SHARED_NAMESPACE, "")}
