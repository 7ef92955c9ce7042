"""Every metric of every process, in one enum: its name is written nowhere else.

Nothing is counted here; `metric_values` makes what counts. `docs/metrics.md` is generated from this
page (`python -m streamfill.observability.metrics_page --write`), and the dashboard in
`deploy/grafana/` may name nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final


class MetricKind(Enum):
    """In Prometheus's words."""

    COUNTER = "counter"
    """Only grows, from 0 at the start of the process. Its name ends in ``_total``."""
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Owner(Enum):
    """Which processes a metric is scraped from."""

    EVERY = "every process"
    ROUTER = "the router"
    SERVER = "prefill and decode servers"
    CONTROLLER = "the preemption controller"


METRICS_PATH: Final = "/metrics"
"""On the port of each process."""
LATENCY_BUCKETS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 30.0, 60.0, 120.0),
)
"""From a token on a GPU to a one-shot prompt on two cores; close together around one second, where
a user begins to notice."""
LOG_BUCKETS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
RATIO_BUCKETS: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """What a metric is."""

    name: str
    """As it is scraped; counters end in ``_total``."""
    kind: MetricKind
    unit: str
    """``seconds``, ``bytes``, ``tokens``, or what is counted."""
    help: str
    """One sentence."""
    owner: Owner
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""


_SERVER_LABELS: Final = ("server", "role")


def _every(name: str, unit: str, text: str, *labels: str) -> MetricSpec:
    return _spec(Owner.EVERY, MetricKind.GAUGE, f"streamfill_{name}", unit, text, labels)


def _gauge(name: str, unit: str, text: str, *labels: str) -> MetricSpec:
    full = f"streamfill_router_{name}"
    return _spec(Owner.ROUTER, MetricKind.GAUGE, full, unit, text, labels)


def _count(name: str, unit: str, text: str, *labels: str) -> MetricSpec:
    full = f"streamfill_router_{name}_total"
    return _spec(Owner.ROUTER, MetricKind.COUNTER, full, unit, text, labels)


def _seconds(name: str, text: str, *labels: str) -> MetricSpec:
    full = f"streamfill_router_{name}_seconds"
    return _histogram(full, "seconds", text, labels, LATENCY_BUCKETS_S)


def _histogram(
    name: str, unit: str, text: str, labels: Sequence[str], buckets: tuple[float, ...]
) -> MetricSpec:
    return MetricSpec(
        name=name,
        kind=MetricKind.HISTOGRAM,
        unit=unit,
        help=text,
        owner=Owner.ROUTER,
        labels=tuple(labels),
        buckets=buckets,
    )


def _held(name: str, unit: str, text: str) -> MetricSpec:
    full = f"streamfill_server_{name}"
    return _spec(Owner.SERVER, MetricKind.GAUGE, full, unit, text, _SERVER_LABELS)


def _done(name: str, unit: str, text: str, *labels: str) -> MetricSpec:
    full, all_labels = f"streamfill_server_{name}_total", (*_SERVER_LABELS, *labels)
    return _spec(Owner.SERVER, MetricKind.COUNTER, full, unit, text, all_labels)


def _known(name: str, unit: str, text: str, *labels: str) -> MetricSpec:
    full = f"streamfill_controller_{name}"
    kind = MetricKind.COUNTER if name.endswith("_total") else MetricKind.GAUGE
    return _spec(Owner.CONTROLLER, kind, full, unit, text, labels)


def _spec(  # noqa: PLR0917  the columns of the table below, in its order
    owner: Owner, kind: MetricKind, name: str, unit: str, text: str, labels: Sequence[str]
) -> MetricSpec:
    return MetricSpec(name=name, kind=kind, unit=unit, help=text, owner=owner, labels=tuple(labels))


class Metric(Enum):
    """All metrics, process by process."""

    BUILD = _every("build_info", "1", "Always 1; the labels say what runs.", "process", "version")
    LOOP_AGE = _every(
        "loop_age_seconds",
        "seconds",
        "Since the process's loop last published; everything else is as old.",
        "process",
    )

    # Streams at the router.
    READY = _gauge("ready", "1", "Whether new streams are served (docs/servers.md).")
    OPEN_STREAMS = _gauge("open_streams", "streams", "Streams that have not ended.", "state")
    STREAMS_OPENED = _count("streams_opened", "streams", "Streams opened.", "mode")
    STREAMS_ENDED = _count("streams_ended", "streams", "Streams ended, each once.", "outcome")
    SEGMENTS = _count("segments", "segments", "Segments taken in.", "mode")
    TOKENS_IN = _count(
        "tokens_in", "tokens", "Prompt tokens sent to servers, changed seams included."
    )
    TOKENS_OUT = _count("tokens_out", "tokens", "Tokens of answers given to clients.")

    # Waits of streams, each observed once, when the stream has ended.
    TTFT_COMMIT = _seconds("ttft_from_commit", "From the commit to the first token.")
    TTFT_SEGMENT = _seconds(
        "ttft_from_last_segment", "From the arrival of the last segment to the first token."
    )
    INTER_TOKEN = _seconds("inter_token", "Between consecutive tokens of an answer.")
    TOKENISE = _seconds("segment_send", "From a segment's arrival to its being sent to a server.")
    PREFILL_QUEUE = _seconds(
        "prefill_queue", "Between commit and first token, while nothing of it was computed."
    )
    HANDOFF_TIME = _seconds("handoff", "From the first token to the report that the KV arrived.")
    DECODE_QUEUE = _seconds("decode_queue", "From hand-off and first token to the second token.")
    STREAM_TIME = _seconds("stream", "From the opening of a stream to its end.", "outcome")
    OVERLAP = _histogram(
        "streamfill_router_overlap_ratio",
        "ratio",
        "Share of a prompt's compute time that was hidden before its last segment.",
        (),
        RATIO_BUCKETS,
    )
    LIFETIMES_LOST = _count(
        "lifetimes_lost", "streams", "Ended streams missing in the waits, since too many ended."
    )
    SPANS_LOST = _count("spans_lost", "spans", "Spans of traces that could not be exported.")

    # Where streams go.
    PLACEMENT = _gauge(
        "placement_info", "1", "Always 1; the label says the placement policy in force.", "policy"
    )
    PLACEMENTS = _count(
        "placements",
        "questions",
        "Questions which server gets a stream: it was chosen, or the least loaded one in the place "
        "of a policy's bad answer, or there was none.",
        *("role", "outcome"),
    )
    PLACEMENT_CHOICES = _count(
        "placement_choices",
        "questions",
        "Of those for prefill servers, where the policy chose, by why (docs/placement.md).",
        "reason",
    )
    PLACEMENT_TOKENS = _count(
        "placement_prompt_tokens",
        "tokens",
        "Of prompts, known at these questions; more than once for some.",
    )
    PLACEMENT_FOUND = _count(
        "placement_found_tokens", "tokens", "Of them, expected in the cache of the chosen server."
    )
    STREAMS_PLACED_ANEW = _count(
        "streams_placed_anew",
        "streams",
        "Streams sent to another server when more of their prompt was known, before much was sent.",
    )
    RESIDENCY_GAPS = _count(
        "residency_gaps", "gaps", "Reports of what is cached that were lost, and noticed."
    )
    RESIDENCY_ASKED = _count(
        "residency_asked",
        "questions",
        "Times that a server was asked for all that it has cached: at first, behind a gap, and "
        "where it did not answer.",
    )
    RESIDENCY_AWAITED = _gauge(
        "residency_awaited",
        "servers",
        "Servers that have not answered that yet: what is known of their cache is old or nothing.",
    )

    # What goes wrong, and what is made of it.
    HANDOFFS = _count("handoffs", "hand-offs", "Hand-offs of KV, by how they ended.", "outcome")
    ATTEMPTS_FAILED = _count("attempts_failed", "attempts", "Attempts that servers failed.")
    RETRIES = _count("retries", "attempts", "Of them, those after which it was tried again.")
    RESYNCS = _count("resyncs", "messages", "Times that a server missed a message.")
    STREAMS_MOVED = _count(
        "streams_moved", "streams", "Moves of streams between living servers.", "reason"
    )
    ROUTER_MALFORMED = _count("malformed_frames", "frames", "Frames that could not be read.")
    REFUSALS = _count(
        "refusals",
        "requests",
        "Requests, and operations on streams, that clients were refused.",
        *("api", "reason"),
    )
    REFUSED_HANDSHAKES = _count(
        "refused_handshakes",
        "connections",
        "Connections to the ZeroMQ socket that had no admitted key.",
        "reason",
    )
    STALE_MESSAGES = _count("stale_messages", "messages", "Late news about what is over, dropped.")

    # The log of streams, where there is one.
    LOG_ON = _gauge("log_on", "1", "Whether streams outlive the router: a log is kept and works.")
    LOG_RECORDS = _count("log_records", "records", "Records written to the log.")
    LOG_BYTES = _count("log_written_bytes", "bytes", "Of these records.")
    LOG_FILE_BYTES = _gauge("log_file_bytes", "bytes", "Size of the log on the disk.")
    LOG_DELAY = _histogram(
        "streamfill_router_log_delay_seconds",
        "seconds",
        "From the oldest record of a batch to all of it being written.",
        (),
        LOG_BUCKETS_S,
    )
    LOG_FAILURES = _count(
        "log_failures", "failures", "Times that the log, or a stream in it, could not be used."
    )
    STREAMS_RESTORED = _count("streams_restored", "streams", "Found in the log at the start.")
    STREAMS_RESUMED = _count("streams_resumed", "streams", "Times that a client came back.")

    # Room for context that nobody has committed yet.
    ADMISSION_WAIT = _seconds("admission_wait", "Waits of segments for room.", "outcome")
    WAITING_SEGMENTS = _gauge("waiting_segments", "segments", "Waiting for room now.", "server")
    REFUSED_SEGMENTS = _count("refused_segments", "segments", "Refused for want of room.", "server")
    OVER_CAP_SEGMENTS = _count(
        "over_cap_segments", "segments", "Admitted above the cap, to make progress.", "server"
    )
    UNCOMMITTED_TOKENS = _gauge(
        "uncommitted_tokens", "tokens", "Of contexts that nobody has committed yet.", "server"
    )
    UNCOMMITTED_LIMIT = _gauge("uncommitted_tokens_limit", "tokens", "The cap on them.", "server")

    # Servers as the router sees them.
    SERVERS = _gauge("servers", "servers", "Servers by state.", "role", "state")
    ASSIGNED_STREAMS = _gauge(
        "server_assigned_streams", "streams", "Placed on the server.", *_SERVER_LABELS
    )
    ASSIGNED_PENDING = _gauge(
        "server_pending_tokens", "tokens", "Placed there and not computed yet.", *_SERVER_LABELS
    )
    HEARTBEAT_AGE = _gauge(
        "server_heartbeat_age_seconds", "seconds", "Since its last heartbeat.", *_SERVER_LABELS
    )
    POLICY = _gauge(
        "server_policy_info",
        "1",
        "Always 1; the label says the policy in force.",
        "server",
        "policy",
    )

    # A server, of itself.
    STREAMS = _held("streams", "streams", "Streams that it knows.")
    WAITING = _held("waiting_requests", "requests", "In SGLang's waiting queue.")
    RUNNING = _held("running_requests", "requests", "That hold a request slot.")
    PENDING_TOKENS = _held("pending_tokens", "tokens", "Known and not computed yet.")
    KV_USED = _held("kv_used_tokens", "tokens", "KV slots neither free nor evictable.")
    KV_CACHED = _held("kv_cached_tokens", "tokens", "KV slots that the radix tree could give back.")
    KV_FREE = _held("kv_free_tokens", "tokens", "KV slots that are free.")
    KV_TOTAL = _held("kv_total_tokens", "tokens", "Size of the KV pool.")
    FREE_SLOTS = _held("free_request_slots", "requests", "Free request slots.")
    TOTAL_SLOTS = _held("request_slots", "requests", "All request slots.")
    TRANSFERS = _held("transfers", "transfers", "KV transfers under way.")
    STAGING_BYTES = _held("staging_bytes", "bytes", "Transfer staging memory in use.")
    HOST_TOKENS = _held("host_tokens", "tokens", "KV in host memory that may be needed again.")
    PLAN_VERSION = _held("plan_version", "1", "Newest preemption plan applied; 0: the local rule.")
    CONTROLLER_ALIVE = _held("controller_alive", "1", "Whether it hears the controller.")
    REGISTERED = _held("registered", "1", "Whether the router has taken it in.")
    SERVER_MALFORMED = _done("malformed_frames", "frames", "Frames that could not be read.")
    SERVER_REFUSED_HANDSHAKES = _done(
        "refused_handshakes",
        "connections",
        "Connections to the ZeroMQ socket that had no admitted key.",
    )
    EVICTED = _done("evicted_tokens", "tokens", "KV slots taken from the radix tree.")
    COMPUTED = _done("computed_tokens", "tokens", "Prompt tokens that went through the model.")
    RECOMPUTED = _done(
        "recomputed_tokens", "tokens", "Of them, computed before for the same stream and evicted."
    )
    PREEMPTIONS = _done("preemptions", "losses", "Times that a living stream had lost KV.")
    INTERRUPTIONS = _done("interruptions", "steps", "Times that commits ran inside another step.")
    HANDOFF_BYTES = _done("handoff_bytes", "bytes", "KV sent to decode servers.")
    EARLY_BYTES = _done("handoff_early_bytes", "bytes", "Of it, sent ahead of the commit.")
    SWAP_OUTS = _done("swap_outs", "copies", "Groups of KV pages copied to host memory.")
    SWAP_INS = _done("swap_ins", "copies", "Groups of KV pages copied back.")
    SWAP_OUT_BYTES = _done("swap_out_bytes", "bytes", "KV copied to host memory.")
    SWAP_IN_BYTES = _done("swap_in_bytes", "bytes", "KV copied back.")
    STEPS = _done("steps", "steps", "Turns of the loop behind which the engine had work.")
    TURNS = _done("turns", "turns", "All turns of the loop.")
    RUNS = _done("runs", "runs", "Requests given to the engine, by why they ran.", "reason")

    # The preemption controller.
    PLANS = _known("plans_total", "plans", "Plans made, which is also the newest version.")
    PLANS_SENT = _known("plans_sent_total", "plans", "Plans sent, repetitions included.")
    REPORTS = _known("reports_total", "reports", "Reports of prefill servers received.")
    STALE_REPORTS = _known("stale_reports_total", "reports", "Of them, dropped as out of date.")
    VICTIMS_RANKED = _known("victims_ranked_total", "streams", "Streams put into an order, summed.")
    CONTROLLER_MALFORMED = _known(
        "malformed_frames_total", "frames", "Frames that could not be read."
    )
    CONTROLLER_REFUSED_HANDSHAKES = _known(
        "refused_handshakes_total",
        "connections",
        "Connections to the ZeroMQ socket that had no admitted key.",
        "reason",
    )
    KNOWN_SERVERS = _known("servers", "servers", "Prefill servers heard of lately.")
    KNOWN_STREAMS = _known("streams", "streams", "Streams in their newest reports.")
    STANDING_VERSION = _known("standing_plan_version", "1", "Version of its plan.", "server")
    STANDING_VICTIMS = _known("standing_victims", "streams", "Streams in its plan.", "server")

    @property
    def spec(self) -> MetricSpec:
        """What it is."""
        spec: MetricSpec = self.value
        return spec
