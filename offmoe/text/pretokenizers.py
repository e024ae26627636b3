"""Pre-tokenizers of byte-level BPE: the regular expressions behind GGUF's `tokenizer.ggml.pre` names.

A wrong split silently changes the token ids. The expressions are those of the models' own tokenizer.json; where
llama.cpp (src/llama-vocab.cpp) rewrites one, its comment keeps the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from offmoe.errors import OffmoeError

# Cased letters as DeepSeek-LLM's tokenizer.json lists them.
LETTERS = (
    "A-Za-z"
    "\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7"
    "-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-"
    "\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-"
    "\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-"
    "\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e"
    "-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400"
    "-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
HAN_HANGUL = "\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff"  # includes thousands of marks, digits and spaces
MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
BOTH = "A-Za-z\uff21-\uff3a\uff41-\uff5a"  # in LETTERS and in MARKS
FALCON_MARKS = r"\p{P}\$\+<=>\^~\|`"
CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
HALVED_SPACES = "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s{1}"
SYMBOLS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def llama3_pattern(digits: str, punctuation_tail: str = r"[\r\n]*") -> str:
    """Return Llama 3's expression: contractions, words, `digits`, punctuation, spaces."""
    return CASELESS + rf"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+{punctuation_tail}" + SPACES


def o200k_pattern(digits: str, contraction: str) -> str:
    """Return o200k's expression, which splits words where lower case is followed by upper case."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{lead}{UPPER}*{LOWER}+{contraction}|{lead}{UPPER}+{LOWER}*{contraction}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES
    )


def deepseek_v3_patterns() -> tuple[str, ...]:
    """Return DeepSeek-V3's three expressions: digits, CJK, and the rest."""
    rest = r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + SPACES
    return (r"\p{N}{1,3}", CJK, SYMBOLS + rest)


def kimi_k2_pattern() -> str:
    """Return o200k's expression with Chinese characters as words of their own, as in Kimi's tokenization_kimi.py."""
    upper, lower = (rf"[{letters[1:-1]}&&[^\p{{Han}}]]" for letters in (UPPER, LOWER))
    lead, tail = r"[^\r\n\p{L}\p{N}]?", CASELESS + "?"
    words = rf"{lead}{upper}*{lower}+{tail}|{lead}{upper}+{lower}*{tail}"
    return rf"[\p{{Han}}]+|{words}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + SPACES


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = llama3_pattern(r"\p{N}{1,3}")
QWEN2 = llama3_pattern(r"\p{N}")
LINES = r"[^\n]+|[\n]+"
PIECES = r" ?[^(\s|.,!?…。，、।۔،)]+"
ASIAN = (  # used by AFMoE
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)


@dataclass(frozen=True)
class PreTokenizerKind:
    """Regular expressions applied one after another, each to the pieces that the previous one left."""

    patterns: tuple[str, ...]
    fused: tuple[str, ...] = ()  # equivalent expressions in fewer passes: one pass costs as much as merging
    ignore_merges: bool = False  # a piece that is in the vocabulary is one token, regardless of the merges
    add_bos: bool = False  # default if the file does not say
    byte_level: bool = True  # bytes as GPT-2's characters; otherwise `▁` for spaces and tokens <0x00> to <0xFF>


KINDS: dict[str, PreTokenizerKind] = {
    "gpt-2": PreTokenizerKind((GPT2,)),
    "smollm": PreTokenizerKind((r"\p{N}", GPT2)),
    "qwen2": PreTokenizerKind((QWEN2,)),
    "llama-bpe": PreTokenizerKind((LLAMA3,), ignore_merges=True, add_bos=True),
    "dbrx": PreTokenizerKind((LLAMA3,)),
    "qwen35": PreTokenizerKind(
        (CASELESS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES,)
    ),
    "gpt-4o": PreTokenizerKind((o200k_pattern(r"\p{N}{1,3}", CASELESS + "?"),)),
    "tekken": PreTokenizerKind((o200k_pattern(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    "deepseek-v3": PreTokenizerKind(deepseek_v3_patterns()),
    "deepseek-llm": PreTokenizerKind(
        (
            r"[\r\n]",
            rf"\s?[{LETTERS}]+",
            rf"\s?[{MARKS}]+",
            r"\s+$",
            f"[{HAN_HANGUL}]+",
            r"\p{N}+",
        ),
        (
            rf"[\r\n]|\s?[{BOTH}]+|[\s&&[^\u3000]]?[{LETTERS}&&[^{BOTH}]]+"
            rf"|\s?(?:[{MARKS}&&[^{BOTH}\u3000]]|\u3000(?![{LETTERS}]))+|\u3000",  # a mark that is a space too
            r"\s+$",
            rf"[{HAN_HANGUL}&&[^\p{{N}}]]+|[{HAN_HANGUL}&&\p{{N}}]+|[\p{{N}}&&[^{HAN_HANGUL}]]+",
        ),
    ),
    "deepseek-coder": PreTokenizerKind(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{HAN_HANGUL}]+", r"\p{N}"),
        (r"[\r\n]|\s?\p{L}+|\s?\p{P}+", rf"[{HAN_HANGUL}&&[^\p{{N}}]]+|\p{{N}}"),
    ),
    "bailingmoe": PreTokenizerKind(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "kimi-k2": PreTokenizerKind((kimi_k2_pattern(),)),
    "afmoe": PreTokenizerKind((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", ASIAN, deepseek_v3_patterns()[-1])),
    "tiny_aya": PreTokenizerKind((r"\d{1,3}(?=(?:\d{3})*\b)", o200k_pattern(r"\p{N}{1,3}", CASELESS + "?"))),
    "exaone-moe": PreTokenizerKind(
        (
            CASELESS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "youtu": PreTokenizerKind(
        (
            "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            o200k_pattern(r"\p{N}", CASELESS + "?"),
        ),
        ignore_merges=True,
    ),
    "spark2_5": PreTokenizerKind(
        (
            *deepseek_v3_patterns()[:2],
            SYMBOLS + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "seed-coder": PreTokenizerKind(
        (CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + SPACES,),
    ),
    "ufakzeka": PreTokenizerKind((QWEN2.removeprefix(CASELESS + "|"),)),
    "laguna": PreTokenizerKind((LINES, QWEN2)),
    "minicpm5": PreTokenizerKind((r"\p{N}{1,3}", llama3_pattern(r"\p{N}+")), ignore_merges=True),
    "jais-2": PreTokenizerKind((LLAMA3.removesuffix(r"|\s+(?!\S)|\s+") + HALVED_SPACES,)),
    "superbpe": PreTokenizerKind((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "gemma4": PreTokenizerKind((LINES,), byte_level=False),
    "sarvam-moe": PreTokenizerKind((LINES,), byte_level=False),
    "bloom": PreTokenizerKind((PIECES,)),
    "viking": PreTokenizerKind((PIECES, r"\p{N}")),
    "falcon": PreTokenizerKind(
        (rf"[{FALCON_MARKS}]+", GPT2, r"[0-9][0-9][0-9]"),
        (
            rf"[{FALCON_MARKS}]+| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}{FALCON_MARKS}]+"
            rf"|\s+(?=[{FALCON_MARKS}])|\s+(?!\S)|\s+",
            r"[0-9][0-9][0-9]",
        ),
    ),
    "default": PreTokenizerKind((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
SAME_AS = {
    "gpt-2": "olmo mpt phi-2 jais gigachat exaone4 trillion granite-docling mellum a.x-4.0",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "qwen2": "stablelm2 deepseek-r1-qwen hunyuan solar-open grok-2 megrez kormo",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "dbrx": "smaug-bpe chatglm-bpe",
    "gpt-4o": "llama4 kanana2 minimax-m2 talkie",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "tiny_aya": "cohere2moe",
    "bloom": "poro-chat gpt3-finnish",
    "bailingmoe": "bailingmoe2 llada-moe",
}
KINDS |= {name: KINDS[kind] for kind, names in SAME_AS.items() for name in names.split()}
KINDS |= dict.fromkeys(("glm4", "glm5"), PreTokenizerKind((LLAMA3,), ignore_merges=True))


def find_kind(name: str) -> PreTokenizerKind:
    """Return the kind called `name` in GGUF files. Raises OffmoeError if it is unknown."""
    if name not in KINDS:
        aliases = {alias for names in SAME_AS.values() for alias in names.split()}
        known = ", ".join(sorted(KINDS.keys() - aliases))
        found = repr(str(name)[:60])
        raise OffmoeError(f"the file's pre-tokenizer {found} is not supported: expected {known} or an alias of these")
    return KINDS[name]


def build_pre_tokenizer(kind: PreTokenizerKind) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that splits as `kind` says and then, if it is byte-level, maps bytes to characters."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.fused or kind.patterns]
    byte_level = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)] if kind.byte_level else []
    return pre_tokenizers.Sequence([*splits, *byte_level])


def pre_tokenizer_name(tokenizer_json: dict[str, Any]) -> str:
    """Return the GGUF name of a byte-level `tokenizer.json`'s pre-tokenizer.

    Among kinds with the same expressions, prefer one with the same `ignore_merges`. Raises OffmoeError if there is no
    such name.
    """
    root = tokenizer_json.get("pre_tokenizer") or {}
    patterns = tuple(pattern for step in root.get("pretokenizers", [root]) for pattern in step_patterns(step))
    ignore_merges = bool((tokenizer_json.get("model") or {}).get("ignore_merges"))
    same = [name for name, kind in KINDS.items() if kind.patterns == patterns]
    if not same:
        raise OffmoeError(
            f"tokenizer.json splits text by {patterns}: this has no GGUF name, so pack cannot write the tokenizer"
        )
    return next((name for name in same if KINDS[name].ignore_merges == ignore_merges), same[0])


def step_patterns(step: dict[str, Any]) -> list[str]:
    """Return the expressions that one step of a tokenizer.json pre-tokenizer stands for."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
    if kind == "Split" and "Regex" in step.get("pattern", {}):
        return [escape_controls(step["pattern"]["Regex"])]
    return [f"<{kind}>"]


def escape_controls(pattern: str) -> str:
    """Return `pattern` with line ends escaped as in the table: some files hold them as characters, some as escapes."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")
