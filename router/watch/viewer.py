"""One who looks: what was sent to them, and so what is new for them.

Kept here is one entry for each stream of the view, at most `wish.MAX_LIMIT`; what is not sent is
not kept. So a viewer who reads slowly costs no memory, but sees fewer frames.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from router.watch import selection
from router.watch.frames import (
    ClusterView,
    Frame,
    Selected,
    ServerView,
    StreamChange,
    StreamFacts,
    Verdict,
)
from router.watch.sample import Sample
from router.watch.timeline import Timeline
from router.watch.wish import WatchWish

SLICE: Final = 25
"""Streams written before others in the loop have their turn: about a millisecond."""
_FIELDS: Final = StreamFacts.__struct_fields__


@dataclass(slots=True)
class _Sent:
    """Of one stream."""

    timeline: Timeline
    stamp: int = 0
    """Of the timeline as it was sent."""
    facts: StreamFacts | None = None
    verdict: Verdict | None = None


class Viewer:
    """Makes the frames for one viewer."""

    def __init__(self, wish: WatchWish, epoch_ms: int) -> None:
        self.wish = wish
        self.selected: list[StreamFacts] = []
        """The streams of the newest frame."""
        self._epoch_ms = epoch_ms
        self._cluster: ClusterView | None = None
        self._servers: list[ServerView] | None = None
        self._choice: Selected | None = None
        self._sent: dict[str, _Sent] = {}

    def select(self, sample: Sample) -> Selected:
        """Choose the streams of the next frame."""
        visible = selection.may_see(sample.streams.values(), self.wish.tenant)
        matching = selection.matching(visible, self.wish)
        self.selected = selection.first(matching, self.wish)
        return Selected(
            order=[facts.id for facts in self.selected],
            num_matching=len(matching),
            num_visible=len(visible),
        )

    async def frame(
        self, sample: Sample, choice: Selected, timelines: Mapping[str, Timeline]
    ) -> Frame:
        """What is new in this sample.

        Args:
            sample: the newest one.
            choice: what `select` returned for it.
            timelines: of the streams in `selected`.
        """
        self._sent = {
            each.id: self._sent[each.id] for each in self.selected if each.id in self._sent
        }
        streams: list[msgspec.Raw] = []
        for place, facts in enumerate(self.selected):
            if place and place % SLICE == 0:
                await asyncio.sleep(0)
            verdict = sample.described.verdict(facts)
            change = self._change(facts, verdict, timelines[facts.id])
            if change is not None:
                streams.append(msgspec.Raw(msgspec.json.encode(change)))
        cluster, servers = self._cluster_view(sample), list(sample.servers)
        frame = Frame(
            now_ms=sample.now_ms,
            epoch_ms=self._epoch_ms,
            cluster=None if cluster == self._cluster else cluster,
            servers=None if servers == self._servers else servers,
            selected=None if choice == self._choice else choice,
            streams=streams,
        )
        self._cluster, self._servers, self._choice = cluster, servers, choice
        return frame

    def _change(
        self, facts: StreamFacts, verdict: Verdict | None, timeline: Timeline
    ) -> StreamChange | None:
        sent = self._sent.get(facts.id)
        is_new = sent is None or sent.timeline is not timeline
        if sent is None or is_new:
            sent = self._sent[facts.id] = _Sent(timeline)
        stamp = sent.stamp
        is_moved = timeline.stamp > stamp
        is_moment = timeline.moments_stamp > stamp
        if not is_moved and facts == sent.facts and verdict == sent.verdict:
            return None
        change = StreamChange(
            id=facts.id,
            is_new=is_new,
            facts=_changed_fields(sent.facts, facts),
            verdict=None if verdict == sent.verdict else verdict,
            moments=timeline.moments if is_moment or is_new else None,
            segments=timeline.segments.since(stamp) if is_moved else None,
            runs=timeline.runs.since(stamp) if is_moved else None,
            preemptions=timeline.preemptions.since(stamp) if is_moved else None,
            progress=timeline.progress.since(stamp) if is_moved else None,
        )
        sent.facts, sent.verdict, sent.stamp = facts, verdict, timeline.stamp
        return change

    def _cluster_view(self, sample: Sample) -> ClusterView:
        info = sample.info
        return ClusterView(
            model=info.model.rstrip("/").rpartition("/")[2] or info.model,
            ready=info.ready,
            num_open=info.num_open_streams,
            num_by_outcome=dict(info.num_streams_by_outcome),
            sees_all=self.wish.tenant is None,
            uses_tenants=any(facts.tenant for facts in self.selected),
        )


def _changed_fields(before: StreamFacts | None, now: StreamFacts) -> dict[str, Any] | None:
    if before == now:
        return None
    return {
        name: value
        for name in _FIELDS
        if (value := getattr(now, name)) != getattr(before, name, _MISSING)
    }


_MISSING: Final = object()
