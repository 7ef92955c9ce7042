"""JSON bodies and query strings as checked structs: which fields there are, and which are refused.

A field is one of four kinds. It is supported; or it changes nothing and is left out; or it would
change the answer and is refused unless its value asks for nothing; or it is unknown, and refused,
since nobody here can tell whether it would change the answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from router import request_checks as checks
from router.http.errors import not_supported
from streamfill.errors import InvalidArgumentError

S = TypeVar("S", bound=msgspec.Struct)

INLINE_BYTES = 256 * 1024
"""A larger body is parsed in a thread: it takes longer than other streams should wait."""

HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
        *("separate_reasoning", "stream_reasoning", "spaces_between_special_tokens"),
    }
)
"""Names of accounts, caches and the like, and details of what is not here anyway."""

NEUTRAL: Mapping[str, Sequence[object]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
    "logit_bias": ({},),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "prompt_logprobs": (),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "stop_regex": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "lora_path": (),
    "image_data": (),
    "return_hidden_states": (False,),
    "return_token_ids": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (True,),
}
"""Fields of OpenAI, vLLM and SGLang that would change the answer, with the values besides null that
ask for nothing."""


class Fields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all that clients send."""


class SamplingFields(Fields, frozen=True, kw_only=True):
    """How the answer is generated. Null is as good as leaving a field out."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    keep_s: float | None = None
    """For so many seconds a prompt that begins with this one is to be expected."""


class OpeningFields(Protocol):
    """What may be said of a stream when it is opened."""

    @property
    def priority(self) -> int | None:
        """Larger is more urgent."""

    @property
    def request_id(self) -> str | None:
        """The client's own name for it, in logs."""

    @property
    def deadline_s(self) -> float | None:
        """Whole life of the stream, from now."""

    @property
    def ttft_slo_ms(self) -> float | None:
        """From the commit to the first token, as the client wishes it."""


class RequestFields(SamplingFields, frozen=True, kw_only=True):
    """Of a request that is opened and committed in one. See ``OpeningFields``."""

    priority: int | None = None
    request_id: str | None = None
    deadline_s: float | None = None
    ttft_slo_ms: float | None = None


async def parse_body(kind: type[S], body: bytes) -> S:
    """The JSON object ``body`` as a ``kind``.

    Raises:
        InvalidArgumentError: it is no JSON object, or a field is unknown, not supported or of a
            wrong type; names it.
    """
    if len(body) > INLINE_BYTES:
        return await asyncio.to_thread(_parse, kind, body)
    return _parse(kind, body)


def convert(kind: type[S], data: Mapping[str, Any], *, strict: bool = True) -> S:
    """As ``parse_body``, of what was parsed.

    Args:
        strict: False for a query string, whose values are all strings.
    """
    kept: dict[str, Any] = {}
    known = kind.__struct_fields__  # `structs.fields` evaluates all annotations, each time
    for name, value in data.items():
        if name in known:
            kept[name] = value
        elif name in NEUTRAL:
            if value is not None and not any(value == neutral for neutral in NEUTRAL[name]):
                raise not_supported(name, value)
        elif name not in HARMLESS:
            raise InvalidArgumentError(
                f"{_shown(name)} is no known field; known here: {', '.join(sorted(known))}",
                details={"field": _shown(name)},
            )
    try:
        return msgspec.convert(kept, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise explained(error) from error


def given_sampling(fields: SamplingFields, max_tokens: int | None) -> dict[str, float]:
    """The values of ``request_checks.SAMPLING_RANGES`` that were given, without ``logprobs``.

    Args:
        max_tokens: when the client said nothing.
    """
    given = {
        name: getattr(fields, name) for name, _, _ in checks.SAMPLING_RANGES if name != "logprobs"
    }
    if given["max_tokens"] is None:
        given["max_tokens"] = max_tokens
    return {name: value for name, value in given.items() if value is not None}


def explained(error: msgspec.ValidationError) -> InvalidArgumentError:
    """What a client is told about a value of a wrong type."""
    text, _, path = str(error).partition(" - at `$")
    field = path.strip("`").removeprefix(".")
    if unknown := re.search(r"unknown field `(.+)`", text):
        field = f"{field}.{unknown[1]}" if field else unknown[1]
        text = "is no known field"
    elif missing := re.search(r"missing required field `(.+)`", text):
        field = f"{field}.{missing[1]}" if field else missing[1]
        text = "is missing"
    else:
        text = f"is wrong: {text[:1].lower()}{text[1:]}".replace("`", "")
    return InvalidArgumentError(f"{field or 'the body'} {text}", details={"field": field or "body"})


def _parse(kind: type[S], body: bytes) -> S:
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidArgumentError(f"the body is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidArgumentError(f"the body is a JSON {type(data).__name__}, not an object")
    return convert(kind, data)


def _shown(name: str) -> str:
    return name if len(name) <= 64 else f"{name[:63]}…"
