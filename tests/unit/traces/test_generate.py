"""Generated traces: what is in them, and that the shipped files are what their command makes."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shlex
from pathlib import Path

import pytest

from streamfill.cli import traces_generate
from streamfill.errors import ConfigError
from streamfill.messages.common import StreamMode
from streamfill.models.default import default_model_folder, is_default_model_ready
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from streamfill.traces.contents import NUM_RANKED, ranking_history
from streamfill.traces.files import TraceReader
from streamfill.traces.format import Request
from streamfill.traces.generate import matching_time_scale
from streamfill.traces.prose import Entry
from streamfill.traces.script import Scripts

FOLDER = Path(__file__).parents[3] / "traces"
SHIPPED = ("crawl-small", "ann-small")
MAX_PROMPT_TOKENS = 4000
MAX_DURATION_S = 330


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    if not is_default_model_ready():
        pytest.skip("the default model is not converted; `make setup` does it")
    return load_tokenizer(default_model_folder())


def generated(*words: str) -> int:
    parser = argparse.ArgumentParser()
    traces_generate.add_arguments(parser)
    return traces_generate.run(parser.parse_args(words))


def command_of(name: str) -> list[str]:
    """The words of the command that the page beside the file gives, behind `generate`."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(rf"streamfill traces generate (.*traces/{name}\.jsonl)", page)
    assert found is not None
    return shlex.split(found[1])


def read(path: Path) -> tuple[TraceReader, list[Request]]:
    with TraceReader(path) as reader:
        return reader, list(reader)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_traces_are_what_their_command_makes(
    name: str, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    """The documented command, cut to its first requests, makes the beginning of the shipped
    file, byte by byte."""
    assert tokenizer.vocab_size
    words = command_of(name)
    words[words.index("--requests") + 1] = "5"
    path = tmp_path / f"{name}.jsonl"
    words[words.index("--output") + 1] = str(path)
    assert generated(*words) == 0
    made = path.read_bytes()
    assert made.count(b'"type":"request"') == 5
    assert (FOLDER / f"{name}.jsonl").read_bytes().startswith(made)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_traces_are_small(name: str, tokenizer: TextTokenizer) -> None:
    """Two cores replay each in a few minutes, and no prompt is longer than some 4,000 tokens."""
    reader, requests = read(FOLDER / f"{name}.jsonl")
    assert len(requests) == int(command_of(name)[command_of(name).index("--requests") + 1])
    scripts = Scripts(reader.header, reader.documents, vocab_size=tokenizer.vocab_size)
    made = [scripts.script(request) for request in requests]
    assert max(each.arrival_s + each.commit_due_s for each in made) < MAX_DURATION_S
    for each in made:
        assert isinstance(each.prompt, str)
        ids = tokenizer.encode(each.prompt, add_special_tokens=False)
        assert len(ids) <= MAX_PROMPT_TOKENS
        assert not tokenizer.special_ids & set(ids)


def test_crawl_appends_pages_and_asks_at_the_end(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """The question comes with the last page, and the longest page has the answer."""
    assert tokenizer.vocab_size
    path = tmp_path / "c.jsonl"
    generated(
        "crawl", "--requests", "3", "--seed", "5", "--token-scale", "1/4", "--output", str(path)
    )
    reader, requests = read(path)
    assert reader.header.token_scale == 0.25
    for request in requests:
        assert request.mode is StreamMode.APPEND
        assert request.prefix == ""
        texts = [segment.text or "" for segment in request.segments]
        longest = max(texts, key=len)
        entry = Entry(5, f"{request.id}/{texts.index(longest)}")
        answers = {f"Question: {f.question}\nAnswer:": f.answer for f in entry.facts}
        assert answers[request.suffix] in longest


def test_each_update_changes_the_ranking(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """Updates are rankings of the same number of documents, and none equals the one before."""
    assert tokenizer.vocab_size
    path = tmp_path / "a.jsonl"
    generated(
        "ann", "--requests", "4", "--seed", "2", "--token-scale", "1/24", "--output", str(path)
    )
    _, requests = read(path)
    for request in requests:
        assert request.mode is StreamMode.UPDATE
        assert request.prefix
        assert request.suffix.startswith("Question: ")
        rankings = [segment.document_ids or () for segment in request.segments]
        assert all(len(set(ranking)) == NUM_RANKED for ranking in rankings)
        assert all(old != new for old, new in itertools.pairwise(rankings))
        assert rankings[-1] == tuple(f"{request.id}-d{n}" for n in range(NUM_RANKED))


def test_rankings_get_better() -> None:
    """What an update takes over keeps its order; what is gone does not come back."""
    for seed in range(50):
        history = ranking_history(8, random.Random(seed))
        for old, new in itertools.pairwise(history):
            kept = [each for each in old if each in new]
            assert kept == [each for each in new if each in old]
            assert old[: len(kept)] == kept
            assert len(kept) < NUM_RANKED
        seen: set[int] = set()
        for old, new in itertools.pairwise(history):
            seen |= set(old) - set(new)
            assert not seen & set(new)


def test_lengths_without_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only lengths need no tokenizer, and make short rows."""
    path = tmp_path / "lengths.jsonl.gz"
    assert generated("crawl", "--requests", "20", "--length-only", "--output", str(path)) == 0
    reader, requests = read(path)
    assert reader.header.name == "lengths"
    assert "segments.num_tokens" in reader.header.drawn
    assert all(segment.num_tokens for request in requests for segment in request.segments)
    assert "20 requests" in capsys.readouterr().out


def test_time_scale_keeps_the_ratio_of_prefill_to_gap(tmp_path: Path) -> None:
    """A machine that prefills slower gets longer gaps, and fewer tokens shorter ones."""
    assert matching_time_scale(1 / 24, 310) == pytest.approx(6.66, abs=0.01)
    path = tmp_path / "c.jsonl"
    words = ["crawl", "--requests", "1", "--length-only", "--output", str(path)]
    generated(*words, "--token-scale", "1/24", "--prefill-rate", "310")
    assert read(path)[0].header.time_scale == matching_time_scale(1 / 24, 310)
    generated(*words)
    assert read(path)[0].header.time_scale == pytest.approx(1.0)
    generated(*words, "--time-scale", "2.5")
    assert read(path)[0].header.time_scale == 2.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ann", "--length-only"), "--length-only = True: lengths alone"),
        (("crawl", "--requests", "0"), "--requests = 0: must be at least 1"),
        (("crawl", "--output-tokens", "0"), "--output-tokens = 0: must be at least 1"),
        (("crawl", "--token-scale", "1/0"), "--token-scale = '1/0': must be a number"),
        (("crawl", "--token-scale", "1e999"), "--token-scale = '1e999': must be a number"),
        (("crawl", "--token-scale", "-1"), "--token-scale = '-1': must be greater than 0"),
        (("crawl", "--time-scale", "slow"), "--time-scale = 'slow': must be a number"),
        (("crawl", "--prefill-rate", "nan"), "--prefill-rate = nan: must be greater"),
    ],
)
def test_wrong_options_are_explained(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """One line names the option, its value and the remedy; no file is written."""
    path = tmp_path / "t.jsonl"
    with pytest.raises(ConfigError) as caught:
        generated(*words, "--output", str(path))
    assert str(caught.value).startswith(message)
    assert not path.exists()


def test_the_header_says_what_was_drawn() -> None:
    """Every kind of field that is not measured stands in the shipped files' headers."""
    for name in SHIPPED:
        with (FOLDER / f"{name}.jsonl").open(encoding="utf-8") as file:
            header = json.loads(file.readline())
        assert {"arrival_ms", "segments", "segments.delay_ms", "prompt_tokens"} < set(
            header["drawn"]
        )
        assert "2604.16395" in header["source"]
