"""The hooks in SGLang's scheduler process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.plugins.hook_registry import HookRegistry

from streamfill.engine import plugin
from streamfill.serving.turn import Turn

TURN = Turn(
    now_s=1.0,
    messages=(),
    transfer_ids=(),
    lost_transfer_ids=(),
    plan=None,
    controller_alive=False,
    copies=(),
    shut_down=False,
)


class _Runtime:
    """A server that only takes notes."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, object]] = []

    def attach(self, scheduler: Any) -> None:
        self.notes.append(("attach", scheduler))

    def gather(self) -> Turn:
        return TURN

    def take(self, turn: Turn) -> None:
        self.notes.append(("take", turn))

    def on_step_end(self) -> None:
        self.notes.append(("step", None))

    def on_abort(self, message: Any) -> None:
        self.notes.append(("abort", message))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> _Runtime:
    runtime = _Runtime()
    monkeypatch.setattr(plugin, "_runtime", runtime)
    return runtime


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's registry as it is before any plugin; nothing is patched in this process."""
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    return HookRegistry


def test_a_process_that_is_no_server_of_ours_is_left_alone(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry point is called in every process of SGLang."""
    monkeypatch.setattr(plugin, "_runtime", None)
    plugin.register()
    assert not registry._hooks


def test_every_function_that_is_depended_on_is_hooked(registry: Any, runtime: _Runtime) -> None:
    """Once, and each of them exists in the pinned SGLang."""
    import pkgutil

    plugin.register()
    assert set(registry._hooks) == set(plugin._TARGETS)
    assert all(len(hooks) == 1 for hooks in registry._hooks.values())
    for target in plugin._TARGETS:
        assert callable(pkgutil.resolve_name(target)), target


def test_a_function_that_is_not_there_stops_the_start(registry: Any, runtime: _Runtime) -> None:
    """SGLang itself only logs it."""
    plugin.register()
    registry._patched.update(plugin._TARGETS)
    plugin.check_hooks()
    registry._patched.remove(plugin._SAMPLE)
    with pytest.raises(RuntimeError, match=r"SGLang has no .*sampling_from_probs_torch"):
        plugin.check_hooks()


def test_the_finished_scheduler_is_handed_over(runtime: _Runtime) -> None:
    """Behind its own initialisation."""
    scheduler = object()
    plugin._after_init(None, scheduler, "server_args", port_args=1)
    assert runtime.notes == [("attach", scheduler)]


def test_a_step_ends_when_the_gpu_is_done_with_it(runtime: _Runtime) -> None:
    """Not when it was launched; on the CPU there is nothing to wait for."""

    def current_stream() -> Any:
        return SimpleNamespace(synchronize=lambda: runtime.notes.append(("waited", None)))

    device_module = SimpleNamespace(current_stream=current_stream)
    gpu = SimpleNamespace(device="cuda", device_module=device_module)
    cpu = SimpleNamespace(device="cpu", device_module=device_module)
    assert plugin._after_run_batch("result", gpu, "batch") == "result"
    assert runtime.notes == [("waited", None), ("step", None)]
    assert plugin._after_run_batch("result", cpu, "batch") == "result"
    assert runtime.notes == [("waited", None), ("step", None), ("step", None)]


def test_a_turn_rides_on_the_requests_of_rank_0(runtime: _Runtime) -> None:
    """Other ranks, who are given none, get it by SGLang's broadcast."""
    assert plugin._after_pull(["request"], object()) == ["request", TURN]
    assert plugin._after_pull(None, object()) is None


def test_a_turn_is_taken_behind_sglangs_own_requests(runtime: _Runtime) -> None:
    """SGLang does not see it."""
    seen: list[list[object]] = []

    def original(scheduler: object, requests: list[object]) -> None:
        assert not runtime.notes
        seen.append(requests)

    plugin._around_process_input(original, object(), ["request", TURN])
    assert seen == [["request"]]
    assert runtime.notes == [("take", TURN)]


def test_only_aborts_leave_by_the_output_channel(runtime: _Runtime) -> None:
    """Outputs are read off the requests."""

    class AbortReq:
        pass

    abort = AbortReq()
    sink = plugin._OutputSink()
    sink.send_output(SimpleNamespace())
    sink.send_output(abort, "request")
    assert runtime.notes == [("abort", abort)]


@pytest.mark.parametrize(
    ("metadata", "is_skipped"),
    [
        ({"is_prefill_only": True, "return_logprob": False}, True),
        ({"is_prefill_only": True, "return_logprob": True}, False),
        ({"is_prefill_only": False, "return_logprob": False}, False),
        ({"is_prefill_only": True}, False),
    ],
)
def test_logits_are_computed_only_where_somebody_reads_them(
    metadata: dict[str, bool], is_skipped: bool
) -> None:
    """A batch of segments leaves the vocabulary out; any other one is computed as always."""
    calls: list[tuple[object, ...]] = []

    def original(*args: object) -> str:
        calls.append(args)
        return "logits"

    forward_batch = SimpleNamespace(**metadata)
    result = plugin._around_logits(original, "self", "ids", "hidden", "head", forward_batch, None)
    assert (result != "logits") == is_skipped == (not calls)
    if is_skipped:
        assert result.next_token_logits is None
    else:
        assert calls == [("self", "ids", "hidden", "head", forward_batch, None)]
