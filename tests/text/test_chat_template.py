"""Chat templates render the same text as in transformers; malicious ones give one-line errors within a deadline."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_cpp_sources import LLAMA_CPP, WANT_TOOLS

from offmoe.errors import OffmoeError
from offmoe.text.chat_template import ChatTemplate

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + system_message }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {% endif %}
  {% if message['role'] == 'user' %}
    {{- ' [INST] ' + message['content'] + ' [/INST]' }}
  {% elif message['role'] == 'assistant' %}
    {% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
  {% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""
QWEN3 = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" %}{%- set ns.last = index %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- if tools %}{{- tools | tojson }}{%- endif %}
{%- endfor %}
{{- {'a': '<é&>', "b": [1, none]} | tojson(indent=2) }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3}
ONE = [{"role": "user", "content": "Hi <b>& 'you' 🎉"}]
THREE = [
    *ONE,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n Hello! \n"},
    {"role": "user", "content": "  and?\n"},
]
SYSTEM = [{"role": "system", "content": " Short. "}]
CHATS = {"one": ONE, "three": THREE, "system": SYSTEM + ONE, "system three": SYSTEM + THREE}


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> Iterator[tuple[str, ChatTemplate]]:
    source = TEMPLATES[request.param]
    ours = ChatTemplate(source, NAMES)
    yield source, ours
    ours.close()


def theirs(source: str, messages: list[dict[str, str]], prompt: bool) -> str:
    """Return the text of transformers' own renderer, or the exception's message if the template raises."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=prompt, **NAMES)
    except Exception as error:
        return f"error: {error}"
    return str(texts[0])


def ours(template: ChatTemplate, messages: list[dict[str, str]], prompt: bool) -> str:
    """Return the text, or the template's or jinja2's own error message."""
    try:
        return template.render(messages, prompt)
    except OffmoeError as error:
        message = str(error)
    told = re.fullmatch(r".* rejects this conversation: (.*)|.* fails \(\w+: (.*)\): use plain text", message)
    assert told, message
    return f"error: {told[1] or told[2]}"


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_same_text_as_transformers(template: tuple[str, ChatTemplate], chat: str, prompt: bool) -> None:
    source, rendering = template
    assert ours(rendering, CHATS[chat], prompt) == theirs(source, CHATS[chat], prompt)


PUBLISHED = sorted(LLAMA_CPP.glob("models/templates/*.jinja"))


@pytest.mark.skipif(not PUBLISHED, reason="LLAMA_CPP_SOURCE names no llama.cpp sources")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_template_as_transformers(file: Path) -> None:
    """Text or the error message is byte for byte the same; of messages without a system prompt, only the text is
    compared.
    """
    source = file.read_text(encoding="utf-8")
    rendering = ChatTemplate(source, NAMES)
    for name, messages in CHATS.items():
        for prompt in (True, False):
            expected = theirs(source, messages, prompt)
            got = ours(rendering, messages, prompt)
            assert got == " ".join(expected.split()) if expected.startswith("error: ") else got == expected
            assert got.startswith("error: ") is (file.stem in WANT_TOOLS) or name.startswith("system")
    rendering.close()


HOSTILE = {
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ raise_exception.__globals__['sys'] }}": "UndefinedError|SecurityError|unsafe",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "within 2 s",
    "{% for i in range(9**9) %}{% endfor %}": "OverflowError",
    "{{ 'a' * 10**10 }}": "MemoryError",
    "{{ messages[0].content * 10**10 }}": "MemoryError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}": "longer than",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ undefined_function() }}": "'undefined_function' is undefined",
    "{{ raise_exception('two\nlines') }}": "rejects this conversation: two lines",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_template_is_one_line_and_the_next_render_works(source: str) -> None:
    """Same worker, or a new one if it had to be killed, renders the next conversation."""
    template = ChatTemplate("{% if messages|length > 1 %}fine{% else %}" + source + "{% endif %}", NAMES)
    for _ in range(2):
        with pytest.raises(OffmoeError) as error:
            template.render(ONE, True)
        assert "\n" not in str(error.value)
        assert any(part in str(error.value) for part in HOSTILE[source].split("|"))
        assert template.render(THREE, True) == "fine"
    template.close()


def test_syntax_error() -> None:
    template = ChatTemplate("{{ bos_token }}\n{% for x in messages", NAMES)
    for _ in range(2):
        with pytest.raises(OffmoeError, match="TemplateSyntaxError in line 2: unexpected end of template"):
            template.render(ONE, True)
    template.close()


def test_a_template_that_never_compiles_ends_in_time() -> None:
    """jinja2 folds constants during compilation; the worker's own alarm ends it."""
    template = ChatTemplate("{{ (9 ** 9999999) % 7 }}{{ (9 ** 99999999) % 7 }}", NAMES)
    with pytest.raises(OffmoeError, match="did not finish in time"):
        template.render(ONE, True)
    template.close()


def test_killed_worker_is_reported_once() -> None:
    template = ChatTemplate(CHATML, NAMES)
    expected = template.render(ONE, True)
    os.kill(worker_pid(template), signal.SIGKILL)
    with pytest.raises(OffmoeError, match="ended its process"):
        template.render(ONE, True)
    assert template.render(ONE, True) == expected
    template.close()


def test_worker_ignores_ctrl_c() -> None:
    template = ChatTemplate(CHATML, NAMES)
    expected = template.render(ONE, True)
    os.kill(worker_pid(template), signal.SIGINT)
    assert os.getsid(worker_pid(template)) != os.getsid(0)  # the terminal's Ctrl-C does not even reach it
    assert template.render(ONE, True) == expected
    template.close()


def test_worker_ends_with_its_input_and_with_close() -> None:
    template = ChatTemplate(CHATML, NAMES)
    template.render(ONE, True)
    process: Any = template._worker._process  # type: ignore[union-attr]
    process.stdin.close()  # as the parent's death does
    assert process.wait(timeout=10) == 0
    template.close()
    template.close()


def test_code_of_templates_runs_elsewhere() -> None:
    template = ChatTemplate(CHATML, NAMES)
    assert worker_pid(template) != os.getpid()
    template.close()


def test_large_conversation() -> None:
    """Request and reply are both larger than a pipe's buffer."""
    template = ChatTemplate(CHATML, NAMES)
    content = "wörld 🎉\n" * 50_000
    assert content in template.render([{"role": "user", "content": content}], True)
    template.close()


def worker_pid(template: ChatTemplate) -> int:
    assert template._worker is not None
    return template._worker._process.pid
