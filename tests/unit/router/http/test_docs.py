"""docs/http.md names everything that there is, and the limits that are in force."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from router import stream_call
from router.http import bodies, openapi, protocol, server, sockets
from router.http.chat import ChatRequest
from router.http.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from router.http.requests import MAX_CHOICES
from router.http.socket_messages import CancelFields, CommitFields, OpenFields, SegmentFields
from router.http.uploads import UploadQuery
from router.request_checks import MAX_LOGPROBS, MAX_STOP_STRINGS

PAGE = (Path(__file__).parents[4] / "docs" / "http.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "kind",
    [
        *(ChatRequest, CompletionRequest, UploadQuery),
        *(OpenFields, SegmentFields, CommitFields, CancelFields),
    ],
)
def test_every_field_is_named(kind: type[msgspec.Struct]) -> None:
    """The page speaks of each field that a client may send."""
    missing = [f.name for f in msgspec.structs.fields(kind) if f.name not in PAGE]
    assert not missing


def test_every_path_is_named() -> None:
    """And of each path."""
    missing = [
        path
        for path in openapi.description(with_keys=True)["paths"]
        if path.split("{")[0] not in PAGE
    ]
    assert not missing


@pytest.mark.parametrize(
    "words",
    [
        f"the head of a request | {protocol.HEAD_S:g} s, {server.MAX_HEAD_BYTES // 1024} KiB",
        f"{bodies.BODY_SILENCE_S:g} s, and {bodies.BODY_TOTAL_S:g} s for all of it",
        f"the first message on a WebSocket | {stream_call.FIRST_MESSAGE_S:g} s",
        f"a connection without a request | {server.KEEP_ALIVE_S} s",
        f"whose machine is gone | {server.UNREAD_S} s",
        f"is read\nfor {protocol.REST_S:g} s more",
        f"a completion has {DEFAULT_MAX_TOKENS} tokens",
        f"up to {MAX_CHOICES} answers",
        f"up to {MAX_LOGPROBS} others",
        f"a list of up to {MAX_STOP_STRINGS}",
        f"close code is {sockets.CLOSE_FAILED} plus",
    ],
)
def test_limits_are_those_of_the_code(words: str) -> None:
    """Each number of the page is the one that is in force."""
    assert words in PAGE
