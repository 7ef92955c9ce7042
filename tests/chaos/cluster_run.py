"""One chaos run against the whole cluster.

1. A cluster is started: two prefill and two decode servers with small pools, one router, one
   controller. A few requests make everything warm, and what it holds then is its base.
2. Streams begin at a steady rate, probes ask now and then, and the plan's faults happen.
3. When all streams have ended and whatever stood still goes on, it must become healthy and come
   back to its base.
4. Caches are emptied, and every prompt is sent once, whole, alone. Then everything is judged.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from router.timing import RESUME_WAIT_S
from streamfill.api import Client
from streamfill.errors import StreamError
from streamfill.kv_transfer.faults import VARIABLE as KV_VARIABLE
from streamfill.links.faults import VARIABLE as LINK_VARIABLE
from streamfill.stream.tokenizer import load_tokenizer
from tests.chaos import checks
from tests.chaos.cluster_evidence import read_evidence
from tests.chaos.cluster_history import StreamHistory
from tests.chaos.cluster_inflict import Inflictor, gate_of
from tests.chaos.cluster_judge import (
    Promise,
    Service,
    judge_answer,
    judge_faults,
    judge_log,
    judge_restarts,
    judge_service,
    judge_stream,
    service_after,
)
from tests.chaos.cluster_options import ChaosOptions
from tests.chaos.cluster_plan import ChaosPlan, FaultKind
from tests.chaos.cluster_player import play
from tests.chaos.cluster_probe import Prober
from tests.chaos.cluster_report import ChaosReport
from tests.chaos.cluster_rest import Use, not_at_base, not_healthy, uses
from tests.chaos.cluster_streams import PlannedStream, StreamWriter
from tests.chaos.judge import Rule, Violation
from tests.chaos.router_log import error_lines
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.counters import empty_caches
from tests.support.wall_clock import WallClock

HEALTHY_WITHIN_S = 60.0
"""From the end of the load until all that was killed is there again; a server starts in ten seconds
on two quiet cores."""

BASE_WITHIN_S = 30.0

ABANDONED_S = 15.0
"""Of the router: a stream that lives without a call, and whose client is gone, is kept so long."""

ORPHANED_S = RESUME_WAIT_S + 10.0
"""After a restart the router waits so long for the clients of the streams in its log; some vanished
just then."""

_PREFIX = "chaos-"
_WARM_STREAMS = 8


def start(
    folder: Path, model: Path, options: ChaosOptions, plan: ChaosPlan
) -> tuple[RunningCluster, WallClock]:
    """The cluster of a run, and its wall clock.

    Raises:
        AssertionError: it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clock = WallClock(folder / "clock")
    environment = dict(clock.environment) if plan.of(FaultKind.CLOCK) else {}
    if plan.of(FaultKind.LINKS):
        environment[LINK_VARIABLE] = plan.link_variable(gate_of(folder, FaultKind.LINKS))
    if plan.of(FaultKind.KV):
        environment[KV_VARIABLE] = plan.kv_variable(gate_of(folder, FaultKind.KV))
    cluster = start_cluster(
        folder,
        model,
        "chaos",
        settings=[
            "prefill.count=2",
            "decode.count=2",
            "prefill.threads=1",
            "decode.threads=1",
            f"prefill.pool_tokens={options.prefill_pool_tokens}",
            f"decode.pool_tokens={options.decode_pool_tokens}",
            f"router.idle_stream_timeout_s={ABANDONED_S}",
            "router.log=sqlite",
            "launcher.drain_timeout_s=5",
        ],
        environment=environment,
    )
    return cluster, clock


async def run(
    cluster: RunningCluster, clock: WallClock, model: Path, options: ChaosOptions, plan: ChaosPlan
) -> ChaosReport:
    """Load, faults and checks, against a cluster that was just started."""
    return await _Run(cluster, clock, model, options, plan).run()


class _Run:
    def __init__(
        self,
        cluster: RunningCluster,
        clock: WallClock,
        model: Path,
        options: ChaosOptions,
        plan: ChaosPlan,
    ) -> None:
        self._cluster = cluster
        self._options = options
        self._plan = plan
        self._address = cluster.address
        self._logs = Path(cluster.state.run_dir) / "logs"
        self._writer = StreamWriter(
            load_tokenizer(model), plan.seed, longest_tokens=options.longest_prompt_tokens
        )
        self._inflictor = Inflictor(cluster, plan, clock)
        self._prober = Prober(self._address)
        self._planned: list[PlannedStream] = []
        self._histories: list[StreamHistory] = []
        self._problems: list[str] = []
        self._services: list[Service] = []

    async def run(self) -> ChaosReport:
        began_s = time.monotonic()
        # Every second seed the streams that keep their connection share one call.
        async with Client(self._address, one_call=self._plan.seed % 2 == 1) as client:
            base = await self._warm_up(client)
            await self._under_load(client)
        load_wall_s = time.monotonic() - began_s
        violations: list[Violation] = []
        # A client of its own: that of the load may wait before it tries a dead router again.
        async with Client(self._address) as client:
            sick = await not_healthy(self._cluster, client, HEALTHY_WITHIN_S)
            deaths_s = self._router_deaths_s
            orphans_s = max(deaths_s, default=-ORPHANED_S) + ORPHANED_S - time.monotonic()
            within_s = max(BASE_WITHIN_S, orphans_s)
            held = await not_at_base(self._cluster, client, base, within_s)
            violations += [Violation(rule=Rule.HEALTH, text=text) for text in sick]
            violations += [Violation(rule=Rule.COUNTERS, text=text) for text in held]
            used = uses(self._cluster)
            violations += await checks.check_final_request(client)
            found, num_compared = await self._compare(client)
            violations += found
        violations += self._judge()
        return ChaosReport(
            plan=self._plan,
            planned=self._planned,
            histories=self._histories,
            violations=violations,
            inflicted=self._inflictor.inflicted,
            services=self._services,
            evidence=read_evidence(self._logs),
            num_compared=num_compared,
            num_probes=len(self._prober.probes),
            base=base,
            used=used,
            load_wall_s=load_wall_s,
            wall_s=time.monotonic() - began_s,
        )

    async def _warm_up(self, client: Client) -> dict[str, Use]:
        """Each prefill server hands over to each decode server; then what there is is the base."""
        for number in range(3):
            prompts = (f"Warm {number} {place}. " * 8 for place in range(_WARM_STREAMS))
            await asyncio.gather(
                *(client.complete(text, max_tokens=8, ignore_eos=True) for text in prompts)
            )
        held = await not_at_base(self._cluster, client, uses(self._cluster), BASE_WITHIN_S)
        assert not held, f"not at rest before the load: {held}"
        return uses(self._cluster)

    async def _under_load(self, client: Client) -> None:
        probing = asyncio.create_task(self._prober.run())
        inflicting = asyncio.create_task(self._inflictor.run())
        try:
            await self._load(client)
            try:
                await asyncio.wait_for(inflicting, self._plan.load_s)
            except* AssertionError as group:
                self._problems += [str(error) for error in group.exceptions]
            except* TimeoutError:
                self._problems.append("not all faults happened in time")
        finally:
            inflicting.cancel()
            self._inflictor.calm()
            probing.cancel()
            await asyncio.wait({inflicting, probing})

    async def _load(self, client: Client) -> None:
        options = self._options
        gate = asyncio.Semaphore(options.num_at_once)
        began_s = time.monotonic()

        async def one(planned: PlannedStream) -> StreamHistory:
            try:
                return await play(planned, client, self._address, _PREFIX)
            finally:
                gate.release()

        tasks: list[asyncio.Task[StreamHistory]] = []
        async with asyncio.TaskGroup() as group:
            for number in range(options.most_streams):
                due_s = began_s + number / options.rate
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                await gate.acquire()
                if time.monotonic() > began_s + self._plan.load_s:
                    gate.release()
                    break
                self._planned.append(self._writer.stream(number))
                tasks.append(group.create_task(one(self._planned[-1])))
        self._histories = [task.result() for task in tasks]

    async def _compare(self, client: Client) -> tuple[list[Violation], int]:
        """Every answer, whole or not, with that of its prompt in one shot."""
        violations: list[Violation] = []
        num_compared = 0
        try:
            await empty_caches(client, within_s=10.0)
        except AssertionError as error:
            violations.append(Violation(rule=Rule.COUNTERS, text=f"caches: {error}"))
        for planned, history in zip(self._planned, self._histories, strict=True):
            if not history.token_ids:
                continue
            try:
                result = await client.complete(token_ids=planned.prompt_ids, **planned.sampling)
            except StreamError as error:
                text = f"one shot of stream {planned.number}: {error}"
                violations.append(Violation(rule=Rule.FINAL_REQUEST, text=text))
                break
            violations += judge_answer(planned, history, result.token_ids)
            num_compared += 1
        return violations, num_compared

    @property
    def _router_deaths_s(self) -> list[float]:
        return [
            each.began_s
            for each in self._inflictor.inflicted
            if each.fault.kind is FaultKind.KILL and each.fault.target == "router"
        ]

    def _errors(self) -> list[str]:
        """Errors in the logs, but that of a router that cannot write its log where it is to."""
        lines = error_lines(self._logs)
        if self._plan.of(FaultKind.DISK):
            lines = [line for line in lines if " stream_log_failed " not in line]
        return lines

    def _judge(self) -> list[Violation]:
        inflicted = self._inflictor.inflicted
        kills = [each for each in inflicted if each.fault.kind is FaultKind.KILL]
        promise = Promise(keeps_streams=True, router_deaths_s=self._router_deaths_s)
        evidence = read_evidence(self._logs)
        restarts = {each.name: each.num_restarts for each in self._cluster.state.processes}
        self._services = [
            service_after(kill, inflicted, self._prober.probes, self._options.service_within_s)
            for kill in kills
        ]
        return [
            *(
                violation
                for planned, history in zip(self._planned, self._histories, strict=True)
                for violation in judge_stream(planned, history, promise)
            ),
            *judge_log(self._histories, evidence, promise),
            *judge_faults(self._plan, inflicted, evidence, self._problems),
            *judge_restarts(inflicted, restarts, self._errors()),
            *judge_service(self._services),
        ]
