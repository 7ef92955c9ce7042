"""What each codec of KV costs on this machine, and how much it changes.

``python -m streamfill.kv_transfer.bench_codecs`` prints one line ``RESULT {…}``; with ``--model``
the KV is that of a Hugging Face folder for some English text (needs transformers), else random
numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from streamfill.kv_transfer.bench import LAYOUTS
from streamfill.kv_transfer.codecs import CODECS, SAMPLE_BYTES, measure_codec, relative_error
from streamfill.kv_transfer.layout import KvLayout

_TEXT = (
    "A retriever finds one page after another, and the model reads each of them as it comes. "
    "Nothing waits for the last page but the answer itself. "
)
_REPEATS = 12
"""Of the text: some 350 tokens."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="streamfill.kv_transfer.bench_codecs"
    )
    parser.add_argument(
        "--model", type=Path, help="folder of a model with keys and values per head"
    )
    options = parser.parse_args()
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model = {options.model}: is no folder")
    torch.set_num_threads(1)
    layout = LAYOUTS["smollm2-135m"]
    keys, values = (_normal(), _normal()) if options.model is None else _of_model(options.model)
    rows = {}
    for name, codec in CODECS.items():
        cost = measure_codec(codec, layout, torch.device("cpu"))
        rows[name] = {
            "bytes": codec.num_bytes(SAMPLE_BYTES, layout) / SAMPLE_BYTES,
            "encode_gb_per_s": round(1e-9 / cost.encode_s, 2),
            "decode_gb_per_s": round(1e-9 / cost.decode_s, 2),
            "pays_below_gb_per_s": round(_break_even(name, layout), 2),
            "error_of_keys": relative_error(codec, keys, layout),
            "error_of_values": relative_error(codec, values, layout),
        }
    source = "normal" if options.model is None else options.model.name
    print("RESULT", json.dumps({"kv": source, "codecs": rows}))


def _normal() -> Tensor:
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))


def _of_model(folder: Path) -> tuple[Tensor, Tensor]:
    """Keys and values of all layers, float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(_TEXT * _REPEATS, return_tensors="pt")
    with torch.inference_mode():
        cache = model(**inputs, use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return torch.stack([keys for keys, _ in layers]), torch.stack([values for _, values in layers])


def _break_even(name: str, layout: KvLayout) -> float:
    """The fastest link, in GB/s of what travels, on which the codec still saves time."""
    codec = CODECS[name]
    cost = measure_codec(codec, layout, torch.device("cpu"))
    slow, fast = 1e-3, 1e3
    for _ in range(50):
        middle = (slow * fast) ** 0.5
        if cost.pays(codec, layout, 1e-9 / middle):
            slow = middle
        else:
            fast = middle
    return slow


if __name__ == "__main__":
    main()
