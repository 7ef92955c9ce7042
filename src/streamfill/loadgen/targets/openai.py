"""Any server with OpenAI's interface, as a target.

Text and token ids go to ``/v1/completions``, chat messages to ``/v1/chat/completions``, both
streamed, greedy. What not every server knows is asked for and left out for good once a server
refuses it by name: ``ignore_eos`` (SGLang, vLLM), ``return_token_ids`` (vLLM), ``stream_options``.

Times of tokens: an event that brings token ids or log probabilities counts as so many tokens; any
other event with text counts as one. A server that puts several tokens into one event without saying
so therefore has fewer times than its ``usage`` has tokens, and so has an answer with tokens that
have no text; how long an answer is says the ``usage``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any, Final

from streamfill.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    StreamError,
    UnavailableError,
)
from streamfill.loadgen.target import Ask, Reply, ServerAccount, TargetFacts, TargetStream
from streamfill.loadgen.targets.sse import HttpEndpoint, HttpStatusError, as_stream_error
from streamfill.messages.common import StreamMode
from streamfill.models.describe import describe_model
from streamfill.traces.format import ChatMessage
from streamfill.traces.script import Content

SMALLEST_VOCABULARY: Final = 32_000
"""Token ids below this are in the vocabulary of every common model (Llama 2 has the smallest)."""

_OPTIONAL_FIELDS: Final[Mapping[str, Any]] = {
    "ignore_eos": True,
    "return_token_ids": True,
    "stream_options": {"include_usage": True},
}
_FLUSH_PATHS: Final = ("/flush_cache", "/reset_prefix_cache")
"""SGLang's, and vLLM's with ``VLLM_SERVER_DEV_MODE=1``."""
FLUSH_TIMEOUT_S: Final = 15.0
"""SGLang's prefill server frees the KV of a request a moment after its hand-off; seen to take
seconds on a machine with seven processes for each core."""
_FLUSH_POLL_S: Final = 0.2
_NO_SUCH_PATH: Final = frozenset({404, 405, 501})


class OpenAITarget:
    """One endpoint, any number of requests at the same time; has no streams."""

    has_streams = False

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        name: str = "openai",
        *,
        model_path: Path | None = None,
        vocab_size: int = SMALLEST_VOCABULARY,
    ) -> None:
        """
        Args:
            base_url: with or without ``/v1`` at its end.
            model: name to ask for; the first that the server lists by default.
            api_key: sent as a bearer token, never shown.
            model_path: folder of the same model, where there is one: tells the vocabulary.
            vocab_size: of the model, where there is no folder.
        """
        self.name = name
        self._endpoint = HttpEndpoint(base_url.rstrip("/").removesuffix("/v1"), api_key=api_key)
        self._model = model
        self._model_path = model_path
        self._vocab_size = vocab_size
        self._optional = dict(_OPTIONAL_FIELDS)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Fields that the server refused so far, for the report of a run."""
        return tuple(name for name in _OPTIONAL_FIELDS if name not in self._optional)

    async def facts(self) -> TargetFacts:
        """As ``Target.facts``: the model of that name, or the first that the server lists."""
        try:
            listed = _models(await self._endpoint.get("/v1/models"))
        except HttpStatusError as error:
            raise as_stream_error(error, self._endpoint.base_url) from error
        if self._model is None:
            if not listed:
                raise UnavailableError(f"{self._endpoint.base_url} lists no model")
            self._model = next(iter(listed))
        limit = listed.get(self._model, {}).get("max_model_len")
        context_tokens = limit if isinstance(limit, int) else 0
        vocab_size = self._vocab_size
        if self._model_path is not None:
            described = describe_model(self._model_path)
            vocab_size = described.vocab_size
            context_tokens = context_tokens or described.context_length_tokens
        return TargetFacts(model=self._model, vocab_size=vocab_size, context_tokens=context_tokens)

    async def generate(self, prompt: Content, ask: Ask) -> Reply:
        """As ``Target.generate``."""
        if self._model is None:
            await self.facts()
        path, body = _question(prompt)
        body |= {
            "model": self._model,
            "max_tokens": ask.max_output_tokens,
            "temperature": 0,
            "stream": True,
        }
        while True:
            optional = dict(self._optional)
            try:
                return await self._answer(path, body | optional)
            except HttpStatusError as error:
                refused = [name for name in optional if name in error.text]
                if error.status not in {400, 422} or not refused:
                    raise as_stream_error(error, self._endpoint.base_url) from error
                for name in refused:
                    self._optional.pop(name, None)

    def open(self, mode: StreamMode, ask: Ask) -> AbstractAsyncContextManager[TargetStream]:
        """Always raises ``InvalidArgumentError``: the interface has no streams."""
        raise InvalidArgumentError(f"{self.name} cannot take a prompt in pieces")

    async def empty_caches(self) -> None:
        """As ``Target.empty_caches``, by SGLang's or vLLM's own call."""
        for path in _FLUSH_PATHS:
            if await flush(self._endpoint, path):
                return
        raise FailedPreconditionError(
            f"{self._endpoint.base_url} has no call that empties its prefix cache "
            "(SGLang has /flush_cache; vLLM has /reset_prefix_cache where it was started with "
            "VLLM_SERVER_DEV_MODE=1)"
        )

    async def counters(self) -> dict[str, int]:
        """Empty: the interface has none."""
        return {}

    async def close(self) -> None:
        """As ``Target.close``."""
        await self._endpoint.close()

    async def _answer(self, path: str, body: Mapping[str, Any]) -> Reply:
        answer = _Answer()
        async with aclosing(self._endpoint.events(path, body)) as events:
            async for at_s, event in events:
                try:
                    answer.add(at_s, event)
                except (KeyError, TypeError, AttributeError, IndexError) as error:
                    shown = str(event)[:80]
                    raise UnavailableError(f"the server sent an unknown event: {shown}") from error
        return answer.reply()


async def flush(endpoint: HttpEndpoint, path: str) -> bool:
    """Has a server empty its caches; False where it knows no such call.

    A server may still be busy with the end of a request whose answer is complete, so that it is
    asked again for a while.

    Raises:
        UnavailableError: it refuses.
    """
    deadline_s = time.monotonic() + FLUSH_TIMEOUT_S
    while True:
        try:
            await endpoint.post(path, {})
        except HttpStatusError as error:
            if error.status in _NO_SUCH_PATH:
                return False
            if time.monotonic() > deadline_s:
                message = f"{endpoint.base_url}{path} answered {error.status}: {error.text}"
                raise UnavailableError(message) from error
            await asyncio.sleep(_FLUSH_POLL_S)
        else:
            return True


class _Answer:
    """Puts the events of one answer together."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._has_ids = True
        self._times_s: list[float] = []
        self._usage: Mapping[str, Any] = {}

    def add(self, at_s: float, event: Mapping[str, Any]) -> None:
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            text, num_tokens = self._piece(choice)
            self._texts.append(text)
            self._times_s.extend([at_s] * num_tokens)

    def reply(self) -> Reply:
        usage = self._usage
        details = usage.get("prompt_tokens_details") or {}
        num_prompt_tokens = _number(usage.get("prompt_tokens"))
        return Reply(
            text="".join(self._texts),
            token_ids=tuple(self._ids) if self._has_ids and self._ids else None,
            token_times_s=tuple(self._times_s),
            account=ServerAccount(
                num_prompt_tokens=num_prompt_tokens,
                num_output_tokens=_number(usage.get("completion_tokens")),
                num_cached_tokens=_number(details.get("cached_tokens")),
            ),
        )

    def _piece(self, choice: Mapping[str, Any]) -> tuple[str, int]:
        delta = choice.get("delta") or {}
        # Models that think first answer in a field of its own; its tokens are output as well.
        text = "".join(
            part
            for part in (choice.get("text"), delta.get("reasoning_content"), delta.get("content"))
            if part
        )
        ids = choice.get("token_ids")
        if ids:
            self._ids.extend(ids)
            return text, len(ids)
        num_tokens = _num_logprobs(choice.get("logprobs")) or (1 if text else 0)
        if num_tokens:
            self._has_ids = False
        return text, num_tokens


def _question(prompt: Content) -> tuple[str, dict[str, Any]]:
    if isinstance(prompt, str):
        return "/v1/completions", {"prompt": prompt}
    if prompt and all(isinstance(part, ChatMessage) for part in prompt):
        return "/v1/chat/completions", {"messages": [_message(part) for part in prompt]}
    return "/v1/completions", {"prompt": list(prompt)}


def _message(part: int | ChatMessage) -> dict[str, str]:
    assert isinstance(part, ChatMessage)
    return {"role": part.role, "content": part.content}


def _models(answer: Any) -> dict[str, Mapping[str, Any]]:
    try:
        cards: Iterable[Mapping[str, Any]] = answer["data"]
        return {str(card["id"]): card for card in cards}
    except (KeyError, TypeError) as error:
        raise _no_list(answer) from error


def _no_list(answer: Any) -> StreamError:
    return UnavailableError(f"/v1/models answered with no list of models: {str(answer)[:80]!r}")


def _num_logprobs(logprobs: Any) -> int:
    if not isinstance(logprobs, dict):
        return 0
    return len(logprobs.get("tokens") or logprobs.get("content") or ())


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None
