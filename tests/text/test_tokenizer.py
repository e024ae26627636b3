"""Tokenizers: round trips, streaming, conversations, GGUF and directory vocabularies, bad files."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from llama_cpp_sources import LLAMA_CPP
from tokenizer_files import Files, expect_error, load, write
from tokenizers import Tokenizer as Library
from tokenizers import models

from offmoe.checkpoint.find_model import DEMO
from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError
from offmoe.text.answer_parser import StopStrings
from offmoe.text.messages import Message
from offmoe.text.pretokenizers import GPT2, KINDS, QWEN2, build_pre_tokenizer, pre_tokenizer_name
from offmoe.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    checkpoint = open_checkpoint(DEMO)
    checkpoint.close()
    return checkpoint.metadata


@pytest.fixture(scope="module")
def demo(metadata: dict[str, Any]) -> Iterator[Tokenizer]:
    files = Files()
    files.metadata = metadata
    tokenizer = load(files)
    yield tokenizer
    tokenizer.close()


def sentencepiece(**changes: Any) -> Files:
    """Return a vocabulary of `<unk> <s> </s>`, all bytes, and a few pieces, whose score is minus their rank."""
    pieces = ["▁", "h", "i", "hi", "▁hi", "t", "▁t", "th", "\n", ">"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    ggml = {"tokens": tokens, "token_type": types, "scores": scores} | changes
    files = Files(chat_template=changes.pop("chat_template", TURN))
    files.metadata |= {f"tokenizer.ggml.{key}": value for key, value in ({"model": "llama"} | ggml).items()}
    return files


# The demo model's own vocabulary.


@MANY
@given(TEXTS)
def test_round_trip(demo: Tokenizer, text: str) -> None:
    """Holds for texts without special tokens whose bytes are in the vocabulary: SmolLM2's lacks some of rare planes."""
    assume(not any(token.content in text for token in demo._added.values()))
    assume(set(text.encode()) <= {byte for id in range(600) for byte in demo.token_bytes(id)})
    assert demo.decode(demo.encode(text)) == text


@MANY
@given(st.lists(st.integers(0, 20_600), max_size=30))
def test_stream_is_decode_and_never_half_a_character(demo: Tokenizer, ids: list[int]) -> None:
    detokenizer = demo.detokenizer()
    shown = [detokenizer.push(id) for id in ids]
    raw = b"".join(demo.token_bytes(id) for id in ids)
    assert "".join(shown) + detokenizer.flush() == demo.decode(ids) == raw.decode(errors="replace")


@MANY
@given(TEXTS)
def test_decode_as_the_library(demo: Tokenizer, text: str) -> None:
    ids = demo.encode(text)
    assert demo.decode(ids) == demo._bpe.decode(ids)


def test_emoji_comes_with_its_last_token(demo: Tokenizer) -> None:
    ids = demo.encode("🎉")
    detokenizer = demo.detokenizer()
    assert len(ids) > 1
    assert [detokenizer.push(id) for id in ids] == [""] * (len(ids) - 1) + ["🎉"]
    assert demo.decode(ids[:-1]) == "\ufffd"


def test_special_tokens_are_recognised_hidden_and_end_turns(demo: Tokenizer) -> None:
    assert demo.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]
    assert demo.decode([1, 2, 0]) == ""
    assert demo.eos == {0, 2}  # <|endoftext|> and <|im_end|>
    assert (demo.vocab_size, demo.bos) == (20480, 1)
    assert demo.decode([10**6]) == ""  # an embedding may have more rows than the vocabulary


def test_lone_surrogate_is_refused(demo: Tokenizer) -> None:
    with pytest.raises(OffmoeError, match="lone surrogate"):
        demo.encode("a\ud800b")
    with pytest.raises(OffmoeError, match="lone surrogate"):
        demo.encode_chat([{"role": "user", "content": "\udfff"}])


# Conversations.


def test_second_turn_begins_with_the_first_and_its_answer(demo: Tokenizer) -> None:
    """Holds for any generated ids, including ones that encoding their text would not produce."""
    first: list[Message] = [{"role": "user", "content": "Hi"}]
    prompt = demo.encode_chat(first)
    answer = demo.encode("H") + demo.encode("ello") + demo.encode(" wor") + demo.encode("ld  ")
    content = demo.decode(answer)
    assert answer != demo.encode(content)
    second: list[Message] = [
        *first,
        {"role": "assistant", "content": content, "tokens": answer},
        {"role": "user", "content": "More"},
    ]
    ids = demo.encode_chat(second)
    assert ids[: len(prompt) + len(answer)] == prompt + answer
    assert ids[len(prompt) + len(answer)] == 2
    assert demo._bpe.decode(ids, skip_special_tokens=False) == demo._template.render(second, True)  # type: ignore[union-attr]


def test_chat_without_kept_tokens_is_the_rendered_text(demo: Tokenizer) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert demo.encode_chat(messages) == demo.encode(demo._template.render(messages, True))  # type: ignore[union-attr]
    assert len(demo.encode_chat(messages, False)) < len(demo.encode_chat(messages))


def with_template(metadata: dict[str, Any], template: str) -> Tokenizer:
    files = Files()
    files.metadata = metadata | {"tokenizer.chat_template": template}
    return load(files)


TRIMMED = "{% for m in messages %}[{{ m.content.strip() }}]{% endfor %}"
NO_THINKING = "{% for m in messages %}[{{ m.content.split('</think>')[-1] }}]{% endfor %}"
LAST_ONLY = "[{{ messages[-1].content }}]"
TWICE = "{% for m in messages %}[{{ m.content }}{{ m.content|length }}]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "content", "kept"),
    [
        (TRIMMED, " a b ", True),
        (NO_THINKING, "a b", True),
        (NO_THINKING, "<think>hm</think>a b", False),
        (LAST_ONLY, "a b", False),
        (TWICE, "a b", False),
    ],
)
def test_generated_ids_are_kept_where_the_template_keeps_the_content(
    metadata: dict[str, Any], template: str, content: str, kept: bool
) -> None:
    """Where the template drops or edits the content, its text is encoded."""
    tokenizer = with_template(metadata, template)
    tokens = [id for letter in content for id in tokenizer.encode(letter)]
    messages: list[Message] = [
        {"role": "assistant", "content": content, "tokens": tokens},
        {"role": "user", "content": "x"},
    ]
    ids = tokenizer.encode_chat(messages)
    assert (ids[1 : 1 + len(tokens)] == tokens) is kept
    text = tokenizer._template.render(messages, True)  # type: ignore[union-attr]
    assert kept or ids == tokenizer.encode(text)
    tokenizer.close()


def test_one_edited_answer_leaves_the_others_kept(metadata: dict[str, Any]) -> None:
    tokenizer = with_template(metadata, NO_THINKING)
    tokens = tokenizer.encode("a") + tokenizer.encode("b")
    messages: list[Message] = [
        {"role": "assistant", "content": "ab", "tokens": tokens},
        {"role": "assistant", "content": "</think>c", "tokens": tokenizer.encode("</think>c")},
    ]
    (begin,), (border,) = tokenizer.encode("["), tokenizer.encode("][")
    assert tokenizer.encode_chat(messages, False) == [begin, *tokens, border, *tokenizer.encode("c]")]
    tokenizer.close()


def test_images_and_missing_contents_are_refused(demo: Tokenizer) -> None:
    for content in ([{"type": "image"}], None, 3):
        with pytest.raises(OffmoeError, match="message 1 has a content of type"):
            demo.encode_chat([{"role": "user", "content": content}])  # type: ignore[typeddict-item]


def test_no_chat_template(metadata: dict[str, Any]) -> None:
    files = Files()
    files.metadata = {key: value for key, value in metadata.items() if key != "tokenizer.chat_template"}
    tokenizer = load(files)
    assert tokenizer.chat_template is None
    with pytest.raises(OffmoeError, match="no chat template: use plain text"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])
    tokenizer.close()


# Sentencepiece vocabularies.


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = load(sentencepiece())
    ids = tokenizer.encode("hi thé")
    pieces = [tokenizer._bpe.id_to_token(id) for id in ids]
    assert pieces == ["<s>", "▁hi", "▁t", "h", "<0xC3>", "<0xA9>"]  # ▁t has a higher score than th
    assert tokenizer.decode(ids) == "hi thé"
    assert (tokenizer.bos, tokenizer.eos) == (1, {2})
    tokenizer.close()


def test_sentencepiece_space_is_dropped_once_at_the_start() -> None:
    tokenizer = load(sentencepiece())
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode(" hi hi")
    assert "".join(detokenizer.push(id) for id in ids) == " hi hi" == tokenizer.decode(ids)
    tokenizer.close()
    plain = load(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert plain.encode("hi") == [plain._bpe.token_to_id("hi")]
    plain.close()


def test_sentencepiece_conversation_gets_no_space_after_kept_tokens() -> None:
    tokenizer = load(sentencepiece())
    tokens = [tokenizer._bpe.token_to_id(piece) for piece in ("h", "i")]
    messages: list[Message] = [
        {"role": "t", "content": "hi", "tokens": tokens},
        {"role": "t", "content": "hi"},
    ]
    text = tokenizer._template.render(messages, True)  # type: ignore[union-attr]
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == text == "<t>hi\n<t>hi\n"
    tokenizer.close()


# Directories.


@pytest.fixture
def directory(tmp_path: Path, demo: Tokenizer) -> Path:
    demo._bpe.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"})
    return tmp_path


def test_directory_has_the_same_ids(directory: Path, demo: Tokenizer) -> None:
    tokenizer = load(Files(directory))
    for text in ("", "Hello wörld\n\n 123 🎉", "<|im_end|>"):
        assert tokenizer.encode(text) == demo.encode(text)
        assert tokenizer.decode(demo.encode(text)) == demo.decode(demo.encode(text))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, {0, 2}, 20480)


@pytest.mark.parametrize("listed", [5, [5, 6], None])
def test_generation_config_names_more_ends(directory: Path, listed: Any) -> None:
    write(directory, "generation_config.json", eos_token_id=listed)
    more = {5: {5}, None: set()}.get(listed, {5, 6}) if not isinstance(listed, list) else {5, 6}
    assert load(Files(directory)).eos == {0, 2} | more


def test_end_of_message_is_no_end_of_turn_in_harmony(directory: Path) -> None:
    library = Library.from_file(str(directory / "tokenizer.json"))
    library.add_special_tokens(["<|end|>", "<|return|>", "<|call|>"])
    library.save(str(directory / "tokenizer.json"))
    assert load(Files(directory)).eos == {0, 2, 20481, 20482}


def test_bos_of_the_post_processor_and_of_the_config(directory: Path) -> None:
    raw = json.loads((directory / "tokenizer.json").read_text())
    bos = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": bos["id"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos["id"]: bos},
    }
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    assert load(Files(directory)).encode("a")[0] == 1
    write(directory, "tokenizer_config.json", bos_token="<|im_start|>", add_bos_token=False)
    assert load(Files(directory)).encode("a")[0] != 1


def test_chat_template_file_wins_over_the_named_ones(directory: Path) -> None:
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    write(directory, "tokenizer_config.json", chat_template=named)
    assert load(Files(directory)).chat_template == "D"
    write(directory, "tokenizer_config.json", chat_template="S")
    assert load(Files(directory)).chat_template == "S"
    (directory / "chat_template.jinja").write_text("{{ eos_token }}é")
    assert load(Files(directory)).chat_template == "{{ eos_token }}é"


def test_truncation_and_padding_of_a_file_are_switched_off(directory: Path) -> None:
    library = Library.from_file(str(directory / "tokenizer.json"))
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(directory / "tokenizer.json"))
    assert len(load(Files(directory)).encode("one two three four")) == 4


def test_damaged_directories(directory: Path) -> None:
    Library(models.WordPiece({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    expect_error(Files(directory), "decoder")
    (directory / "tokenizer.json").write_bytes(b'{"model": \xff')
    expect_error(Files(directory), "cannot be read")
    (directory / "tokenizer.json").write_text("{}")
    expect_error(Files(directory), "cannot be read")
    (directory / "tokenizer.json").unlink()
    expect_error(Files(directory), "has no tokenizer.json")


# GGUF metadata that is missing or damaged.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "has no tokenizer"),
        ({"model": "no_vocab"}, "has no tokenizer"),
        ({"model": "bert"}, "'bert' is not supported: expected gpt2, gemma4, llama"),
        ({"pre": "klingon"}, "'klingon' is not supported: expected .*qwen2"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": [1, 2]}, "tokens is missing or not a list of strings"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "twice"),
        ({"token_type": [1]}, "token_type does not match"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["nonsense here"]}, "damaged"),
        ({"merges": ["nospace"]}, "damaged"),
        ({"merges": ["c h", "ch ch"]}, "the merge 'ch ch' contains an unknown token"),
    ],
)
def test_damaged_gguf(metadata: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    files = Files()
    files.metadata = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    expect_error(files, message)


def test_damaged_sentencepiece() -> None:
    expect_error(sentencepiece(scores=[0.0]), "scores does not match")
    expect_error(sentencepiece(scores=None), "scores does not match")


def test_special_ids_outside_the_vocabulary_do_not_count() -> None:
    """Those of the kind hold instead, as in llama.cpp."""
    tokenizer = load(sentencepiece(bos_token_id=10**6, eos_token_id=-1, eot_token_id=264))
    assert (tokenizer.bos, tokenizer.eos) == (1, {2, 264})
    assert tokenizer.encode("hi")[0] == 1
    tokenizer.close()


# How text is cut.


SAMPLE = "I'LL it's 12345 abcDef!!\n\n x  y"
CUTS = {
    "gpt-2": ["I", "'", "LL", " it", "'s", " 12345", " abcDef", "!!", "\n\n", " x", " ", " y"],
    "smollm": [
        *["I", "'", "LL", " it", "'s", " ", "1", "2", "3", "4", "5"],
        *[" abcDef", "!!", "\n\n", " x", " ", " y"],
    ],
    "qwen2": [
        *["I", "'LL", " it", "'s", " ", "1", "2", "3", "4", "5", " abcDef", "!!\n\n", " x", " ", " y"],
    ],
    "llama-bpe": ["I", "'LL", " it", "'s", " ", "123", "45", " abcDef", "!!\n\n", " x", " ", " y"],
    "gpt-4o": ["I'LL", " it's", " ", "123", "45", " abc", "Def", "!!\n\n", " x", " ", " y"],
    "deepseek-v3": ["I", "'LL", " it", "'s", " ", "123", "45", " abcDef", "!!\n\n", " x", " ", " y"],
}


@pytest.mark.parametrize("name", CUTS)
def test_splits(name: str) -> None:
    pieces = [SAMPLE[a:b] for _, (a, b) in build_pre_tokenizer(KINDS[name]).pre_tokenize_str(SAMPLE)]
    assert "".join(pieces) == SAMPLE
    assert pieces == CUTS[name]


ODD = (  # marks that are letters, spaces that are marks, digits among Thai and Han letters
    "  \t\n\r\u00a0\u3000\u2003\u2028abzZéßΩя中文字ก๑๒한ท١12345678,.;:!'`$+<=>^~|()©€→\u0301ªµ²Ⅳ\u2167①"
    "\U0001f600\U00010400\u3001\uff01\uff21’"
)


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].fused])
def test_fused_expressions_split_the_same_way(name: str) -> None:
    """Also run once with 2,000,000 such texts, and with every character below U+20000 between them."""
    slow, fast, random = (
        build_pre_tokenizer(replace(KINDS[name], fused=())),
        build_pre_tokenizer(KINDS[name]),
        Random(7),
    )
    for _ in range(20_000):
        text = "".join(random.choices(ODD, k=random.randrange(1, 14)))
        assert fast.pre_tokenize_str(text) == slow.pre_tokenize_str(text), ascii(text)


@pytest.mark.parametrize("name", KINDS)
def test_name_of_a_pre_tokenizer(name: str) -> None:
    """Name found for a tokenizer.json splits like the kind that wrote it."""
    library = Library(models.BPE(ignore_merges=KINDS[name].ignore_merges))
    library.pre_tokenizer = build_pre_tokenizer(replace(KINDS[name], fused=()))  # as published
    found = KINDS[pre_tokenizer_name(json.loads(library.to_str()))]
    assert (found.patterns, found.ignore_merges) == (KINDS[name].patterns, KINDS[name].ignore_merges)


def test_name_of_published_pre_tokenizers() -> None:
    byte_level = {"type": "ByteLevel", "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated"}
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer_name({"pre_tokenizer": byte_level}) == "gpt-2"
    assert pre_tokenizer_name(sequence(digits, byte_level)) == "smollm"
    assert pre_tokenizer_name(sequence(split, byte_level | {"use_regex": False})) == "qwen2"
    for unknown in (sequence(split, digits), sequence({"type": "Whitespace"}), {"pre_tokenizer": None}):
        with pytest.raises(OffmoeError, match="no GGUF name"):
            pre_tokenizer_name(unknown)
    assert GPT2 in KINDS["smollm"].patterns


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


def pairs(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield a vocabulary's test texts and their ids, as llama.cpp's own test reads them."""
    texts = Path(f"{file}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{file}.out").read_text().split("\n")
    return zip(texts, ([int(id) for id in line.split()] for line in lines), strict=False)


PUBLISHED = sorted(LLAMA_CPP.glob("models/ggml-vocab-*.gguf"))
REFUSED = {"bert-bge": "'bert' is not supported", "nomic-bert-moe": "'t5' is not supported"}


@pytest.mark.skipif(not PUBLISHED, reason="LLAMA_CPP_SOURCE names no llama.cpp sources")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem.removeprefix("ggml-vocab-"))
def test_published_vocabularies(file: Path) -> None:
    """Ids equal those of the model's own tokenizer if published, else texts round-trip; or the error names the
    kind.
    """
    checkpoint = open_checkpoint(file)
    checkpoint.close()
    if reason := REFUSED.get(file.stem.removeprefix("ggml-vocab-")):
        with pytest.raises(OffmoeError, match=reason):
            load_tokenizer(checkpoint)
        return
    tokenizer = load_tokenizer(checkpoint)
    known = Path(f"{file}.inp").exists()
    for text, ids in pairs(file if known else LLAMA_CPP / "models/ggml-vocab-gpt-2.gguf"):
        assert not known or tokenizer._encode(text) == ids
        assert tokenizer.decode(tokenizer._encode(text)) == text
    tokenizer.close()


APPROXIMATED = {"gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie", "tekken"}


@pytest.mark.llama
@pytest.mark.parametrize("name", sorted({name for name in KINDS if KINDS[name].byte_level} - APPROXIMATED))
def test_splits_as_llama_cpp(metadata: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Demo vocabulary under each name, except kinds whose expression llama.cpp only approximates."""
    gguf, llama = pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    files = Files()
    files.metadata = metadata | {"tokenizer.ggml.pre": name}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = True
    model = llama.llama_model_load_from_file(str(tmp_path / "v.gguf").encode(), parameters)
    tokenizer, vocab = load(files), llama.llama_model_get_vocab(model)
    for text in (
        SAMPLE,
        "'S\t12 Ⅷ½²\r\n\n é漢字カな한글 हिन्दी,,$$^`~ 123456 …“a” \u00a0\u2003 🎉 ",
        " \n \n",
        "a\n b",
    ):
        raw, ids = text.encode(), (ctypes.c_int32 * 999)()
        count = llama.llama_tokenize(vocab, raw, len(raw), ids, 999, False, True)
        assert tokenizer._encode(text) == list(ids[:count])
    tokenizer.close()
    llama.llama_model_free(model)


# Stop strings.


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=12),
)
@example(["abca", "bc"], ["ab", "ca"])
@example(["abca", "bc"], ["abca"])
def test_stops_do_not_depend_on_the_pieces(stops: list[str], pieces: list[str]) -> None:
    """Everything before the stop string that ends first is emitted; nothing is lost if there is none."""
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    matcher, shown, stopped = StopStrings(stops), "", False
    for piece in pieces:
        new, stopped = matcher.push(piece)
        shown += new
        assert expected.startswith(shown)
    assert (shown + matcher.flush(), stopped) == (expected, bool(ends))


def test_stop_strings_hold_back_only_what_may_begin_one() -> None:
    matcher = StopStrings(["\nUser:"])
    assert matcher.push("Hi\n") == ("Hi", False)
    assert matcher.push("Us") == ("", False)
    assert matcher.push("ed") == ("\nUsed", False)
    assert matcher.push("\nUser: x") == ("", True)
    assert matcher.push("y") == ("", True)
    assert matcher.flush() == ""
    assert StopStrings([]).push("x") == ("x", False)
