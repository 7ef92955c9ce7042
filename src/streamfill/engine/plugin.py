"""How a streamfill server gets into SGLang's scheduler process.

Entry point of the group ``sglang.srt.plugins``. In a process that ``engine.process`` started it
hooks these functions of SGLang 0.5.16 (named below ``sglang.srt``); in any other process it does
nothing:

``managers.scheduler.Scheduler.__init__`` (after)
    hand the finished scheduler to the server
``managers.scheduler_components.request_receiver.SchedulerRequestReceiver._pull_raw_reqs`` (after)
    rank 0 adds what came for us to what SGLang received, so that SGLang's broadcast takes it to all
    ranks
``managers.scheduler.Scheduler.process_input_requests`` (around)
    take it out again, on every rank, and take a turn
``managers.scheduler.Scheduler.run_batch`` (after)
    note when a step ended, for the accounts of streams
``managers.scheduler_components.ipc_channels.SchedulerIpcChannels.create`` (after)
    no tokenizer and no detokenizer process: outputs are read off the requests, aborts are caught
    here
``sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch`` (after)
    seeds per request; penalties of tokens that were sampled elsewhere
``layers.logits_processor.LogitsProcessor.forward`` (around)
    no logits for a batch that samples nothing: segments only fill the cache
``layers.sampler.sampling_from_probs_torch``,
``layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch`` (replaced)
    as above
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from streamfill.serving.turn import ServerRuntime, Turn

_COMPONENTS = "sglang.srt.managers.scheduler_components"
_INIT = "sglang.srt.managers.scheduler.Scheduler.__init__"
_PROCESS_INPUT = "sglang.srt.managers.scheduler.Scheduler.process_input_requests"
_RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"
_PULL = f"{_COMPONENTS}.request_receiver.SchedulerRequestReceiver._pull_raw_reqs"
_CREATE_CHANNELS = f"{_COMPONENTS}.ipc_channels.SchedulerIpcChannels.create"
_SAMPLING_INFO = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"
_LOGITS = "sglang.srt.layers.logits_processor.LogitsProcessor.forward"
_SAMPLE = "sglang.srt.layers.sampler.sampling_from_probs_torch"
_SAMPLE_FILTERED = "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch"
_TARGETS = (
    _INIT,
    _PROCESS_INPUT,
    _PULL,
    _RUN_BATCH,
    _CREATE_CHANNELS,
    _SAMPLING_INFO,
    _LOGITS,
    _SAMPLE,
    _SAMPLE_FILTERED,
)

_runtime: ServerRuntime | None = None


def install(runtime: ServerRuntime) -> None:
    """Make ``runtime`` the server of this process. To be called before SGLang loads its plugins."""
    global _runtime
    _runtime = runtime


def register() -> None:
    """Entry point: register the hooks, if this process is a streamfill server."""
    if _runtime is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from streamfill.engine import sampling
    from streamfill.engine.radix import register_backend

    register_backend()
    after, around, replace = HookType.AFTER, HookType.AROUND, HookType.REPLACE
    for target, hook, kind in (
        (_INIT, _after_init, after),
        (_PROCESS_INPUT, _around_process_input, around),
        (_PULL, _after_pull, after),
        (_RUN_BATCH, _after_run_batch, after),
        (_CREATE_CHANNELS, _after_create_channels, after),
        (_SAMPLING_INFO, _after_sampling_info, after),
        (_LOGITS, _around_logits, around),
        (_SAMPLE, sampling.sample_from_probs, replace),
        (_SAMPLE_FILTERED, sampling.sample_from_filtered_probs, replace),
    ):
        HookRegistry.register(target, hook, kind)


def check_hooks() -> None:
    """Verify that SGLang applied every hook: it only logs those it cannot.

    Raises:
        RuntimeError: a function that we depend on is not there.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = sorted(set(_TARGETS) - HookRegistry._patched)
    if missing:
        raise RuntimeError(
            f"SGLang has no {', '.join(missing)}; is it the pinned version, unchanged?"
        )


class _OutputSink:
    """In place of SGLang's socket to its tokenizer process: outputs are read elsewhere, aborts are
    reported."""

    def send_output(self, output: Any, received: Any = None) -> None:
        """Called by SGLang for every batch of outputs."""
        del received
        if type(output).__name__ == "AbortReq" and _runtime is not None:
            _runtime.on_abort(output)


def _after_init(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    del result, args, kwargs
    if _runtime is not None:
        _runtime.attach(scheduler)


def _after_pull(result: list[Any] | None, receiver: Any) -> list[Any] | None:
    del receiver
    if result is not None and _runtime is not None:
        result.append(_runtime.gather())
    return result


def _after_run_batch(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """On a GPU the pass has only been launched here. Waiting for it costs nothing: what SGLang does
    next without its overlapped scheduling, which ``process`` turns off, is to read the result
    (``SchedulerBatchResultProcessor``)."""
    del args, kwargs
    if _runtime is not None:
        if scheduler.device != "cpu":
            scheduler.device_module.current_stream().synchronize()
        _runtime.on_step_end()
    return result


def _around_process_input(
    original: Callable[..., None], scheduler: Any, recv_reqs: list[Any]
) -> None:
    turns = [request for request in recv_reqs if isinstance(request, Turn)]
    original(scheduler, [request for request in recv_reqs if not isinstance(request, Turn)])
    if _runtime is not None:
        for turn in turns:
            _runtime.take(turn)


def _after_create_channels(channels: Any, *args: Any, **kwargs: Any) -> Any:
    del args, kwargs
    return dataclasses.replace(
        channels, send_to_tokenizer=_OutputSink(), send_to_detokenizer=_OutputSink()
    )


def _around_logits(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``TpModelWorker.forward_batch_generation`` samples nothing where ``is_prefill_only``, and
    takes None for logits that are not there. The fourth argument behind ``self`` is the batch; a
    model may also pass ``LogitsMetadata``, which does not say whether log probabilities are
    wanted."""
    batch = kwargs["logits_metadata"] if "logits_metadata" in kwargs else args[4]
    if batch.is_prefill_only and not getattr(batch, "return_logprob", True):
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        return LogitsProcessorOutput(next_token_logits=None)
    return original(*args, **kwargs)


def _after_sampling_info(info: Any, cls: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    del cls, args, kwargs
    from sglang.srt.runtime_context import get_server_args

    from streamfill.engine import sampling

    if get_server_args().sampling_backend == "pytorch":
        sampling.attach_seeds(info, batch)
    sampling.order_penalizers(info)
    sampling.replay_outputs(info, batch)
    return info
