"""Configuration of a cluster and of each of its processes.

``ClusterConfig`` is what a cluster file (TOML) and ``streamfill up`` describe. The launcher
derives from it one ``RouterConfig``, ``ControllerConfig`` and a ``ServerConfig`` per server, and
hands each to its process as a JSON file. Everything is frozen; a wrong or unknown value stops the
start with its key and what to do.
"""

from __future__ import annotations

import enum
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from streamfill.curve.exposure import check_listening
from streamfill.errors import ConfigError
from streamfill.messages.common import Role
from streamfill.observability.metrics_token import read_token
from streamfill.scheduling.registry import DEFAULT_POLICY, PREEMPTION_MODES, make_policy
from streamfill.tls import TlsFiles, TlsOptions, check_pair

EARLY_PUSHES = ("auto", "on", "off")
"""Values of ``early_push``."""


ROUTER_LOGS = ("memory", "sqlite")
"""Values of ``router.log``."""

KV_CODECS = ("none", "float16", "bfloat16", "float8_e4m3fn")
"""Values of ``kv_codec``; ``kv_transfer.codecs`` has them."""


class _Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


MetricsPort = int | str
"""A port, 0 for any free one, or ``off``."""


class ModelSection(_Config, frozen=True, kw_only=True):
    """``[model]``"""

    path: str | None = None
    """Hugging Face model folder. None: SmolLM2-135M-Instruct, made on first use."""
    context_tokens: int | None = None
    """Shorten the model's context to this many tokens."""


class CacheNamespaces(enum.Enum):
    """Who may be served from whose KV."""

    TENANT = "tenant"
    SHARED = "shared"


class RouterSection(_Config, frozen=True, kw_only=True):
    """``[router]``"""

    host: str = "127.0.0.1"
    grpc_port: int = 50051
    """0: any free port."""
    http_port: int | str = 8000
    """0: any free port. off: no HTTP."""
    http_host: str | None = None
    """None: as ``host``."""
    http_allow_origins: tuple[str, ...] = ("*",)
    """Web pages of these origins may use the cluster from a browser. ``*``: all; empty: none."""
    max_body_bytes: int = 64 * 1024 * 1024
    """Of one HTTP request or WebSocket message. A streamed upload may be longer."""
    status_page: bool = True
    """Whether HTTP has ``/status``, a page that draws what happens in the cluster."""
    api_keys_file: str | None = None
    """File of `streamfill keys`: who may use the cluster. None: everybody who can reach it."""
    cache_namespaces: str = CacheNamespaces.TENANT.value
    """Who may be served from whose KV, where there are API keys: tenant (each from its own prompts,
    unless a key was made with ``--shared-cache``) or shared (everybody from everybody's)."""
    fair_sharing: bool = True
    """Where there are API keys and tenants want more than there is, each gets a share by the weight
    of its keys. False: whoever comes first."""
    tls_cert_file: str | None = None
    """Certificate of the router (PEM), for gRPC and HTTP. None: no TLS."""
    tls_key_file: str | None = None
    """Its private key (PEM, not encrypted)."""
    tls_client_ca_file: str | None = None
    """Who vouches for clients (PEM): only those with a certificate are served. None: all are."""
    zmq_host: str | None = None
    """None: as ``host``. With all servers on this machine, 127.0.0.1 is enough."""
    zmq_port: int = 0
    max_streams: int = 10_000
    """Open streams beyond this are refused with RESOURCE_EXHAUSTED."""
    idle_stream_timeout_s: float = 3600.0
    """An uncommitted stream that nobody touched for this long is aborted."""
    max_waiting_segments: int = 256
    """Segments that wait for room on one prefill server. More are refused with
    RESOURCE_EXHAUSTED."""
    admission_wait_s: float = 30.0
    """A segment that waited for room this long is refused with RESOURCE_EXHAUSTED."""
    ready_without_decode: bool = True
    """Whether the router is ready while no decode server takes streams: prefill servers then write
    whole answers."""
    rebalance: bool = True
    """Whether streams that nobody has committed yet move from a busy prefill server to an idle
    one."""
    placement: str = "least-loaded"
    """Policy that chooses the prefill server of each stream: least-loaded, round-robin,
    power-of-two, cache-aware, dualmap, pull, or the name of a plug-in."""
    placement_options: dict[str, str] = {}
    """Options of the policy, by name."""
    metrics_port: MetricsPort = 0
    """Of ``/metrics``, for Prometheus, on ``metrics_host``."""
    log: str = "memory"
    """What the router knows of streams: in its memory only, or also in a file (sqlite), so that
    they go on when it was killed and is back."""
    log_file: str | None = None
    """Of ``log = "sqlite"``. None: router_log.sqlite in ``launcher.run_dir``, and a path that is
    not absolute begins there."""
    otlp_endpoint: str | None = None
    """Where the traces of streams go (OTLP over HTTP), such as ``http://127.0.0.1:4318``. None:
    where OpenTelemetry's environment variables say, else nowhere."""


class ControllerSection(_Config, frozen=True, kw_only=True):
    """``[controller]``"""

    host: str = "127.0.0.1"
    zmq_port: int = 0
    metrics_port: MetricsPort = 0
    """As of the router."""


class ServerSection(_Config, frozen=True, kw_only=True):
    """``[prefill]`` and ``[decode]``"""

    count: int = 1
    host: str = "127.0.0.1"
    threads: int = 0
    """CPU threads of each server. 0: an equal share of the cores."""
    pool_tokens: int | None = None
    """KV pool size in tokens. None: SGLang decides on a GPU; on the CPU 32,768, less where memory
    is short."""
    page_size: int | None = None
    """None: the measured default of the platform."""
    step_tokens: int | None = None
    """Prefill tokens computed in one step; four times as many where commits are computed that
    others can interrupt. None: 256 on the CPU, 8192 on a GPU."""
    segment_tokens: int | None = None
    """Of these, the tokens of streams that nobody has committed yet, unless much of it waits. A
    commit waits for at most one such step, and on the CPU for a layer of it where the policy lets
    commits interrupt. None: 96 on the CPU, as many as ``step_tokens`` on a GPU."""
    max_uncommitted_tokens: int | None = None
    """Cap on the tokens of all contexts on one prefill server that are not committed yet. Segments
    beyond it wait. None: 8 times the KV pool. Of no effect on decode servers."""
    policy: str = DEFAULT_POLICY
    """Who is computed next, and who gives up memory: a name that ``streamfill policy list`` shows.
    ``streamfill policy set`` changes it while the cluster runs. Of prefill servers only."""
    policy_options: dict[str, str] = {}
    """Options of the policy, by name."""
    preemption: str = "auto"
    """How KV may be taken from streams that are not over when memory is short: auto, swap,
    recompute or none. Of prefill servers only."""
    cost_profile: str | None = None
    """File of ``streamfill profile``, which says what recomputing and swapping cost. None: the one
    that was made for this model on this machine, else a built-in guess. Of prefill servers only."""
    host_pool_tokens: int | None = None
    """Host memory of each server for KV that was taken from streams, in tokens. 0: never copy.
    None: twice the KV pool, at most 15 % of the machine's memory. Of prefill servers only."""
    early_push: str = "auto"
    """Whether KV goes to a decode server ahead of the commit: auto (what will probably stay), on
    (all that is computed) or off. Of prefill servers only."""
    kv_codec: str = "none"
    """How KV may be written on its way to decode servers where the link is slow enough for it to
    pay: none (exact), float16, bfloat16 or float8_e4m3fn. Answers that may rest on such KV are
    marked. Of prefill servers only."""
    max_requests: int = 64
    """Requests computed at the same time."""
    tp_size: int = 1
    base_gpu_id: int = 0
    """Server i of this role uses GPUs from base_gpu_id + i * tp_size on."""
    sglang: dict[str, Any] = {}
    """Further SGLang server arguments, by their Python names."""
    metrics_port: MetricsPort = 0
    """As of the router; server i of this role has this port + i."""


class LauncherSection(_Config, frozen=True, kw_only=True):
    """``[launcher]``"""

    run_dir: str | None = None
    """Where logs and state go. None: STREAMFILL_HOME/run/<name>."""
    ready_timeout_s: float = 180.0
    drain_timeout_s: float = 30.0
    max_restarts: int = 5
    """Of one process in a row, each after a longer pause; a process that ran for a minute starts
    over."""


class ClusterConfig(_Config, frozen=True, kw_only=True):
    """A cluster file."""

    name: str = "local"
    log_level: str = "info"
    zmq_keys_dir: str | None = None
    """Folder of `streamfill zmq-keys`: the links between processes are encrypted, and only who has
    a key is let in. None: in the clear, and on this machine only."""
    allow_plain_zmq: bool = False
    """Let processes listen without keys also where other machines can reach them."""
    metrics_host: str = "127.0.0.1"
    """Where ``/metrics`` of all processes listen."""
    metrics_token_file: str | None = None
    """File with a token that ``/metrics`` asks for. None: it asks for nothing."""
    model: ModelSection = ModelSection()
    router: RouterSection = RouterSection()
    controller: ControllerSection = ControllerSection()
    prefill: ServerSection = ServerSection()
    decode: ServerSection = ServerSection()
    launcher: LauncherSection = LauncherSection()


class RouterConfig(_Config, frozen=True, kw_only=True):
    """Of the router process."""

    model_path: str
    host: str
    grpc_port: int
    zmq_port: int
    http_port: int | None = None
    """None: no HTTP."""
    http_host: str | None = None
    """None: as ``host``."""
    http_allow_origins: tuple[str, ...] = ("*",)
    max_body_bytes: int = 64 * 1024 * 1024
    status_page: bool = True
    api_keys_file: str | None = None
    cache_namespaces: str = CacheNamespaces.TENANT.value
    fair_sharing: bool = True
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    tls_client_ca_file: str | None = None
    zmq_host: str | None = None
    """None: as ``host``."""
    zmq_keys_dir: str | None = None
    allow_plain_zmq: bool = False
    operator_socket: str | None = None
    """Path of a Unix socket on which gRPC is served without keys and in the clear, for whoever may
    write to it: the launcher and the commands of its user. None: there is none."""
    max_streams: int = 10_000
    idle_stream_timeout_s: float = 3600.0
    max_uncommitted_tokens: int | None = None
    max_waiting_segments: int = 256
    admission_wait_s: float = 30.0
    ready_without_decode: bool = True
    rebalance: bool = True
    placement: str = "least-loaded"
    placement_options: dict[str, str] = {}
    context_tokens: int | None = None
    controller_endpoint: str | None = None
    metrics_port: int | None = None
    """None: no ``/metrics``. 0: any free port."""
    metrics_host: str = "127.0.0.1"
    metrics_token_file: str | None = None
    otlp_endpoint: str | None = None
    log: str = "memory"
    log_file: str | None = None
    """Needed for ``log = "sqlite"``."""
    log_level: str = "info"


class ControllerConfig(_Config, frozen=True, kw_only=True):
    """Of the preemption controller process."""

    host: str
    zmq_port: int
    zmq_keys_dir: str | None = None
    allow_plain_zmq: bool = False
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    metrics_token_file: str | None = None
    log_level: str = "info"


class ServerConfig(_Config, frozen=True, kw_only=True):
    """Of one prefill or decode server process."""

    role: Role
    server_id: str
    model_path: str
    router_endpoint: str
    """``tcp://host:port`` of the router's ZeroMQ socket."""
    controller_endpoint: str | None
    host: str = "127.0.0.1"
    """Address under which other servers reach this one's KV transport."""
    zmq_keys_dir: str | None = None
    allow_plain_zmq: bool = False
    threads: int = 1
    context_tokens: int | None = None
    pool_tokens: int | None = None
    page_size: int | None = None
    step_tokens: int | None = None
    segment_tokens: int | None = None
    policy: str = DEFAULT_POLICY
    policy_options: dict[str, str] = {}
    preemption: str = "auto"
    cost_profile: str | None = None
    host_pool_tokens: int | None = None
    early_push: str = "auto"
    kv_codec: str = "none"
    max_requests: int = 64
    tp_size: int = 1
    base_gpu_id: int = 0
    sglang: dict[str, Any] = {}
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    metrics_token_file: str | None = None
    log_level: str = "info"


C = TypeVar("C", bound=_Config)

ROUTER_TLS_OPTIONS = TlsOptions(
    cert_file="router.tls_cert_file",
    key_file="router.tls_key_file",
    ca_file="router.tls_client_ca_file",
)

MIN_BODY_BYTES = 1024
"""Less does not hold an ordinary request."""


def load_cluster_file(path: Path) -> ClusterConfig:
    """The cluster that a TOML file describes.

    Raises:
        ConfigError: the file is not there, is no TOML, or has an unknown key or a value of the
        wrong kind.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "--config", str(path), f"cannot be read ({error.strerror}); give an existing file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("--config", str(path), f"is no valid TOML: {error}") from error
    return check_cluster(from_mapping(ClusterConfig, data, str(path)))


def load_process_file(kind: type[C], path: Path) -> C:
    """The configuration of one process, from the JSON file that the launcher wrote.

    Raises:
        ConfigError: as ``load_cluster_file``.
    """
    try:
        data = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            "--config-file", str(path), f"cannot be read ({error.strerror})"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError("--config-file", str(path), f"is no valid JSON: {error}") from error
    return from_mapping(kind, data, str(path))


def from_mapping(kind: type[C], data: object, source: str) -> C:
    """``data`` as a ``kind``, every key known and of the right type.

    Raises:
        ConfigError: names the key, the value, and the keys or the type that would be right.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        key, value, remedy = _explain(kind, data, str(error))
        raise ConfigError(key, value, f"{remedy} (in {source})") from error


def check_cluster(config: ClusterConfig) -> ClusterConfig:
    """``config`` itself, when its values make sense together.

    Raises:
        ConfigError: names the first key whose value does not.
    """
    for role, section in (("prefill", config.prefill), ("decode", config.decode)):
        _at_least(f"{role}.count", section.count, 1 if role == "prefill" else 0)
        _at_least(f"{role}.threads", section.threads, 0)
        _at_least(f"{role}.max_requests", section.max_requests, 1)
        _at_least(f"{role}.tp_size", section.tp_size, 1)
        _at_least(f"{role}.base_gpu_id", section.base_gpu_id, 0)
        for key in ("page_size", "step_tokens", "segment_tokens", "max_uncommitted_tokens"):
            value = getattr(section, key)
            if value is not None:
                _at_least(f"{role}.{key}", value, 1)
        if section.pool_tokens is not None:
            # SGLang admits half as many requests as the pool has tokens, and insists on one.
            _at_least(f"{role}.pool_tokens", section.pool_tokens, 2)
        if section.host_pool_tokens is not None:
            _at_least(f"{role}.host_pool_tokens", section.host_pool_tokens, 0)
    _check_roles(config)
    if config.prefill.cost_profile is not None and not Path(config.prefill.cost_profile).is_file():
        raise ConfigError(
            "prefill.cost_profile",
            config.prefill.cost_profile,
            "is no file; make one with `streamfill profile`, or leave the setting out",
        )
    _check_access(config)
    _check_links(config)
    _check_limits(config)
    if config.router.log not in ROUTER_LOGS:
        remedy = f"must be one of {', '.join(ROUTER_LOGS)}"
        raise ConfigError("router.log", config.router.log, remedy)
    if config.router.log_file is not None and config.router.log == "memory":
        remedy = 'needs router.log = "sqlite"; set that, or leave this out'
        raise ConfigError("router.log_file", config.router.log_file, remedy)
    if config.decode.count == 0 and not config.router.ready_without_decode:
        remedy = "needs decode servers: set decode.count to at least 1, or this to true"
        raise ConfigError("router.ready_without_decode", False, remedy)
    try:
        make_policy(config.prefill.policy, config.prefill.policy_options)
    except ConfigError as error:
        raise ConfigError(f"prefill.{error.key}", error.value, error.remedy) from error
    if (config.decode.policy, config.decode.policy_options) != (DEFAULT_POLICY, {}):
        remedy = "decode servers have no policy to choose; set prefill.policy"
        raise ConfigError("decode.policy", config.decode.policy, remedy)
    _check_placement(config.router)
    _check_observability(config)
    _check_ports(config)
    page_sizes = (config.prefill.page_size, config.decode.page_size)
    if config.decode.count and page_sizes[0] != page_sizes[1]:
        raise ConfigError(
            "decode.page_size",
            page_sizes[1],
            f"must equal prefill.page_size, which is {page_sizes[0]}",
        )
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(
            "log_level", config.log_level, "must be one of debug, info, warning, error"
        )
    return config


def _check_limits(config: ClusterConfig) -> None:
    """Numbers and times that would let nothing through."""
    _at_least("router.max_body_bytes", config.router.max_body_bytes, MIN_BODY_BYTES)
    _at_least("router.max_streams", config.router.max_streams, 1)
    _at_least("router.max_waiting_segments", config.router.max_waiting_segments, 1)
    _at_least("launcher.max_restarts", config.launcher.max_restarts, 0)
    if config.model.context_tokens is not None:
        _at_least("model.context_tokens", config.model.context_tokens, 1)
    for key, seconds in (
        ("router.admission_wait_s", config.router.admission_wait_s),
        ("router.idle_stream_timeout_s", config.router.idle_stream_timeout_s),
        ("launcher.ready_timeout_s", config.launcher.ready_timeout_s),
    ):
        if not seconds > 0:
            raise ConfigError(key, seconds, "must be above 0")
    if not config.launcher.drain_timeout_s >= 0:
        raise ConfigError(
            "launcher.drain_timeout_s", config.launcher.drain_timeout_s, "must be at least 0"
        )


def with_absolute_files(config: ClusterConfig) -> ClusterConfig:
    """The same files by names that do not depend on the folder one is in: each process of a cluster
    is in another one than who started it."""

    def absolute(section: C, *keys: str) -> C:
        names = {key: getattr(section, key) for key in keys}
        found = {key: str(Path(name).absolute()) for key, name in names.items() if name is not None}
        return msgspec.structs.replace(section, **found)

    return msgspec.structs.replace(
        absolute(config, "zmq_keys_dir", "metrics_token_file"),
        router=absolute(
            config.router, "api_keys_file", "tls_cert_file", "tls_key_file", "tls_client_ca_file"
        ),
        prefill=absolute(config.prefill, "cost_profile"),
    )


def _check_placement(router: RouterSection) -> None:
    # Late: only who starts a cluster needs the router's policies.
    from router.placement.registry import make_placement

    try:
        make_placement(router.placement, router.placement_options)
    except ConfigError as error:
        raise ConfigError(f"router.{error.key}", error.value, error.remedy) from error


def _check_ports(config: ClusterConfig) -> None:
    http_port = config.router.http_port
    if isinstance(http_port, str) and http_port != "off":
        raise ConfigError("router.http_port", http_port, "must be a number, or off for no HTTP")
    for key, port in (
        ("router.grpc_port", config.router.grpc_port),
        ("router.http_port", http_port if isinstance(http_port, int) else 0),
        ("router.zmq_port", config.router.zmq_port),
        ("controller.zmq_port", config.controller.zmq_port),
    ):
        if not 0 <= port <= 65535:
            raise ConfigError(key, port, "must be between 0 (any free port) and 65535")


def _check_roles(config: ClusterConfig) -> None:
    """What only one role knows, and its names."""
    if config.prefill.preemption not in PREEMPTION_MODES:
        raise ConfigError(
            "prefill.preemption",
            config.prefill.preemption,
            f"must be one of {', '.join(PREEMPTION_MODES)}",
        )
    if config.prefill.early_push not in EARLY_PUSHES:
        raise ConfigError(
            "prefill.early_push",
            config.prefill.early_push,
            f"must be one of {', '.join(EARLY_PUSHES)}",
        )
    if config.prefill.kv_codec not in KV_CODECS:
        raise ConfigError(
            "prefill.kv_codec", config.prefill.kv_codec, f"must be one of {', '.join(KV_CODECS)}"
        )
    for key, default in (
        ("preemption", "auto"),
        ("cost_profile", None),
        ("host_pool_tokens", None),
        ("early_push", "auto"),
        ("kv_codec", "none"),
    ):
        value = getattr(config.decode, key)
        if value != default:
            raise ConfigError(
                f"decode.{key}", value, f"is of no use to decode servers; set prefill.{key}"
            )


def router_tls_files(config: RouterSection | RouterConfig) -> TlsFiles:
    """The TLS files of a router."""
    return TlsFiles(
        cert_file=config.tls_cert_file,
        key_file=config.tls_key_file,
        ca_file=config.tls_client_ca_file,
    )


def _check_access(config: ClusterConfig) -> None:
    """Files that say who may use the cluster. What is in them the router looks at."""
    keys = config.router.api_keys_file
    if keys is not None and not Path(keys).is_file():
        remedy = "is no file; make it with `streamfill keys add NAME --file FILE`"
        raise ConfigError("router.api_keys_file", keys, remedy)
    namespaces = config.router.cache_namespaces
    known = [each.value for each in CacheNamespaces]
    if namespaces not in known:
        remedy = f"must be one of {', '.join(known)}"
        raise ConfigError("router.cache_namespaces", namespaces, remedy)
    files = router_tls_files(config.router)
    check_pair(files, ROUTER_TLS_OPTIONS)
    if files.ca_file is not None and files.cert_file is None:
        remedy = "needs a certificate of the router too: set router.tls_cert_file and tls_key_file"
        raise ConfigError("router.tls_client_ca_file", files.ca_file, remedy)
    for field in ("cert_file", "key_file", "ca_file"):
        path = getattr(files, field)
        if path is not None and not Path(path).is_file():
            remedy = "is no file; name one in PEM form"
            raise ConfigError(getattr(ROUTER_TLS_OPTIONS, field), path, remedy)


def _check_links(config: ClusterConfig) -> None:
    """Keys of the links between processes, and addresses that may not do without."""
    router, zmq_host = config.router, config.router.zmq_host
    option = "router.host" if zmq_host is None else "router.zmq_host"
    check_listening(config, option, zmq_host or router.host)
    check_listening(config, "controller.host", config.controller.host)
    if config.decode.count:
        check_listening(config, "decode.host", config.decode.host)
    if config.zmq_keys_dir is not None:
        from streamfill.curve.keys import read_connect_keys, read_listen_keys

        read_listen_keys(config.zmq_keys_dir)
        read_connect_keys(config.zmq_keys_dir)


def _check_observability(config: ClusterConfig) -> None:
    if config.metrics_token_file is not None:
        read_token(Path(config.metrics_token_file))
    endpoint = config.router.otlp_endpoint
    if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
        remedy = "must be a URL such as http://127.0.0.1:4318"
        raise ConfigError("router.otlp_endpoint", endpoint, remedy)
    for section, base, count in (
        ("router", config.router.metrics_port, 1),
        ("controller", config.controller.metrics_port, 1),
        ("prefill", config.prefill.metrics_port, config.prefill.count),
        ("decode", config.decode.metrics_port, config.decode.count),
    ):
        highest = 65536 - max(1, count)
        is_port = isinstance(base, int) and 0 <= base <= highest
        if not is_port and base != "off":
            remedy = f'must be between 0 (any free port) and {highest}, or "off"'
            if count > 1:
                remedy += f"; the last of {count} servers has this port + {count - 1}"
            raise ConfigError(f"{section}.metrics_port", base, remedy)


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(key, value, f"must be at least {least}")


def _explain(kind: type[_Config], data: object, message: str) -> tuple[str, object, str]:
    """Key, value and remedy of a msgspec validation error, whose text ends in a path such as
    ``$.prefill.count``. A value in a table of any keys is shown with its table: the path has
    ``[...]`` for its key."""
    text, _, path = message.partition(" - at `$")
    keys = [part for part in path.strip("`").partition("[")[0].split(".") if part]
    unknown = "unknown field `"
    if unknown in text:
        field = text.split(unknown)[1].split("`")[0]
        keys.append(field)
        section: Any = kind
        for key in keys[:-1]:
            section = {f.name: f.type for f in msgspec.structs.fields(section)}.get(key, kind)
        known = ", ".join(f.name for f in msgspec.structs.fields(section))
        return ".".join(keys), _lookup(data, keys), f"is no known option; known here: {known}"
    return ".".join(keys) or "configuration", _lookup(data, keys), text


def _lookup(data: object, keys: list[str]) -> object:
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            return None
        data = data[key]
    return data
