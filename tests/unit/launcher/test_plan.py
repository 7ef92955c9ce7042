"""From a cluster file to processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamfill.config import (
    ClusterConfig,
    ControllerConfig,
    ControllerSection,
    ModelSection,
    RouterConfig,
    RouterSection,
    ServerConfig,
    ServerSection,
)
from streamfill.errors import ConfigError
from streamfill.launcher.plan import ClusterPlan, ProcessKind, plan_cluster, thread_share
from streamfill.launcher.ports import Ports
from streamfill.messages.common import Role

PORTS = Ports(router_grpc=1001, router_http=1004, router_zmq=1002, controller_zmq=1003)


def plan(config: ClusterConfig, num_cores: int = 8) -> ClusterPlan:
    """The plan of `config` with fixed ports and folders."""
    return plan_cluster(
        config,
        model_path=Path("/models/m"),
        ports=PORTS,
        num_cores=num_cores,
        run_dir=Path("/run/c"),
        python="python",
    )


def servers(made: ClusterPlan) -> dict[str, ServerConfig]:
    """The servers' configurations by name."""
    return {
        spec.name: msgspec.json.decode(spec.config_json, type=ServerConfig)
        for spec in made.processes
        if spec.kind in (ProcessKind.PREFILL, ProcessKind.DECODE)
    }


def test_one_process_each() -> None:
    """The default cluster is a router, a controller, a prefill and a decode server."""
    made = plan(ClusterConfig())
    assert [(spec.name, spec.kind) for spec in made.processes] == [
        ("router", ProcessKind.ROUTER),
        ("controller", ProcessKind.CONTROLLER),
        ("prefill-0", ProcessKind.PREFILL),
        ("decode-0", ProcessKind.DECODE),
    ]
    assert made.processes[2].argv == (
        "python",
        "-m",
        "prefill_server",
        "--config-file",
        "/run/c/config/prefill-0.json",
    )
    assert made.address == "127.0.0.1:1001"


def test_all_find_each_other() -> None:
    """Router, controller and servers are given the same end points."""
    made = plan(ClusterConfig())
    router = msgspec.json.decode(made.processes[0].config_json, type=RouterConfig)
    controller = msgspec.json.decode(made.processes[1].config_json, type=ControllerConfig)
    assert (router.grpc_port, router.zmq_port, controller.zmq_port) == (1001, 1002, 1003)
    assert (router.http_port, made.http_url) == (1004, "http://127.0.0.1:1004")
    assert router.controller_endpoint == "tcp://127.0.0.1:1003"
    assert router.status_page
    for server in servers(made).values():
        assert server.router_endpoint == "tcp://127.0.0.1:1002"
        assert server.controller_endpoint == "tcp://127.0.0.1:1003"


def test_the_status_page_can_be_switched_off() -> None:
    """The router hears of it."""
    made = plan(ClusterConfig(router=RouterSection(status_page=False)))
    router = msgspec.json.decode(made.processes[0].config_json, type=RouterConfig)
    assert not router.status_page


@pytest.mark.parametrize(
    ("bound", "reached"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.0.0.7", "10.0.0.7")]
)
def test_wildcard_hosts_are_reached_by_loopback(bound: str, reached: str) -> None:
    """A router that listens everywhere is reached through the loopback address."""
    made = plan(ClusterConfig(router=RouterSection(host=bound)))
    assert made.address == f"{reached}:1001"
    assert servers(made)["prefill-0"].router_endpoint == f"tcp://{reached}:1002"


def test_servers_may_be_on_another_address_than_clients() -> None:
    """What listens to the world need not listen to it for servers."""
    made = plan(ClusterConfig(router=RouterSection(host="10.0.0.7", zmq_host="127.0.0.1")))
    router = msgspec.json.decode(made.processes[0].config_json, type=RouterConfig)
    assert (router.host, router.zmq_host) == ("10.0.0.7", "127.0.0.1")
    assert made.address == "10.0.0.7:1001"
    assert servers(made)["prefill-0"].router_endpoint == "tcp://127.0.0.1:1002"


def test_threads_are_shared_or_given() -> None:
    """Threads 0 means an equal share of the cores, in the file and in the environment."""
    config = ClusterConfig(prefill=ServerSection(count=2), decode=ServerSection(threads=3))
    made = plan(config, num_cores=8)
    assert {name: server.threads for name, server in servers(made).items()} == {
        "prefill-0": 2,
        "prefill-1": 2,
        "decode-0": 3,
    }
    threads = {spec.name: spec.env["OMP_NUM_THREADS"] for spec in made.processes}
    assert threads["prefill-0"] == "2"
    assert threads["decode-0"] == "3"
    assert threads["router"] == "1"


@pytest.mark.parametrize(("cores", "num_servers", "share"), [(2, 2, 1), (2, 4, 1), (64, 3, 21)])
def test_thread_share(cores: int, num_servers: int, share: int) -> None:
    """A share is never below one thread."""
    assert thread_share(cores, num_servers) == share


def test_sections_reach_their_servers() -> None:
    """Every option of a server section, and of the whole cluster, reaches the server."""
    prefill = ServerSection(
        count=2,
        host="10.0.0.7",
        pool_tokens=111,
        page_size=16,
        step_tokens=222,
        segment_tokens=77,
        max_requests=33,
        tp_size=2,
        base_gpu_id=4,
        sglang={"dtype": "bfloat16"},
    )
    config = ClusterConfig(
        log_level="debug", model=ModelSection(context_tokens=99), prefill=prefill
    )
    server = servers(plan(config))["prefill-1"]
    assert server == ServerConfig(
        role=Role.PREFILL,
        server_id="prefill-1",
        model_path="/models/m",
        router_endpoint="tcp://127.0.0.1:1002",
        controller_endpoint="tcp://127.0.0.1:1003",
        host="10.0.0.7",
        threads=2,
        context_tokens=99,
        pool_tokens=111,
        page_size=16,
        step_tokens=222,
        segment_tokens=77,
        max_requests=33,
        tp_size=2,
        base_gpu_id=6,
        sglang={"dtype": "bfloat16"},
        log_level="debug",
    )


def test_servers_of_one_gpu_are_hosts_of_their_own() -> None:
    """To NCCL, which refuses two ranks of a host on one GPU; nobody else is."""
    config = ClusterConfig(
        prefill=ServerSection(count=2, tp_size=2),
        decode=ServerSection(count=2, base_gpu_id=3),
    )
    hosts = {spec.name: spec.env.get("NCCL_HOSTID") for spec in plan(config).processes}
    assert hosts == {
        "router": None,
        "controller": None,
        "prefill-0": None,
        "prefill-1": "prefill-1",
        "decode-0": "decode-0",
        "decode-1": None,
    }


def test_no_decode_server() -> None:
    """A cluster without decode servers is a plan like any other."""
    made = plan(ClusterConfig(decode=ServerSection(count=0), controller=ControllerSection()))
    assert list(servers(made)) == ["prefill-0"]


def test_router_options() -> None:
    """What the file says of the router is in its configuration."""
    section = RouterSection(
        max_streams=5,
        idle_stream_timeout_s=6.0,
        max_waiting_segments=7,
        admission_wait_s=8.0,
        otlp_endpoint="http://h:4318",
        cache_namespaces="shared",
        fair_sharing=False,
    )
    prefill = ServerSection(max_uncommitted_tokens=99)
    model = ModelSection(context_tokens=77)
    made = plan(ClusterConfig(router=section, prefill=prefill, model=model))
    router = msgspec.json.decode(made.processes[0].config_json, type=RouterConfig)
    assert (router.max_streams, router.idle_stream_timeout_s) == (5, 6.0)
    assert (router.max_waiting_segments, router.admission_wait_s) == (7, 8.0)
    assert router.max_uncommitted_tokens == 99
    assert router.otlp_endpoint == "http://h:4318"
    assert (router.cache_namespaces, router.fair_sharing) == ("shared", False)
    assert (router.model_path, router.context_tokens) == ("/models/m", 77)


def test_a_router_that_asks_for_something_has_a_socket_for_its_user() -> None:
    """The launcher and its user have no key and no certificate, and need none; an open router has
    no such socket."""
    for section, socket in (
        (RouterSection(), None),
        (RouterSection(api_keys_file="/k"), "/state/router.sock"),
        (RouterSection(tls_cert_file="/c", tls_key_file="/p"), "/state/router.sock"),
    ):
        made = plan_cluster(
            ClusterConfig(router=section),
            model_path=Path("/models/m"),
            ports=PORTS,
            num_cores=8,
            run_dir=Path("/run/c"),
            state_dir=Path("/state"),
        )
        router = msgspec.json.decode(made.processes[0].config_json, type=RouterConfig)
        assert (router.api_keys_file, router.operator_socket) == (section.api_keys_file, socket)
        assert (router.tls_cert_file, router.tls_key_file) == (
            section.tls_cert_file,
            section.tls_key_file,
        )
        scheme = "https" if section.tls_cert_file else "http"
        assert made.http_url == f"{scheme}://127.0.0.1:1004"
        assert made.address == "127.0.0.1:1001"
        assert made.own_address == (f"unix:{socket}" if socket else made.address)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("/" + "x" * 95, "is 108 bytes long, and a Unix socket's path at most 107"),
        ("/a,b", "comma"),
    ],
)
def test_a_folder_that_cannot_have_the_socket(folder: str, words: str) -> None:
    """Is said before a process starts; a router without one does not mind."""
    section = RouterSection(api_keys_file="/k")
    rest: dict[str, Any] = {
        "model_path": Path("/models/m"),
        "ports": PORTS,
        "num_cores": 8,
        "run_dir": Path("/run/c"),
        "state_dir": Path(folder),
    }
    with pytest.raises(ConfigError, match=f"STREAMFILL_HOME = .*{words}"):
        plan_cluster(ClusterConfig(router=section), **rest)
    assert plan_cluster(ClusterConfig(), **rest).operator_address is None
    shorter = rest | {"state_dir": Path("/" + "x" * 94)}
    assert plan_cluster(ClusterConfig(router=section), **shorter).operator_address is not None


def test_where_the_log_of_the_router_is() -> None:
    """In the cluster's folder, unless the file names another place; nowhere without one."""
    for section, log_file in (
        (RouterSection(), None),
        (RouterSection(log="sqlite"), "/run/c/router_log.sqlite"),
        (RouterSection(log="sqlite", log_file="mine"), "/run/c/mine"),
        (RouterSection(log="sqlite", log_file="/data/mine"), "/data/mine"),
    ):
        made = plan_cluster(
            ClusterConfig(router=section),
            model_path=Path("/models/m"),
            ports=PORTS,
            num_cores=8,
            run_dir=Path("/run/c"),
        )
        router = msgspec.json.decode(made.processes[0].config_json, type=RouterConfig)
        assert (router.log, router.log_file) == (section.log, log_file)


def test_policy_of_prefill_servers() -> None:
    """The policy that the file names reaches every prefill server, with its options."""
    prefill = ServerSection(count=2, policy="lcas", policy_options={"order": "newest"})
    made = servers(plan(ClusterConfig(prefill=prefill)))
    for name in ("prefill-0", "prefill-1"):
        assert (made[name].policy, made[name].policy_options) == ("lcas", {"order": "newest"})
    assert made["decode-0"].policy_options == {}
