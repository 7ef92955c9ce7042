"""One soak, from the start of its cluster to its report.

1. A cluster is started: one prefill and one decode server with pools that are too small.
2. `load.Load` keeps so many streams alive, while the weather and the scheduling policy change.
3. When all have come to their end, `checks` looks at what is left.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from random import Random

from streamfill.api import Client
from streamfill.config import (
    ClusterConfig,
    LauncherSection,
    RouterSection,
    ServerSection,
    check_cluster,
)
from streamfill.launcher.cluster import RunningCluster, running_cluster
from streamfill.launcher.log_files import log_file
from streamfill.launcher.signals import StopRequest
from streamfill.stream.tokenizer import load_tokenizer
from tests.chaos import checks
from tests.chaos.actor import Stage
from tests.chaos.judge import judge_memory
from tests.chaos.load import Load, prefix_of
from tests.chaos.memory import resident_mb
from tests.chaos.options import SoakOptions
from tests.chaos.policies import PolicySwitcher
from tests.chaos.progress import Progress
from tests.chaos.prompts import PromptBank
from tests.chaos.report import SoakReport
from tests.chaos.router_log import RouterLog
from tests.chaos.script_writer import ScriptWriter
from tests.chaos.weather import Weather

_SHOW_EVERY_S = 0.5


async def soak(
    options: SoakOptions, model: Path, folder: Path, stop: StopRequest, progress: Progress
) -> SoakReport:
    """Start a cluster in ``folder``, put it under load and check everything.

    Raises:
        LaunchError, ConfigError: the cluster cannot be started.
        StoppedError: ``stop`` came before it was ready.
    """
    progress.say(f"Seed {options.seed}. Starting a cluster; logs in {folder / 'logs'}.")
    async with running_cluster(
        _config(options),
        model_path=model,
        state_dir=folder,
        run_dir=folder,
        stop=stop,
        on_change=lambda statuses: None,
    ) as cluster:
        return await _Soak(options, model, cluster, stop, progress).run()


class _Soak:
    def __init__(
        self,
        options: SoakOptions,
        model: Path,
        cluster: RunningCluster,
        stop: StopRequest,
        progress: Progress,
    ) -> None:
        self._options = options
        self._model = model
        self._cluster = cluster
        self._stop = stop
        self._progress = progress
        self._logs = cluster.run_dir / "logs"
        self._rss_start_mb: dict[str, float] = {}

    async def run(self) -> SoakReport:
        """Load, then checks."""
        options, progress = self._options, self._progress
        began_s = time.monotonic()
        async with Client(self._cluster.address) as client:
            violations = await checks.check_final_request(client)  # also makes everything warm
            info = await client.server_info()
            tokenizer = load_tokenizer(self._model)
            bank = PromptBank(
                tokenizer,
                options.seed,
                num_prompts=options.num_prompts,
                longest_tokens=options.longest_prompt_tokens,
            )
            weather = Weather(Random(f"weather {options.seed}"), options.climate)
            switcher = PolicySwitcher(client, options.switch_every_s)
            log = RouterLog(log_file(self._logs, "router"), prefix_of(options))
            load = Load(
                options,
                address=self._cluster.address,
                client=client,
                log=log,
                writer=ScriptWriter(bank, options.seed, options.habits),
                stage=Stage(
                    weather=weather,
                    context_tokens=info.context_tokens,
                    vocab_size=info.vocab_size,
                ),
            )
            await self._run_load(load, weather, switcher)
            rss_end_mb = resident_mb(self._cluster.supervisor.statuses)
            progress.say("The load is over. Checking what is left of it.")
            violations += [*load.violations, *switcher.violations]
            violations += await checks.check_rest(client)
            before = Counter(info.num_streams_by_outcome)
            after = Counter((await client.server_info()).num_streams_by_outcome)
            violations += await checks.check_totals(client, before, log)
            num_signals = self._stop.num_signals
            found, num_compared = await checks.check_answers(
                client,
                load.played,
                is_stopped=lambda: self._stop.num_signals > num_signals,
                say=lambda done, total: progress.show(
                    done / total, f"{done} of {total} prompts compared with one shot"
                ),
            )
            violations += found
            violations += await checks.check_final_request(client)
            violations += checks.check_processes(self._cluster.supervisor.statuses, self._logs)
            violations += judge_memory(
                self._rss_start_mb.get("router", 0.0),
                rss_end_mb.get("router", 0.0),
                options.most_router_growth,
            )
            servers = (await client.server_info()).servers
        after.subtract(before)
        return SoakReport(
            options=options,
            played=load.played,
            violations=violations,
            num_opened=log.num_opened,
            by_outcome=+after,
            num_compared=num_compared,
            num_bursts=weather.num_bursts,
            num_switches=switcher.num_switches,
            policies=sorted(switcher.seen),
            num_evicted_tokens=sum(each.counters["num_evicted_tokens"] for each in servers),
            rss_start_mb=self._rss_start_mb,
            rss_end_mb=rss_end_mb,
            wall_s=time.monotonic() - began_s,
            interrupted=self._stop.first.is_set(),
        )

    async def _run_load(self, load: Load, weather: Weather, switcher: PolicySwitcher) -> None:
        background = [
            asyncio.create_task(weather.run()),
            asyncio.create_task(self._watch(load, weather, switcher)),
        ]
        if self._options.switch_every_s:
            background.append(asyncio.create_task(switcher.run()))
        try:
            await load.run(self._stop.first.is_set)
        finally:
            for task in background:
                task.cancel()
            await asyncio.wait(background)
        for task in background:
            if not task.cancelled():
                task.result()
        if not self._rss_start_mb:
            self._rss_start_mb = resident_mb(self._cluster.supervisor.statuses)

    async def _watch(self, load: Load, weather: Weather, switcher: PolicySwitcher) -> None:
        options = self._options
        began_s = time.monotonic()
        while True:
            await asyncio.sleep(_SHOW_EVERY_S)
            passed_s = time.monotonic() - began_s
            rss_mb = resident_mb(self._cluster.supervisor.statuses)
            if not self._rss_start_mb and passed_s >= min(options.settle_s, options.load_s / 2):
                self._rss_start_mb = rss_mb
            by_outcome = ", ".join(f"{n} {name}" for name, n in sorted(load.outcomes.items()))
            self._progress.show(
                passed_s / options.load_s,
                f"{passed_s:.0f} of {options.load_s:.0f} s, {load.num_in_flight} streams open, "
                f"ended: {by_outcome or 'none'}; {weather.num_bursts} bursts, "
                f"{switcher.num_switches} policies, router {rss_mb.get('router', 0):.0f} MB, "
                f"{len(load.violations)} violations",
            )


def _config(options: SoakOptions) -> ClusterConfig:
    return check_cluster(
        ClusterConfig(
            name="soak",
            router=RouterSection(
                grpc_port=0, http_port="off", idle_stream_timeout_s=options.idle_timeout_s
            ),
            prefill=ServerSection(threads=1, pool_tokens=options.prefill_pool_tokens),
            decode=ServerSection(threads=1, pool_tokens=options.decode_pool_tokens),
            launcher=LauncherSection(drain_timeout_s=5.0),
        )
    )
