"""What a decision costs: ``python -m streamfill.scheduling.bench``, or ``make bench-scheduling``.

Each round changes some streams, as a server does between two steps, and then times everything that
scheduling does about it: the changed views go into the table, the policy brings its order up to
date and plans the step. Making a view is the server's and timed apart. The workload is the
published crawler's: chunks of 1,131 tokens, steps of 2,048.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from typing import Final

import msgspec

from streamfill.scheduling.policy import Policy
from streamfill.scheduling.registry import make_policy, parse_policy_spec
from streamfill.scheduling.snapshot import ContextMode, MemoryView, StreamTable, StreamView
from streamfill.stream.ids import StreamId

POLICIES: Final = (
    "default",
    "fcfs",
    "lcas",
    "lcas(order=newest)",
    "mcps",
    "laps",
    "edf",
    "adaptive",
)
CHUNK_TOKENS: Final = 1131
STEP_TOKENS: Final = 2048
COMMITTED_SHARE: Final = 0.1
PUBLISHED: Final = {"n50_us": "13 to 16", "n500_us": "about 150"}
"""Stream2LLM's own figures for sorting, on its machine; other hardware, so only the order of
magnitude can be compared."""
GOALS_US: Final = {"n50_us": 8.0, "n500_us": 60.0, "n5000_changed50_us": 200.0}


class Workload:
    """Streams with work to do, of which some change from round to round."""

    def __init__(self, num_streams: int, num_changed: int | None, seed: int) -> None:
        """
        Args:
            num_changed: streams that get a new chunk in each round. None: what ran has run, and one
                chunk comes, as when the server steps.
        """
        self.table = StreamTable()
        self.now_s = 1000.0
        self._random = random.Random(seed)
        self._num_changed = num_changed
        self._next_id = num_streams
        self._memory = MemoryView(
            num_free_tokens=1 << 24, num_evictable_tokens=0, num_total_tokens=1 << 24, page_size=16
        )
        for number in range(num_streams):
            self.table.put(self._new(number))

    def changes(self, ran: list[tuple[StreamId, int]]) -> list[StreamView | StreamId]:
        """Views that changed, and ids that are over; made before the clock starts."""
        self.now_s += 0.05
        streams, changed = self.table.streams, list[StreamView | StreamId]()
        for stream_id, up_to in ran:
            view = streams[stream_id]
            if view.committed_s is not None and up_to == view.num_known_tokens:
                changed.extend((stream_id, self._new(self._next_id)))
                self._next_id += 1
            else:
                changed.append(msgspec.structs.replace(view, num_computed_tokens=up_to))
        ids = self._random.sample(sorted(streams), self._num_changed or 1)
        gone = {stream_id for stream_id, _ in ran}
        changed.extend(self._grown(streams[each]) for each in ids if each not in gone)
        return changed

    def decide(
        self, policy: Policy, changed: list[StreamView | StreamId]
    ) -> list[tuple[StreamId, int]]:
        """What is timed."""
        table = self.table
        for change in changed:
            if isinstance(change, StreamView):
                table.put(change)
            else:
                table.remove(change)
        snapshot = table.snapshot(
            memory=self._memory, token_budget=STEP_TOKENS, max_requests=64, now_s=self.now_s
        )
        return [(run.stream_id, run.up_to) for run in policy.decide(snapshot).runs]

    def _new(self, number: int) -> StreamView:
        rand = self._random
        num_known = rand.randrange(1, 8) * CHUNK_TOKENS
        is_committed = rand.random() < COMMITTED_SHARE
        at_s = self.now_s - rand.random() * 10
        return StreamView(
            stream_id=StreamId(number),
            mode=ContextMode(number % 2),
            arrival_s=at_s - rand.random() * 10,
            last_segment_s=at_s,
            pending_since_s=at_s,
            committed_s=at_s if is_committed else None,
            num_known_tokens=num_known,
            num_computed_tokens=num_known - rand.randrange(32, CHUNK_TOKENS),
            num_segments=rand.randrange(1, 12),
            gaps_s=tuple(rand.random() for _ in range(8)),
        )

    def _grown(self, view: StreamView) -> StreamView:
        if view.committed_s is not None:
            return msgspec.structs.replace(view, priority=view.priority ^ 1)
        return msgspec.structs.replace(
            view,
            last_segment_s=self.now_s,
            num_known_tokens=view.num_computed_tokens + CHUNK_TOKENS,
            num_segments=view.num_segments + 1,
        )


def median_us(spec: str, num_streams: int, num_changed: int | None, rounds: int) -> float:
    """Median time of a decision, in microseconds."""
    name, options = parse_policy_spec(spec)
    policy = make_policy(name, options)
    workload = Workload(num_streams, num_changed, seed=1)
    times: list[int] = []
    ran = workload.decide(policy, [])
    gc.collect()
    for _ in range(rounds):
        changed = workload.changes(ran)
        start = time.perf_counter_ns()
        ran = workload.decide(policy, changed)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000.0


def view_us(rounds: int) -> float:
    """Time to make one view, in microseconds."""
    workload = Workload(1, None, seed=1)
    view = workload.table.streams[StreamId(0)]
    fields = {name: getattr(view, name) for name in view.__struct_fields__}
    start = time.perf_counter_ns()
    for _ in range(rounds):
        StreamView(**fields)
    return (time.perf_counter_ns() - start) / rounds / 1000.0


def main() -> int:
    """Prints a table and the ``RESULT`` line. Exit code 1 when a goal was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m streamfill.scheduling.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=2000, help="decisions per figure; 2000")
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error(f"--rounds {rounds}: must be at least 1")
    sizes: tuple[tuple[str, int, int | None], ...] = (
        ("n50_us", 50, None),
        ("n500_us", 500, None),
        ("n5000_changed50_us", 5000, 50),
    )
    result: dict[str, object] = {"goals_us": GOALS_US, "published_us": PUBLISHED}
    is_met = True
    print("decision, microseconds".ljust(24) + "".join(key.rjust(22) for key, _, _ in sizes))
    for spec in POLICIES:
        figures = {
            key: round(median_us(spec, num_streams, num_changed, rounds), 2)
            for key, num_streams, num_changed in sizes
        }
        is_met &= all(figures[key] <= goal for key, goal in GOALS_US.items())
        print(spec.ljust(24) + "".join(f"{figures[key]:22.1f}" for key, _, _ in sizes), flush=True)
        result[spec] = figures
    print("goal".ljust(24) + "".join(f"{GOALS_US[key]:22.0f}" for key, _, _ in sizes))
    print(
        "published (sort only)".ljust(24)
        + "".join(PUBLISHED.get(key, "").rjust(22) for key, _, _ in sizes)
    )
    result["view_us"] = round(view_us(100 * rounds), 2)
    result["goals_met"] = is_met
    print(f"RESULT {json.dumps(result)}")
    return 0 if is_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
