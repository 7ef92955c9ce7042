"""The ASGI application: which path leads where. Knows Starlette, and nothing of sockets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from http import HTTPStatus

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from router.access.guarded import GuardedManager
from router.access.key_ring import KeyRing
from router.http import openapi
from router.http.answers import Answer
from router.http.bodies import read_body
from router.http.chat import ChatRequest, plan_chat
from router.http.chat_replies import ChatForm
from router.http.completion_replies import CompletionForm
from router.http.completions import CompletionRequest, plan_completion
from router.http.errors import model_not_found, on_bug, on_http_exception, on_stream_error
from router.http.fields import parse_body
from router.http.keys import KeyGuard
from router.http.logprobs import LogprobWriter
from router.http.models import ModelCard, ModelList, ReadyReply
from router.http.origins import OriginGuard
from router.http.refusals import RefusalCounter
from router.http.replies import ReplyHead, new_head
from router.http.requests import AnswerPlan, CompletionFields, ServedModel
from router.http.sampling import MAX_REQUEST_ID_CHARS
from router.http.sockets import serve_socket
from router.http.status import (
    EVENTS_PATH,
    PAGE_PATH,
    StatusEvents,
    StatusPage,
    status_events,
)
from router.http.uploads import upload_answer
from router.interface import StreamManager
from router.refusals import Note, not_counted
from streamfill.errors import StreamError


def make_app(
    manager: StreamManager,
    max_body_bytes: int,
    allow_origins: Sequence[str],
    keys: KeyRing | None = None,
    on_refused: Note = not_counted,
    *,
    status_page: bool = True,
) -> ASGIApp:
    """The application on top of one core.

    Args:
        manager: the core.
        max_body_bytes: of an ordinary request.
        allow_origins: of web pages that may use it; ``*`` stands for all.
        keys: that are asked for. None: none are.
        on_refused: called for each refusal.
        status_page: whether there is one.
    """
    guarded = manager if keys is None else GuardedManager(manager)
    endpoints = _Endpoints(guarded, max_body_bytes, on_refused, with_keys=keys is not None)
    return Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/ready", endpoints.ready),
            Route("/openapi.json", endpoints.describe),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{model:path}", endpoints.model),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.completion, methods=["POST"]),
            Route("/v1/streams", endpoints.upload, methods=["POST", "PUT"]),
            Route("/v1/streams", endpoints.no_socket),
            WebSocketRoute("/v1/streams", endpoints.socket),
            *(endpoints.status_routes() if status_page else ()),
        ],
        middleware=[
            Middleware(RefusalCounter, note=on_refused),
            Middleware(OriginGuard, allow_origins=allow_origins),
            Middleware(
                CORSMiddleware,
                allow_origins=allow_origins,
                allow_methods=["GET", "POST", "PUT"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            ),
            *([] if keys is None else [Middleware(KeyGuard, keys=keys)]),
        ],
        exception_handlers={
            StreamError: on_stream_error,
            HTTPException: on_http_exception,
            Exception: on_bug,
        },
    )


class _Endpoints:
    """One method for each route."""

    def __init__(
        self,
        manager: StreamManager,
        max_body_bytes: int,
        on_refused: Note,
        *,
        with_keys: bool,
    ) -> None:
        self._on_refused = on_refused
        self._manager = manager
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time())
        self._description = msgspec.json.encode(openapi.description(with_keys=with_keys))

    async def health(self, request: Request) -> Response:
        """The process lives."""
        return Response(b"{}", media_type="application/json")

    async def ready(self, request: Request) -> Response:
        """As gRPC's health; see `readiness`."""
        info = self._manager.info()
        status = HTTPStatus.OK if info.ready else HTTPStatus.SERVICE_UNAVAILABLE
        return _json(ReadyReply(ready=info.ready, reason=info.ready_reason), status)

    async def describe(self, request: Request) -> Response:
        """What there is, for programs."""
        return Response(self._description, media_type="application/json")

    async def models(self, request: Request) -> Response:
        """The one model."""
        return _json(ModelList(data=[self._card()]))

    async def model(self, request: Request) -> Response:
        """The one model, asked for by a name of it."""
        wanted = str(request.path_params["model"])
        card = self._card()
        if wanted.strip("/") not in (card.id, card.root.strip("/")):
            raise model_not_found(wanted, card.id)
        return _json(card)

    async def chat(self, request: Request) -> Answer:
        """``/v1/chat/completions``"""
        body = await read_body(request, self._max_body_bytes)
        fields = await parse_body(ChatRequest, body)
        head = self._head("chatcmpl", fields)
        plan = plan_chat(fields, _request_id(request, head), self._manager.info())
        return self._answer(plan, head, ChatForm(head, LogprobWriter(self._manager.token_bytes)))

    async def completion(self, request: Request) -> Answer:
        """``/v1/completions``"""
        body = await read_body(request, self._max_body_bytes)
        fields = await parse_body(CompletionRequest, body)
        head = self._head("cmpl", fields)
        plan = plan_completion(fields, _request_id(request, head), self._manager.info())
        form = CompletionForm(head, LogprobWriter(self._manager.token_bytes))
        return self._answer(plan, head, form)

    async def upload(self, request: Request) -> Answer:
        """``POST /v1/streams``, or PUT, which is what ``curl -T`` says."""
        return upload_answer(request, self._manager)

    async def no_socket(self, request: Request) -> Response:
        """``GET /v1/streams`` of a client that does not ask for a WebSocket."""
        detail = "GET /v1/streams is a WebSocket; to upload a context, use POST"
        headers = {"upgrade": "websocket", "connection": "upgrade"}
        raise HTTPException(HTTPStatus.UPGRADE_REQUIRED, detail, headers)

    async def socket(self, socket: WebSocket) -> None:
        """``GET /v1/streams``, upgraded."""
        await serve_socket(socket, self._manager, self._on_refused)

    def status_routes(self) -> Sequence[Route]:
        """The page, and what it shows."""
        page = StatusPage()

        async def show(request: Request) -> Response:
            return page.response()

        async def events(request: Request) -> StatusEvents | Response:
            return status_events(request, self._manager)

        return (Route(PAGE_PATH, show), Route(EVENTS_PATH, events))

    def _head(self, prefix: str, fields: CompletionFields) -> ReplyHead:
        options = fields.stream_options
        return new_head(
            prefix,
            fields.model or ServedModel.of(self._manager.info()).name,
            includes_usage=options is not None and bool(options.include_usage),
        )

    def _answer(self, plan: AnswerPlan, head: ReplyHead, form: ChatForm | CompletionForm) -> Answer:
        return Answer(
            manager=self._manager,
            choices=plan.choices,
            form=form,
            request_id=head.id,
            streams=plan.streams,
            includes_usage=plan.includes_usage,
        )

    def _card(self) -> ModelCard:
        info = self._manager.info()
        model = ServedModel.of(info)
        return ModelCard(
            id=model.name,
            root=model.path,
            created=self._created,
            max_model_len=info.context_tokens,
        )


def _request_id(request: Request, head: ReplyHead) -> str:
    """What the client calls its request in the usual header, or what we call it."""
    return request.headers.get("x-request-id", "")[:MAX_REQUEST_ID_CHARS] or head.id


def _json(data: msgspec.Struct, status: int = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json")
