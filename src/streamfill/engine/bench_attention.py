"""Times our CPU attention against SGLang's `torch_native` on the shapes of SmolLM2-135M.

    python -m streamfill.engine.bench_attention [--repeats 5] [--layers 30]

Prints a table and, as its last line, ``RESULT {json}`` with milliseconds per layer. The backends
run the same batch in turn, with other keys and values in each layer, so that caches hold no more
of them than in a model. The figure is the fastest of the repeats, in CPU time of the one thread,
which other processes of the machine disturb less than wall time.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any, Final

from streamfill.engine.torchvision_fix import install

NUM_HEADS: Final = 9
NUM_KV_HEADS: Final = 3
HEAD_DIM: Final = 64

CASES: Final[dict[str, tuple[tuple[tuple[int, int], ...], bool]]] = {
    "1550 new": (((0, 1550),), False),
    "50 behind 1500": (((1500, 50),), False),
    "256 behind 1500": (((1500, 256),), False),
    "512 behind 1536": (((1536, 512),), False),
    "16 behind 4080": (((4080, 16),), False),
    "1 behind 1500": (((1500, 1),), False),
    "8 x 64 behind 512": (((512, 64),) * 8, False),
    "decode at 1500": (((1499, 1),), True),
    "decode 16 at 500": (((499, 1),) * 16, True),
}


def main() -> None:
    """Runs all cases with one thread."""
    parser = argparse.ArgumentParser(description="CPU attention, ms per layer, one thread")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    options = parser.parse_args()
    install()

    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from streamfill.engine.attention import StreamfillCpuAttention
    from streamfill.engine.attention_cases import AttentionShape, build_case

    torch.set_num_threads(1)
    result: dict[str, dict[str, float]] = {}
    print(f"{'case':20} {'stock':>9} {'scattered':>10} {'adjacent':>9}   ms per layer")
    for name, (lengths, decode) in CASES.items():
        figures: dict[str, float] = {}
        for layout, scattered in (("scattered", True), ("adjacent", False)):
            shape = AttentionShape(
                num_heads=NUM_HEADS,
                num_kv_heads=NUM_KV_HEADS,
                head_dim=HEAD_DIM,
                lengths=lengths,
                decode=decode,
                num_layers=options.layers,
                scattered=scattered,
            )
            case = build_case(shape)
            backends: dict[str, Any] = {layout: StreamfillCpuAttention(case.model_runner)}
            if scattered:
                backends["stock"] = TorchNativeAttnBackend(case.model_runner)
            for _ in range(options.repeats):
                for backend_name, backend in backends.items():
                    begin_s = time.thread_time()
                    case.run(backend)
                    ms = (time.thread_time() - begin_s) * 1e3 / options.layers
                    figures[backend_name] = min(figures.get(backend_name, ms), ms)
        result[name] = {key: round(figures[key], 3) for key in ("stock", "scattered", "adjacent")}
        print(
            f"{name:20} {figures['stock']:9.2f} {figures['scattered']:10.2f} "
            f"{figures['adjacent']:9.2f}",
            flush=True,
        )
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
