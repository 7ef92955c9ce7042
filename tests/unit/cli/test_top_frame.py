"""One frame of `streamfill top`, from made-up moments."""

from __future__ import annotations

from typing import Any

import pytest

from streamfill.api import ClusterInfo, Server, ServerStreams, StreamDecision
from streamfill.cli.tables import Table, table_lines
from streamfill.cli.top_frame import Moment, frame, pool_bar

COUNTERS = {
    "num_running": 2,
    "num_pending_tokens": 1500,
    "num_used_tokens": 500,
    "num_cached_tokens": 250,
    "num_total_tokens": 1000,
    "num_host_tokens": 77,
    "num_preemptions": 3,
    "num_computed_tokens": 10_000,
}


def server(server_id: str = "prefill-0", **changes: Any) -> Server:
    fields: dict[str, Any] = {
        "server_id": server_id,
        "role": server_id.partition("-")[0],
        "state": "alive",
        "pid": 42,
        "num_assigned_streams": 5,
        "heartbeat_age_s": 0.1,
        "loop_age_s": 0.1,
        "controller_alive": True,
        "counters": COUNTERS,
        "policy": "lcas(order=newest)",
    }
    return Server(**{**fields, **changes})


def stream(stream_id: int, **changes: Any) -> StreamDecision:
    fields: dict[str, Any] = {
        "stream_id": stream_id,
        "state": "open",
        "num_known_tokens": 400,
        "num_computed_tokens": 100,
        "num_shared_tokens": 0,
        "priority": 0,
        "idle_s": 1.25,
        "expected_next_s": None,
        "decision": "no_memory",
        "reason": "the KV pool had no room for it",
        "victim_rank": 0,
    }
    return StreamDecision(**{**fields, **changes})


def moment(
    *servers: Server, at_s: float = 10.0, trouble: str = "", **streams: tuple[StreamDecision, ...]
) -> Moment:
    """Streams by server id, with an underscore for the dash."""
    info = ClusterInfo(
        model="m",
        vocab_size=1,
        context_tokens=8192,
        pool_tokens=1,
        ready=True,
        decode_available=True,
        num_open_streams=2,
        num_streams_by_outcome={"DONE": 4},
        num_malformed_frames=0,
        servers=servers,
    )
    described = {
        name.replace("_", "-"): ServerStreams(
            answered=True, role=name.partition("_")[0], policy="lcas", streams=some
        )
        for name, some in streams.items()
    }
    return Moment(at_s=at_s, info=info, described=described, trouble=trouble)


def lines(now: Moment, before: Moment | None = None, max_streams: int = 20) -> list[str]:
    shown: list[str] = []
    for part in frame(now, before, address="h:1", max_streams=max_streams):
        shown += table_lines(part) if isinstance(part, Table) else [part]
    return shown


def row_of(shown: list[str], first: str) -> list[str]:
    return next(line.split() for line in shown if line.lstrip().startswith(first))


@pytest.mark.parametrize(
    ("used", "cached", "total", "bar"),
    [
        (0, 0, 100, ".........."),
        (50, 25, 100, "#####==..."),
        (1, 1, 100_000, "#=........"),
        (100, 0, 100, "##########"),
        (99, 1, 100, "##########"),
        (0, 100, 100, "=========="),
        (0, 0, 0, "----------"),
    ],
)
def test_pool_bar(used: int, cached: int, total: int, bar: str) -> None:
    """What is not nothing is seen, and the bar is never longer than itself."""
    assert pool_bar(used, cached, total, 10) == bar


def test_a_server_with_its_load_memory_and_policy() -> None:
    """All in its row; without an earlier frame there is no rate."""
    row = row_of(lines(moment(server())), "prefill-0")
    assert row == [
        *("prefill-0", "prefill", "alive", "lcas(order=newest)", "5", "2", "1,500", "-"),
        *("##########=====.....", "500", "of", "1,000", "77", "3", "alive"),
    ]


def test_the_rate_is_what_was_computed_between_two_frames() -> None:
    """Of the same process: one that was restarted counts from zero and has none."""
    before = moment(server(), at_s=8.0)
    later = {**COUNTERS, "num_computed_tokens": 13_000}
    now = moment(server(counters=later), at_s=10.0)
    assert row_of(lines(now, before), "prefill-0")[7] == "1,500"
    anew = moment(server(counters=later, pid=43), at_s=10.0)
    assert row_of(lines(anew, before), "prefill-0")[7] == "-"
    other = moment(server("prefill-1", counters=later), at_s=10.0)
    assert row_of(lines(other, before), "prefill-1")[7] == "-"


def test_servers_and_streams_are_in_order() -> None:
    """Prefill servers first; streams that have something to compute before those that do not."""
    idle = {"decision": "idle", "reason": "everything known of it is computed"}
    now = moment(
        *(server("decode-0"), server("prefill-1"), server("prefill-0")),
        decode_0=(stream(9, decision="commit"),),
        prefill_1=(stream(3), stream(4, **idle)),
        prefill_0=(stream(1, **idle), stream(2)),
    )
    shown = lines(now)
    names = [line.split()[0] for line in shown if "-" in line[:10] and "lcas" in line]
    assert names == ["prefill-0", "prefill-1", "decode-0"]
    numbers = [line.split()[0] for line in shown if line.strip()[:1].isdigit()]
    assert numbers == ["2", "3", "9", "1", "4"]


def test_a_stream_with_its_progress_and_what_was_decided() -> None:
    """Tokens, a bar, the victim's rank, and the reason as a sentence."""
    shown = lines(moment(server(), prefill_0=(stream(7), stream(8, victim_rank=None))))
    assert row_of(shown, "7") == [
        *("7", "prefill-0", "open", "100", "400", "##--------", "1.2", "s", "0", "no_memory"),
        *["the", "KV", "pool", "had", "no", "room", "for", "it"],
    ]
    assert row_of(shown, "8")[8] == "-"


def test_a_full_bar_means_that_all_is_computed() -> None:
    """One token that is missing can be seen."""
    streams = (stream(7, num_computed_tokens=399), stream(8, num_computed_tokens=400))
    shown = lines(moment(server(), prefill_0=streams))
    assert row_of(shown, "7")[5] == "#########-"
    assert row_of(shown, "8")[5] == "##########"


def test_streams_that_do_not_fit_are_counted() -> None:
    """In a line below the table."""
    shown = lines(moment(server(), prefill_0=tuple(stream(n) for n in range(9))), max_streams=4)
    assert shown[-1] == "... and 5 more"
    assert sum("no_memory" in line for line in shown) == 4


def test_what_is_wrong_is_said() -> None:
    """A server that is not alive stands out, one that did not answer is named, an old frame says
    that it is old."""
    now = moment(server(state="suspect"), trouble="UNAVAILABLE: gone")
    silent = ServerStreams(answered=False, role="prefill", policy="", streams=())
    now = Moment(at_s=1.0, info=now.info, described={"prefill-0": silent}, trouble=now.trouble)
    parts = frame(now, None, address="h:1", max_streams=5)
    (table,) = (part for part in parts if isinstance(part, Table))
    assert table.alarms == {0}
    assert "NOT UP TO DATE: UNAVAILABLE: gone; trying again" in parts
    assert "no answer in time about the streams of prefill-0" in parts


def test_an_idle_cluster_says_so() -> None:
    """Instead of an empty table."""
    assert lines(moment(server(), prefill_0=()))[-1] == "no streams on any server"
