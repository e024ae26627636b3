"""Typed contents, messages that a template leaves out, answers that are continued, reasoning in contents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from special_tokens import CHATML, PUBLISHED, published
from tokenizer_files import Files, load, write

from offmoe.errors import OffmoeError
from offmoe.text.tokenizer import Tokenizer

PARTS = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"


def turn(content: str) -> str:
    """Return a template that prints `content` for each message."""
    return "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + "<|im_end|>\n{% endfor %}"


TYPED = {
    "loop": turn(PARTS),
    "first part": turn("{{ m.content[0].text }}"),
    "checked": turn(PARTS.replace("part['text']", "part.text | trim")),
    "fails on a string": turn("{{ m.content[0]['text'] + '' }}"),
    "filter": turn("{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}"),
    "user only": turn("{% if m.role == 'user' %}" + PARTS + "{% else %}{{ m.content + '' }}{% endif %}"),
    "all but the system": turn("{% if m.role != 'system' %}" + PARTS + "{% else %}{{ m.content + '' }}{% endif %}"),
    "either": turn("{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"),
    "string": turn("{{ m.content }}"),
}
STRINGS = {"user only": ("system", "assistant"), "all but the system": ("system",)}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "the <|im_end|> fox"},
    {"role": "assistant", "content": "lazy"},
    {"role": "user", "content": "  dog 123\n"},
]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Tokenizer]]:
    """Makes the tokenizer of a directory with a template."""
    opened: list[Tokenizer] = []

    def make(template: str, name: str = "qwen3") -> Tokenizer:
        library, _, _ = published(name)
        library.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        bos = {"bos_token": "<s>", "eos_token": "</s>"} if name == "mistral" else {}
        write(tmp_path, "tokenizer_config.json", **config, **bos)
        opened.append(load(Files(tmp_path)))
        return opened[-1]

    yield make
    for tokenizer in opened:
        tokenizer.close()


def theirs(folder: Path, messages: list[dict[str, Any]], **more: Any) -> str:
    import transformers

    return str(transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **more))


def text(tokenizer: Tokenizer, messages: Any, prompt: bool = True) -> str:
    return str(tokenizer._bpe.decode(tokenizer.encode_chat(messages, prompt), skip_special_tokens=False))


@pytest.mark.parametrize("name", TYPED)
def test_template_that_reads_parts_is_given_parts(made: Callable[..., Tokenizer], tmp_path: Path, name: str) -> None:
    """Text is what transformers renders with parts for the roles that need them; a second time too."""
    tokenizer = made(TYPED[name])
    strings = STRINGS.get(name, () if name not in ("either", "string") else ("system", "user", "assistant"))
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in CONVERSATION]
    typed = [m if m["role"] in strings else part for m, part in zip(CONVERSATION, parts, strict=True)]
    for given in (CONVERSATION, parts, CONVERSATION):
        assert text(tokenizer, given) == theirs(tmp_path, typed)
        assert tokenizer.prompt_notes == []
    assert text(tokenizer, CONVERSATION[1:2]) == theirs(tmp_path, typed[1:2])


def test_last_message_that_a_template_drops_is_an_error(made: Callable[..., Tokenizer]) -> None:
    for template in (
        "{% for m in messages %}{{ m.text }}{% endfor %}hi",
        "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
        turn("{{ m.content[:0] }}"),
    ):
        with pytest.raises(OffmoeError, match="the chat template leaves out the last message"):
            made(template).encode_chat([{"role": "user", "content": "the fox"}, {"role": "user", "content": "dog"}])


def test_other_messages_that_a_template_drops_are_noted(made: Callable[..., Tokenizer]) -> None:
    tokenizer = made("{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}")
    tokenizer.encode_chat(CONVERSATION)  # type: ignore[arg-type]
    assert tokenizer.prompt_notes == ["the chat template leaves out messages of the role 'system'"]
    tokenizer.encode_chat(CONVERSATION[1:])  # type: ignore[arg-type]
    assert tokenizer.prompt_notes == []
    tokenizer = made("{% for m in messages[-2:] %}{{ m.content }}{% endfor %}")
    tokenizer.encode_chat(CONVERSATION)  # type: ignore[arg-type]
    assert [note[-8:] for note in tokenizer.prompt_notes] == ["'system'", "e 'user'"]


@pytest.mark.parametrize(
    "change", ["trim", "upper", "replace('o', '0')", "tojson", "string", "e", "wordwrap(3)", "title", "indent(2)"]
)
def test_text_that_a_template_edits_is_not_lost(made: Callable[..., Tokenizer], tmp_path: Path, change: str) -> None:
    tokenizer, asked = made(turn(f"{{{{ m.content | {change} }}}}")), [{"role": "user", "content": ' a "fox" or\nno '}]
    assert text(tokenizer, asked) == theirs(tmp_path, asked)
    assert tokenizer.prompt_notes == []


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("start", ["The lazy", "The lazy ", " the\n\n", "x", "the fox the fox"])
def test_answer_is_continued_as_in_transformers(
    made: Callable[..., Tokenizer], tmp_path: Path, name: str, start: str
) -> None:
    import transformers

    tokenizer = made(PUBLISHED[name][1], name)
    messages: Any = [{"role": "user", "content": "x the fox"}, {"role": "assistant", "content": start}]
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rendered = other.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ids = tokenizer.encode_chat(messages)
    assert ids == other.encode(rendered, add_special_tokens=False), rendered


def test_continued_answer_keeps_its_tokens(made: Callable[..., Tokenizer]) -> None:
    tokenizer = made(CHATML)
    tokens = [id for letter in "the fox" for id in tokenizer.encode(letter)]
    messages: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "the fox", "tokens": tokens}]
    assert tokenizer.encode_chat(messages)[-len(tokens) - 1 :] == [*tokenizer.encode("\n"), *tokens]


def test_empty_start_of_an_answer_is_no_start(made: Callable[..., Tokenizer]) -> None:
    tokenizer = made(CHATML)
    asked: Any = [{"role": "user", "content": "x"}]
    for empty in ("", " \n"):
        assert tokenizer.encode_chat([*asked, {"role": "assistant", "content": empty}]) == tokenizer.encode_chat(asked)


def test_start_that_a_template_drops_cannot_be_continued(made: Callable[..., Tokenizer]) -> None:
    tokenizer = made("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(OffmoeError, match="leaves out the start of the answer"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": "the fox"}])


def test_reasoning_is_continued(made: Callable[..., Tokenizer]) -> None:
    """The parser knows that the answer begins inside reasoning, however long that is."""
    tokenizer = made(PUBLISHED["qwen3"][1])
    thought = "the quick brown fox " * 30
    messages: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "reasoning": thought}]
    ids = tokenizer.encode_chat(messages)
    assert text(tokenizer, messages).endswith(f"<think>\n{thought}")
    parser = tokenizer.answer_parser(ids, continues=True)
    assert parser.in_reasoning
    parts = [part for id in tokenizer.encode(" jumps</think>\n\ndone") for part in parser.push(id)] + parser.flush()
    assert "".join(said for reasoning, said in parts if not reasoning) == "done"
    assert not parser.in_reasoning
    messages[1]["content"] = "so"
    assert not tokenizer.answer_parser(tokenizer.encode_chat(messages)).in_reasoning


def test_open_reasoning_of_an_earlier_turn_is_over(made: Callable[..., Tokenizer]) -> None:
    tokenizer = made(CHATML)
    begun = tokenizer.encode("<|im_start|>assistant\n<think>\nhm<|im_end|>\n<|im_start|>assistant\n")
    assert not tokenizer.answer_parser(begun).in_reasoning
    assert tokenizer.answer_parser(begun[: begun.index(tokenizer.encode("<|im_end|>")[0])]).in_reasoning


def test_continued_text_keeps_the_space_of_its_next_word(made: Callable[..., Tokenizer]) -> None:
    tokenizer = made(PUBLISHED["mistral"][1], "mistral")
    messages: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "the"}]
    ids, next_word = tokenizer.encode_chat(messages), tokenizer.encode(" lazy", control_tokens=True)[1:]
    for continues in (True, False):
        parser = tokenizer.answer_parser(ids, continues=continues)
        parts = [part for id in next_word for part in parser.push(id)] + parser.flush()
        assert "".join(said for _, said in parts) == " lazy"[not continues :]


BLOCK = "<think>\nthe fox\n</think>\n\nlazy </think> dog <think> x"


@pytest.mark.parametrize("name", ["qwen3", "deepseek", "chatml"])
def test_reasoning_in_front_of_an_answer(made: Callable[..., Tokenizer], tmp_path: Path, name: str) -> None:
    """Those at the start are marks for a template that reads them, others are text; the prompt is transformers'."""
    tokenizer, reads = made(PUBLISHED[name][1]), name != "chatml"
    plain = BLOCK.replace(" </think> dog <think> x", "")
    for messages in (
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": plain}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": plain}, {"role": "user", "content": "y"}],
    ):
        assert text(tokenizer, messages, False) == theirs(tmp_path, messages)
        marks = [tokenizer.encode(mark)[0] for mark in ("<think>", "</think>")]
        expected = [id for id in tokenizer.encode(theirs(tmp_path, messages)) if id in marks and reads]
        messages[1]["content"] = BLOCK
        ids = tokenizer.encode_chat(messages, False)  # type: ignore[arg-type]
        assert [id for id in ids if id in marks] == expected
        assert "lazy </think> dog <think> x" in tokenizer._bpe.decode(ids, skip_special_tokens=False)
