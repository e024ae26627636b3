"""A model's tokenizer as the metadata of a GGUF, in the keys of llama.cpp and, for what it has none for, in our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from offmoe.errors import OffmoeError
from offmoe.text.directory_vocab import vocab_from_directory
from offmoe.text.gguf_metadata import BYTE, CONTROL, FLAGS_KEY, NORMAL, TOKEN_FLAGS, UNKNOWN, UNUSED, USER_DEFINED
from offmoe.text.gguf_vocab import vocab_from_gguf
from offmoe.text.pretokenizers import KINDS, pre_tokenizer_name
from offmoe.text.tokenizer import BYTE_TOKEN
from offmoe.text.vocab import END_OF_TURN, NAMES, Vocab

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint

UNMERGED = -1e9  # score of a token that no merge produces
END_KEYS = ("eot", "eom")
PROBES = ("{0}", "a {0} b", "a{0}b", " \t{0}\n {0}  é", "{0}{0} x{0}.")  # texts with an added token


def tokenizer_keys(checkpoint: Checkpoint, vocab_size: int) -> dict[str, Any]:
    """Return the keys of `tokenizer.json`, or, without that file, the key that says there is no vocabulary."""
    raw = checkpoint.json("tokenizer.json")
    if raw is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise OffmoeError(f"{checkpoint.path}/tokenizer.json is not a BPE: pack cannot write this tokenizer")
    vocab = vocab_from_directory(checkpoint)
    tokens, types = token_table(vocab, model, vocab_size)
    keys: dict[str, Any] = {"tokens": tokens, "token_type": types}
    keys |= sentencepiece_keys(raw, model, tokens) if model.get("byte_fallback") else byte_level_keys(raw, model)
    keys |= special_ids(vocab, vocab_size) | {"add_bos_token": vocab.add_bos} | token_flags(vocab, raw)
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    named |= {"tokenizer.chat_template": vocab.chat_template} if vocab.chat_template else {}
    check_same(vocab, named)
    return named


def check_same(vocab: Vocab, keys: dict[str, Any]) -> None:
    """Raise OffmoeError if the tokenizer in `keys` has other ids for an added token in some text, or other ends."""
    written = vocab_from_gguf(keys)
    size = len(keys["tokenizer.ggml.tokens"])
    added = [token.content for id, token in vocab.tokenizer.get_added_tokens_decoder().items() if id < size]
    for frame in PROBES:
        texts = [frame.format(text) for text in added] or [frame.format("")]
        pairs = zip(texts, encode_all(vocab.tokenizer, texts), encode_all(written.tokenizer, texts), strict=True)
        if text := next((text for text, want, got in pairs if want != got), None):
            raise OffmoeError(f"a GGUF would give the text {text!r} other token ids: pack cannot write this tokenizer")
    if missing := {id for id in vocab.eos if id < size} - written.eos:
        raise OffmoeError(f"a GGUF would not end answers at token {min(missing)}: pack cannot write this tokenizer")


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def token_table(vocab: Vocab, model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return texts and types of all `size` ids; ids that the tokenizer lacks are marked unused."""
    tokens, types = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
    fallback = bool(model.get("byte_fallback"))
    for text, id in model["vocab"].items():
        set_token(tokens, types, id, text, BYTE if fallback and BYTE_TOKEN.fullmatch(text) else NORMAL)
    for id, added in vocab.tokenizer.get_added_tokens_decoder().items():
        if id < size:  # others have no row in the embedding
            set_token(tokens, types, id, added.content, CONTROL if added.special else USER_DEFINED)
    if (unknown := model.get("unk_token")) in model["vocab"]:
        types[model["vocab"][unknown]] = UNKNOWN
    return tokens, types


def set_token(tokens: list[str], types: list[int], id: int, text: str, kind: int) -> None:
    """Set one entry of the token table. Raises OffmoeError if the id is outside it."""
    if not 0 <= id < len(tokens):
        raise OffmoeError(
            f"tokenizer.json has the token id {id}: expected ids below vocab_size, which is {len(tokens)}"
        )
    tokens[id], types[id] = text, kind


def merge_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges as pairs, by rank; older files write them as `left right`."""
    split = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return [(left, right) for left, right in split]


def byte_level_keys(raw: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a byte-level BPE."""
    merges = [f"{left} {right}" for left, right in merge_pairs(model)]
    name, ignore_merges = pre_tokenizer_name(raw), bool(model.get("ignore_merges"))
    keys = {"model": "gpt2", "pre": name, "merges": merges} | normalizer_key(raw)
    # A key of our own, as the normaliser's is. llama.cpp always merges, which gives the same token for most words.
    return keys | ({} if KINDS[name].ignore_merges == ignore_merges else {"ignore_merges": ignore_merges})


def normalizer_key(raw: dict[str, Any]) -> dict[str, str]:
    """Return a key of our own for the normaliser: llama.cpp has none for these vocabularies and does not normalise."""
    step = raw.get("normalizer") or {}
    kinds = [step.get("type") for step in step.get("normalizers", [step]) if step]
    if kinds and kinds != ["NFC"]:
        raise OffmoeError(
            f"tokenizer.json normalises text by {kinds}: this has no GGUF name, so pack cannot write the tokenizer"
        )
    return {"normalizer": "nfc"} if kinds else {}


def sentencepiece_keys(raw: dict[str, Any], model: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Return the keys of a BPE with scores instead of merges: the earlier a merge, the higher its token's score."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merge_pairs(model)):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks[text]) if text in ranks else UNMERGED for text in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": adds_space(raw)}


def adds_space(raw: dict[str, Any]) -> bool:
    """Return whether a space is put before each text, by a Prepend normaliser or a Metaspace."""
    normalizer_key, metaspace = raw.get("normalizer") or {}, raw.get("pre_tokenizer") or {}
    steps = normalizer_key.get("normalizers", [normalizer_key])
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or metaspace.get("prepend_scheme", "never") != "never"


def special_ids(vocab: Vocab, size: int) -> dict[str, Any]:
    """Return the ids of bos, eos and the other named tokens, and of further ends of answers that have no known text."""
    ids = {key: vocab.tokenizer.token_to_id(vocab.names.get(name, "")) for key, name in NAMES.items()}
    found = {key: id for key, id in ids.items() if id is not None and id < size}
    known = {vocab.tokenizer.token_to_id(text) for text in END_OF_TURN}
    ends = sorted(id for id in vocab.eos if id < size)
    if "eos" not in found and ends:
        found["eos"] = ends[0]
    others = [id for id in ends if id not in known and id != found.get("eos")]
    if len(others) > len(END_KEYS):
        raise OffmoeError(
            f"answers end at the tokens {ends}: a GGUF has no keys for so many, so pack cannot write them"
        )
    return {f"{key}_token_id": id for key, id in (found | dict(zip(END_KEYS, others, strict=False))).items()}


def token_flags(vocab: Vocab, raw: dict[str, Any]) -> dict[str, list[int] | bool]:
    """Return keys of our own for added tokens that take the spaces around them, stand apart from words, or are found
    only after normalisation: the ids by flag. llama.cpp knows no such flags in files.
    """
    added = vocab.tokenizer.get_added_tokens_decoder()
    flags = TOKEN_FLAGS if raw.get("normalizer") else TOKEN_FLAGS[:-1]  # without a normaliser the last changes nothing
    ids = {flag: sorted(id for id, token in added.items() if getattr(token, flag)) for flag in flags}
    return {f"{FLAGS_KEY}.{flag}": found for flag, found in ids.items() if found} | {f"{FLAGS_KEY}.complete": True}
