"""The cluster that the options of a command line describe, and the one that they point at."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import msgspec.toml

from streamfill.config import (
    ClusterConfig,
    RouterSection,
    check_cluster,
    from_mapping,
    load_cluster_file,
)
from streamfill.errors import ConfigError
from streamfill.launcher.state import ClusterState, cluster_folder, find_cluster
from streamfill.tls import TlsFiles, TlsOptions

if TYPE_CHECKING:
    from streamfill.api import Client

TLS_OPTIONS: Final = TlsOptions(ca_file="--tls-ca", cert_file="--tls-cert", key_file="--tls-key")
_TLS_VARIABLES: Final = {
    "ca_file": "STREAMFILL_TLS_CA",
    "cert_file": "STREAMFILL_TLS_CERT",
    "key_file": "STREAMFILL_TLS_KEY",
}
_TLS_HELP: Final = {
    "ca_file": "who vouches for the router's certificate",
    "cert_file": "certificate of this client, where the router asks for one",
    "key_file": "its private key",
}

DEFAULT_NAME: Final = ClusterConfig().name
_TEXT_TABLES: Final = ("placement_options", "policy_options")
"""Sections of a cluster file whose values are all strings, numbers too."""


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Options that describe a cluster to start; each goes before what the file says."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="cluster file (TOML)")
    parser.add_argument(
        "--model", metavar="PATH", help="Hugging Face model folder; default: SmolLM2-135M-Instruct"
    )
    parser.add_argument("--prefill", type=int, metavar="N", help="number of prefill servers")
    parser.add_argument("--decode", type=int, metavar="M", help="number of decode servers")
    parser.add_argument("--port", type=int, metavar="P", help="port for clients; 0: any free one")
    parser.add_argument(
        "--http-port",
        metavar="P",
        help="port for HTTP clients; 0: any free one, off: none; default: "
        f"{RouterSection().http_port}",
    )
    parser.add_argument("--name", help=f"name of the cluster; default: {DEFAULT_NAME}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the cluster file, such as prefill.threads=2; may be repeated",
    )


def cluster_from_options(args: argparse.Namespace) -> ClusterConfig:
    """The checked cluster of `add_cluster_options`.

    Raises:
        ConfigError: names the key, as in the cluster file, its value and what would be right.
    """
    config = load_cluster_file(args.config) if args.config is not None else ClusterConfig()
    given = {
        "model.path": args.model,
        "prefill.count": args.prefill,
        "decode.count": args.decode,
        "router.grpc_port": args.port,
        "router.http_port": _number_or_word(args.http_port),
        "name": args.name,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    return with_changes(config, {**changes, **parse_settings(args.set)})


def with_changes(config: ClusterConfig, changes: Mapping[str, Any]) -> ClusterConfig:
    """`config` with the values of some dotted keys replaced, checked.

    Raises:
        ConfigError: there is no such key, or a value cannot work.
    """
    data: dict[str, Any] = msgspec.to_builtins(config)
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = data
        for section in sections:
            inner = place.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(key, value, f"{section} is an option, not a section")
            place = inner
        place[last] = value
    changed = check_cluster(from_mapping(ClusterConfig, data, "the command line"))
    cluster_folder(changed.name)
    return changed


def _number_or_word(value: str | None) -> int | str | None:
    return int(value) if value is not None and value.isdecimal() else value


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """The values of ``--set KEY=VALUE``: TOML where it can be read as such, else a string.

    An option of a policy is a string in any case, as in a cluster file, without the quotes there.

    Raises:
        ConfigError: one has no equals sign.
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError("--set", setting, "write KEY=VALUE, such as prefill.threads=2")
        parsed[key.strip()] = _value_of(key.strip(), value.strip())
    return parsed


def _value_of(key: str, text: str) -> Any:
    try:
        value = msgspec.toml.decode(f"value = {text}")["value"]
    except msgspec.DecodeError:
        return text
    is_text = any(section in _TEXT_TABLES for section in key.split(".")[:-1])
    return text if is_text and not isinstance(value, str) else value


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Options that point at a running cluster."""
    parser.add_argument("--address", metavar="HOST:PORT", help="address of the router")
    parser.add_argument(
        "--name", default=DEFAULT_NAME, help=f"name of a cluster here; default: {DEFAULT_NAME}"
    )
    add_tls_options(parser)


def add_tls_options(parser: argparse.ArgumentParser) -> None:
    """Options that go with ``--address`` of a router with TLS."""
    for field, variable in _TLS_VARIABLES.items():
        parser.add_argument(
            getattr(TLS_OPTIONS, field),
            dest=f"tls_{field}",
            metavar="FILE",
            help=f"{_TLS_HELP[field]} (PEM), with --address; default: {variable}",
        )


def tls_files(args: argparse.Namespace) -> TlsFiles:
    """The files of `add_tls_options`, or of the environment; none without an address: a cluster of
    this user is reached in another way.

    Raises:
        ConfigError: an option is there without ``--address``.
    """
    given = {field: getattr(args, f"tls_{field}") for field in _TLS_VARIABLES}
    if args.address:
        named = {
            field: given[field] or os.environ.get(variable) or None
            for field, variable in _TLS_VARIABLES.items()
        }
        return TlsFiles(**named)
    for field, path in given.items():
        if path is not None:
            remedy = "goes with --address; a cluster that is named needs none"
            raise ConfigError(getattr(TLS_OPTIONS, field), path, remedy)
    return TlsFiles()


def target_address(args: argparse.Namespace) -> str:
    """The address of `add_target_options`.

    Raises:
        ConfigError: no address is given and no cluster of that name runs here.
    """
    return str(args.address) if args.address else running_cluster_named(args.name).address


def target_client(args: argparse.Namespace) -> Client:
    """A client of the cluster of `add_target_options`, to be opened. A cluster of this user is
    reached without an API key, one that is named by its address with that of STREAMFILL_API_KEY.

    Raises:
        ConfigError: as `target_address`.
    """
    from streamfill.api import Client

    files = tls_files(args)
    if not args.address:
        return Client(running_cluster_named(args.name).own_address)
    return Client(
        args.address,
        tls_ca_file=files.ca_file,
        tls_cert_file=files.cert_file,
        tls_key_file=files.key_file,
    )


def target_http_url(args: argparse.Namespace) -> str | None:
    """Where the cluster of `add_target_options` serves HTTP; None where it does not, or where only
    its address is known.

    Raises:
        ConfigError: as `target_address`.
    """
    return None if args.address else running_cluster_named(args.name).http_url


def running_cluster_named(name: str) -> ClusterState:
    """The cluster of that name on this machine.

    Raises:
        ConfigError: none runs.
    """
    state = find_cluster(cluster_folder(name))
    if state is None:
        remedy = "no cluster of this name runs here; start one with `streamfill up`"
        raise ConfigError("--name", name, remedy)
    return state
