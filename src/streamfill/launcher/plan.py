"""From a cluster file to a list of processes. Pure: nothing is read, written or started here."""

from __future__ import annotations

import enum
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from streamfill.config import (
    ClusterConfig,
    ControllerConfig,
    RouterConfig,
    ServerConfig,
    ServerSection,
)
from streamfill.launcher.ports import Ports
from streamfill.messages.common import Role
from streamfill.unix_sockets import check_unix_path, unix_target

OPERATOR_SOCKET: Final = "router.sock"
ROUTER_LOG: Final = "router_log.sqlite"


class ProcessKind(enum.Enum):
    """What a process of the cluster does."""

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    CONTROLLER = "controller"

    @property
    def drain_stage(self) -> int:
        """Lower stages stop first: the router takes nothing new while its servers finish, and
        the servers may ask the controller to the end."""
        return {ProcessKind.ROUTER: 0, ProcessKind.CONTROLLER: 2}.get(self, 1)


_MODULES: Mapping[ProcessKind, str] = {
    ProcessKind.ROUTER: "router",
    ProcessKind.PREFILL: "prefill_server",
    ProcessKind.DECODE: "decode_server",
    ProcessKind.CONTROLLER: "streamfill.preemption",
}


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One process to start. It is ready when it prints a line ``READY {json}``."""

    name: str
    """Unique in the cluster; also the name of its log file."""
    kind: ProcessKind
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Put over the launcher's own environment."""
    config_file: Path
    config_json: bytes
    """What `config_file` must hold before the process starts."""
    metrics_address: str | None = None
    """``host:port`` of its ``/metrics`` for this machine. None: it has none."""


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """Everything there is to start."""

    name: str
    address: str
    """``host:port`` of the router for clients on this machine."""
    processes: tuple[ProcessSpec, ...]
    http_url: str | None = None
    """Of the router, for clients on this machine; None: no HTTP."""
    operator_address: str | None = None
    """Of the router's Unix socket, as gRPC writes it, for the launcher and its user. None: clients
    need nothing to use `address`, so there is none."""

    @property
    def own_address(self) -> str:
        """Where the launcher and its user reach the router."""
        return self.operator_address or self.address


def plan_cluster(
    config: ClusterConfig,
    *,
    model_path: Path,
    ports: Ports,
    num_cores: int,
    run_dir: Path,
    state_dir: Path | None = None,
    python: str = sys.executable,
) -> ClusterPlan:
    """The processes of `config`, in the order in which a table shows them.

    Args:
        config: a checked cluster.
        model_path: absolute folder of the model.
        ports: settled ports; those in `config` are not looked at.
        num_cores: CPU cores that this cluster may use.
        run_dir: absolute folder for the configuration files.
        state_dir: absolute folder for the router's Unix socket; None: ``run_dir``.
        python: the interpreter that runs the processes.

    Raises:
        ConfigError: the path of the router's Unix socket cannot be one.
    """
    router_host = reachable_host(config.router.host)
    router_endpoint, controller_endpoint = endpoints_of(config, ports)

    def spec(
        name: str,
        kind: ProcessKind,
        threads: int,
        process_config: RouterConfig | ControllerConfig,
    ) -> ProcessSpec:
        env = environment(threads)
        return process_spec(name, kind, process_config, env=env, run_dir=run_dir, python=python)

    socket = (state_dir or run_dir) / OPERATOR_SOCKET if _asks_clients(config) else None
    if socket is not None:
        check_unix_path(socket, "STREAMFILL_HOME")
    router = RouterConfig(
        model_path=str(model_path),
        host=config.router.host,
        grpc_port=ports.router_grpc,
        http_port=ports.router_http,
        http_host=config.router.http_host,
        http_allow_origins=config.router.http_allow_origins,
        max_body_bytes=config.router.max_body_bytes,
        status_page=config.router.status_page,
        api_keys_file=config.router.api_keys_file,
        cache_namespaces=config.router.cache_namespaces,
        fair_sharing=config.router.fair_sharing,
        tls_cert_file=config.router.tls_cert_file,
        tls_key_file=config.router.tls_key_file,
        tls_client_ca_file=config.router.tls_client_ca_file,
        operator_socket=None if socket is None else str(socket),
        zmq_host=config.router.zmq_host,
        zmq_keys_dir=config.zmq_keys_dir,
        allow_plain_zmq=config.allow_plain_zmq,
        zmq_port=ports.router_zmq,
        max_streams=config.router.max_streams,
        idle_stream_timeout_s=config.router.idle_stream_timeout_s,
        max_uncommitted_tokens=config.prefill.max_uncommitted_tokens,
        max_waiting_segments=config.router.max_waiting_segments,
        admission_wait_s=config.router.admission_wait_s,
        ready_without_decode=config.router.ready_without_decode,
        rebalance=config.router.rebalance,
        placement=config.router.placement,
        placement_options=config.router.placement_options,
        context_tokens=config.model.context_tokens,
        controller_endpoint=controller_endpoint,
        metrics_port=ports.metrics.get("router"),
        metrics_host=config.metrics_host,
        metrics_token_file=config.metrics_token_file,
        otlp_endpoint=config.router.otlp_endpoint,
        log=config.router.log,
        log_file=_router_log(config, run_dir),
        log_level=config.log_level,
    )
    controller = ControllerConfig(
        host=config.controller.host,
        zmq_port=ports.controller_zmq,
        zmq_keys_dir=config.zmq_keys_dir,
        allow_plain_zmq=config.allow_plain_zmq,
        metrics_port=ports.metrics.get("controller"),
        metrics_host=config.metrics_host,
        metrics_token_file=config.metrics_token_file,
        log_level=config.log_level,
    )
    processes = [
        spec("router", ProcessKind.ROUTER, 1, router),
        spec("controller", ProcessKind.CONTROLLER, 1, controller),
    ]
    share = thread_share(num_cores, config.prefill.count + config.decode.count)
    servers = [
        server_config(
            config,
            role,
            section,
            index,
            share=share,
            model_path=model_path,
            endpoints=(router_endpoint, controller_endpoint),
            ports=ports,
        )
        for role, section in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode))
        for index in range(section.count)
    ]
    num_users = Counter(gpu for server in servers for gpu in gpus_of(server))
    for server in servers:
        shares_gpu = any(num_users[gpu] > 1 for gpu in gpus_of(server))
        processes.append(server_spec(server, shares_gpu=shares_gpu, run_dir=run_dir, python=python))
    return ClusterPlan(
        name=config.name,
        address=_join(router_host, ports.router_grpc),
        processes=tuple(processes),
        http_url=_http_url(config, ports),
        operator_address=None if socket is None else unix_target(socket),
    )


def thread_share(num_cores: int, num_servers: int) -> int:
    """CPU threads of a server whose file says 0: an equal share of the cores, at least 1."""
    return max(1, num_cores // max(1, num_servers))


def environment(threads: int) -> dict[str, str]:
    """What each process finds in its environment besides the launcher's own.

    The thread counts must be there before torch is imported. Tokenizers run in our own threads;
    their pool would only compete with the model's.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # Keeps memory that torch frees: fresh pages cost page faults
        # (docs/benchmarks/cpu_attention.md).
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    }


def _router_log(config: ClusterConfig, run_dir: Path) -> str | None:
    if config.router.log == "memory":
        return None
    return str(run_dir / (config.router.log_file or ROUTER_LOG))


def _asks_clients(config: ClusterConfig) -> bool:
    """Whether a client needs something to use the router, which the launcher may not have."""
    return config.router.api_keys_file is not None or config.router.tls_cert_file is not None


def gpus_of(server: ServerConfig) -> range:
    """Numbers of the GPUs that a server takes where the machine has any."""
    return range(server.base_gpu_id, server.base_gpu_id + server.tp_size)


def reachable_host(host: str) -> str:
    """Where a process on this machine reaches a socket that is bound to `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}.get(host, host)


def endpoints_of(config: ClusterConfig, ports: Ports) -> tuple[str, str]:
    """Where servers on this machine reach the router and the controller."""
    zmq_host = reachable_host(config.router.zmq_host or config.router.host)
    controller_host = reachable_host(config.controller.host)
    return (
        f"tcp://{_join(zmq_host, ports.router_zmq)}",
        f"tcp://{_join(controller_host, ports.controller_zmq)}",
    )


def process_spec(
    name: str,
    kind: ProcessKind,
    process_config: RouterConfig | ControllerConfig | ServerConfig,
    *,
    env: Mapping[str, str],
    run_dir: Path,
    python: str,
) -> ProcessSpec:
    """One process with this configuration."""
    config_file = run_dir / "config" / f"{name}.json"
    return ProcessSpec(
        name=name,
        kind=kind,
        argv=(python, "-m", _MODULES[kind], "--config-file", str(config_file)),
        env=env,
        config_file=config_file,
        config_json=msgspec.json.format(msgspec.json.encode(process_config), indent=2),
        metrics_address=(
            None
            if process_config.metrics_port is None
            else _join(reachable_host(process_config.metrics_host), process_config.metrics_port)
        ),
    )


def server_spec(
    server: ServerConfig, *, shares_gpu: bool, run_dir: Path, python: str
) -> ProcessSpec:
    """The process of a server.

    Args:
        shares_gpu: another server of this machine uses one of its GPUs.
    """
    # NCCL refuses two ranks of one host on one GPU. Under names of their own they talk over TCP,
    # where they cannot share the GPU's memory (kv_transfer.rings); with GPUs of their own that
    # would be a waste.
    more = {"NCCL_HOSTID": server.server_id} if shares_gpu else {}
    return process_spec(
        server.server_id,
        ProcessKind(server.role.value),
        server,
        env={**environment(server.threads), **more},
        run_dir=run_dir,
        python=python,
    )


def server_config(
    config: ClusterConfig,
    role: Role,
    section: ServerSection,
    index: int,
    *,
    share: int,
    model_path: Path,
    endpoints: tuple[str, str],
    ports: Ports,
) -> ServerConfig:
    """Of server `index` of a role.

    Args:
        section: of this role.
        share: CPU threads where the section does not say how many.
        model_path: absolute folder of the model.
        endpoints: as of `endpoints_of`.
        ports: of which that of its metrics counts.
    """
    router_endpoint, controller_endpoint = endpoints
    server_id = f"{role.value}-{index}"
    return ServerConfig(
        role=role,
        server_id=server_id,
        model_path=str(model_path),
        router_endpoint=router_endpoint,
        controller_endpoint=controller_endpoint,
        host=section.host,
        zmq_keys_dir=config.zmq_keys_dir,
        allow_plain_zmq=config.allow_plain_zmq,
        threads=section.threads or share,
        context_tokens=config.model.context_tokens,
        pool_tokens=section.pool_tokens,
        page_size=section.page_size,
        step_tokens=section.step_tokens,
        segment_tokens=section.segment_tokens,
        policy=section.policy,
        policy_options=section.policy_options,
        preemption=section.preemption,
        early_push=section.early_push,
        kv_codec=section.kv_codec,
        cost_profile=section.cost_profile,
        host_pool_tokens=section.host_pool_tokens,
        max_requests=section.max_requests,
        tp_size=section.tp_size,
        base_gpu_id=section.base_gpu_id + index * section.tp_size,
        sglang=section.sglang,
        metrics_port=ports.metrics.get(server_id),
        metrics_host=config.metrics_host,
        metrics_token_file=config.metrics_token_file,
        log_level=config.log_level,
    )


def _http_url(config: ClusterConfig, ports: Ports) -> str | None:
    if ports.router_http is None:
        return None
    host = reachable_host(config.router.http_host or config.router.host)
    scheme = "http" if config.router.tls_cert_file is None else "https"
    return f"{scheme}://{_join(host, ports.router_http)}"


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
