"""Options of `streamfill bench` commands that say what is measured."""

from __future__ import annotations

import argparse
import os
from typing import Final

from streamfill.cli.cluster_options import (
    add_cluster_options,
    add_tls_options,
    cluster_from_options,
    parse_settings,
    tls_files,
    with_changes,
)
from streamfill.errors import ConfigError
from streamfill.loadgen.cluster_target import OpenAIServer, OwnCluster, RunningCluster, TargetSpec
from streamfill.models.progress import show_progress
from streamfill.models.resolve import resolve_model

_CLUSTER_OPTIONS: Final = ("config", "model", "prefill", "decode", "port", "http_port", "name")
API_KEY_VARIABLE: Final = "OPENAI_API_KEY"


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Options that say against what: by default a cluster that is started for it."""
    parser.add_argument("--address", metavar="HOST:PORT", help="router of a running cluster")
    add_tls_options(parser)
    add_cluster_options(parser)


def target_spec(args: argparse.Namespace) -> TargetSpec:
    """What the options of `add_target_options`, and ``--openai`` where a command has it, point at.

    The default model is converted where that was not done yet.

    Raises:
        ConfigError: two targets are named, or the cluster's options cannot work.
        ModelError: the default model cannot be converted.
    """
    openai: str | None = getattr(args, "openai", None)
    files = tls_files(args)
    if args.address is None and openai is None:
        return own_cluster(args)
    option = "--address" if args.address is not None else "--openai"
    value = args.address if args.address is not None else openai
    others = [name for name in _CLUSTER_OPTIONS if getattr(args, name) is not None]
    if openai is not None:
        others = [name for name in others if name != "model"]
    if args.set:
        others.append("set")
    if args.address is not None and openai is not None:
        others.append("openai")
    if others:
        other = others[0].replace("_", "-")
        raise ConfigError(option, value, f"the server is there already; leave --{other} out")
    if args.address is not None:
        return RunningCluster(address=args.address, tls=files)
    assert openai is not None
    return OpenAIServer(url=openai, model=args.model, api_key=os.environ.get(API_KEY_VARIABLE))


def own_cluster(args: argparse.Namespace) -> OwnCluster:
    """The cluster that is started for the measurement: as the options and the cluster file say; by
    default one server of each kind with one thread, and always on a free port.

    Raises:
        ConfigError: as `cluster_from_options`.
        ModelError: the default model cannot be converted.
    """
    config = cluster_from_options(args)
    changes: dict[str, object] = {
        "router.grpc_port": args.port or 0,
        "router.http_port": "off" if args.http_port is None else config.router.http_port,
    }
    if args.name is None:
        changes["name"] = f"bench-{os.getpid()}"
    if args.config is None:
        named = parse_settings(args.set)
        for key in ("prefill.threads", "decode.threads"):
            if key not in named:
                changes[key] = 1
    config = with_changes(config, changes)
    with show_progress("Converting the default model") as progress:
        model_path = resolve_model(config.model.path, progress)
    return OwnCluster(config=config, model_path=model_path)
