"""Ids, texts and prompts equal those of `transformers` for the default model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamfill.stream.chat import ChatTemplate
from streamfill.stream.incremental import IncrementalTokenizer
from streamfill.stream.self_check import SAMPLE
from streamfill.stream.tokenizer import load_tokenizer
from tests.unit.stream.tokenizers_for_tests import smollm2_folder


@pytest.fixture(scope="module")
def folder() -> Path:
    found = smollm2_folder()
    if found is None:
        pytest.skip("the default model is not on this machine")
    return found


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    # transformers imports torchvision, whose CUDA build does not load everywhere.
    from streamfill.engine.torchvision_fix import install

    install()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.slow
def test_ids_are_those_of_transformers(folder: Path, theirs: Any) -> None:
    """Appended in pieces, a text has the ids that AutoTokenizer gives the whole."""
    tokenizer = load_tokenizer(folder)
    for add_special_tokens in (False, True):
        stream = IncrementalTokenizer(tokenizer, add_special_tokens=add_special_tokens)
        for begin in range(0, len(SAMPLE), 7):
            stream.append(SAMPLE[begin : begin + 7])
        expected = theirs(SAMPLE, add_special_tokens=add_special_tokens)["input_ids"]
        assert list(stream.ids) == expected
    assert stream.is_incremental
    assert tokenizer.decode(stream.ids, skip_special_tokens=True) == theirs.decode(
        expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert tokenizer.special_ids >= set(theirs.all_special_ids)
    assert theirs.eos_token_id in tokenizer.eos_ids
    assert tokenizer.bos_id == theirs.bos_token_id


@pytest.mark.slow
def test_prompts_are_those_of_transformers(folder: Path, theirs: Any) -> None:
    """The chat template renders the same text, with and without the generation prompt."""
    chat = ChatTemplate.load(folder)
    assert chat is not None
    messages = [
        {"role": "user", "content": "What is 2+2? "},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "  Thanks\n"},
    ]
    for add_generation_prompt in (False, True):
        assert chat.render(
            messages, add_generation_prompt=add_generation_prompt
        ) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )


def test_the_core_imports_no_heavy_library() -> None:
    """The router's tokenizer, template and detokenizer need neither torch nor transformers."""
    code = (
        "import sys, streamfill.stream.chat, streamfill.stream.detokenizer, "
        "streamfill.stream.hf_tokenizer, streamfill.stream.sentencepiece_tokenizer, "
        "streamfill.stream.token_log, streamfill.stream.state; "
        "print(sorted({'torch', 'sglang', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": str(Path(__file__).parents[3] / "src")},
    )
    assert done.stdout.strip() == "[]"
