"""SGLang's own prefill and decode servers behind SGLang's router, as a target.

Its native ``/generate`` is used, not the OpenAI interface, because it says the ids of the answer's
tokens: each event holds all ids so far.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

from streamfill.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from streamfill.loadgen.peers.prompt_ids import PromptTokens
from streamfill.loadgen.target import Ask, Reply, ServerAccount, TargetFacts, TargetStream
from streamfill.loadgen.targets.openai import flush
from streamfill.loadgen.targets.sse import HttpEndpoint, HttpStatusError, as_stream_error
from streamfill.messages.common import StreamMode
from streamfill.models.describe import describe_model
from streamfill.traces.format import ChatMessage
from streamfill.traces.script import Content


class SglangTarget:
    """One SGLang endpoint, a server or a router; has no streams."""

    has_streams = False

    def __init__(
        self, base_url: str, *, model_path: Path, context_tokens: int, name: str = "sglang-pd"
    ) -> None:
        """
        Args:
            model_path: folder of the model that the servers run.
            context_tokens: longest prompt plus answer that they take.
        """
        self.name = name
        self._endpoint = HttpEndpoint(base_url)
        self._model_path = model_path
        self._context_tokens = context_tokens
        self._tokens: PromptTokens | None = None

    async def facts(self) -> TargetFacts:
        """As ``Target.facts``, from the model's folder."""
        described = describe_model(self._model_path)
        return TargetFacts(
            model=self._model_path.name,
            vocab_size=described.vocab_size,
            context_tokens=self._context_tokens,
        )

    async def generate(self, prompt: Content, ask: Ask) -> Reply:
        """As ``Target.generate``."""
        body = self._question(prompt) | {
            "stream": True,
            "rid": ask.request_id,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": ask.max_output_tokens,
                "ignore_eos": True,
            },
        }
        ids: tuple[int, ...] = ()
        times_s: list[float] = []
        text, meta = "", {}
        try:
            async with aclosing(self._endpoint.events("/generate", body)) as events:
                async for at_s, event in events:
                    ids, text, meta = tuple(event["output_ids"]), event["text"], event["meta_info"]
                    times_s.extend([at_s] * (len(ids) - len(times_s)))
        except HttpStatusError as error:
            raise as_stream_error(error, self._endpoint.base_url) from error
        except (KeyError, TypeError) as error:
            raise UnavailableError(f"SGLang sent an unknown event: {error!r}") from error
        _raise_abort(meta)
        return Reply(
            text=text,
            token_ids=ids,
            token_times_s=tuple(times_s),
            account=ServerAccount(
                num_prompt_tokens=meta.get("prompt_tokens"),
                num_cached_tokens=meta.get("cached_tokens"),
            ),
        )

    def open(self, mode: StreamMode, ask: Ask) -> AbstractAsyncContextManager[TargetStream]:
        """Always raises ``InvalidArgumentError``: the interface has no streams."""
        raise InvalidArgumentError(f"{self.name} cannot take a prompt in pieces")

    async def empty_caches(self) -> None:
        """As ``Target.empty_caches``; the router passes it on to all servers and answers
        206 when one of them was not reached or was busy."""
        if not await flush(self._endpoint, "/flush_cache"):
            raise FailedPreconditionError("this SGLang has no /flush_cache")

    async def counters(self) -> dict[str, int]:
        """Empty: SGLang counts other things than our servers."""
        return {}

    async def close(self) -> None:
        """As ``Target.close``."""
        await self._endpoint.close()

    def _question(self, prompt: Content) -> dict[str, Any]:
        if isinstance(prompt, str):
            return {"text": prompt}
        if prompt and isinstance(prompt[0], ChatMessage):
            if self._tokens is None:
                self._tokens = PromptTokens.load(self._model_path)
            return {"input_ids": self._tokens.ids(prompt)}
        return {"input_ids": list(prompt)}


def _raise_abort(meta: Any) -> None:
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort":
        status = reason.get("status_code")
        error = HttpStatusError(
            status=status if isinstance(status, int) else 500, text=str(reason.get("message"))
        )
        raise as_stream_error(error, "SGLang") from error
