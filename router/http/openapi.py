"""The description of this API for programs: OpenAPI 3.1, made of the structs that are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

import streamfill
from router.http.chat import ChatRequest
from router.http.chat_replies import ChatChunk, ChatReply
from router.http.completion_replies import CompletionReply
from router.http.completions import CompletionRequest
from router.http.errors import ErrorReply
from router.http.models import ModelCard, ModelList, ReadyReply
from router.http.uploads import UploadQuery

_REF = "#/components/schemas/{name}"
_KINDS = (
    *(ChatRequest, ChatReply, ChatChunk, CompletionRequest, CompletionReply),
    *(ModelCard, ModelList, ReadyReply, ErrorReply, UploadQuery),
)
_ERRORS = {
    400: "A value that can never be accepted; `param` names the field.",
    404: "Another model than the one that is served.",
    408: "The body did not come to its end in time, or the stream was silent for too long.",
    413: "The body is larger than `router.max_body_bytes`.",
    429: "A limit of this cluster is reached; try again, see `Retry-After`.",
    500: "A bug; the router's log has more.",
    503: "No server to do it, or the router is shutting down; see `Retry-After`.",
    504: "The request's `deadline_s` is over.",
}


def description() -> dict[str, Any]:
    """The whole document."""
    _, schemas = msgspec.json.schema_components(_KINDS, ref_template=_REF)
    query = schemas.pop("UploadQuery")
    parameters = [
        {
            "name": name,
            "in": "query",
            "schema": schema,
            "description": schema.get("description", ""),
        }
        for name, schema in query["properties"].items()
    ]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "streamfill",
            "version": streamfill.__version__,
            "description": "The OpenAI API for one model, and contexts that arrive over time.",
        },
        "paths": {
            "/health": {"get": _operation("The router lives", {"200": _json_of({})})},
            "/ready": {
                "get": _operation(
                    "Whether requests can be served now",
                    {"200": _json_of(_ref("ReadyReply")), "503": _json_of(_ref("ReadyReply"))},
                )
            },
            "/openapi.json": {"get": _operation("This description", {"200": _json_of({})})},
            "/v1/models": {
                "get": _operation("The served model", {"200": _json_of(_ref("ModelList"))})
            },
            "/v1/models/{model}": {
                "get": _operation(
                    "The served model, by its name",
                    {"200": _json_of(_ref("ModelCard")), "404": _error(404)},
                    parameters=[
                        {
                            "name": "model",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string"},
                        }
                    ],
                )
            },
            "/v1/chat/completions": {
                "post": _completion("Answer a chat", "ChatRequest", "ChatReply", "ChatChunk")
            },
            "/v1/completions": {
                "post": _completion(
                    "Go on with a text", "CompletionRequest", "CompletionReply", "CompletionReply"
                )
            },
            "/v1/streams": {
                "get": _operation(
                    "A stream over a WebSocket; docs/http.md has its messages",
                    {"101": {"description": "Switched to WebSocket"}, "426": _error(426)},
                ),
                "post": _operation(
                    "Context that is computed while it is uploaded; the end of the body commits",
                    _answers("CompletionReply", "CompletionReply"),
                    parameters=parameters,
                    requestBody={
                        "required": True,
                        "content": {"*/*": {"schema": {"type": "string"}}},
                        "description": "Text in UTF-8, in chunks that may be cut anywhere",
                    },
                ),
            },
        },
        "components": {"schemas": schemas},
    }


def _completion(summary: str, request: str, reply: str, chunk: str) -> dict[str, Any]:
    return _operation(
        summary,
        _answers(reply, chunk),
        requestBody={
            "required": True,
            "content": {"application/json": {"schema": _ref(request)}},
        },
    )


def _operation(summary: str, responses: dict[str, Any], **more: object) -> dict[str, Any]:
    return {"summary": summary, "responses": responses, **more}


def _answers(reply: str, chunk: str) -> dict[str, Any]:
    answer = _json_of(_ref(reply))
    answer["content"]["text/event-stream"] = {
        "schema": {"type": "string"},
        "x-event-schema": _ref(chunk),
    }
    return {"200": answer, **{str(status): _error(status) for status in _statuses()}}


def _statuses() -> Sequence[int]:
    return tuple(_ERRORS)


def _error(status: int) -> dict[str, Any]:
    found = _json_of(_ref("ErrorReply"))
    return {**found, "description": _ERRORS.get(status, "Refused")}


def _json_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "Done", "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}
