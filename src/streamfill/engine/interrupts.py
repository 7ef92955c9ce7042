"""Requests that run in the middle of a step, between two layers of the model.

A step of the prefill of long contexts takes seconds on a CPU, and a commit that comes meanwhile
would wait for its end. The forward pass is one Python call per layer, though, and between two of
them nothing is under way: what it has computed is in tensors of its own, its KV slots are taken and
its prefixes locked. So another batch can be formed and computed there, and the step goes on where
it stopped. FlowPrefill (2026) calls this operator-level preemption; no work is lost by it.

Only on the CPU with one rank: on a GPU layers are only launched when Python comes by, seconds of
work ahead of the device, and the ranks of a group would have to stop at the same layer.

Depends on SGLang 0.5.16: ``managers.scheduler.Scheduler`` (``get_next_batch_to_run``,
``run_batch``, ``process_batch_result``, ``running_batch``, ``waiting_queue``, ``chunked_req``,
``event_loop_normal``), ``model_executor.runner.eager_runner.EagerRunner.load_batch`` with the
environment variable ``SGLANG_EAGER_INPUT_NO_COPY``, and ``ScheduleBatch.filter_batch`` and
``merge_batch``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

_NO_COPY = "SGLANG_EAGER_INPUT_NO_COPY"
"""SGLang copies the inputs of each batch into buffers that all batches share. With this it leaves
them where they are, so that a second batch does not overwrite those of the first."""


class LayerBreaks:
    """The breaks between layers. Owned by the engine, used in the scheduler's thread."""

    def __init__(self, scheduler: Any, layers: nn.ModuleList) -> None:
        self._scheduler = scheduler
        self._on_break: Callable[[LayerBreaks], None] | None = None
        self.allowed = False
        """Whether the step that runs next may be interrupted."""
        os.environ[_NO_COPY] = "1"
        for layer in layers[1:]:  # before the first one the step might as well not have begun
            layer.register_forward_pre_hook(self._between_layers)

    def call(self, on_break: Callable[[LayerBreaks], None]) -> None:
        """``on_break`` is called in every break of a step that may be interrupted."""
        self._on_break = on_break

    @property
    def is_possible(self) -> bool:
        """Whether a batch could be formed now of what is started now, and of nothing else."""
        scheduler = self._scheduler
        return not scheduler.waiting_queue and scheduler.chunked_req is None

    def run_waiting(self) -> None:
        """Compute what waits, as one turn of ``event_loop_normal`` would; what memory or slots do
        not suffice for goes on waiting."""
        scheduler = self._scheduler
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=None
        )
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch is None:
            return
        scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        if not batch.forward_mode.is_extend():
            return
        # Answers that go on here join the others; the loop does that with the batch before its own.
        batch.filter_batch()
        if batch.is_empty():
            return
        if scheduler.running_batch.is_empty():
            scheduler.running_batch = batch
        else:
            scheduler.running_batch.merge_batch(batch)

    def _between_layers(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        del layer, inputs
        if not self.allowed or self._on_break is None:
            return
        self.allowed = False  # what interrupts is not interrupted
        try:
            self._on_break(self)
        finally:
            self.allowed = True


def layer_breaks(scheduler: Any) -> LayerBreaks | None:
    """None where a step cannot be interrupted."""
    model_runner = scheduler.tp_worker.model_runner
    is_one_rank = scheduler.ps.tp_size == 1 and scheduler.ps.pp_size == 1
    if model_runner.device != "cpu" or scheduler.enable_overlap or not is_one_rank:
        return None
    layers = decoder_layers(model_runner.model)
    return None if layers is None else LayerBreaks(scheduler, layers)


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """The longest list of modules that is not inside of another, as lists of experts are."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(module) for outer in lists for module in outer.modules() if module is not outer}
    return max((each for each in lists if id(each) not in inner), key=len, default=None)
