"""Chat messages to one text, also while the last message is still growing.

Templates are Jinja programs from the model folder, run in a sandbox with the same settings, filters
and functions as in `transformers`, so that the texts are the same. They are not trusted: a template
that fails is the sender's error.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamfill.errors import InvalidArgumentError, ModelError
from streamfill.stream.model_files import ModelFiles, read_json
from streamfill.stream.splice import common_prefix_chars

Message: TypeAlias = Mapping[str, Any]
"""``{"role": …, "content": …}``; content is a text or a list of parts ``{"type": "text", …}``."""

_DEFAULT_NAME = "default"
# Two texts that differ in their first character and that no template has a reason to treat apart.
_PROBES = ("Aq7", "Zq7")


class ChatTemplate:
    """The chat template of one model."""

    def __init__(self, source: str, named_tokens: Mapping[str, str] | None = None) -> None:
        """Args:
            source: the Jinja text.
            named_tokens: `bos_token`, `eos_token`, … as the template sees them.

        Raises:
            ModelError: it is no valid template.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"chat template: {error}") from error
        self._named_tokens = dict(named_tokens or {})

    @classmethod
    def load(cls, model_dir: str | Path) -> ChatTemplate | None:
        """The template of a model folder; None when it has none.

        Raises:
            ModelError: there is one that cannot be read.
        """
        folder = Path(model_dir)
        files = ModelFiles.read(folder)
        source = _find_source(folder, files)
        return None if source is None else cls(source, files.named_tokens())

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The whole prompt.

        Args:
            messages: the complete conversation.
            add_generation_prompt: end with what begins the assistant's answer.
            tools: JSON schemas of functions, for templates that know them.
            variables: further names that the template uses (``enable_thinking=False``).

        Raises:
            InvalidArgumentError: the template refuses these messages; says why.
        """
        if not messages:
            raise InvalidArgumentError("a chat needs at least one message")
        try:
            return self._template.render(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._named_tokens, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise InvalidArgumentError(f"chat template: {error}") from error

    def open_prefix(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text that is certain while the content of the last message still grows.

        White space at the open end of the content is left out, since a template may trim it. A
        template is a program, so this is a forecast; the text that counts is `render` of the
        complete messages.

        Raises:
            InvalidArgumentError: the template refuses these messages; says why.
        """
        if not messages:
            raise InvalidArgumentError("a chat needs at least one message")
        first, second = (
            self.render([*messages[:-1], _grown(messages[-1], probe)], tools=tools, **variables)
            for probe in _PROBES
        )
        return first[: common_prefix_chars(first, second)]


def _grown(message: Message, text: str) -> Message:
    """`message` with `text` behind its content's last visible character."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return {**message, "content": (content or "").rstrip() + text}
    if isinstance(content, Sequence):
        *before, last = content or [{"type": "text", "text": ""}]
        if isinstance(last, Mapping) and isinstance(last.get("text"), str):
            grown = {**last, "text": last["text"].rstrip() + text}
            return {**message, "content": [*before, grown]}
    raise InvalidArgumentError("the content of the last message does not end with text")


def _find_source(folder: Path, files: ModelFiles) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
    for template in (
        files.tokenizer_config.get("chat_template"),
        read_json(folder / "chat_template.json").get("chat_template"),
    ):
        if isinstance(template, str):
            return template
        if isinstance(template, Sequence):
            named = {entry["name"]: entry["template"] for entry in template}
            if _DEFAULT_NAME in named:
                return str(named[_DEFAULT_NAME])
    return None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks text for training; here it is just text."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.datetime.now().strftime(format_string)
