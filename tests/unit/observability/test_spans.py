"""The spans of a stream follow from its lifetime events, without OpenTelemetry."""

from __future__ import annotations

from typing import Any

import pytest

from streamfill.observability import lifetime as lt
from streamfill.observability.lifetime import LifetimeEntry, LifetimeEvent
from streamfill.observability.spans import Span, stream_span
from streamfill.observability.tracing import NoTraces, TraceTarget, trace_target

E = LifetimeEvent


def entry(at_s: float, event: LifetimeEvent, **fields: Any) -> LifetimeEntry:
    return LifetimeEntry(event, at_s, **fields)


LIFE = [
    entry(10.0, E.OPENED),
    entry(10.1, E.SEGMENT_RECEIVED, segment=0),
    entry(10.2, E.SEGMENT_SENT, segment=0),
    entry(10.6, E.SEGMENT_COMPUTED, segment=0),
    entry(12.0, E.SEGMENT_RECEIVED, segment=1),
    entry(12.25, E.SEGMENT_SENT, segment=1),
    entry(13.0, E.COMMIT_RECEIVED),
    entry(13.0, E.COMMIT_SENT),
    # What servers did is learnt with the first token.
    entry(10.3, E.COMPUTE_STARTED, reason="segment"),
    entry(10.5, E.COMPUTE_DONE, num_tokens=40, reason="segment"),
    entry(13.4, E.COMPUTE_STARTED, reason="commit"),
    entry(13.9, E.COMPUTE_DONE, num_tokens=60, reason="commit"),
    entry(11.0, E.PREEMPTED_SWAP, num_tokens=40, reason="idle for long", predicted_s=0.5),
    entry(14.0, E.FIRST_TOKEN),
    entry(14.0, E.HANDOFF_STARTED),
    entry(14.3, E.HANDOFF_DONE),
    entry(14.4, E.SECOND_TOKEN),
    entry(14.5, E.TOKEN),
    entry(14.6, E.LAST_TOKEN),
    entry(14.7, E.DONE),
]


def spans(entries: list[LifetimeEntry], **more: str) -> Span:
    root = stream_span(entries, name="stream", attributes={"a": 1}, **more)
    assert root is not None
    return root


def of(root: Span, name: str) -> list[tuple[Any, Any]]:
    return [
        (pytest.approx(child.start_s), pytest.approx(child.end_s))
        for child in root.children
        if child.name == name
    ]


def test_a_whole_life() -> None:
    """The root from the opening to the end; segments, compute, queue, hand-off and answer in it."""
    root = spans(LIFE)
    assert (root.name, root.start_s, root.end_s, root.error) == ("stream", 10.0, 14.7, "")
    assert root.attributes == {"a": 1}
    assert of(root, "segment") == [(10.2, 10.6), (12.25, 14.0)]
    assert of(root, "prefill") == [(10.3, 10.5), (13.4, 13.9)]
    assert of(root, "queue") == [(13.0, 13.4), (13.9, 14.0)]
    assert of(root, "hand-off") == [(14.0, 14.3)]
    assert of(root, "decode") == [(14.0, 14.6)]
    assert [child.start_s for child in root.children] == sorted(c.start_s for c in root.children)


def test_the_parts_say_what_they_are_about() -> None:
    """Number and tokenisation of a segment, tokens and reason of a run, tokens of the answer."""
    first, *_ = (child for child in spans(LIFE).children if child.name == "segment")
    assert first.attributes == {
        "streamfill.segment": 0,
        "streamfill.computed": True,
        "streamfill.tokenise_s": pytest.approx(0.1),
    }
    runs = [child.attributes for child in spans(LIFE).children if child.name == "prefill"]
    assert runs == [
        {"streamfill.num_tokens": 40, "streamfill.reason": "segment"},
        {"streamfill.num_tokens": 60, "streamfill.reason": "commit"},
    ]
    (decode,) = (child for child in spans(LIFE).children if child.name == "decode")
    assert decode.attributes == {"streamfill.num_tokens": 4}


def test_the_queue_is_the_figure_of_the_same_name() -> None:
    """Its spans add up to `prefill_queue_s`."""
    total_s = sum(c.end_s - c.start_s for c in spans(LIFE).children if c.name == "queue")
    assert total_s == pytest.approx(lt.prefill_queue_s(LIFE))


def test_moments_are_in_order_of_time() -> None:
    """Commit, tokens and preemptions stand in the root, the latter with what is known of them."""
    events = spans(LIFE).events
    assert [(event.name, event.at_s) for event in events] == [
        ("preempted", 11.0),
        ("commit", 13.0),
        ("first token", 14.0),
        ("second token", 14.4),
        ("last token", 14.6),
    ]
    assert events[0].attributes == {
        "streamfill.action": "swap",
        "streamfill.num_tokens": 40,
        "streamfill.reason": "idle for long",
        "streamfill.predicted_s": 0.5,
    }


def test_a_life_that_broke_off() -> None:
    """What was not computed lasts until the end and says so; nothing is made up."""
    root = spans(
        [
            entry(1.0, E.OPENED),
            entry(2.0, E.SEGMENT_RECEIVED, segment=0),
            entry(2.5, E.SEGMENT_SENT, segment=0),
            entry(5.0, E.FAILED),
        ],
        error="the server died",
    )
    (segment,) = root.children
    assert (segment.start_s, segment.end_s) == (2.5, 5.0)
    assert segment.attributes["streamfill.computed"] is False
    assert root.error == "the server died"


def test_a_hand_off_that_failed() -> None:
    """It ends with the second token, and the reason stands in it, not in the stream."""
    life = [each for each in LIFE if each.event is not E.HANDOFF_DONE]
    root = spans(life, handoff_error="failed: refused")
    (handoff,) = (child for child in root.children if child.name == "hand-off")
    assert (handoff.start_s, handoff.end_s, handoff.error) == (14.0, 14.4, "failed: refused")
    assert root.error == ""


def test_an_answer_that_broke_off_lasts_to_the_end() -> None:
    """Its last token never came."""
    life = [each for each in LIFE if each.event not in (E.LAST_TOKEN, E.DONE)]
    assert of(spans([*life, entry(20.0, E.ABORTED)]), "decode") == [(14.0, 20.0)]


def test_no_part_lies_outside_of_the_stream() -> None:
    """Servers' ages may be off by the time that a message was under way."""
    root = spans(
        [
            entry(10.0, E.OPENED),
            entry(9.5, E.COMPUTE_STARTED),
            entry(12.5, E.COMPUTE_DONE, num_tokens=1),
            entry(12.0, E.DONE),
        ]
    )
    assert of(root, "prefill") == [(10.0, 12.0)]


def test_a_living_stream_has_no_trace() -> None:
    """Nor has one of which nothing is recorded."""
    assert stream_span([entry(1.0, E.OPENED)], name="stream", attributes={}) is None
    assert stream_span([], name="stream", attributes={}) is None


GENERAL, OF_TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.mark.parametrize(
    ("endpoint", "environment", "target"),
    [
        (None, {}, NoTraces()),
        (None, {GENERAL: ""}, NoTraces()),
        (None, {GENERAL: "http://h:1"}, TraceTarget(endpoint=None, asked_by=GENERAL)),
        (None, {OF_TRACES: "http://h:1"}, TraceTarget(endpoint=None, asked_by=OF_TRACES)),
        (
            None,
            {"OTEL_TRACES_EXPORTER": "otlp"},
            TraceTarget(endpoint=None, asked_by="OTEL_TRACES_EXPORTER"),
        ),
        (None, {GENERAL: "http://h:1", "OTEL_TRACES_EXPORTER": "none"}, NoTraces()),
        (None, {GENERAL: "http://h:1", "OTEL_SDK_DISABLED": "true"}, NoTraces()),
        (
            "http://h:4318",
            {GENERAL: "http://other:1"},
            TraceTarget(endpoint="http://h:4318/v1/traces", asked_by="router.otlp_endpoint"),
        ),
        (
            "https://h/my/path",
            {},
            TraceTarget(endpoint="https://h/my/path", asked_by="router.otlp_endpoint"),
        ),
        (
            "http://h:4318",
            {"OTEL_SDK_DISABLED": "TRUE"},
            NoTraces(reason="OTEL_SDK_DISABLED is true"),
        ),
    ],
)
def test_who_asks_for_traces(
    endpoint: str | None, environment: dict[str, str], target: TraceTarget | NoTraces
) -> None:
    """Nobody by default; OpenTelemetry's variables, or our own key before them."""
    assert trace_target(endpoint, environment) == target


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "console"}, "OTEL_TRACES_EXPORTER is console"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is grpc"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "is http/json"),
    ],
)
def test_a_wish_that_cannot_be_met_is_named(environment: dict[str, str], words: str) -> None:
    """With the variable and what would do."""
    target = trace_target(None, {GENERAL: "http://h:1", **environment})
    assert isinstance(target, NoTraces)
    assert words in target.reason


def test_the_protocol_of_traces_goes_before_the_general_one() -> None:
    """As in OpenTelemetry's specification."""
    environment = {
        GENERAL: "http://h:1",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    }
    assert isinstance(trace_target(None, environment), TraceTarget)
