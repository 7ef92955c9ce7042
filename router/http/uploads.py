"""``POST /v1/streams``, or PUT: the body is the context, computed while it comes; its end commits.

For programs that can write into an HTTP request and little more, such as ``curl -T -``. How the
answer is generated is said in the query string. The body is text in UTF-8 and may be cut anywhere.
A body that is silent is given up by the core, as any stream that nobody touches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request

from router import request_checks as checks
from router.http.answers import Answer
from router.http.bodies import TextUpload
from router.http.choices import Choice
from router.http.completion_replies import CompletionForm
from router.http.fields import RequestFields, convert
from router.http.logprobs import LogprobWriter
from router.http.replies import new_head
from router.http.requests import ServedModel
from router.http.sampling import commit_options, open_options
from router.interface import CommitOptions, Segment, StreamHandle, StreamManager

_LISTS = frozenset({"stop", "stop_token_ids"})
"""Names that may be given several times."""


class UploadQuery(RequestFields, frozen=True, kw_only=True):
    """The query string."""

    model: str | None = None
    stream: bool | None = None
    """Answer as server-sent events."""
    include_usage: bool | None = None
    """In the events."""
    logprobs: int | None = None
    chat: bool | None = None
    """The body is what a user says, put into the model's chat template."""
    system: str | None = None
    """What the system says before, in a chat."""
    final_text: str | None = None
    """Put behind the body, in one step with the commit; a question, for example."""


def upload_answer(request: Request, manager: StreamManager) -> Answer:
    """What answers an upload.

    Raises:
        StreamError: INVALID_ARGUMENT, names the field of the query string and its value; NOT_FOUND,
            another model.
    """
    query = convert(UploadQuery, _values(request.query_params), strict=False)
    info = manager.info()
    model = ServedModel.of(info)
    model.check(query.model)
    if query.system is not None and not query.chat:
        raise checks.wrong("system", query.system, "left out without chat=true")
    includes_usage = bool(query.include_usage)
    head = new_head("stream", query.model or model.name, includes_usage=includes_usage)
    commit = commit_options(query, vocab_size=info.vocab_size, num_logprobs=query.logprobs)
    if query.final_text:
        commit = replace(commit, final_segment=Segment(text=query.final_text))
    opening = replace(open_options(query, head.id), messages=_first_messages(query))
    upload = TextUpload(request.receive)
    return Answer(
        manager=manager,
        choices=[Choice(opening=opening, feed=partial(_feed, upload=upload, commit=commit))],
        form=CompletionForm(head, LogprobWriter(manager.token_bytes)),
        request_id=head.id,
        streams=bool(query.stream),
        includes_usage=includes_usage,
        gone=upload.gone,
    )


async def _feed(handle: StreamHandle, *, upload: TextUpload, commit: CommitOptions) -> None:
    async for text in upload.pieces():
        await handle.append(Segment(text=text))
    await handle.commit(commit)


def _first_messages(query: UploadQuery) -> Sequence[Mapping[str, Any]] | None:
    if not query.chat:
        return None
    before = [] if query.system is None else [{"role": "system", "content": query.system}]
    return [*before, {"role": "user", "content": ""}]


def _values(params: QueryParams) -> dict[str, Any]:
    """A name that is given once too often goes on as a list, which no other field takes."""
    values: dict[str, Any] = {}
    for name in params:
        given = params.getlist(name)
        values[name] = given if name in _LISTS or len(given) > 1 else given[0]
    return values
