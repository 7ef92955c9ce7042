"""When the CPU platform is active and what it answers to SGLang."""

from __future__ import annotations

import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.attention import attention_registry
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.platforms.interface import SRTPlatform

from streamfill.engine import platform
from streamfill.engine.attention import ATTENTION_BACKEND_NAME, create_attention
from streamfill.engine.host_memory import HostMemory
from streamfill.engine.paged_allocator import CpuPagedAllocator
from streamfill.engine.shared_kv_pool import SharedMhaTokenToKvPool


@pytest.fixture
def cpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU on which nobody asked for SGLang's CPU engine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)


@pytest.mark.usefixtures("cpu_machine")
def test_a_cpu_machine_gets_the_platform() -> None:
    """The entry point answers with the path of a class that SGLang can load."""
    path = platform.activate()
    assert path is not None
    cls = pkgutil.resolve_name(path)
    assert issubclass(cls, SRTPlatform)
    assert cls().is_out_of_tree()


@pytest.mark.usefixtures("cpu_machine")
def test_a_gpu_leaves_sglang_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU, CUDA or ROCm, the platform is not active."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert platform.activate() is None


@pytest.mark.usefixtures("cpu_machine")
def test_sglangs_own_cpu_engine_has_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for SGLang's CPU engine gets that."""
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


def _server_args(**values: Any) -> Any:
    unset = {
        "attention_backend": None,
        "sampling_backend": None,
        "disable_overlap_schedule": False,
        "dtype": "auto",
        "page_size": None,
        "mem_fraction_static": None,
    }
    return SimpleNamespace(**{**unset, **values})


def test_unset_arguments_get_what_a_cpu_needs() -> None:
    """Nothing set: Triton-free attention and sampling, float32, no overlap, the measured page."""
    args = _server_args(attention_backend="intel_amx")
    platform.StreamfillCpuPlatform().apply_server_args_defaults(args)
    assert vars(args) == {
        "attention_backend": ATTENTION_BACKEND_NAME,
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
        "dtype": "float32",
        "page_size": platform.CPU_DEFAULT_PAGE_SIZE,
        "mem_fraction_static": platform.CPU_DEFAULT_MEM_FRACTION,
    }


def test_what_the_user_chose_stays() -> None:
    """Attention, dtype, page size and memory share are not overwritten."""
    chosen = {
        "attention_backend": "flex_attention",
        "dtype": "bfloat16",
        "page_size": 32,
        "mem_fraction_static": 0.5,
    }
    args = _server_args(**chosen)
    platform.StreamfillCpuPlatform().apply_server_args_defaults(args)
    assert {key: getattr(args, key) for key in chosen} == chosen


def test_the_backend_takes_over_sglangs_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a worker's start our attention answers to the name that means "no Triton"."""
    monkeypatch.setattr(
        attention_registry, "ATTENTION_BACKENDS", dict(attention_registry.ATTENTION_BACKENDS)
    )
    cpu = platform.StreamfillCpuPlatform()
    cpu.init_backend()
    name = cpu.get_default_attention_backend()
    assert attention_registry.ATTENTION_BACKENDS[name] is create_attention


def test_pools_and_allocator() -> None:
    """The pools are SGLang's, one in shared memory; the allocator is ours, layers run plain
    torch."""
    cpu = platform.StreamfillCpuPlatform()
    assert cpu.get_mha_kv_pool_cls() is SharedMhaTokenToKvPool
    assert cpu.get_mla_kv_pool_cls() is MLATokenToKVPool
    assert cpu.get_paged_allocator_cls() is CpuPagedAllocator
    assert cpu.get_dispatch_key_name() == "native"
    assert not cpu.support_cuda_graph()


def test_memory_is_what_the_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Total less usage is what can still be had, as SGLang's contract says."""
    monkeypatch.setattr(
        platform, "read_host_memory", lambda: HostMemory(total_bytes=1000, available_bytes=300)
    )
    cpu = platform.StreamfillCpuPlatform()
    assert cpu.get_device_total_memory() == 1000
    assert cpu.get_current_memory_usage() == 700.0
    assert cpu.get_available_memory() == (300, 1000)
