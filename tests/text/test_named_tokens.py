"""Every place that may hold a special token, an end of answers or a chat template; transformers is the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import Files, load, write
from tokenizers import AddedToken
from trained_tokenizers import byte_level

from offmoe.text.named_tokens import CLASS_DEFAULTS, STANDARD
from offmoe.text.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ eos_token }}\n"
    "{% endfor %}"
    "{{ sep_token }}{{ pad_token }}{{ cls_token }}{{ mask_token }}{{ unk_token }}{{ image_token }}{{ boi_token }}"
)
TEXTS = (
    "a<|im_start|>b <|im_end|> c",
    "<|end|><|new|>x<|image|> y",
    "<|new|> <x1><x2>\n <x3>",
    "plain text",
    "<s></s><unk>",
    "it's <pad>\t<|im_end|>\n\n x",
)


def entry(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False} | flags


def typed(text: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **entry(text, **flags)}


NUMBERED = {
    str(319 + at): entry(text, special=True) for at, text in enumerate(("<|im_start|>", "<|im_end|>", "<|new|>"))
}
PLACES: dict[str, dict[str, dict[str, Any]]] = {
    "config": {"tokenizer_config": {"bos_token": "<s>", "eos_token": typed("</s>"), "pad_token": "<|end|>"}},
    "all names": {"tokenizer_config": {name: f"<{name[0]}>" for name in STANDARD}},
    "map": {"special_tokens_map": {"bos_token": "<s>", "eos_token": entry("</s>"), "cls_token": "<|im_start|>"}},
    "map wins over config": {
        "tokenizer_config": {"bos_token": "<unk>", "eos_token": "</s>"},
        "special_tokens_map": {"bos_token": "<s>"},
    },
    "map is not read where there is a decoder": {
        "tokenizer_config": {"bos_token": "<unk>", "added_tokens_decoder": NUMBERED},
        "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"},
    },
    "decoder": {"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": NUMBERED}},
    "decoder with flags": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "319": entry("<|im_start|>", special=True, rstrip=True),
                "320": entry("<|im_end|>", special=True, lstrip=True),
                "321": entry("<|new|>", normalized=True),
                "322": entry("<|image|>", single_word=True),
            }
        }
    },
    "decoder in another order": {"tokenizer_config": {"added_tokens_decoder": dict(reversed(NUMBERED.items()))}},
    "decoder changes a token of the file": {
        "tokenizer_config": {"added_tokens_decoder": {"3": entry("<|end|>", rstrip=True), **NUMBERED}}
    },
    "added_tokens": {"added_tokens": {"<|im_start|>": 319, "<|im_end|>": 320, "<|new|>": 321}},
    "added_tokens, named": {
        "tokenizer_config": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|new|>"]},
        "added_tokens": {"<|im_end|>": 320, "<|im_start|>": 319, "<|new|>": 321},
    },
    "additional": {"tokenizer_config": {"additional_special_tokens": ["<|im_start|>", typed("<|im_end|>"), "<x1>"]}},
    "additional in the map": {"special_tokens_map": {"additional_special_tokens": ["<|im_start|>", "<x2>"]}},
    "extra list": {"tokenizer_config": {"extra_special_tokens": ["<x1>", "<x3>"]}},
    "extra list in the map": {"special_tokens_map": {"extra_special_tokens": ["<x1>", entry("<x3>")]}},
    "extra table": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<|image|>", "boi_token": "<x1>"}}},
    "extra table in the map": {"special_tokens_map": {"extra_special_tokens": {"image_token": "<|image|>"}}},
    "token of the model's own": {"tokenizer_config": {"image_token": "<|image|>", "boi_token": "<x2>"}},
    "config and additional": {
        "tokenizer_config": {
            "mask_token": "<|new|>",
            "sep_token": "<x2>",
            "additional_special_tokens": ["<x1>"],
            "added_tokens_decoder": NUMBERED,
        },
    },
    "null": {"tokenizer_config": {"bos_token": None, "eos_token": "</s>", "extra_special_tokens": None}},
    "nothing": {},
}


@pytest.fixture
def directory(tmp_path: Path) -> Callable[..., Path]:
    """Writes a directory: a tokenizer.json, and the JSON files given by name."""

    def make(template: str | None = TEMPLATE, **files: dict[str, Any]) -> Path:
        byte_level().save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": template} if template else {})
        for name, content in ({"tokenizer_config": {}} | files).items():
            write(tmp_path, f"{name}.json", **((config if name == "tokenizer_config" else {}) | content))
        return tmp_path

    return make


def compare(ours: Tokenizer, folder: Path) -> None:
    """Compare names, ids of texts and conversations with transformers' AutoTokenizer."""
    import transformers

    other = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours._template
    names = {key: value for key, value in other.special_tokens_map.items() if isinstance(value, str)}
    assert ours._template._setup["variables"] == names
    for text in TEXTS:
        assert ours._encode(text) == other.encode(text, add_special_tokens=False), text
    messages: Any = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": " x"}]
    assert ours.encode_chat(messages, False) == list(other.apply_chat_template(messages)["input_ids"])
    assert ours.bos == other.bos_token_id
    assert other.eos_token_id is None or other.eos_token_id in ours.eos
    hidden = {id for id, token in other.added_tokens_decoder.items() if token.special}
    assert hidden <= {id for id in ours._added if not ours.token_bytes(id)}


@pytest.mark.parametrize("place", PLACES)
def test_tokens_of_every_place(directory: Callable[..., Path], place: str) -> None:
    folder = directory(**PLACES[place])
    ours = load(Files(folder))
    compare(ours, folder)
    ours.close()


@pytest.mark.parametrize("name", sorted(CLASS_DEFAULTS))
def test_defaults_of_tokenizer_classes(directory: Callable[..., Path], name: str) -> None:
    """What the class names, where config and maps do not, as transformers' class does; an explicit null wins."""
    import transformers

    for given in ({}, {"eos_token": "<|end|>"}, {"eos_token": None}):
        folder = directory(tokenizer_config={"tokenizer_class": f"{name}Fast", **given})
        tokens = list(CLASS_DEFAULTS[name].values())
        library = byte_level()
        library.add_special_tokens([AddedToken(text, normalized=False) for text in tokens])
        library.save(str(folder / "tokenizer.json"))
        ours, other = load(Files(folder)), getattr(transformers, name).from_pretrained(folder)
        assert ours._template
        assert ours._template._setup["variables"] == other.special_tokens_map
        ours.close()


ENDS: dict[str, tuple[dict[str, dict[str, Any]], set[int]]] = {
    "generation_config": ({"generation_config": {"eos_token_id": 7}}, {7}),
    "generation_config, several": ({"generation_config": {"eos_token_id": [7, 9]}}, {7, 9}),
    "config": ({"config": {"eos_token_id": 7}}, {7}),
    "config, several": ({"config": {"eos_token_id": [7, 8]}}, {7, 8}),
    "text_config": ({"config": {"text_config": {"eos_token_id": [7]}}}, {7}),
    "both levels": ({"config": {"eos_token_id": 6, "text_config": {"eos_token_id": 7}}}, {6, 7}),
    "tokenizer_config": ({"tokenizer_config": {"eos_token": "</s>"}}, {2}),
    "tokenizer_config, an id": ({"tokenizer_config": {"eos_token_id": 7}}, {7}),
    "special_tokens_map": ({"special_tokens_map": {"eos_token": "</s>"}}, {2}),
    "end of turn": ({"tokenizer_config": {"eot_token": "<s>"}}, {1}),
    "added": ({"added_tokens": {"<|im_end|>": 319}}, {319}),
    "null": ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [None, True, "3"]}}, set()),
}


@pytest.mark.parametrize("place", ENDS)
def test_ends_of_every_place(directory: Callable[..., Path], place: str) -> None:
    files, expected = ENDS[place]
    ours = load(Files(directory(**files)))
    assert ours.eos == expected | {3}  # <|end|>, which ends turns wherever it is
    ours.close()


def test_model_without_an_end_is_told(directory: Callable[..., Path]) -> None:
    folder = directory("{{ messages[0].content }}")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|end|>", "<|bend|>"))
    ours = load(Files(folder))
    assert [note for note in ours.notes if "ends an answer" in note]
    ours.close()


def test_empty_template_variables_are_told(directory: Callable[..., Path]) -> None:
    template = "{{ bos_token }}{{ eos_token }}{% if pad_token is defined %}{{ pad_token }}{% endif %}{{ x }}"
    ours = load(Files(directory(template, tokenizer_config={"eos_token": "</s>"})))
    (note,) = ours.notes
    assert note == "the chat template reads bos_token, which the model's files do not name: it is empty in prompts"
    ours.close()


def test_gap_before_an_added_token_is_told(directory: Callable[..., Path]) -> None:
    """The library numbers added tokens without gaps, in transformers too."""
    folder = directory(tokenizer_config={"added_tokens_decoder": {"330": entry("<|new|>", special=True)}})
    ours = load(Files(folder))
    compare(ours, folder)
    assert "the token '<|new|>' has the id 319 and not 330" in ours.notes[0]
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append(entry("<x1>", special=True) | {"id": 400})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    write(folder, "tokenizer_config.json")
    other = load(Files(folder))
    assert "the token '<x1>' has the id 319 and not 400" in other.notes[0]
    ours.close()
    other.close()


def jinja(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


TEMPLATES: dict[str, tuple[dict[str, Any], dict[str, str], str | None]] = {
    "config": ({"tokenizer_config": {"chat_template": "A"}}, {}, "A"),
    "config, a list": (
        {
            "tokenizer_config": {
                "chat_template": [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
            }
        },
        {},
        "A",
    ),
    "config, a table": ({"tokenizer_config": {"chat_template": {"rag": "B", "default": "A"}}}, {}, "A"),
    "file": ({"tokenizer_config": {"chat_template": "B"}}, {"chat_template.jinja": "A"}, "A"),
    "more files": ({}, {"chat_template.jinja": "A", "additional_chat_templates/rag.jinja": "B"}, "A"),
    "default among more files": (
        {"tokenizer_config": {"chat_template": "B"}},
        {"additional_chat_templates/default.jinja": "A", "additional_chat_templates/aaa.jinja": "B"},
        "A",
    ),
    "processor": ({"chat_template": {"chat_template": "A"}}, {}, "A"),
    "processor, several": ({"chat_template": {"chat_template": {"default": "A", "x": "B"}}}, {}, "A"),
    "config over processor": (
        {"tokenizer_config": {"chat_template": "A"}, "chat_template": {"chat_template": "B"}},
        {},
        "A",
    ),
    "none": ({}, {}, None),
}


@pytest.mark.parametrize("place", TEMPLATES)
def test_template_of_every_place(directory: Callable[..., Path], place: str) -> None:
    import transformers

    files, more, expected = TEMPLATES[place]
    folder = directory(None, **files)
    for name, text in more.items():
        jinja(folder, name, text)
    ours = load(Files(folder))
    assert ours.chat_template == expected
    if expected and "processor" not in place:
        assert transformers.AutoTokenizer.from_pretrained(folder).get_chat_template() == "A"
    ours.close()


def test_only_named_templates(directory: Callable[..., Path]) -> None:
    folder = directory(None, tokenizer_config={"chat_template": [{"name": "tool_use", "template": "A"}]})
    ours = load(Files(folder))
    assert ours.chat_template == "A"
    assert "of the chat templates tool_use none is called default: tool_use is used" in ours.notes
    ours.close()


def test_byte_order_mark_of_a_template(directory: Callable[..., Path]) -> None:
    folder = directory(None)
    jinja(folder, "chat_template.jinja", "\ufeffA")
    ours = load(Files(folder))
    assert ours.chat_template == "A"
    ours.close()
