"""Where each process of a cluster has its `/metrics`, from the file to Prometheus."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from streamfill.cli.cluster_options import with_changes
from streamfill.cli.status import metrics_urls
from streamfill.config import (
    ClusterConfig,
    ControllerSection,
    RouterConfig,
    RouterSection,
    ServerConfig,
    ServerSection,
)
from streamfill.errors import ConfigError
from streamfill.launcher.metrics_targets import TARGETS_FILE, write_targets
from streamfill.launcher.plan import ClusterPlan, plan_cluster
from streamfill.launcher.ports import Ports, choose_ports
from streamfill.launcher.state import ClusterPhase, ClusterState, ProcessRecord

FREE = ClusterConfig(router=RouterSection(grpc_port=0, http_port=0))
NAMES = ("router", "controller", "prefill-0", "prefill-1", "decode-0")
PORTS = Ports(
    router_grpc=1001,
    router_zmq=1002,
    controller_zmq=1003,
    metrics={name: 2000 + number for number, name in enumerate(NAMES)},
)


def plan(config: ClusterConfig, ports: Ports = PORTS) -> ClusterPlan:
    return plan_cluster(
        config, model_path=Path("/m"), ports=ports, num_cores=2, run_dir=Path("/run/c")
    )


def two_free_ports() -> int:
    """The first of two neighbours, of which the system gives none away by itself."""
    while True:
        port = choose_ports(FREE).metrics["prefill-0"]
        with suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port


def test_every_process_has_a_free_port_by_default() -> None:
    """All different, and different from the others."""
    ports = choose_ports(with_changes(FREE, {"prefill.count": 2}))
    assert sorted(ports.metrics) == sorted(NAMES)
    everything = [*ports.metrics.values(), ports.router_grpc, ports.router_zmq]
    assert len(set(everything)) == len(everything)
    assert 0 not in everything


def test_a_port_given_is_that_of_the_first_server() -> None:
    """The others have the next ones; "off" has none."""
    port = two_free_ports()
    config = ClusterConfig(
        router=RouterSection(grpc_port=0, http_port="off", metrics_port="off"),
        controller=ControllerSection(metrics_port="off"),
        prefill=ServerSection(count=2, metrics_port=port),
    )
    ports = choose_ports(config)
    assert sorted(ports.metrics) == ["decode-0", "prefill-0", "prefill-1"]
    assert (ports.metrics["prefill-0"], ports.metrics["prefill-1"]) == (port, port + 1)


def test_a_port_in_use_stops_the_start() -> None:
    """Named with its key, also where it is the second server's."""
    port = two_free_ports() + 1
    with socket.create_server(("127.0.0.1", port)):
        config = with_changes(FREE, {"prefill.count": 2, "prefill.metrics_port": port - 1})
        with pytest.raises(ConfigError, match="in use") as caught:
            choose_ports(config)
    assert (caught.value.key, caught.value.value) == ("prefill.metrics_port", port)


def test_an_address_that_is_not_ours_stops_the_start() -> None:
    """By its own key."""
    with pytest.raises(ConfigError, match="no address of this machine") as caught:
        choose_ports(with_changes(FREE, {"metrics_host": "192.0.2.1"}))
    assert (caught.value.key, caught.value.value) == ("metrics_host", "192.0.2.1")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("router.metrics_port", -1, "between 0 .* and 65535"),
        ("controller.metrics_port", 65536, "between 0 .* and 65535"),
        ("prefill.metrics_port", 65535, "between 0 .* and 65534.*last of 2 servers"),
        ("decode.metrics_port", "on", "off"),
    ],
)
def test_a_port_that_cannot_be(key: str, value: object, words: str) -> None:
    """Refused with its key, its value and what would be right."""
    with pytest.raises(ConfigError, match=words) as caught:
        with_changes(FREE, {"prefill.count": 2, key: value})
    assert (caught.value.key, caught.value.value) == (key, value)


def test_the_ports_reach_the_processes() -> None:
    """Each finds its own in its configuration; without one it has none."""
    config = ClusterConfig(prefill=ServerSection(count=2))
    specs = {spec.name: spec for spec in plan(config).processes}
    router = msgspec.json.decode(specs["router"].config_json, type=RouterConfig)
    second = msgspec.json.decode(specs["prefill-1"].config_json, type=ServerConfig)
    assert (router.metrics_port, second.metrics_port) == (2000, 2003)
    assert specs["prefill-1"].metrics_address == "127.0.0.1:2003"
    without = Ports(router_grpc=1, router_zmq=2, controller_zmq=3)
    assert all(spec.metrics_address is None for spec in plan(config, without).processes)


def test_they_listen_where_the_file_says() -> None:
    """On this machine only, wherever the process itself listens, unless there is another address;
    with the token of the cluster."""
    for cluster, address in (
        (ClusterConfig(router=RouterSection(host="10.0.0.7")), "127.0.0.1:2000"),
        (ClusterConfig(metrics_host="10.0.0.7", metrics_token_file="/t"), "10.0.0.7:2000"),
    ):
        specs = plan(cluster).processes
        assert specs[0].metrics_address == address
        for spec in specs:
            found = msgspec.json.decode(spec.config_json)
            assert found["metrics_host"] == cluster.metrics_host
            assert found["metrics_token_file"] == cluster.metrics_token_file


def test_prometheus_finds_them_in_a_file(tmp_path: Path) -> None:
    """In the form of its file-based discovery, reached through loopback where all is bound."""
    config = ClusterConfig(name="c", metrics_host="0.0.0.0")
    made = plan(config)
    write_targets(made.name, made.processes, tmp_path)
    groups = json.loads((tmp_path / TARGETS_FILE).read_text())
    assert groups[0] == {
        "targets": ["127.0.0.1:2000"],
        "labels": {"cluster": "c", "process": "router", "kind": "router"},
    }
    assert [group["labels"]["process"] for group in groups] == [
        *("router", "controller", "prefill-0", "decode-0")
    ]
    assert [path.name for path in tmp_path.iterdir()] == [TARGETS_FILE]


def test_status_shows_them() -> None:
    """As addresses to open; a process without one is left out."""

    def record(name: str, address: str | None) -> ProcessRecord:
        return ProcessRecord(
            name=name,
            kind=name,
            state="ready",
            pid=1,
            num_restarts=0,
            log_file="",
            metrics_address=address,
        )

    state = ClusterState(
        name="c",
        address="127.0.0.1:1",
        model_path="/m",
        phase=ClusterPhase.READY,
        launcher_pid=1,
        launcher_start_ticks=1,
        run_dir="/run",
        startup_s=1.0,
        processes=(record("router", "127.0.0.1:2000"), record("controller", None)),
    )
    assert metrics_urls(state) == {"router": "http://127.0.0.1:2000/metrics"}
