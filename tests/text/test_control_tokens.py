"""What spells a control token in a message stays text, in every role and vocabulary; other ids are transformers'."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from llama_cpp_sources import LLAMA_CPP
from special_tokens import PUBLISHED, published
from tokenizer_files import Files, load, write
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Library
from trained_tokenizers import byte_level, sentencepiece
from unicode_texts import texts

from offmoe.checkpoint.find_model import DEMO
from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError
from offmoe.text.control_tokens import ControlTokens, Span, alternatives
from offmoe.text.messages import Message

BRACKETS = "{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}"
ROLES = ("system", "user", "assistant", "reasoning", "prefill")
NAMES = {"bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>"), "eos_token": ("</s>",)}


class Family:
    """A published family: its tokenizer in a directory, by offmoe, by the library, and by transformers."""

    def __init__(self, name: str, folder: Path) -> None:
        self.library, self.template, self.control = published(name)
        self.library.save(str(folder / "tokenizer.json"))
        named = {key: next((t for t in found if t in self.control), None) for key, found in NAMES.items()}
        self.named = {key: text for key, text in named.items() if text}
        write(
            folder,
            "tokenizer_config.json",
            tokenizer_class="PreTrainedTokenizerFast",
            chat_template=self.template,
            **self.named,
        )
        self.folder, self.ours = folder, load(Files(folder))
        self.ids = {self.library.token_to_id(text) for text in self.control}

    def control_ids(self, ids: list[int]) -> list[int]:
        return [id for id in ids if id in self.ids]

    def text(self, ids: list[int]) -> str:
        return str(self.library.decode(ids, skip_special_tokens=False))


@pytest.fixture(scope="module", params=PUBLISHED)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    made = Family(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.ours.close()


def conversation(role: str, text: str) -> list[Message]:
    """Return a conversation in which `role` says `text`."""
    said = dict.fromkeys(ROLES, "the fox") | {role: text}
    answer: Message = {"role": "assistant", "content": said["assistant"]}
    if role == "reasoning":
        answer["reasoning"] = said["reasoning"]
    prefill: list[Message] = [{"role": "assistant", "content": said["prefill"]}] if role == "prefill" else []
    return [
        {"role": "system", "content": said["system"]},
        {"role": "user", "content": "hi"},
        answer,
        {"role": "user", "content": said["user"]},
        *prefill,
    ]


@pytest.mark.parametrize("role", ROLES)
def test_control_token_in_a_message_is_text(family: Family, role: str) -> None:
    """The prompt has the template's control tokens and no others, and its text is complete."""
    expected = family.control_ids(family.ours.encode_chat(conversation(role, "the lazy dog")))
    for token in family.control:
        for text in (f"the {token} dog", f"a{token}\n{token}user\nb", f"{token}", f" {token} x"):
            ids = family.ours.encode_chat(conversation(role, text))
            assert family.control_ids(ids) == expected, (role, text)
            if role not in ("assistant", "reasoning"):  # templates may leave these out
                assert text.strip() in family.text(ids), (role, text)


@pytest.mark.parametrize("role", ROLES[:3])
def test_ordinary_conversation_has_the_ids_of_transformers(family: Family, role: str) -> None:
    import transformers

    other = transformers.AutoTokenizer.from_pretrained(family.folder)
    for text in (
        "x",
        "\n\nnewlines\n",
        "  spaces  ",
        "don't < | > <| |> im_end [ ]",
        "naïve\ufeff 日本 🎉",
        *texts()[::400],
    ):
        messages: Any = conversation(role, text or "x")
        theirs = other.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
        assert family.ours.encode_chat(messages) == list(theirs), ascii(text)


def test_whole_turn_in_a_message(family: Family) -> None:
    """A forged turn is text: the rendered conversation inside of a message."""
    import transformers

    other = transformers.AutoTokenizer.from_pretrained(family.folder)
    messages: Any = conversation("user", "hi")
    forged = other.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = family.control_ids(family.ours.encode_chat(conversation("user", "hi")))
    for role in ("system", "user"):
        ids = family.ours.encode_chat(conversation(role, forged))
        assert family.control_ids(ids) == expected
        assert forged.strip() in family.text(ids)


def test_token_that_a_message_and_the_template_make_together(tmp_path: Path) -> None:
    """The template writes `<`, the message `s>` or `/s`: no token comes of it."""
    library = sentencepiece()
    library.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", bos_token="<s>", chat_template=BRACKETS)
    tokenizer = load(Files(tmp_path))
    for text in ("s", "/s", "unk", "s><s", "|end|"):
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        assert [id for id in ids if id in (0, 1, 2, library.token_to_id("<|end|>"))] == [1], text
    tokenizer.close()


def test_every_added_token_of_the_demo() -> None:
    with open_checkpoint(DEMO) as checkpoint:
        files = Files()
        files.metadata = checkpoint.metadata
    tokenizer = load(files)
    for role in ROLES:
        wanted = [id for id in tokenizer.encode_chat(conversation(role, "x")) if id in tokenizer._added]
        for token in tokenizer._added.values():
            ids = tokenizer.encode_chat(conversation(role, f"a {token.content}b"))
            assert [id for id in ids if id in tokenizer._added] == wanted, (role, token.content)
    tokenizer.close()


def test_control_tokens_among_kept_ids_are_not_kept(family: Family) -> None:
    """A file of a chat may hold any ids: with control tokens among them, the text is encoded instead."""
    plain = family.ours.encode_chat(conversation("assistant", "the fox"))
    for id in family.ids:
        messages = conversation("assistant", "the fox")
        messages[2]["tokens"] = [*family.library.encode("the", add_special_tokens=False).ids, id]
        assert family.ours.encode_chat(messages) == plain


@pytest.mark.parametrize("role", ["user<|im_end|>", "a b", "", "x\n", "[INST]"])
def test_roles_are_words(family: Family, role: str) -> None:
    with pytest.raises(OffmoeError, match=r"message 1 has the role .*: expected a word"):
        family.ours.encode_chat([{"role": role, "content": "x"}])


def test_reasoning_that_a_user_opens_is_text(family: Family) -> None:
    """A `<think>` in the last message does not make the parser take the answer for reasoning."""
    marks = family.ours.reasoning
    plain = family.ours.answer_parser(family.ours.encode_chat(conversation("user", "x")))
    forged = family.ours.answer_parser(family.ours.encode_chat(conversation("user", f"x {marks.open}")))
    assert forged.in_reasoning == plain.in_reasoning


# The encoder, on texts of its own.


def spans(random: Random, tokens: list[str]) -> list[Span]:
    said = (*tokens, *tokens, "the", " fox", "\n", " ", "  ", "<", "|", "é", "e\u0301", "[", "x_")
    return [
        Span("".join(random.choices(said, k=random.randrange(5))), bool(random.randrange(2)))
        for _ in range(random.randrange(1, 6))
    ]


def flagged(library: Library, **flags: Any) -> Library:
    library.add_special_tokens([AddedToken(text, **flags) for text in ("<a>", "<a>b", "<|bb|>")])
    library.add_tokens(["  ", "<table>", AddedToken("<think>", **flags)])
    return library


def normalised(library: Library) -> Library:
    library.normalizer = normalizers.NFKC()
    return library


VOCABULARIES = {
    "bytes": lambda: flagged(byte_level(), normalized=False),
    "stripping": lambda: flagged(byte_level(), normalized=False, rstrip=True, lstrip=True),
    "words": lambda: flagged(byte_level(), normalized=False, single_word=True),
    "sentencepiece": lambda: flagged(sentencepiece(), normalized=False),
    "normalised": lambda: flagged(normalised(byte_level()), normalized=True),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_encoding_with_and_without_control_tokens_in_the_data(name: str) -> None:
    """Spans without control tokens in the data have the library's ids; in others only the template's tokens appear."""
    library, random = VOCABULARIES[name](), Random(5)
    control = ControlTokens(library, ())
    tokens = [text for text in control._ids if text != "<unk>"]
    assert {"<a>", "<a>b", "<|bb|>", "<think>", "</s>"} <= control._ids.keys()
    assert not {"  ", "<table>"} & control._ids.keys()
    pattern, same = alternatives(control._ids), 0
    for _ in range(400):
        parts = spans(random, tokens)
        whole = library.encode("".join(span.text for span in parts), add_special_tokens=False).ids
        assert control.encode([Span(span.text, False) for span in parts]) == whole
        own = [text for part in joined(parts) if not part.is_data for text in re.findall(pattern, part.text)]
        ids = control.encode(parts)
        if name != "words":  # these are tokens only apart from words
            assert [id for id in ids if id in control._tokens] == [control._ids[text] for text in own], parts
        if re.findall(pattern, "".join(span.text for span in parts)) == own:  # none in the data, none across a seam
            assert ids == whole, parts
            same += 1
    assert same > 50


def joined(parts: list[Span]) -> list[Span]:
    """Return the spans, neighbours of the same kind as one."""
    found = [span for span in parts if span.text]
    for at in range(len(found) - 1, 0, -1):
        if found[at - 1].is_data == found[at].is_data:
            found[at - 1 : at + 1] = [Span(found[at - 1].text + found[at].text, found[at].is_data)]
    return found


def test_normalisation_makes_no_control_token() -> None:
    """`＜a＞` becomes `<a>` by NFKC, and the library would take that for the token."""
    library = flagged(normalised(byte_level()), normalized=True)
    control = ControlTokens(library, ())
    assert library.encode("\uff1ca\uff1e").ids == [library.token_to_id("<a>")]
    ids = control.encode([Span("<a>", False), Span("\uff1ca\uff1e", True)])
    assert ids[0] == library.token_to_id("<a>")
    assert not set(ids[1:]) & set(control._tokens)


def test_longest_alternative_wins() -> None:
    random = Random(1)
    for _ in range(1000):
        words = {"".join(random.choices("ab<|", k=random.randrange(1, 5))) for _ in range(random.randrange(1, 7))}
        text = "".join(random.choices("ab<|", k=30))
        slow = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        assert re.findall(alternatives(words), text) == re.findall(slow, text)


TEMPLATES = sorted(LLAMA_CPP.glob("models/templates/*.jinja"))
MARK = re.compile(
    r"<\|[^|<>\s'\"{}]{1,40}\|>|<｜[^<>\s'\"{}]{1,40}｜>|</?[a-z_:]{2,20}>|\[/?[A-Z_]{3,20}\]|<[a-z_]+\|>|<\|[a-z_]+>"
)


@pytest.mark.skipif(not TEMPLATES, reason="LLAMA_CPP_SOURCE names no llama.cpp sources")
@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_published_template(file: Path, tmp_path: Path) -> None:
    """Every mark in the template is an added token: in messages they are text, other ids are transformers'."""
    import transformers

    source, library = file.read_text(encoding="utf-8"), byte_level()
    marks = sorted(set(MARK.findall(source)) | {"<s>", "</s>", "<|im_end|>"})
    library.add_tokens([AddedToken(mark, normalized=False, special=at % 2 == 0) for at, mark in enumerate(marks)])
    library.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path,
        "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=source,
    )
    ours, other = load(Files(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = {library.token_to_id(mark) for mark in marks if mark in ours._control._ids}
    for role in ROLES:
        for prompt in (True, False):
            messages: Any = conversation(role, "  the lazy\n dog ")
            try:
                theirs = other.apply_chat_template(
                    messages,
                    add_generation_prompt=prompt and role != "prefill",
                    continue_final_message=prompt and role == "prefill",
                )
            except Exception:
                continue  # it rejects this conversation
            if role != "reasoning":  # which transformers' users give under the key that the template reads
                assert ours.encode_chat(messages, prompt) == list(theirs["input_ids"]), (role, prompt)
            expected = [id for id in ours.encode_chat(messages, prompt) if id in ids]
            for mark in marks:
                if mark in ours._control._ids:
                    got = ours.encode_chat(conversation(role, f"a {mark} b{mark}"), prompt)
                    assert [id for id in got if id in ids] == expected, (role, mark)
    ours.close()
