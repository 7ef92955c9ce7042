"""Texts are cut at words so that they have a wanted number of tokens."""

from __future__ import annotations

import random

import pytest

from streamfill.models.default import default_model_folder, is_default_model_ready
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from streamfill.traces.fitting import count_tokens, fitted
from streamfill.traces.prose import Entry


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    if not is_default_model_ready():
        pytest.skip("the default model is not converted; `make setup` does it")
    return load_tokenizer(default_model_folder())


def test_lengths_are_right_to_two_tokens(tokenizer: TextTokenizer) -> None:
    """The number of tokens in the place where the text will stand is the wanted one, nearly always
    exactly."""
    generator = random.Random(1)
    differences = []
    for number in range(200):
        wanted = generator.randint(4, 200)
        text = fitted(tokenizer, Entry(1, str(number)).text, wanted, tail="\n\n")
        before, after = "Some words.\n\n", "The next."
        whole = count_tokens(tokenizer, before + text + "\n\n" + after)
        around = count_tokens(tokenizer, before, goes_on=True) + count_tokens(tokenizer, after)
        differences.append(whole - around - wanted)
    assert max(abs(each) for each in differences) <= 2
    assert differences.count(0) > 0.7 * len(differences)
    assert abs(sum(differences)) < 0.2 * len(differences)


def test_cuts_are_behind_words(tokenizer: TextTokenizer) -> None:
    """What is left is a beginning of the text that ends with a whole word."""
    for number in range(50):
        entry = Entry(2, str(number))
        cut = fitted(tokenizer, entry.text, 5 + 7 * number).removesuffix(" ...")
        whole = entry.text(len(cut) + 100)
        assert whole.startswith(cut)
        assert whole[len(cut)].isspace()


def test_at_least_one_word(tokenizer: TextTokenizer) -> None:
    """No text is empty, even where not a single token is wanted."""
    assert fitted(tokenizer, Entry(1, "a").text, 0)
