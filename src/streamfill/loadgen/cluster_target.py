"""The target of a measurement: a cluster of its own, a running one, or another server.

A cluster of its own lives in a temporary folder, on free ports, as long as the block. Its logs are
thrown away with the folder, unless the block failed or asked to keep them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from streamfill.config import ClusterConfig
from streamfill.launcher.cluster import StoppedError, running_cluster, unless_stopped
from streamfill.launcher.managed_process import ProcessStatus
from streamfill.launcher.signals import StopRequest
from streamfill.loadgen.target import Ask, Target, TargetFacts
from streamfill.loadgen.targets.streamfill import StreamfillTarget
from streamfill.tls import NO_TLS, TlsFiles

_PRIME_TOKENS: Final = 600
"""More than one prefill step on a CPU, and a hand-off."""
_PRIME_OUTPUT_TOKENS: Final = 4
_SILENCE_S: Final = 2.0
"""A target that is not ready after this is said to be waited for."""


@dataclass(frozen=True, kw_only=True)
class OwnCluster:
    """A cluster that is started for the measurement.

    Attributes:
        config: checked.
        model_path: absolute folder of its model.
    """

    config: ClusterConfig
    model_path: Path


@dataclass(frozen=True, kw_only=True)
class RunningCluster:
    """A cluster that runs already, by the address of its router."""

    address: str
    tls: TlsFiles = NO_TLS


@dataclass(frozen=True, kw_only=True)
class OpenAIServer:
    """A server with OpenAI's interface. ``model`` None: the first that it lists."""

    url: str
    model: str | None = None
    api_key: str | None = None


TargetSpec: TypeAlias = OwnCluster | RunningCluster | OpenAIServer


@dataclass(kw_only=True)
class OpenTarget:
    """A target that answers.

    Attributes:
        target: closed at the end of the block.
        facts: of it.
        startup_s: how long its start took; None: it ran already.
        keeps_logs: set it when something went wrong: the logs of a cluster of its own stay.
        logs: their folder; None where they are not ours.
    """

    target: Target
    facts: TargetFacts
    startup_s: float | None = None
    keeps_logs: bool = False
    logs: Path | None = None


@asynccontextmanager
async def open_target(
    spec: TargetSpec,
    *,
    stop: StopRequest,
    on_change: Callable[[Sequence[ProcessStatus]], None] = lambda statuses: None,
    say: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[OpenTarget]:
    """Starts what has to be started, and ends it at the end of the block, whatever ended it.

    Args:
        stop: its first signal ends the start, its second one the orderly end.
        on_change: shows the processes of a cluster of its own.
        say: shows one line, such as where the logs are kept.

    Raises:
        ConfigError: a port or a folder cannot be used.
        LaunchError: a process did not start.
        StoppedError: a signal came while it was starting.
        StreamError: it does not answer.
    """
    match spec:
        case OwnCluster():
            async with _own_cluster(spec, stop, on_change, say) as opened:
                yield opened
        case RunningCluster(address=address, tls=tls):
            async with _answering(StreamfillTarget(address, tls), address, stop, say) as opened:
                yield opened
        case OpenAIServer():
            from streamfill.loadgen.targets.openai import OpenAITarget

            openai = OpenAITarget(spec.url, model=spec.model, api_key=spec.api_key)
            async with _answering(openai, spec.url, stop, say) as opened:
                yield opened


async def prime(opened: OpenTarget) -> None:
    """Makes the target do everything once, so that no measured request pays for first times; it is
    cold again afterwards.

    Raises:
        StreamError: it does not answer, or keeps what it computed.
    """
    vocab_size = opened.facts.vocab_size
    num_tokens = _PRIME_TOKENS
    if opened.facts.context_tokens:
        num_tokens = min(num_tokens, opened.facts.context_tokens // 2)
    prompt = tuple(number % vocab_size for number in range(1, num_tokens + 1))
    ask = Ask(request_id="prime", max_output_tokens=_PRIME_OUTPUT_TOKENS)
    await opened.target.generate(prompt, ask)
    await opened.target.empty_caches()


@asynccontextmanager
async def _own_cluster(
    spec: OwnCluster,
    stop: StopRequest,
    on_change: Callable[[Sequence[ProcessStatus]], None],
    say: Callable[[str], None],
) -> AsyncIterator[OpenTarget]:
    folder = Path(tempfile.mkdtemp(prefix=f"streamfill-bench-{os.getpid()}-"))
    keeps_logs = True
    try:
        async with (
            running_cluster(
                spec.config,
                model_path=spec.model_path,
                state_dir=folder,
                run_dir=folder,
                stop=stop,
                on_change=on_change,
            ) as cluster,
            _answering(
                StreamfillTarget(cluster.own_address), cluster.own_address, stop, say
            ) as opened,
        ):
            opened.startup_s = cluster.startup_s
            opened.logs = folder / "logs"
            yield opened
            keeps_logs = opened.keeps_logs
    except StoppedError:
        keeps_logs = False
        raise
    finally:
        if keeps_logs:
            say(f"Logs are kept in {folder / 'logs'}.")
        else:
            shutil.rmtree(folder)


@asynccontextmanager
async def _answering(
    target: Target, where: str, stop: StopRequest, say: Callable[[str], None]
) -> AsyncIterator[OpenTarget]:
    loop = asyncio.get_running_loop()
    notice = loop.call_later(_SILENCE_S, say, f"Waiting for {where} to be ready.")
    try:
        facts = await unless_stopped(target.facts(), stop)
        notice.cancel()
        yield OpenTarget(target=target, facts=facts)
    finally:
        notice.cancel()
        await target.close()
