"""A model's hyper-parameters and tokenizer as the metadata of a GGUF, in the keys of llama.cpp."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.feed_forward import GELU, SILU, Glu
from offmoe.kernels.rope import Scaling, frequency_factors, yarn_mscale
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.models.rope import FACTORED, GGUF_FACTORS
from offmoe.text.directory_vocab import vocab_from_directory
from offmoe.text.gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from offmoe.text.pretokenizers import KINDS, pre_tokenizer_name
from offmoe.text.tokenizer import BYTE_TOKEN
from offmoe.text.vocab import NAMES, Vocab

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint
    from offmoe.models.config import ModelConfig
    from offmoe.models.family import Family

GPT_OSS = Glu(alpha=1.702, limit=7.0, plus=1.0)
GATING_STATED = ("deepseek2",)  # architectures whose files always state how experts are scored
UNMERGED = -1e9  # score of a token that no merge produces


def model_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the hyper-parameters. Raises OffmoeError if the GGUF architecture has no key for one of them."""
    check_packable(config, family)
    moe = config.moe
    keys: dict[str, Any] = {
        "block_count": config.layers,
        "context_length": config.ctx,
        "embedding_length": config.hidden,
        "feed_forward_length": moe.dense_hidden or moe.expert_hidden,
        "expert_feed_forward_length": moe.expert_hidden,
        "attention.layer_norm_rms_epsilon": config.norm.eps,
        "expert_count": config.experts,
        "expert_used_count": config.top_k,
        "vocab_size": config.vocab,
    }
    if moe.shared_gated:
        keys["expert_shared_feed_forward_length"] = moe.shared_hidden
    elif moe.shared:
        keys["expert_shared_count"] = moe.shared
    if config.dense and family.dense_first:
        keys["leading_dense_block_count"] = len(config.dense)
    if moe.rule.scores == "sigmoid" or family.arch in GATING_STATED:
        keys["expert_gating_func"] = 2 if moe.rule.scores == "sigmoid" else 1
        keys |= {"expert_weights_norm": moe.rule.renormalise, "expert_weights_scale": moe.rule.scale}
    if moe.rule.groups > 1:
        keys |= {"expert_group_count": moe.rule.groups, "expert_group_used_count": moe.rule.kept}
    for mixer in reversed(config.kinds):  # where kinds differ in a key, the first layer's wins
        keys |= mixer.gguf_keys()
    for rope in config.ropes:
        keys |= scaling_keys(rope.scaling, family)
    keys |= family.gguf_keys(config)
    return {f"{family.arch}.{key}": value for key, value in keys.items()}


def check_packable(config: ModelConfig, family: Family) -> None:
    """Raise OffmoeError if llama.cpp would compute something else than the config describes."""
    rule, arch = config.moe.rule, f"the GGUF architecture {family.arch}"

    def refused(what: str, why: str) -> OffmoeError:
        return OffmoeError(f"{family.model_type} with {what} cannot be packed: {why}")

    if rule.renormalise != family.renormalise and rule.scores != "sigmoid":
        raise refused(f"norm_topk_prob = {rule.renormalise}", f"{arch} always means {family.renormalise}")
    if clip := next((mixer.clip for mixer in config.kinds if isinstance(mixer, HeadsConfig) and mixer.clip), None):
        why = f"llama.cpp ignores it for the architecture {family.arch}, and its answers would differ"
        raise refused(f"clip_qkv = {clip}", why)
    if rule.scores == "mixer":
        raise OffmoeError(
            f"{family.model_type} cannot be packed: llama.cpp routes the architecture {family.arch} by another rule, "
            "and its answers would differ"
        )
    if family.dense_first and config.dense != tuple(range(len(config.dense))):
        raise refused(f"experts in the layers {config.routed}", "in a GGUF only the first layers can be dense")
    if rule.groups > rule.kept and rule.group_best != 2:
        why = f"llama.cpp ranks groups by their best two experts, this model by {rule.group_best}"
        raise refused(f"n_group = {rule.groups}", why)
    if config.moe.glu not in (SILU, GPT_OSS, GELU):
        raise refused(str(config.moe.glu), f"{arch} always means {GPT_OSS}")


def scaling_keys(rope: Scaling, family: Family) -> dict[str, Any]:
    """Return `rope.scaling.*`, which models.rope.gguf_scaling reads.

    Raises OffmoeError if the keys cannot express `rope`.
    """
    if rope.kind == "default" or (rope.kind in FACTORED and family.gguf_factors):
        return {}
    keys = {"type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        keys |= {"original_context_length": rope.original, "yarn_beta_fast": rope.fast, "yarn_beta_slow": rope.slow}
        default_attention = yarn_mscale(rope.factor)
        if rope.scores != 1:
            keys["yarn_log_multiplier"] = (math.sqrt(rope.scores) - 1) / math.log(rope.factor)
            default_attention = 1.0
        elif not math.isclose(rope.attention, default_attention):
            keys["attn_factor"], default_attention = rope.attention / default_attention, rope.attention
        expressible = math.isclose(rope.attention, default_attention) and rope.truncate == family.gguf_rounded
    else:
        expressible = rope.kind == "linear"
    if not expressible:
        raise OffmoeError(f"{family.model_type} with {rope} cannot be packed: a GGUF has no keys for this RoPE scaling")
    return {f"rope.scaling.{key}": value for key, value in keys.items()}


def rope_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the frequency divisors by tensor name, float32, for scalings that are not described by `scaling_keys`."""
    scaled = next((rope for rope in config.ropes if rope.scaling.kind in FACTORED), None)
    return {GGUF_FACTORS: frequency_factors(scaled.rotary, scaled.theta, scaled.scaling)} if scaled else {}


def tokenizer_keys(checkpoint: Checkpoint, vocab_size: int) -> dict[str, Any]:
    """Return the keys of `tokenizer.json`, or, without that file, the key that says there is no vocabulary."""
    raw = checkpoint.json("tokenizer.json")
    if raw is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise OffmoeError(f"{checkpoint.path}/tokenizer.json is not a BPE: pack cannot write this tokenizer")
    vocab = vocab_from_directory(checkpoint)
    tokens, types = token_table(raw, model, vocab_size)
    keys: dict[str, Any] = {"tokens": tokens, "token_type": types}
    keys |= sentencepiece_keys(raw, model, tokens) if model.get("byte_fallback") else byte_level_keys(raw, model)
    keys |= special_ids(vocab) | {"add_bos_token": vocab.add_bos}
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return named | ({"tokenizer.chat_template": vocab.chat_template} if vocab.chat_template else {})


def token_table(raw: dict[str, Any], model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return texts and types of all `size` ids; ids that the tokenizer lacks are marked unused."""
    tokens, types = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
    fallback = bool(model.get("byte_fallback"))
    for text, id in model["vocab"].items():
        set_token(tokens, types, id, text, BYTE if fallback and BYTE_TOKEN.fullmatch(text) else NORMAL)
    for added in raw.get("added_tokens", []):
        set_token(tokens, types, added["id"], added["content"], CONTROL if added["special"] else USER_DEFINED)
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


def special_ids(vocab: Vocab) -> dict[str, int]:
    """Return the ids of bos, eos and the other named tokens."""
    ids = {key: vocab.tokenizer.token_to_id(vocab.names.get(name, "")) for key, name in NAMES.items()}
    return {f"{key}_token_id": id for key, id in ids.items() if id is not None}
