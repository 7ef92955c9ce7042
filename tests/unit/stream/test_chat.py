"""Chat messages become the text that the model's template makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import InvalidArgumentError, ModelError
from streamfill.stream.chat import ChatTemplate

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = (
    "{{- bos_token }}\n{%- for message in messages %}\n    {%- if message.role not in "
    "['system', 'user', 'assistant'] %}\n        {{- raise_exception('bad role ' + message.role) }}"
    "\n    {%- endif %}\n    {{- '[' + message.role + ']' + message.content | trim + '[end]' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"
)
TEMPLATES = {"chatml": CHATML, "trimming": TRIMMING}


def template(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"})


def test_a_conversation_is_rendered_with_the_generation_prompt() -> None:
    """The whole prompt at commit ends with what begins the answer."""
    messages = [{"role": "user", "content": "Hi"}]
    assert template("chatml").render(messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template("trimming").render(messages, add_generation_prompt=False) == (
        "<s>[user]Hi[end]"
    )


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    parts=st.lists(st.text(st.sampled_from("ab \n\tZA"), max_size=6), max_size=5),
    system=st.booleans(),
)
def test_what_is_certain_stays_the_beginning_of_the_prompt(
    name: str, parts: list[str], system: bool
) -> None:
    """However the last message grows, the open prefix is a prefix of the final text."""
    before = [{"role": "system", "content": " Be brief. "}] if system else []
    chat = template(name)

    def messages(content: str) -> list[dict[str, str]]:
        return [*before, {"role": "user", "content": content}]

    final = chat.render(messages("".join(parts)))
    for number in range(len(parts) + 1):
        content = "".join(parts[:number])
        prefix = chat.open_prefix(messages(content))
        assert final.startswith(prefix)
        assert prefix.endswith(content.strip())


def test_content_in_parts_grows_in_its_last_text() -> None:
    """A list of parts is open at its last text; one that ends with a picture is refused."""
    chat = ChatTemplate("{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]
    assert chat.open_prefix([{"role": "user", "content": parts}]) == "<one><two"
    with pytest.raises(InvalidArgumentError, match="does not end with text"):
        chat.open_prefix([{"role": "user", "content": [{"type": "image"}]}])


def test_the_templates_refusal_goes_to_the_sender() -> None:
    """`raise_exception` and misuse of the messages become INVALID_ARGUMENT with the reason."""
    with pytest.raises(InvalidArgumentError, match="bad role tool"):
        template("trimming").render([{"role": "tool", "content": "x"}])
    with pytest.raises(InvalidArgumentError, match="at least one message"):
        template("chatml").open_prefix([])
    with pytest.raises(InvalidArgumentError):
        template("chatml").render([{"role": "user"}])


def test_a_template_cannot_leave_the_sandbox() -> None:
    """Templates come with models from anywhere: they reach no Python internals."""
    chat = ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(InvalidArgumentError):
        chat.render([{"role": "user", "content": "x"}])


def test_helpers_of_templates_are_there() -> None:
    """tojson without HTML escapes, loop controls, dates and generation blocks work."""
    chat = ChatTemplate(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson(indent=None) }}{% generation %}G{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%%') }}{{ tools[0].name }}{{ mood }}"
    )
    text = chat.render([{"role": "<é>"}, {"role": "b"}], tools=[{"name": "t"}], mood="!")
    assert text == '{"role": "<é>"}G%t!'


def test_the_template_of_a_folder_is_found(tmp_path: Path) -> None:
    """In tokenizer_config.json, alone or among named ones, or in chat_template.jinja first."""
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    message = [{"role": "user", "content": "x"}]
    config.write_text(json.dumps({"chat_template": "A{{ bos_token }}", "bos_token": "<b>"}))
    assert rendered(tmp_path, message) == "A<b>"
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": named, "eos_token": {"content": "<e>"}}))
    assert rendered(tmp_path, message) == "D<e>"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert rendered(tmp_path, message) == "J"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate.load(tmp_path)


def rendered(folder: Path, messages: list[dict[str, str]]) -> str:
    chat = ChatTemplate.load(folder)
    assert chat is not None
    return chat.render(messages)
