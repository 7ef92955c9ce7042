"""Breaks between the layers of a model, with a small model and a scheduler that only counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from streamfill.engine.interrupts import LayerBreaks, decoder_layers, layer_breaks


class _Layer(nn.Module):
    def __init__(self, num_experts: int = 0) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class _Model(nn.Module):
    def __init__(self, num_layers: int, num_experts: int = 0) -> None:
        super().__init__()
        self.tower = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.layers = nn.ModuleList(_Layer(num_experts) for _ in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Batch:
    def __init__(self, reqs: list[str], *, is_extend: bool = True) -> None:
        self.reqs = reqs
        self.finished: set[str] = set()
        self.forward_mode = SimpleNamespace(is_extend=lambda: is_extend)

    def filter_batch(self) -> None:
        self.reqs = [req for req in self.reqs if req not in self.finished]

    def is_empty(self) -> bool:
        return not self.reqs

    def merge_batch(self, other: _Batch) -> None:
        self.reqs += other.reqs


class _Scheduler:
    """The attributes that ``LayerBreaks`` uses."""

    def __init__(self, running: list[str], batch: _Batch | None) -> None:
        self.running_batch = _Batch(running)
        self.waiting_queue: list[str] = []
        self.chunked_req: object = None
        self.batch = batch
        self.calls: list[str] = []

    def get_next_batch_to_run(self, *, running_batch: _Batch, last_batch: object) -> object:
        assert last_batch is None, "it would be merged twice"
        self.calls.append("form")
        return SimpleNamespace(running_batch=running_batch, batch_to_run=self.batch)

    def run_batch(self, batch: _Batch) -> str:
        self.calls.append("run")
        return "result"

    def process_batch_result(self, batch: _Batch, result: str) -> None:
        assert result == "result"
        self.calls.append("process")


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_EAGER_INPUT_NO_COPY", "0")


def test_a_break_before_each_layer_but_the_first() -> None:
    """Only where the step may be interrupted, and not in what interrupts it."""
    model = _Model(num_layers=5)
    breaks = LayerBreaks(_Scheduler([], None), model.layers)
    seen: list[bool] = []

    def on_break(given: LayerBreaks) -> None:
        seen.append(given.allowed)
        model(torch.zeros(1))  # as a nested batch does

    breaks.call(on_break)
    assert model(torch.zeros(1)) == 5
    assert seen == []
    breaks.allowed = True
    assert model(torch.zeros(1)) == 5
    assert seen == [False] * 4
    assert breaks.allowed


def test_an_error_in_a_break_is_not_swallowed() -> None:
    """It ends the step as one of its own would."""
    model = _Model(num_layers=2)
    breaks = LayerBreaks(_Scheduler([], None), model.layers)

    def on_break(given: LayerBreaks) -> None:
        raise ZeroDivisionError

    breaks.call(on_break)
    breaks.allowed = True
    with pytest.raises(ZeroDivisionError):
        model(torch.zeros(1))


@pytest.mark.parametrize(("running", "merged"), [([], ["b"]), (["c"], ["c", "b"])])
def test_what_goes_on_joins_the_running(running: list[str], merged: list[str]) -> None:
    """What ended with the nested batch does not."""
    batch = _Batch(["a", "b"])
    batch.finished = {"a"}
    scheduler = _Scheduler(running, batch)
    LayerBreaks(scheduler, nn.ModuleList()).run_waiting()
    assert scheduler.calls == ["form", "run", "process"]
    assert scheduler.running_batch.reqs == merged


def test_a_decode_step_is_not_merged_into_itself() -> None:
    """SGLang's running batch is what it gives out then."""
    scheduler = _Scheduler([], None)
    scheduler.batch = scheduler.running_batch = _Batch(["a"], is_extend=False)
    LayerBreaks(scheduler, nn.ModuleList()).run_waiting()
    assert scheduler.running_batch.reqs == ["a"]


def test_nothing_that_fits_is_no_error() -> None:
    """It goes on waiting."""
    scheduler = _Scheduler([], None)
    LayerBreaks(scheduler, nn.ModuleList()).run_waiting()
    assert scheduler.calls == ["form"]


@pytest.mark.parametrize("hindrance", ["waiting", "chunked"])
def test_not_while_others_would_be_in_the_batch(hindrance: str) -> None:
    """Requests that wait already, or a chunk of one."""
    scheduler = _Scheduler([], None)
    breaks = LayerBreaks(scheduler, nn.ModuleList())
    assert breaks.is_possible
    if hindrance == "waiting":
        scheduler.waiting_queue.append("a")
    else:
        scheduler.chunked_req = "a"
    assert not breaks.is_possible


def test_the_layers_are_found() -> None:
    """Not the shorter list beside them, nor the longer ones inside."""
    model = _Model(num_layers=4, num_experts=8)
    assert decoder_layers(model) is model.layers
    assert decoder_layers(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    "changes",
    [{"device": "cuda"}, {"tp_size": 2}, {"pp_size": 2}, {"enable_overlap": True}],
)
def test_only_on_the_cpu_with_one_rank(changes: dict[str, Any]) -> None:
    """Elsewhere there is no moment that could be used."""
    facts = {"device": "cpu", "tp_size": 1, "pp_size": 1, "enable_overlap": False}

    def scheduler(**facts: Any) -> object:
        runner = SimpleNamespace(device=facts["device"], model=_Model(num_layers=2))
        return SimpleNamespace(
            tp_worker=SimpleNamespace(model_runner=runner),
            ps=SimpleNamespace(tp_size=facts["tp_size"], pp_size=facts["pp_size"]),
            enable_overlap=facts["enable_overlap"],
        )

    assert layer_breaks(scheduler(**facts)) is not None
    assert layer_breaks(scheduler(**{**facts, **changes})) is None
