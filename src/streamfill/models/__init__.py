"""Models on disk: the default one, any Hugging Face folder, and tiny ones for tests.

Nothing here imports torch, transformers or sglang.

- `home`: where streamfill keeps its files.
- `default`: the default model, converted from a GGUF file on first use.
- `gguf_import`, `folder`: how a GGUF file becomes a Hugging Face model folder.
- `resolve`: which folder the user means by `--model`.
- `describe`: the facts about a model that the router needs.
- `tiny`, `tiny_tokenizer`: random Llama models with real tokenizers, made in a second.
- `progress`: progress on a terminal and in a log.
"""

from __future__ import annotations
