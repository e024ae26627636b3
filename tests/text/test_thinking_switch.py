"""Thinking switch: published templates accept it under their own variable names, or the error says what they
accept.
"""

from __future__ import annotations

import pytest
from exhaustive import where_present
from llama_cpp_sources import LLAMA_CPP

from offmoe.engine import Engine
from offmoe.errors import OffmoeError
from offmoe.text.chat_template import ChatTemplate
from offmoe.text.thinking_switch import thinking_variables

MESSAGES = [{"role": "user", "content": "Why?"}]
QWEN3 = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}"""
GPT_OSS = """{% if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif %}
{% if reasoning_effort not in ["low", "medium", "high"] %}{{ raise_exception("no such effort") }}{% endif %}
Reasoning: {{ reasoning_effort }}"""


def rendered(template: ChatTemplate, value: str | None) -> str:
    template.extra_variables = thinking_variables(value, template.variables)
    return template.render(MESSAGES, add_generation_prompt=True)


def test_a_template_is_given_what_it_reads() -> None:
    template = ChatTemplate(QWEN3, {})
    assert template.variables == ["enable_thinking", "messages"]
    assert rendered(template, None) == rendered(template, "on") != rendered(template, "off")
    template.close()
    template = ChatTemplate(GPT_OSS, {})
    texts = [rendered(template, value).strip() for value in (None, "low", "high")]
    assert texts == [f"Reasoning: {value}" for value in ("medium", "low", "high")]
    with pytest.raises(OffmoeError, match="rejects this conversation: no such effort"):
        rendered(template, "enormous")
    template.close()


@pytest.mark.parametrize(
    ("value", "names", "want"),
    [
        ("off", {"enable_thinking", "thinking"}, {"enable_thinking": False, "thinking": False}),
        ("on", {"thinking_mode"}, {"thinking_mode": "enabled"}),
        ("high", {"thinking", "reasoning_effort"}, {"thinking": True, "reasoning_effort": "high"}),
        ("max", {"thinking_effort"}, {"thinking_effort": "max"}),
        (None, set(), {}),
        ("on", {"messages"}, "has no variable for thinking"),
        ("off", {"reasoning_effort"}, "does not accept 'off' for thinking: try a word such as low"),
        ("low", {"enable_thinking"}, "does not accept 'low' for thinking: expected on or off"),
        ("a lot", {"enable_thinking"}, "thinking is 'a lot': expected on, off or a word"),
    ],
)
def test_values(value: str | None, names: set[str], want: dict[str, object] | str) -> None:
    if isinstance(want, str):
        with pytest.raises(OffmoeError, match=want):
            thinking_variables(value, names)
    else:
        assert thinking_variables(value, names) == want


def test_what_a_template_does_not_take_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_build", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(OffmoeError, match="the model's chat template has no variable for thinking"):
        Engine.load("demo", think="off", device="cpu")


def test_a_template_that_does_not_compile_has_no_variables() -> None:
    template = ChatTemplate("{% if %}", {})
    assert template.variables == []
    template.close()


@pytest.mark.parametrize(
    ("file", "value"),
    where_present([
        ("Qwen-Qwen3-0.6B", "off"), ("Qwen3.5-4B", "off"), ("GLM-4.6", "off"), ("GLM-4.7-Flash", "off"),
        ("deepseek-ai-DeepSeek-V3.1", "on"), ("openai-gpt-oss-120b", "high"), ("MiniMax-M3", "off"),
        ("google-gemma-4-31B-it", "on"), ("ibm-granite-granite-3.3-2B-Instruct", "on"), ("Kimi-K3", "low"),
        ("tencent-Hy3", "high"),
    ], LLAMA_CPP.is_dir(), "LLAMA_CPP_SOURCE names no llama.cpp sources"),
)  # fmt: skip
def test_published_templates_say_something_else(file: str, value: str) -> None:
    template = ChatTemplate((LLAMA_CPP / f"models/templates/{file}.jinja").read_text("utf-8"), {"bos_token": "<s>"})
    assert rendered(template, value) != rendered(template, None)
    template.close()
