"""Special tokens and roles' marks of published vocabularies, on a small byte-level or sentencepiece vocabulary."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer
from trained_tokenizers import byte_level, sentencepiece

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reads reasoning from the content too, and drops that of earlier answers.
QWEN3 = r"""{%- for message in messages %}
{%- if message.role == "assistant" %}
  {%- set reasoning = '' %}{%- set content = message.content %}
  {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
  {%- elif '</think>' in content %}
    {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\n') %}
  {%- endif %}
  {{- '<|im_start|>assistant\n' }}
  {%- if loop.last and reasoning %}{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}
  {{- content.lstrip('\n') + '<|im_end|>\n' }}
{%- elif message.content.startswith('<tool_response>') %}
  {{- '<|im_start|>tool\n' + message.content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"""
LLAMA3 = """{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT] {{ m.content }}[/SYSTEM_PROMPT]"
    "{% else %} {{ m.content.strip() }}</s>{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{{ m.content.strip() }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MINIMAX = (
    "{% for m in messages %}]~b]{{ 'ai' if m.role == 'assistant' else m.role }}\n{{ m.content }}[e~[\n{% endfor %}"
    "{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}"
)
TOOLS = "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>"
# Name → (vocabulary, template, special tokens, visible ones that are marks all the same).
PUBLISHED: dict[str, tuple[Callable[[], Tokenizer], str, str, str]] = {
    "chatml": (byte_level, CHATML, "<|endoftext|> <|im_start|> <|im_end|>", ""),
    "qwen3": (
        byte_level,
        QWEN3,
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|box_end|> <|vision_pad|>",
        f"{TOOLS} <|fim_prefix|> <|repo_name|> <|file_sep|>",
    ),
    "llama3": (
        byte_level,
        LLAMA3,
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
        "<|eom_id|> <|python_tag|> <|reserved_special_token_0|> <|finetune_right_pad_id|>",
        "",
    ),
    "llama4": (byte_level, LLAMA3, "<|begin_of_text|> <|header_start|> <|eot|> <|image_start|> <|patch|>", ""),
    "mistral": (
        sentencepiece,
        MISTRAL,
        "<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CALLS] "
        "[AVAILABLE_TOOLS] [TOOL_RESULTS] [IMG] [THINK] [/THINK]",
        "",
    ),
    "phi": (byte_level, PHI, "<|endoftext|> <|user|> <|assistant|> <|system|> <|end|> <|placeholder1|>", ""),
    "gpt-oss": (
        byte_level,
        HARMONY,
        "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|> <|constrain|> "
        "<|startoftext|> <|endofprompt|> <|reserved_200000|>",
        "",
    ),
    "deepseek": (
        byte_level,
        DEEPSEEK,
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜▁pad▁｜>",
        "<｜User｜> <｜Assistant｜> <think> </think> <｜fim▁hole｜> <｜tool▁calls▁begin｜> <｜tool▁sep｜>",
    ),
    "glm": (
        byte_level,
        GLM,
        "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> "
        "<|observation|> <|begin_of_image|>",
        f"{TOOLS} <arg_key> </arg_value>",
    ),
    "gemma": (
        sentencepiece,
        GEMMA,
        "<pad> <eos> <bos> <start_of_turn> <end_of_turn> <start_of_image>",
        "<unused0> [multimodal] [@BOS@] <|tool_response>",
    ),
    "minimax": (byte_level, MINIMAX, "]!p~[ ]!d~[ ]~b] [e~[ ]~!b[", "<think> </think> <minimax:tool_call>"),
    "kimi": (
        byte_level,
        CHATML,
        "[BOS] [EOS] <|im_end|> <|im_user|> <|im_assistant|> <|im_start|> <|im_middle|> "
        "[EOT] [PAD] [UNK] [start_header_id] [end_header_id]",
        "<|tool_calls_section_begin|> <think> </think>",
    ),
    "hunyuan": (
        byte_level,
        CHATML,
        "<|startoftext|> <|extra_0|> <|extra_4|> <|eos|> <|im_start|> <|im_end|>",
        "<answer> </answer> <think> </think>",
    ),
    "granite": (byte_level, LLAMA3, "<|end_of_text|> <|start_of_role|> <|end_of_role|> <fim_prefix> <gh_stars>", ""),
    "lfm2": (byte_level, CHATML, "<|pad|> <|startoftext|> <|im_start|> <|im_end|> <|tool_call_start|>", ""),
    "olmo": (byte_level, PHI, "<|endoftext|> <|padding|>", "|||IP_ADDRESS||| |||EMAIL_ADDRESS||| <|user|>"),
}


def published(name: str) -> tuple[Tokenizer, str, list[str]]:
    """Return the tokenizer, the template and the control tokens of one family."""
    make, template, special, visible = PUBLISHED[name]
    library = make()
    library.add_special_tokens([AddedToken(text, normalized=False) for text in special.split()])
    library.add_tokens([AddedToken(text, normalized=False) for text in visible.split()])
    return library, template, special.split() + visible.split()
