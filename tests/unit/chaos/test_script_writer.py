"""Scripts are drawn from a seed, do everything, and come to the prompt that they say."""

from __future__ import annotations

from collections import Counter

import pytest

from streamfill.models.tiny import make_tiny_model
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from tests.chaos.prompts import PromptBank
from tests.chaos.script_writer import Habits, ScriptWriter
from tests.chaos.scripts import ENDS_OPEN, Fate, Form, Prank, Script
from tests.support.stories import Story

NUM_SCRIPTS = 1500
LONGEST_TOKENS = 200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(make_tiny_model(tmp_path_factory.mktemp("model")))


def writer(tokenizer: TextTokenizer, seed: int) -> ScriptWriter:
    bank = PromptBank(tokenizer, seed, num_prompts=40, longest_tokens=LONGEST_TOKENS)
    return ScriptWriter(bank, seed, Habits())


@pytest.fixture(scope="module")
def scripts(tokenizer: TextTokenizer) -> list[Script]:
    return list(map(writer(tokenizer, 1).script, range(NUM_SCRIPTS)))


def test_repeatable(tokenizer: TextTokenizer, scripts: list[Script]) -> None:
    """The same seed and number give the same script, whatever was drawn before; others differ."""
    again = writer(tokenizer, 1)
    assert [again.script(number) for number in (700, 3)] == [scripts[700], scripts[3]]
    assert writer(tokenizer, 2).script(3) != scripts[3]


def test_everything_occurs(scripts: list[Script]) -> None:
    """Every fate in every form that can have it, every prank, and every way of the prompt."""
    assert {script.fate for script in scripts} == set(Fate)
    assert {script.form for script in scripts if script.fate is Fate.FINISHED} == set(Form)
    assert {script.form for script in scripts if script.fate is Fate.HALF_CLOSED} == {Form.BIDI}
    pranks = {
        prank
        for script in scripts
        for prank in (
            script.before_commit,
            script.after_commit,
            *(prank for step in script.steps for prank in (step.before, step.after)),
        )
    }
    assert pranks == {None, *Prank}
    ways = Counter((s.mode, s.final is None, s.is_greedy) for s in scripts)
    assert len(ways) == 8
    assert len({script.deadline_s is None for script in scripts}) == 2
    assert len({script.priority for script in scripts}) > 2


def test_prompts_are_what_arrives(tokenizer: TextTokenizer, scripts: list[Script]) -> None:
    """All pieces of an append stream, or the last of an update stream, are the prompt."""
    for script in scripts:
        pieces = [step.piece for step in script.steps]
        pieces += [] if script.final is None else [script.final]
        story = Story(
            mode="append" if script.form is Form.ONE_SHOT else script.mode,
            pieces=tuple(pieces),
            gaps_s=(0.0,) * len(pieces),
            commit_brings_last=script.final is not None,
        )
        assert tuple(story.token_ids(tokenizer)) == script.prompt_ids, script.describe()


def test_limits(scripts: list[Script]) -> None:
    """Nothing is longer than a pool has room for, and fates come when they can."""
    for script in scripts:
        assert 0 < len(script.prompt_ids) < 2 * LONGEST_TOKENS
        if script.fate in ENDS_OPEN:
            assert script.num_before <= len(script.steps)
        if script.form is Form.UNARY:
            assert script.before_commit is not Prank.SECOND_OPEN
        if script.fate in (Fate.DEADLINE_ANY, Fate.DEADLINE_OPEN):
            assert script.deadline_s is not None
            assert script.deadline_s < 10
