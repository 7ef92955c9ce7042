"""The client's hint when its next piece comes: from the wire to the server, and what is refused."""

from __future__ import annotations

import math

import pytest

from router import service_requests as requests
from streamfill.api import requests as client_requests
from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import InvalidArgumentError


@pytest.mark.parametrize("hint", [None, 0.0, 2.5])
@pytest.mark.parametrize(
    "content",
    [
        {"text": "a"},
        {"text": b"a"},
        {"token_ids": [1]},
        {"messages": [{"role": "user", "content": "a"}]},
    ],
)
def test_hint_arrives_with_any_kind_of_content(
    content: dict[str, object], hint: float | None
) -> None:
    arguments = {"text": None, "token_ids": None, "messages": None, **content}
    message = client_requests.segment(*arguments.values(), hint)  # type: ignore[arg-type,call-arg]
    assert requests.segment(message, 100).next_in_s == hint


@pytest.mark.parametrize("hint", [-0.1, math.inf, math.nan])
def test_times_that_cannot_be_are_refused(hint: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"next_in_s is .*; it must be 0 or more"):
        requests.segment(pb.Segment(text="a", next_in_s=hint), 100)


@pytest.mark.parametrize("keep_s", [0.0, 30.0, 3600.0])
def test_time_to_live_arrives_with_the_commit(keep_s: float) -> None:
    assert requests.commit_options(pb.Commit(keep_s=keep_s), 100).keep_s == keep_s
    assert requests.commit_options(pb.Commit(), 100).keep_s == 0.0


@pytest.mark.parametrize("keep_s", [-1.0, 3600.1, math.nan])
def test_times_to_live_that_cannot_be_are_refused(keep_s: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"commit.keep_s is .*between 0 and 3600"):
        requests.commit_options(pb.Commit(keep_s=keep_s), 100)
