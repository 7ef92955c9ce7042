"""One more server for a running cluster: its settings and its process."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest

from streamfill.config import ClusterConfig, RouterSection, ServerConfig, ServerSection
from streamfill.errors import ConfigError
from streamfill.launcher.more_servers import ServerPlanner
from streamfill.launcher.plan import ProcessSpec, plan_cluster
from streamfill.launcher.ports import Ports, choose_ports
from streamfill.messages.common import Role

PORTS = Ports(router_grpc=1001, router_http=1004, router_zmq=1002, controller_zmq=1003)
CONFIG = ClusterConfig(
    prefill=ServerSection(count=2, pool_tokens=500, metrics_port="off"),
    decode=ServerSection(metrics_port="off", base_gpu_id=2),
)


def planner(config: ClusterConfig = CONFIG) -> ServerPlanner:
    return ServerPlanner(
        config=config,
        model_path=Path("/models/m"),
        ports=PORTS,
        num_cores=8,
        run_dir=Path("/run/c"),
        python="python",
    )


def running(config: ClusterConfig = CONFIG) -> tuple[ProcessSpec, ...]:
    made = plan_cluster(
        config,
        model_path=Path("/models/m"),
        ports=PORTS,
        num_cores=8,
        run_dir=Path("/run/c"),
        python="python",
    )
    return made.processes


def config_of(spec: ProcessSpec) -> ServerConfig:
    return msgspec.json.decode(spec.config_json, type=ServerConfig)


def plan(settings: Mapping[str, object] = MappingProxyType({})) -> ProcessSpec:
    taken = {spec.name for spec in running()}
    return planner().plan(Role.PREFILL, settings, taken, running())


def test_it_is_like_the_others_of_its_role() -> None:
    """But for its id, its GPU and its share of the cores."""
    old = config_of(next(spec for spec in running() if spec.name == "prefill-1"))
    new = config_of(plan())
    differing = {key for key in old.__struct_fields__ if getattr(old, key) != getattr(new, key)}
    assert differing == {"server_id", "base_gpu_id"}
    assert (new.server_id, new.base_gpu_id, new.pool_tokens) == ("prefill-2", 2, 500)
    many = tuple(replace(running()[3], name=f"prefill-{n}") for n in range(7))
    assert config_of(planner().plan(Role.PREFILL, {}, (), many)).threads == 1


def test_settings_differ_for_it_alone() -> None:
    """With or without the name of the section; a GPU is meant as it is said."""
    new = config_of(plan({"pool_tokens": 900, "prefill.threads": 5, "base_gpu_id": 6}))
    assert (new.pool_tokens, new.threads, new.base_gpu_id) == (900, 5, 6)
    assert CONFIG.prefill.pool_tokens == 500


def test_ids_are_never_used_twice() -> None:
    """Not those of servers that were removed, nor those of other machines."""
    taken = {"prefill-0", "prefill-7", "prefill-x", "prefill-٣", "decode-9", "router"}
    assert planner().plan(Role.PREFILL, {}, taken, running()).name == "prefill-8"
    assert planner().plan(Role.DECODE, {}, taken, running()).name == "decode-10"
    assert planner().plan(Role.DECODE, {}, {"router"}, running()).name == "decode-0"


def test_a_shared_gpu_is_said_to_nccl() -> None:
    """prefill-2 would come to the GPU of decode-0."""
    assert plan().env["NCCL_HOSTID"] == "prefill-2"
    assert "NCCL_HOSTID" not in plan({"base_gpu_id": 5}).env


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threadz": 2}, r"threadz = 2: is no known option; known here: count, host, threads"),
        ({"threads": "two"}, r"threads = 'two'"),
        ({"threads": -1}, r"prefill.threads = -1: must be at least 0"),
        ({"count": 3}, r"--set count = 3: one server is added at a time"),
        ({"page_size": 16}, r"decode.page_size = None: must equal prefill.page_size, which is 16"),
        ({"policy": "fastest"}, r"prefill.policy = 'fastest'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, object], words: str) -> None:
    """Each is refused by its name, before anything starts."""
    with pytest.raises(ConfigError, match=words):
        plan(settings)


def test_its_metrics_have_a_port_of_their_own() -> None:
    """A free one, or the one that its number gives it, unless that is in use."""
    config = ClusterConfig()
    first = config_of(planner(config).plan(Role.PREFILL, {}, (), ())).metrics_port
    assert first is not None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fixed = ClusterConfig(
            router=RouterSection(), prefill=ServerSection(count=1, metrics_port=port - 1)
        )
        with pytest.raises(ConfigError, match=f"prefill.metrics_port = {port}: is in use"):
            planner(fixed).plan(Role.PREFILL, {}, {"prefill-0"}, ())


@pytest.mark.parametrize("is_given", [False, True])
def test_its_metrics_port_is_looked_for_where_metrics_listen(*, is_given: bool) -> None:
    """The other address is the one that servers are reached at, and need not be of this machine."""
    # A port that the system does not give to somebody else meanwhile.
    router = RouterSection(grpc_port=0, http_port=0)
    base = choose_ports(ClusterConfig(router=router)).metrics["decode-0"] if is_given else 0
    asked = ClusterConfig(prefill=ServerSection(host="192.0.2.1", metrics_port=base))
    assert config_of(planner(asked).plan(Role.PREFILL, {}, (), ())).metrics_port is not None
    elsewhere = ClusterConfig(metrics_host="192.0.2.1", prefill=ServerSection(metrics_port=base))
    with pytest.raises(ConfigError, match="no address of this machine") as caught:
        planner(elsewhere).plan(Role.PREFILL, {}, (), ())
    assert (caught.value.key, caught.value.value) == ("metrics_host", "192.0.2.1")
