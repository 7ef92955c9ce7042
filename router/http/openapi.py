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
from router.http.errors import CHALLENGE, ErrorReply
from router.http.models import ModelCard, ModelList, ReadyReply
from router.http.uploads import UploadQuery

_REF = "#/components/schemas/{name}"
_KINDS = (
    *(ChatRequest, ChatReply, ChatChunk, CompletionRequest, CompletionReply),
    *(ModelCard, ModelList, ReadyReply, ErrorReply, UploadQuery),
)
_ERRORS = {
    400: "A value that can never be accepted; `param` names the field.",
    401: "No API key, or none that is known, where the router asks for keys.",
    403: "A web page of an origin that is not allowed, or a key that may not do this.",
    404: "Another model than the one that is served.",
    408: "The body did not come to its end in time, or the stream was silent for too long.",
    413: "The body is larger than `router.max_body_bytes`.",
    429: "A limit of this cluster, or of the API key, is reached; try again, see `Retry-After`.",
    500: "A bug; the router's log has more.",
    503: "No server to do it, or the router is shutting down; see `Retry-After`.",
    504: "The request's `deadline_s` is over.",
}


_SCHEME = "api_key"
_HEADERS = {
    401: {"WWW-Authenticate": (CHALLENGE, "string")},
    429: {"Retry-After": ("Seconds until it may be tried again.", "integer")},
    503: {"Retry-After": ("Seconds until it may be tried again.", "integer")},
}
_OF_EVERY_REQUEST = (401, 403, 429)
"""Said before anybody looks at what is asked for; 403 of a web page's origin also by probes."""


def description(*, with_keys: bool) -> dict[str, Any]:
    """The whole document.

    Args:
        with_keys: API keys are asked for.
    """
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
        "security": [{_SCHEME: []}] if with_keys else [],
        "paths": {
            "/health": {"get": _probe("The router lives", {"200": _json_of({})})},
            "/ready": {
                "get": _probe(
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
                "post": _upload(parameters),
                "put": _upload(parameters),
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                _SCHEME: {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key of `streamfill keys add`, where the router asks for keys",
                }
            },
        },
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


def _upload(parameters: list[dict[str, Any]]) -> dict[str, Any]:
    return _operation(
        "Context that is computed while it is uploaded; the end of the body commits",
        _answers("CompletionReply", "CompletionReply"),
        parameters=parameters,
        requestBody={
            "required": True,
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "description": "Text in UTF-8, in chunks that may be cut anywhere; of any type",
        },
    )


def _operation(summary: str, responses: dict[str, Any], **more: object) -> dict[str, Any]:
    refusals = {str(status): _error(status) for status in _OF_EVERY_REQUEST}
    return {"summary": summary, "responses": {**refusals, **responses}, **more}


def _probe(summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    """Of orchestrators, which carry no keys."""
    return {
        "summary": summary,
        "responses": {**responses, "403": _error(403)},
        "security": [],
    }


def _answers(reply: str, chunk: str) -> dict[str, Any]:
    answer = _json_of(_ref(reply))
    # Without a schema: version 3.1 has no words for events, and some read one as that of each.
    answer["content"]["text/event-stream"] = {"x-event-schema": _ref(chunk)}
    return {"200": answer, **{str(status): _error(status) for status in _statuses()}}


def _statuses() -> Sequence[int]:
    return tuple(_ERRORS)


def _error(status: int) -> dict[str, Any]:
    found = {**_json_of(_ref("ErrorReply")), "description": _ERRORS.get(status, "Refused")}
    headers = {
        name: {"description": text, "required": True, "schema": {"type": kind}}
        for name, (text, kind) in _HEADERS.get(status, {}).items()
    }
    return {**found, "headers": headers} if headers else found


def _json_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "Done", "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}
