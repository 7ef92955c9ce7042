"""`streamfill doctor`: what this machine has, and what is missing to run a cluster."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import psutil

from streamfill.engine.version import PINNED_SGLANG_VERSION, check_sglang_version
from streamfill.errors import EngineVersionError
from streamfill.models.default import default_model_folder, is_default_model_ready
from streamfill.models.home import streamfill_home

_SERVER_BYTES: Final = 5 << 29
"""A server with the default model takes about 2.5 GiB."""
_PACKAGES: Final = ("torch", "transformers", "grpcio", "pyzmq", "msgspec")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    problem: str = ""
    """What to do, where it keeps a cluster from running."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run(args: argparse.Namespace) -> int:
    """Prints the report. Exit code 1 when something is missing."""
    findings = list(examine())
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        problem = f"   <- {finding.problem}" if finding.problem else ""
        print(f"{finding.name.ljust(width)}  {finding.value}{problem}")
    return 1 if any(finding.problem for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Reads package metadata and the system; imports nothing heavy."""
    yield Finding(name="streamfill", value=_version("streamfill") or "not installed")
    yield Finding(name="python", value=platform.python_version())
    yield _sglang()
    for package in _PACKAGES:
        found = _version(package)
        problem = "" if found else "run `make setup`"
        yield Finding(name=package, value=found or "not installed", problem=problem)
    yield Finding(name="cores", value=str(len(os.sched_getaffinity(0))))
    yield _memory()
    yield Finding(name="home", value=str(streamfill_home()))
    value = str(default_model_folder()) if is_default_model_ready() else "converted on first use"
    yield Finding(name="default model", value=value)


def _sglang() -> Finding:
    found = _version("sglang") or "not installed"
    try:
        check_sglang_version()
    except EngineVersionError as error:
        return Finding(name="sglang", value=found, problem=str(error))
    return Finding(name="sglang", value=f"{found} (pinned: {PINNED_SGLANG_VERSION})")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    value = f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB"
    enough = memory.available >= 2 * _SERVER_BYTES
    problem = "" if enough else "a prefill and a decode server take about 5 GiB"
    return Finding(name="memory", value=value, problem=problem)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
