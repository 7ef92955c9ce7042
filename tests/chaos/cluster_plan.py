"""What goes wrong in one run against the whole cluster, and when. Pure: the same seed gives the
same plan."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from streamfill.kv_transfer.faults import Fault
from streamfill.links.faults import LinkFault

PROCESSES = ("prefill-0", "prefill-1", "decode-0", "decode-1", "router", "controller")

LONGEST_PAUSE_S = 8.0
"""Beyond every time-out after which a silent process is taken for dead."""

_SHORTEST_PAUSE_S = 0.2

QUICK_KV_FAULTS = tuple(
    kind
    for kind in Fault
    if not kind.value.endswith(("stalls", "_lost")) and kind is not Fault.COMPLETE_LATE
)
"""Those that are noticed at once. The others hold a pair of servers up for a time-out each, which
`handoff_faults` looks at."""


class FaultKind(enum.StrEnum):
    """What can go wrong."""

    KILL = "kill"
    PAUSE = "pause"
    LINKS = "links"
    KV = "kv"
    CLOCK = "clock"
    VANISH = "vanish"
    DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class PlannedFault:
    """One fault."""

    kind: FaultKind
    at_s: float
    """Since the load began."""
    target: str = ""
    """Process, of those that happen to one."""
    lasts_s: float = 0.0
    """0: it is over at once."""
    jump_s: float = 0.0
    """Of the wall clock."""

    def describe(self) -> str:
        """A few words."""
        words = [f"{self.at_s:5.1f} s", self.kind.value, self.target]
        if self.lasts_s:
            words.append(f"for {self.lasts_s:.1f} s")
        if self.jump_s:
            words.append(f"by {self.jump_s:+.0f} s")
        return " ".join(word for word in words if word)


@dataclass(frozen=True, kw_only=True)
class ChaosPlan:
    """All faults of a run."""

    seed: int
    load_s: float
    faults: tuple[PlannedFault, ...]
    """In the order of their times."""
    link_every: int = 30
    link_kinds: tuple[LinkFault, ...] = tuple(LinkFault)
    kv_every: int = 3

    def of(self, kind: FaultKind) -> list[PlannedFault]:
        """Those of a kind."""
        return [fault for fault in self.faults if fault.kind is kind]

    def link_variable(self, gate: Path) -> str:
        """For ``STREAMFILL_LINK_FAULTS``."""
        kinds = "+".join(kind.value for kind in self.link_kinds)
        return f"every={self.link_every},seed={self.seed},kinds={kinds},while={gate}"

    def kv_variable(self, gate: Path) -> str:
        """For ``STREAMFILL_KV_FAULTS``."""
        kinds = "+".join(kind.value for kind in QUICK_KV_FAULTS)
        return f"every={self.kv_every},seed={self.seed},kinds={kinds},while={gate}"


def draw_plan(seed: int, load_s: float, processes: Sequence[str] = PROCESSES) -> ChaosPlan:
    """A plan with at least one kill, one pause, and faults of the links or of KV transfers.

    Whom the first kill hits goes round with the seed, so that a few seeds in a row reach all. Of
    one role at most one server is killed, since another takes ten seconds to be there again.
    """
    random = Random(f"chaos plan {seed}")
    faults: list[PlannedFault] = []
    killed: list[str] = [processes[seed % len(processes)]]
    for target in random.sample(processes, random.randint(0, 2)):
        if role_of(target) not in map(role_of, killed):
            killed.append(target)
    for target in killed:
        at_s = load_s * random.uniform(0.1, 0.7)
        faults.append(PlannedFault(kind=FaultKind.KILL, at_s=at_s, target=target))
    living = [target for target in processes if target not in killed]
    for target in random.sample(living, random.randint(1, min(3, len(living)))):
        span = LONGEST_PAUSE_S / _SHORTEST_PAUSE_S
        faults.append(
            PlannedFault(
                kind=FaultKind.PAUSE,
                at_s=load_s * random.uniform(0.05, 0.8),
                target=target,
                lasts_s=_SHORTEST_PAUSE_S * span ** random.random(),
            )
        )
    has_links = random.random() < 0.7
    if has_links:
        faults.append(_window(FaultKind.LINKS, load_s, random))
    if not has_links or random.random() < 0.5:
        faults.append(_window(FaultKind.KV, load_s, random))
    for _ in range(random.randint(0, 2)):
        jump_s = random.choice([-1, 1]) * random.choice([60.0, 3_600.0, 86_400.0])
        at_s = load_s * random.uniform(0.1, 0.9)
        faults.append(PlannedFault(kind=FaultKind.CLOCK, at_s=at_s, jump_s=jump_s))
    if random.random() < 0.6:
        faults.append(
            PlannedFault(
                kind=FaultKind.VANISH,
                at_s=load_s * random.uniform(0.0, 0.5),
                lasts_s=random.uniform(2.5, 5.0),
            )
        )
    # A log that cannot be written is given up, and a router without one may not be killed.
    if "router" not in killed and random.random() < 0.4:
        at_s = load_s * random.uniform(0.2, 0.7)
        faults.append(PlannedFault(kind=FaultKind.DISK, at_s=at_s, target="router"))
    return ChaosPlan(
        seed=seed,
        load_s=load_s,
        faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
        link_every=random.choice([15, 30, 60]),
        link_kinds=tuple(random.sample(list(LinkFault), random.randint(2, len(LinkFault)))),
        kv_every=random.choice([2, 3, 5]),
    )


def kill_plan(seed: int, targets: Sequence[str], first_s: float, every_s: float) -> ChaosPlan:
    """One kill after the other, and nothing else."""
    faults = tuple(
        PlannedFault(kind=FaultKind.KILL, at_s=first_s + place * every_s, target=target)
        for place, target in enumerate(targets)
    )
    return ChaosPlan(seed=seed, load_s=first_s + len(targets) * every_s, faults=faults)


def role_of(process: str) -> str:
    """``prefill``, ``decode``, ``router`` or ``controller``."""
    return process.partition("-")[0]


def _window(kind: FaultKind, load_s: float, random: Random) -> PlannedFault:
    return PlannedFault(
        kind=kind,
        at_s=load_s * random.uniform(0.0, 0.4),
        lasts_s=load_s * random.uniform(0.3, 0.5),
    )
