"""What the engine does to SGLang's requests, with a scheduler that only has queues."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.sampling.sampling_params import SamplingParams

from streamfill.engine.scheduler_engine import SchedulerEngine, _Running
from streamfill.messages.common import FinishReason

KEY = "1.1.1;"


class _Scheduler:
    """Gives requests up as SGLang's does: where they wait, and in the batches before this one."""

    def __init__(self, engine: SchedulerEngine) -> None:
        self.waiting_queue: list[Req] = []
        self.batches: list[Req] = []
        self._engine = engine

    def abort_request(self, message: AbortReq) -> None:
        for request in self.waiting_queue:
            self._engine.on_abort(AbortReq(rid=request.rid))
        self.waiting_queue.clear()
        for request in self.batches:
            request.to_finish = FINISH_ABORT()


@pytest.mark.parametrize("place", ["waiting", "computed before", "computed now"])
def test_a_request_can_be_given_up_wherever_it_is(place: str) -> None:
    """Also between two layers of the step that computes it, where SGLang does not know it."""
    params = SamplingParams(max_new_tokens=50)
    params.normalize(None)
    request = Req(KEY, None, array("q", [1, 2, 3]), params, vocab_size=100)
    engine: Any = SchedulerEngine.__new__(SchedulerEngine)
    engine._running = {KEY: _Running(request, is_segment=False, num_seen=0, num_brought=0)}
    engine._scheduler = scheduler = _Scheduler(engine)
    scheduler.waiting_queue = [request] if place == "waiting" else []
    scheduler.batches = [request] if place == "computed before" else []
    engine.abort(KEY)
    if place != "waiting":
        request.output_ids.append(7)
        request.update_finish_state()
    (update,) = engine.poll()
    assert update.finish is not None
    assert update.finish.reason is FinishReason.ABORT
