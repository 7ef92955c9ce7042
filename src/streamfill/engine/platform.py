"""The CPU as an SGLang platform of its own.

SGLang's CPU engine (`SGLANG_USE_CPU_ENGINE=1`) imports a compiled kernel package that no registry
has. Where neither a GPU nor that engine is to be used, this platform takes the CPU's place:

1. SGLang asks the entry points of `sglang.srt.platforms`; `activate` answers with a class or None.
2. `ServerArgs` calls `apply_server_args_defaults`, then asks `get_device_total_memory`.
3. The model runner calls `init_backend`, which puts our attention in place of SGLang's.
4. The pools and the allocator are built from the classes named here; layers run `forward_native`.

On a GPU `activate` answers None: nothing here is active, and SGLang picks its own.
Dependences on SGLang 0.5.16: `SRTPlatform`, `CpuDeviceMixin`, `ServerArgs`, the attention registry.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

from streamfill.engine.host_memory import read_host_memory

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

PLATFORM_CLASS_PATH: Final = "streamfill.engine.platform.StreamfillCpuPlatform"

CPU_DEFAULT_PAGE_SIZE: Final = 1
"""Tokens per KV page on a CPU, by measurement: see docs/benchmarks/cpu_attention.md."""

CPU_DEFAULT_MEM_FRACTION: Final = 0.3
"""Share of the machine's memory for weights and KV, where nothing is set: a CPU's memory is shared
by all servers of the machine, unlike a GPU's."""

_SGLANG_CPU_ENGINE_VARIABLE: Final = "SGLANG_USE_CPU_ENGINE"


def activate() -> str | None:
    """Entry point of the group `sglang.srt.platforms`: this platform's class path, or None.

    None where a GPU is available (CUDA or ROCm) or SGLang's own CPU engine is asked for.
    """
    if torch.cuda.is_available() or os.environ.get(_SGLANG_CPU_ENGINE_VARIABLE) == "1":
        return None
    return PLATFORM_CLASS_PATH


class StreamfillCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """Answers of the CPU platform; SGLang makes one in each of its processes."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Fills in what the CPU needs and leaves what the user chose, except what cannot run."""
        from streamfill.engine.attention import ATTENTION_BACKEND_NAME

        # SGLang has put "intel_amx" for None by now; its kernels are in the missing package.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND_NAME
        server_args.sampling_backend = "pytorch"
        server_args.disable_overlap_schedule = True
        # Not bfloat16 even where the CPU has it: its rounding lets a prompt computed in other
        # pieces choose other tokens, and streaming promises the same ones.
        if server_args.dtype == "auto":
            server_args.dtype = "float32"
        if server_args.page_size is None:
            server_args.page_size = CPU_DEFAULT_PAGE_SIZE
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = CPU_DEFAULT_MEM_FRACTION

    def init_backend(self) -> None:
        """Puts our attention behind SGLang's Triton-free name; called once in each worker."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        from streamfill.engine.attention import ATTENTION_BACKEND_NAME, create_attention

        register_attention_backend(ATTENTION_BACKEND_NAME)(create_attention)

    def get_default_attention_backend(self) -> str:
        from streamfill.engine.attention import ATTENTION_BACKEND_NAME

        return ATTENTION_BACKEND_NAME

    def get_mha_kv_pool_cls(self) -> type:
        from streamfill.engine.shared_kv_pool import SharedMhaTokenToKvPool

        return SharedMhaTokenToKvPool

    def get_mla_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        return _as_type(MLATokenToKVPool)

    def get_paged_allocator_cls(self) -> type:
        """Used for page size 1 too: SGLang asks no other allocator of a foreign platform."""
        from streamfill.engine.paged_allocator import CpuPagedAllocator

        return CpuPagedAllocator

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Bytes that this process may use, a container's limit respected. All ids are one CPU."""
        return read_host_memory().total_bytes

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """Bytes in use by anybody, so that total less usage is what can still be had."""
        memory = read_host_memory()
        return float(memory.total_bytes - memory.available_bytes)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """`(available, total)` in bytes."""
        memory = read_host_memory()
        return memory.available_bytes, memory.total_bytes

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        return False

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_dispatch_key_name(self) -> str:
        """Layers run their plain torch code, `forward_native`."""
        return "native"


def _as_type(cls: type) -> type:
    return cls
