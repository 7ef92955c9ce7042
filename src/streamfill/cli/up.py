"""`streamfill up`: a cluster that runs until Ctrl-C, or in the background with ``--detach``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from streamfill.cli.cluster_options import add_cluster_options, cluster_from_options
from streamfill.cli.process_view import ProcessView, process_view
from streamfill.config import ClusterConfig
from streamfill.launcher.cluster import RunningCluster, StoppedError, running_cluster
from streamfill.launcher.errors import LaunchError, written_in
from streamfill.launcher.log_files import last_lines, log_file, open_log
from streamfill.launcher.signals import StopRequest, stop_on_signal
from streamfill.launcher.state import ClusterPhase, check_free, cluster_folder, find_cluster
from streamfill.models.progress import show_progress
from streamfill.models.resolve import resolve_model

_LAUNCHER_LOG: Final = "launcher"
_EXIT_STOPPED_EARLY: Final = 130  # 128 + SIGINT, as shells have it
_DETACHED_POLL_S: Final = 0.1
_DETACHED_SLACK_S: Final = 60.0
"""What a launcher may need beside its processes: the conversion of the default model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_cluster_options(parser)
    parser.add_argument(
        "--detach", action="store_true", help="return when the cluster is ready; it goes on"
    )


def run(args: argparse.Namespace) -> int:
    """Starts the cluster, and stays with it unless ``--detach`` was given."""
    config = cluster_from_options(args)
    if args.detach:
        return _detach(config, args.words)
    with show_progress("Converting the default model") as progress:
        model_path = resolve_model(config.model.path, progress)
    with process_view() as view:
        return asyncio.run(_serve(config, model_path, view))


def run_folder(config: ClusterConfig) -> Path:
    """Where the logs of the cluster lie, made or not."""
    if config.launcher.run_dir is None:
        return cluster_folder(config.name)
    return Path(config.launcher.run_dir).expanduser().absolute()


async def _serve(config: ClusterConfig, model_path: Path, view: ProcessView) -> int:
    run_dir = run_folder(config)
    with stop_on_signal() as stop:
        try:
            async with running_cluster(
                config,
                model_path=model_path,
                state_dir=cluster_folder(config.name),
                run_dir=run_dir,
                stop=stop,
                on_change=view.show,
            ) as cluster:
                keep_launcher_log(run_dir, config.log_level, view)
                _announce(cluster, config, view)
                return await _until_the_end(cluster, stop, view)
        except StoppedError:
            return _EXIT_STOPPED_EARLY


async def _until_the_end(cluster: RunningCluster, stop: StopRequest, view: ProcessView) -> int:
    """Waits for a signal, which is a success, or for a cluster that cannot go on."""
    hopeless = asyncio.create_task(cluster.supervisor.wait_hopeless())
    signalled = asyncio.create_task(stop.first.wait())
    try:
        await asyncio.wait({hopeless, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if hopeless.done():
            raise hopeless.result()
        view.say("Draining; once more to stop at once.")
        return 0
    finally:
        hopeless.cancel()
        signalled.cancel()


def _announce(cluster: RunningCluster, config: ClusterConfig, view: ProcessView) -> None:
    view.say(f"Ready after {cluster.startup_s:.1f} s. Clients connect to {cluster.address}.")
    for line in http_lines(cluster.http_url, config):
        view.say(line)
    if config.decode.count == 0:
        view.say("No decode server: answers come from the prefill server.")
    view.say(f"Logs are in {cluster.run_dir / 'logs'}. Stop with Ctrl-C.")


def http_lines(http_url: str | None, config: ClusterConfig) -> list[str]:
    """Where HTTP clients and browsers find the cluster; nothing where there is no HTTP."""
    if http_url is None:
        return []
    lines = [f"HTTP, as of the OpenAI API: {http_url}/v1"]
    if config.router.status_page:
        lines.append(f"Status page: {http_url}/status")
    return lines


def keep_launcher_log(run_dir: Path, level: str, view: ProcessView) -> None:
    """What the launcher does later on goes to a file, since the terminal shows a table. A full disk
    costs the file, not the cluster."""
    try:
        handler = logging.FileHandler(run_dir / "logs" / f"{_LAUNCHER_LOG}-events.log")
    except OSError as error:
        view.say(f"What the launcher does is not logged: {error}")
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger("streamfill")
    root.addHandler(handler)
    root.setLevel(level.upper())


def launcher_words(words: Sequence[str]) -> list[str]:
    """The same command for the launcher itself: without ``--detach``, however it was shortened, or
    each launcher would start another one."""
    return [word for word in words if not ("--detach".startswith(word) and len(word) > len("--"))]


def _detach(config: ClusterConfig, words: Sequence[str]) -> int:
    """Starts this command again in a session of its own and waits until it is ready."""
    state_dir, logs = cluster_folder(config.name), run_folder(config) / "logs"
    check_free(state_dir, config.name)  # or the log of the launcher that runs would be put aside
    command = [sys.executable, "-m", "streamfill.cli.main"]
    command += launcher_words(words)
    with written_in(logs, "launcher.run_dir"), open_log(logs, _LAUNCHER_LOG) as log:
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + 2 * config.launcher.ready_timeout_s + _DETACHED_SLACK_S
    try:
        while launcher.poll() is None and time.monotonic() < deadline:
            state = find_cluster(state_dir)
            if state and state.launcher_pid == launcher.pid and state.phase is ClusterPhase.READY:
                print(f"Ready after {state.startup_s:.1f} s. Clients connect to {state.address}.")
                for line in http_lines(state.http_url, config):
                    print(line)
                print(f"Logs are in {logs}. Stop with `streamfill down --name {config.name}`.")
                return 0
            time.sleep(_DETACHED_POLL_S)
    except KeyboardInterrupt:
        launcher.terminate()  # it is in a session of its own and does not hear of it
        raise
    newest = log_file(logs, _LAUNCHER_LOG)
    tail = last_lines(newest, 12)
    if launcher.poll() is not None and tail and tail[-1].startswith("error: "):
        print(tail[-1], file=sys.stderr)  # the launcher's own words say it best
        return launcher.returncode or 1
    launcher.terminate()
    raise LaunchError("the launcher", f"did not get ready (log: {newest})", tail)
