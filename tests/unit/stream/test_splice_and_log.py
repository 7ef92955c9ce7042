"""Splices, and the log that can bring a server up to date."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.stream.ids import SeqNo
from streamfill.stream.splice import (
    Splice,
    apply_splice,
    common_prefix_chars,
    lcp,
    splice_between,
    token_array,
)
from streamfill.stream.token_log import (
    MAX_HISTORY_SPLICES,
    MAX_HISTORY_TOKENS_PER_PROMPT_TOKEN,
    TokenLog,
)

IDS = st.lists(st.integers(0, 2), max_size=300)


def naive_lcp(a: str | list[int], b: str | list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@given(shared=IDS, a=IDS, b=IDS)
def test_lcp_is_the_common_prefix(shared: list[int], a: list[int], b: list[int]) -> None:
    """Arrays, lists and texts all give the length that counting one by one gives."""
    a, b = shared * 3 + a, shared * 3 + b
    expected = naive_lcp(a, b)
    assert lcp(token_array(a), token_array(b)) == expected
    assert lcp(a, b) == expected
    assert common_prefix_chars("".join(map(str, a)), "".join(map(str, b))) == expected


@given(old=IDS, new=IDS)
def test_a_splice_between_two_prompts_turns_one_into_the_other(
    old: list[int], new: list[int]
) -> None:
    """Applied to the old ids the splice gives the new ones, and it keeps all it can."""
    ids = token_array(old)
    splice = splice_between(ids, token_array(new))
    apply_splice(ids, splice)
    assert list(ids) == new
    assert splice.keep_tokens == naive_lcp(old, new)
    assert splice.num_tokens == len(new)


def test_a_splice_that_keeps_too_much_is_refused() -> None:
    """Keeping more than there is, or less than nothing, is an error; the ids are unharmed."""
    ids = token_array([1, 2])
    with pytest.raises(ValueError, match="keeps 3 tokens of 2"):
        apply_splice(ids, Splice(3, token_array()))
    assert list(ids) == [1, 2]
    with pytest.raises(ValueError, match="-1"):
        Splice(-1, token_array())


@settings(max_examples=60)
@given(prompts=st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=90), data=st.data())
def test_any_server_can_be_brought_up_to_date(
    prompts: list[list[int]], data: st.DataObject
) -> None:
    """Whatever a server has applied, `since` leads it to the current prompt, in bounded memory."""
    log = TokenLog()
    states = [token_array()]
    for number, prompt in enumerate(prompts, start=1):
        assert log.record(splice_between(log.ids, token_array(prompt))) == number
        states.append(log.ids[:])
    assert list(log.ids) == (prompts[-1] if prompts else [])
    seq = data.draw(st.integers(0, len(prompts)))
    server = states[seq]
    for logged in log.since(SeqNo(seq)):
        assert logged.seq > seq
        apply_splice(server, logged.splice)
        seq = logged.seq
    assert server == log.ids
    assert seq == log.last_seq
    kept = list(log._history)
    assert len(kept) <= MAX_HISTORY_SPLICES
    num_kept_tokens = sum(len(each.splice.new_token_ids) for each in kept)
    assert num_kept_tokens <= MAX_HISTORY_TOKENS_PER_PROMPT_TOKEN * log.num_tokens


def test_a_long_gap_is_answered_with_the_whole_prompt() -> None:
    """Behind the history there is one splice that keeps nothing."""
    log = TokenLog()
    for token in range(MAX_HISTORY_SPLICES + 10):
        log.record(Splice(token, token_array([token])))
    (only,) = log.since(SeqNo(3))
    assert only.seq == log.last_seq
    assert only.splice == Splice(0, log.ids)
    assert len(log.since(SeqNo(10))) == MAX_HISTORY_SPLICES
    assert log.since(log.last_seq) == []


@given(num_splices=st.integers(1, 80), seq=st.integers(0, 80), data=st.data())
def test_what_was_forgotten_is_made_up_for_by_the_whole_prompt(
    num_splices: int, seq: int, data: st.DataObject
) -> None:
    """Who has what was forgotten gets the rest, who lacks it everything."""
    log = TokenLog()
    for token in range(num_splices):
        log.record(Splice(token, token_array([token])))
    log.forget(SeqNo(seq))
    have = data.draw(st.integers(0, num_splices))
    logged = log.since(SeqNo(have))
    if have < min(seq, num_splices):
        assert [(each.seq, each.splice.keep_tokens) for each in logged] == [(log.last_seq, 0)]
    elif num_splices - have <= MAX_HISTORY_SPLICES:
        assert [each.splice.keep_tokens for each in logged] == list(range(have, num_splices))
    server = token_array(range(have))
    for each in logged:
        apply_splice(server, each.splice)
    assert server == log.ids
    assert sum(len(each.splice.new_token_ids) for each in log._history) == log._history_tokens


def test_a_number_that_was_never_given_out_is_refused() -> None:
    """A server cannot be ahead of the log."""
    with pytest.raises(ValueError, match=r"1 is outside 0\.\.0"):
        TokenLog().since(SeqNo(1))
