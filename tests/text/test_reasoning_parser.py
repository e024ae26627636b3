"""Reasoning is separated from the answer: markers as tokens and as text, harmony's channels, prompts that open it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp_sources import LLAMA_CPP, WANT_TOOLS
from tokenizer_files import Files, load, write
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from offmoe.app.answer_printer import AnswerPrinter
from offmoe.checkpoint.find_model import DEMO
from offmoe.checkpoint.open import open_checkpoint
from offmoe.engine import Engine, Piece, pieces
from offmoe.errors import OffmoeError
from offmoe.text.messages import Message
from offmoe.text.reasoning_parser import MARKER_PAIRS, Part, ReasoningParser, detect_format
from offmoe.text.tokenizer import Tokenizer, load_tokenizer

HARMONY = ["<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>"]
# Keeps reasoning of the last turn and drops that of older ones, as Qwen3's, GLM's and gpt-oss' templates do.
KEYED = """{%- for m in messages %}<|{{ m.role }}|>
{%- if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- endfor %}"""
STRIPS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% endfor %}"
SILENT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def library() -> Library:
    with open_checkpoint(DEMO) as checkpoint:
        return load_tokenizer(checkpoint)._bpe


def with_tokens(
    folder: Path, library: Library, template: str = SILENT, shown: tuple[str, ...] = (), hidden: tuple[str, ...] = ()
) -> Tokenizer:
    """Return the demo's vocabulary with more tokens: visible ones are text, hidden ones special."""
    copy = Library.from_str(library.to_str())
    copy.add_tokens([AddedToken(text, special=False, normalized=False) for text in shown])
    copy.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in hidden])
    copy.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config.json", chat_template=template, bos_token="<|im_start|>", eos_token="<|im_end|>")
    return load(Files(folder))


@pytest.fixture
def make(tmp_path: Path, library: Library) -> Iterator[Any]:
    opened: list[Tokenizer] = []

    def make(*arguments: Any, **named: Any) -> Tokenizer:
        opened.append(with_tokens(tmp_path, library, *arguments, **named))
        return opened[-1]

    yield make
    for tokenizer in opened:
        tokenizer.close()


def parsed(tokenizer: Tokenizer, answer: str, prompt: str = "", stops: tuple[str, ...] = ()) -> tuple[str, str, bool]:
    """Return (reasoning, answer, saw_no_marker) of the answer's tokens, pushed one at a time until a stop string is
    found.
    """
    parser, parts = tokenizer.answer_parser(tokenizer.encode(prompt), stops), []
    for id in tokenizer.encode(answer):
        parts += parser.push(id)
        if parser.stopped:
            break
    return *joined([*parts, *parser.flush()]), parser.saw_no_marker


def joined(parts: list[Part]) -> tuple[str, str]:
    assert all(text and text.encode() for _, text in parts)  # no marker and no half character is left
    return "".join(text for inside, text in parts if inside), "".join(text for inside, text in parts if not inside)


# Blocks.


@pytest.mark.parametrize("pair", MARKER_PAIRS)
@pytest.mark.parametrize("tokens", ["shown", "hidden", "none"])
def test_a_block_is_separated_from_the_answer(make: Any, pair: tuple[str, str], tokens: str) -> None:
    """Markers are plain text, tokens, or special tokens, which are hidden elsewhere."""
    open, close = pair
    single = "<|channel>", "<channel|>", "<|think|>", "<|end|>", "<|begin|>", "<|content|>", "[BEGIN FINAL RESPONSE]"
    format = tuple(mark for mark in single if mark in open + close) or (open, close)
    tokenizer = make(f"{open}{close}", **({tokens: format} if tokens != "none" else {}))
    assert parsed(tokenizer, f"{open}\nI think,\n\nso\n{close}\n\nIt is 🎉") == ("I think,\n\nso", "It is 🎉", False)
    assert parsed(tokenizer, f"I think,\n{close}\n\n  yes", f"Why?\n{open}\n") == ("I think,", "  yes", False)
    assert parsed(tokenizer, f"{open}\n\n{close}\n\nyes") == ("", "yes", False)
    assert parsed(tokenizer, f"{open}\nno end 🎉 ") == ("no end 🎉", "", False)
    assert parsed(tokenizer, f"{close}yes") == ("", "yes", False)  # MiniMax-M3 writes this if it does not think
    assert parsed(tokenizer, "\n plain") == ("", "\n plain", True)
    assert parsed(tokenizer, "<plain") == ("", "<plain", True)


def test_markers_inside_an_answer_are_text(make: Any) -> None:
    tokenizer = make(shown=("<think>", "</think>"))
    assert parsed(tokenizer, "The tag <think> is closed by </think>.")[1] == "The tag <think> is closed by </think>."
    hidden = make(hidden=("<think>", "</think>"))
    assert parsed(hidden, "a<think>b")[1] == "ab"


def test_a_spelled_out_marker_is_text_if_the_marker_is_a_token(make: Any, library: Library) -> None:
    tokenizer = make(shown=("<think>", "</think>"))
    spelled = [id for letter in "</think>" for id in library.encode(letter).ids]
    ids = [*tokenizer.encode("<think>a"), *spelled, *tokenizer.encode("b</think>c")]
    parser = tokenizer.answer_parser([])
    assert joined([part for id in ids for part in parser.push(id)]) == ("a</think>b", "c")


def test_an_incomplete_character_before_a_marker_stays_before_it(make: Any) -> None:
    tokenizer = make(shown=("<think>", "</think>"))
    ids = [*tokenizer.encode("<think>a"), tokenizer.encode("🎉")[0], *tokenizer.encode("</think>b")]
    parser = tokenizer.answer_parser([])
    assert joined([part for id in ids for part in parser.push(id)]) == ("a\ufffd", "b")


def test_stop_strings_end_the_answer_and_not_the_reasoning(make: Any) -> None:
    tokenizer = make(shown=("<think>", "</think>"))
    text = "<think>one STOP two</think>three STOP four"
    assert parsed(tokenizer, text, stops=("e STOP",)) == ("one STOP two", "thre", False)
    assert parsed(tokenizer, "<think>one</think>three STO", stops=("STOP",)) == ("one", "three STO", False)


@given(st.text("<thinkx/> \n", max_size=30), st.lists(st.integers(0, 30), max_size=6), st.booleans())
def test_parts_do_not_depend_on_the_pieces(text: str, cuts: list[int], inside: bool) -> None:
    format = detect_format("", {}, ())

    def parts(*pieces: str) -> tuple[str, str]:
        parser = format.parser("<think>" if inside else "")
        return joined([part for piece in pieces for part in parser.push(piece)] + parser.flush())

    ends = sorted(cuts)
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert parts(*pieces) == parts(text)
    assert parts(*text) == parts(text)
    if not inside and "think>" not in text:
        assert parts(text) == ("", text)


# Harmony.


@pytest.fixture
def harmony(make: Any) -> Tokenizer:
    tokenizer: Tokenizer = make(hidden=tuple(HARMONY))
    return tokenizer


ANALYSIS = "<|channel|>analysis<|message|>Let me see.\n<|end|><|start|>assistant"


def test_channels(harmony: Tokenizer) -> None:
    prompt = "<|start|>user<|message|>Why?<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>Because 🎉"
    assert parsed(harmony, ANALYSIS + final, prompt) == ("Let me see.", "Because 🎉", False)
    assert parsed(harmony, final, prompt) == ("", "Because 🎉", False)
    twice = "<|channel|>analysis<|message|>More.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
    expected = ("Let me see.\n\nMore.", "Wait.\n\nBecause 🎉", False)
    assert parsed(harmony, ANALYSIS + twice + "<|start|>assistant" + final, prompt) == expected
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}"
    assert parsed(harmony, ANALYSIS + call, prompt) == ("Let me see.\n\n{}", "", False)
    assert parsed(harmony, "seen</a><|end|><|start|>assistant" + final, prompt + ANALYSIS[:30]) == (
        "seen</a>",
        "Because 🎉",
        False,
    )
    assert parsed(harmony, "Because", prompt + final[:27]) == ("", "Because", True)


def test_output_without_channels(harmony: Tokenizer) -> None:
    """A model that does not know the format, raw text, and an answer that ends inside a header."""
    prompt = "<|start|>user<|message|>Why?<|end|><|start|>assistant"
    assert parsed(harmony, "Because", prompt)[:2] == ("", "Because")
    assert parsed(harmony, "so " * 200, prompt)[:2] == ("", "so " * 200)
    parser = harmony.answer_parser(harmony.encode(prompt))
    assert joined([part for id in harmony.encode("so " * 200) for part in parser.push(id)]) == ("", "so " * 200)
    assert parsed(harmony, " a time", "Once upon") == ("", " a time", True)
    assert parsed(harmony, ANALYSIS + "<|channel|>fin", prompt)[:2] == ("Let me see.", "")


@given(st.lists(st.sampled_from(["\ud800", "\ud801", "\ud802", "\ud803", "analysis", "final", " ", "\n", "a"])))
def test_channels_do_not_depend_on_the_pieces(pieces: list[str]) -> None:
    format = detect_format("", dict.fromkeys(HARMONY, 0), HARMONY)

    def parts(pieces: list[str]) -> tuple[str, str]:
        parser: ReasoningParser = format.parser("\ud802")
        return joined([part for piece in pieces for part in parser.push(piece)] + parser.flush())

    assert parts(pieces) == parts(["".join(pieces)]) == parts(list("".join(pieces)))


def test_ends_of_harmony_and_of_generation_config(tmp_path: Path, library: Library) -> None:
    write(tmp_path, "generation_config.json", eos_token_id=[5, 6])
    tokenizer = with_tokens(tmp_path, library, hidden=tuple(HARMONY))
    ids = [tokenizer._bpe.token_to_id(text) for text in ("<|return|>", "<|call|>", "<|im_end|>", "<|endoftext|>")]
    assert tokenizer.eos == {5, 6, *ids}
    tokenizer.close()


# The next turn.


TALK: list[Message] = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A", "reasoning": "hm"},
    {"role": "user", "content": "R"},
]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (KEYED, TALK[:2], "<|user|>Q<|assistant|><think>hm</think>A"),
        (KEYED, TALK, "<|user|>Q<|assistant|>A<|user|>R"),
        (STRIPS, TALK, "<|user|>Q<|assistant|>\n\nA<|user|>R"),
        (SILENT, TALK, "<|user|>Q<|assistant|><think>\nhm\n</think>\n\nA<|user|>R"),
    ],
)
def test_the_template_decides_what_becomes_of_reasoning(
    make: Any, template: str, messages: list[Message], expected: str
) -> None:
    tokenizer = make(template)
    assert tokenizer._bpe.decode(tokenizer.encode_chat(messages), skip_special_tokens=False) == expected


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image"}]}, "message 1 has a content of type list"),
        (
            {"role": "assistant", "content": "", "tool_calls": []},
            "message 1 has 'tool_calls': .*images and tools are not supported",
        ),
        ({"role": "tool", "content": "4"}, "message 1 has the role 'tool'"),
        ({"role": "user", "content": "a", "reasoning": 3}, "message 1 has a reasoning of type int"),
        ({"role": "user", "content": "a", "reasoning": "\ud800"}, "lone surrogate"),
    ],
)
def test_images_and_tools_are_refused_in_one_line(make: Any, message: Any, reason: str) -> None:
    with pytest.raises(OffmoeError, match=reason) as error:
        make().encode_chat([message])
    assert "\n" not in str(error.value)


PUBLISHED = sorted(LLAMA_CPP.glob("models/templates/*.jinja"))
# The pair that each template writes; the others write none of these, or the last.
WRITTEN = {
    "Apertus-8B-Instruct": "<|inner_prefix|>", "Apriel-1.6-15b-Thinker-fixed": "Here are my reasoning steps:",
    "ByteDance-Seed-OSS": "<seed:think>", "Cohere2MoE": "<|START_THINKING|>", "MiniMax-M3": "<mm:think>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|START_THINKING|>", "google-gemma-4-31B-it": "<|channel>thought",
    "google-gemma-4-31B-it-interleaved": "<|channel>thought", "mistralai-Ministral-3-14B-Reasoning-2512": "[THINK]",
}  # fmt: skip
# Those that know reasoning and write that of older turns too, as their makers want it (or leave it in the content).
KEEP = {
    "Apertus-8B-Instruct", "Bielik-11B-v3.0-Instruct", "ByteDance-Seed-OSS", "Cohere2MoE", "HuggingFaceTB-SmolLM3-3B",
    "Kimi-K3", "LFM2.5-Instruct", "MiniMax-M3", "Spark2.5", "ibm-granite-granite-3.3-2B-Instruct",
    "inclusionai-ling-3.0-flash", "mistralai-Ministral-3-14B-Reasoning-2512", "muse-glimmer", "poolside-Laguna-S-2.1",
    "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2",
}  # fmt: skip


@pytest.mark.skipif(not PUBLISHED, reason="LLAMA_CPP_SOURCE names no llama.cpp sources")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_templates(file: Path, make: Any) -> None:
    """Reasoning is left out of the next turn, unless the template writes it or uses the content unchanged."""
    source = file.read_text(encoding="utf-8")
    tokenizer = make(source)
    assert tokenizer.reasoning.open == WRITTEN.get(file.stem, "<think>")
    talk: list[Message] = [TALK[0], {**TALK[1], "reasoning": "Zxqj"}, TALK[2]]
    try:
        text = tokenizer._bpe.decode(tokenizer.encode_chat(talk), skip_special_tokens=False)
    except OffmoeError:
        assert file.stem in WANT_TOOLS
        return
    knows = tokenizer._template.reads_reasoning or tokenizer.reasoning.close in source
    assert ("Zxqj" in text) is (not knows or file.stem in KEEP)


# The engine.


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("demo", vram="50%") as engine:
        yield engine


def answered(engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str, **sampling: Any) -> list[Piece]:
    """Return the pieces that the engine yields for a model that generates `text`."""
    assert engine.tokenizer
    ids = engine.tokenizer.encode(text)
    monkeypatch.setattr(engine.decoder, "tokens", lambda *_: (id for id in ids))
    return list(engine.generate("Why?", **sampling))


def test_pieces_of_an_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = answered(engine, monkeypatch, "<think>\nhm, 🎉\n</think>\n\nSo it is STOP", stop=("STOP",))
    answer = AnswerPrinter(None)
    for piece in said:
        answer.add(piece)
    assert (answer.reasoning, answer.text) == ("hm, 🎉", "So it is ")
    assert [piece.token for piece in said if piece.token is not None] == engine.answer_tokens
    assert not engine.answer_is_plain
    assert engine.stats().finish_reason == "stop"


def test_reasoning_that_is_never_closed_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, unclosed in (("<think>\nhm", True), ("<think>\nhm</think>", False), ("hm", False)):
        said = answered(engine, monkeypatch, text)
        assert engine.answer_in_reasoning == unclosed
        assert any(piece.text and not piece.reasoning for piece in said) == (text == "hm")


def test_an_answer_goes_on_where_the_prompt_ends(engine: Engine) -> None:
    """Greedily, the start of an answer is continued as it went on before."""
    asked: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
    whole = "".join(piece.text for piece in engine.generate(asked, temperature=0, max_tokens=7))
    assert whole == "The capital of France is Paris."
    start: Message = {"role": "assistant", "content": "The capital of France"}
    rest = "".join(piece.text for piece in engine.generate([*asked, start], temperature=0, max_tokens=3))
    assert rest == " is Paris."
    assert engine.prompt_notes == []


def test_a_token_of_two_parts_is_counted_once() -> None:
    parser: Any = SimpleNamespace(push=lambda _: [(True, "a"), (False, "b")], in_reasoning=False)
    assert list(pieces(parser, 7)) == [Piece("a", 7, True), Piece("b", None, False)]
    parser = SimpleNamespace(push=lambda _: [], in_reasoning=True)
    assert list(pieces(parser, 7)) == [Piece("", 7, True)]
    assert list(pieces(None, 7)) == [Piece("", 7, False)]


def test_an_answer_without_reasoning_is_plain(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = answered(engine, monkeypatch, "It is so.")
    assert "".join(piece.text for piece in said if not piece.reasoning) == "It is so."
    assert engine.answer_is_plain
