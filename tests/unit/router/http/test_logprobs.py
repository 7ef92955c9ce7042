"""How tokens are named beside their log probabilities."""

from __future__ import annotations

from router.http.logprobs import LogprobWriter
from router.interface import TokenEvent
from streamfill.messages.common import TokenLogprob

TEXTS = {1: b"a", 2: b"b", 3: b"a", 4: "€".encode()[:1]}
"""3 is written as 1 is, as bytes of a SentencePiece model are; what is not here has no text, as the
padding of a model's vocabulary."""
WRITER = LogprobWriter(lambda token_id: TEXTS.get(token_id, b""))


def _token(token_id: int, logprob: float, **top: float) -> TokenEvent:
    others = tuple((int(name.removeprefix("t")), value) for name, value in top.items())
    found = TokenLogprob(token_id=token_id, logprob=logprob, top=others)
    return TokenEvent(index=0, token_id=token_id, text="", logprob=found)


def _top(event: TokenEvent) -> dict[str, float]:
    written = WRITER.completion([event], 0)
    assert written is not None
    return written.top_logprobs[0]


def test_tokens_without_a_text_are_told_apart_in_completions() -> None:
    """By their ids; otherwise all would be one, under an empty key."""
    event = _token(100, -1.0, t100=-1.0, t101=-2.0, t1=-3.0, t4=-4.0)
    assert _top(event) == {
        "token_id:100": -1.0,
        "token_id:101": -2.0,
        "a": -3.0,
        "bytes:\\xe2": -4.0,
    }
    written = WRITER.completion([event], 0)
    assert written is not None
    assert written.tokens == ["token_id:100"]


def test_of_tokens_that_are_written_alike_the_likeliest_stays() -> None:
    """Or the token itself, which is always among them."""
    assert _top(_token(2, -3.0, t1=-0.5, t3=-1.5, t2=-3.0)) == {"b": -3.0, "a": -0.5}
    assert _top(_token(3, -1.5, t1=-0.5, t2=-2.0)) == {"a": -1.5, "b": -2.0}


def test_chats_list_tokens_without_a_text() -> None:
    """A list needs no keys."""
    written = WRITER.chat([_token(100, -1.0, t100=-1.0, t101=-2.0)])
    assert written is not None
    (content,) = written.content
    assert (content.token, content.bytes) == ("", [])
    assert [(top.token, top.logprob) for top in content.top_logprobs] == [("", -1.0), ("", -2.0)]
