"""The server process: SGLang's scheduler, alone, with our runtime inside it.

Depends on ``sglang.srt.server_args`` (``ServerArgs``, ``PortArgs``), ``managers.scheduler``
(``Scheduler``, ``configure_scheduler_process``) and ``sglang.srt.plugins.load_plugins``. SGLang's
HTTP front end, tokenizer and detokenizer processes are never started: the router has their work.

With tensor parallelism rank 0 is the process that was started, and it starts one child per further
rank.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from streamfill.config import ServerConfig, load_process_file
from streamfill.engine import torchvision_fix
from streamfill.engine.version import check_sglang_version
from streamfill.errors import ConfigError, StreamfillError
from streamfill.messages.common import Role
from streamfill.models.describe import describe_model
from streamfill.observability.logging import configure_logging, log_event
from streamfill.scheduling.policy import LONG_STEP
from streamfill.serving.rank_mailbox import RankMailbox

logger = logging.getLogger(__name__)

_FOLDER_PREFIX = "streamfill-server-"
"""Of a server's temporary folder; its process id follows."""
CPU_STEP_TOKENS = 256
GPU_STEP_TOKENS = 8192
CPU_POOL_TOKENS = 32_768
"""Where the configuration says nothing and this much fits a quarter of the free memory."""
CPU_MEMORY_SHARE = 0.25
CPU_KV_ITEM_BYTES = 4
"""float32, see ``engine.platform``."""

Build = Callable[[ServerConfig, str, int, RankMailbox, int], Any]
"""Makes the runtime of one rank: (config, model id, rank, mailbox, step tokens)."""


def main(role: Role, build: Build, argv: list[str] | None = None) -> int:
    """Run one server until it is told to stop; returns the exit code. The console line of both
    server packages."""
    parser = argparse.ArgumentParser(
        prog=f"{role.value}_server",
        description=f"One streamfill {role.value} server. "
        "Started by `streamfill up`, which writes its configuration.",
    )
    parser.add_argument(
        "--config-file",
        type=Path,
        required=True,
        help="JSON file with the keys of streamfill.config.ServerConfig",
    )
    arguments = parser.parse_args(argv)
    started_s = time.monotonic()
    try:
        config = load_process_file(ServerConfig, arguments.config_file)
        if config.role is not role:
            raise ConfigError("role", config.role.value, f"this is a {role.value} server")
        configure_logging(config.server_id, config.log_level)
        _quiet_sglang(config.log_level)
        return run(config, build, started_s)
    except StreamfillError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def run(config: ServerConfig, build: Build, started_s: float) -> int:
    """Start the ranks of a server and run its rank 0 in this process.

    Raises:
        StreamfillError: the model, SGLang or a value of the configuration does not do.
    """
    check_sglang_version()
    facts = describe_model(Path(config.model_path))
    model_id = model_digest(Path(config.model_path))
    prepare_environment(config)
    torchvision_fix.install()
    server_args, port_args = build_server_args(
        config, 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * CPU_KV_ITEM_BYTES
    )
    _remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-") as folder:
        mailbox = f"ipc://{folder}/ranks"
        # The ranks of a server run on one machine, so they meet in a file. SGLang's default, a TCP
        # port that was free a few seconds ago, now and then belongs to somebody else by then
        # (distributed.bootstrap._resolve_dist_init_method).
        os.environ.setdefault(
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", f"file://{folder}/rendezvous"
        )
        children = [
            multiprocessing.get_context("spawn").Process(
                target=_run_child,
                # As bytes: unpickling them imports sglang, which needs the preparations in
                # _run_child.
                args=(
                    config,
                    build,
                    pickle.dumps((server_args, port_args)),
                    model_id,
                    rank,
                    mailbox,
                ),
            )
            for rank in range(1, config.tp_size)
        ]
        for child in children:
            child.start()
        try:
            return run_rank(config, build, server_args, port_args, model_id, 0, mailbox, started_s)
        finally:
            for child in children:
                child.join(5)
                if child.is_alive():
                    child.kill()


def run_rank(  # noqa: PLR0917  what a spawned process is given, by position
    config: ServerConfig,
    build: Build,
    server_args: Any,
    port_args: Any,
    model_id: str,
    rank: int,
    mailbox: str,
    started_s: float,
) -> int:
    """One rank: build SGLang's scheduler in this process and run its loop until it is told to
    stop."""
    from streamfill.engine import plugin

    step_tokens = step_tokens_of(config, server_args.device)
    runtime = build(config, model_id, rank, RankMailbox(mailbox, rank, config.tp_size), step_tokens)
    plugin.install(runtime)

    from sglang.srt.managers.scheduler import Scheduler, configure_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()
    plugin.check_hooks()
    configure_scheduler_process(server_args, config.base_gpu_id + rank, rank, 0, 0, 0, 0, None)
    configure_logging(
        config.server_id if rank == 0 else f"{config.server_id}.{rank}", config.log_level
    )
    _quiet_sglang(config.log_level)
    _set_process_title(config.server_id, rank)
    try:
        gpu_id = config.base_gpu_id + rank
        scheduler = Scheduler(server_args, port_args, gpu_id, rank, 0, 0, 0, 0, None)
    except Exception as error:  # noqa: BLE001  whatever SGLang raises, the launcher is told
        log_event(logger, "engine_start_failed", level=logging.ERROR, exception=error)
        return 1
    log_event(
        logger,
        "ready",
        seconds=time.monotonic() - started_s,
        pool_tokens=scheduler.max_total_num_tokens,
        page_size=scheduler.page_size,
        step_tokens=step_tokens,
    )
    runtime.announce_ready()
    try:
        scheduler.run_event_loop()
    except Exception as error:  # noqa: BLE001  the edge of the server's loop
        # The scheduler's state cannot be trusted any more. The launcher starts a new process, the
        # router moves the streams.
        log_event(logger, "engine_failed", level=logging.CRITICAL, exception=error)
        return 1
    finally:
        runtime.close()
    log_event(logger, "stopped")
    return 0


def _run_child(  # noqa: PLR0917  as above
    config: ServerConfig,
    build: Build,
    pickled_args: bytes,
    model_id: str,
    rank: int,
    mailbox: str,
) -> None:
    prepare_environment(config)
    torchvision_fix.install()
    server_args, port_args = pickle.loads(pickled_args)  # from our own parent process
    configure_logging(f"{config.server_id}.{rank}", config.log_level)
    sys.exit(
        run_rank(config, build, server_args, port_args, model_id, rank, mailbox, time.monotonic())
    )


def _remove_leftovers() -> None:
    """Folders of servers that were killed and could not remove their own."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)  # another user's, or gone by now


def step_tokens_of(config: ServerConfig, device: str) -> int:
    """Prefill tokens of one step."""
    if config.step_tokens is not None:
        return config.step_tokens
    return CPU_STEP_TOKENS if device == "cpu" else GPU_STEP_TOKENS


def prepare_environment(config: ServerConfig) -> None:
    """Environment that SGLang and torch read when they are imported; what the user set stays."""
    threads = str(max(1, config.threads))
    variables = {
        "OMP_NUM_THREADS": threads,
        # Threads that spin while they wait take the cores from the router and the other servers:
        # measured, up to ten times slower wherever the cores are shared.
        "OMP_WAIT_POLICY": "PASSIVE",
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "SGLANG_SET_CPU_AFFINITY": "0",
    }
    if config.tp_size > 1:
        # SGLang wants to be told where ranks of one NUMA node run (utils.numa_utils).
        num_cores = os.cpu_count() or 1
        cores = [str(rank % num_cores) for rank in range(config.tp_size)]
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(cores)
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def build_server_args(config: ServerConfig, kv_bytes_per_token: int) -> tuple[Any, Any]:
    """SGLang's arguments for this server, as (``ServerArgs``, ``PortArgs``).

    Raises:
        ConfigError: SGLang refuses a value.
    """
    import torch
    from sglang.srt.server_args import PortArgs, ServerArgs

    from streamfill.engine.radix import BACKEND_NAME, register_backend

    register_backend()
    on_gpu = torch.cuda.is_available()
    step_tokens = step_tokens_of(config, "cuda" if on_gpu else "cpu")
    longest_tokens = step_tokens if on_gpu else LONG_STEP * step_tokens
    torch.set_num_threads(max(1, config.threads))
    arguments: dict[str, Any] = {
        "model_path": config.model_path,
        "skip_tokenizer_init": True,
        "radix_cache_backend": BACKEND_NAME,
        "sleep_on_idle": True,
        "tp_size": config.tp_size,
        "base_gpu_id": config.base_gpu_id,
        "max_running_requests": config.max_requests,
        "log_level": "warning",
        "grammar_backend": "none",
        # Our steps are never larger; a page per request is what SGLang rounds up.
        "chunked_prefill_size": longest_tokens + config.max_requests * (config.page_size or 16),
        "skip_server_warmup": True,
    }
    if config.page_size is not None:
        arguments["page_size"] = config.page_size
    if config.context_tokens is not None:
        arguments["context_length"] = config.context_tokens
    if config.pool_tokens is not None:
        arguments["max_total_tokens"] = config.pool_tokens
    if on_gpu:
        # What `engine.platform` sets on the CPU, for the same reasons: a turn reads what the step
        # before it did, and seeds go by SGLang's own sampler.
        arguments["disable_overlap_schedule"] = True
        arguments["sampling_backend"] = "pytorch"
        # Not tried with the hook that leaves logits out.
        arguments["cuda_graph_backend_prefill"] = "disabled"
        # SGLang captures one for each size up to 256, a second of start each for a large model.
        arguments["cuda_graph_max_bs_decode"] = config.max_requests
    else:
        arguments["device"] = "cpu"
        arguments["disable_cuda_graph"] = True
        if config.pool_tokens is None:
            arguments["max_total_tokens"] = default_cpu_pool_tokens(kv_bytes_per_token)
    arguments.update(config.sglang)
    try:
        server_args = ServerArgs(**arguments)
        return server_args, PortArgs.init_new(server_args)
    except (TypeError, ValueError, AssertionError) as error:
        key, value = _refused_setting(config, str(error))
        raise ConfigError(key, value, f"SGLang refuses it: {error}") from error


def _refused_setting(config: ServerConfig, reason: str) -> tuple[str, object]:
    """Key and value of what SGLang refuses: the context's length where it speaks of the one that
    the cluster file gives, else its own arguments."""
    is_ours = config.context_tokens is not None and "context_length" not in config.sglang
    if is_ours and "context_length" in reason:
        return "model.context_tokens", config.context_tokens
    return f"{config.role.value}.sglang", config.sglang


def default_cpu_pool_tokens(kv_bytes_per_token: int) -> int:
    """As many tokens as fit a quarter of the free memory, at most ``CPU_POOL_TOKENS``."""
    import psutil

    affordable = int(psutil.virtual_memory().available * CPU_MEMORY_SHARE) // max(
        1, kv_bytes_per_token
    )
    return max(1024, min(CPU_POOL_TOKENS, affordable))


def model_digest(folder: Path) -> str:
    """Tells models apart by their configuration, so that servers of one cluster do not mix two."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _quiet_sglang(log_level: str) -> None:
    """SGLang logs every batch at INFO; ours says what happens to streams."""
    logging.getLogger("sglang").setLevel(logging.DEBUG if log_level == "debug" else logging.WARNING)


def leave(code: int) -> None:
    """End the process at once. Torch's teardown takes two seconds, and nothing is left to save."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _set_process_title(server_id: str, rank: int) -> None:
    import setproctitle

    suffix = "" if rank == 0 else f" rank {rank}"
    setproctitle.setproctitle(f"streamfill::{server_id}{suffix}")
