"""A model's numbers and tokenizer as the key/values of a GGUF that llama.cpp reads too."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offmoe.errors import OffmoeError
from offmoe.kernels.feed_forward import GELU, SILU, Glu
from offmoe.kernels.rope import Scaling, frequency_factors, yarn_mscale
from offmoe.mixers.heads.config import HeadsConfig
from offmoe.models.rope import FACTORED, GGUF_FACTORS
from offmoe.text.pretokenizers import KINDS, pre_tokenizer_name
from offmoe.text.tokenizer import BYTE_TOKEN
from offmoe.text.vocab import BYTE, CONTROL, NAMES, UNKNOWN, USER_DEFINED, Vocab, read_vocab

if TYPE_CHECKING:
    from offmoe.checkpoint.base import Checkpoint
    from offmoe.models.config import ModelConfig
    from offmoe.models.family import Family

NORMAL, UNUSED = 1, 5  # tokenizer.ggml.token_type; the others stand in vocab.py
GPT_OSS = Glu(alpha=1.702, limit=7.0, plus=1.0)
GATED = ("deepseek2",)  # archs that always say how experts are scored
NOT_TRUNCATED = ("gpt-oss",)  # archs whose yarn ramps between bounds that are no whole numbers
UNMERGED = -1e9  # the score of a token that no merge makes


def model_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Hyper-parameters. Raises OffmoeError on what the GGUF architecture has no key for."""
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
    if moe.rule.scores == "sigmoid" or family.arch in GATED:
        keys["expert_gating_func"] = 2 if moe.rule.scores == "sigmoid" else 1
        keys |= {"expert_weights_norm": moe.rule.renormalise, "expert_weights_scale": moe.rule.scale}
    if moe.rule.groups > 1:
        keys |= {"expert_group_count": moe.rule.groups, "expert_group_used_count": moe.rule.kept}
    for mixer in reversed(config.kinds):  # the first kind's keys stand, where kinds differ
        keys |= mixer.gguf_keys()
    for rope in config.ropes:
        keys |= scaling_keys(rope.scaling, family)
    keys |= family.gguf_keys(config)
    return {f"{family.arch}.{key}": value for key, value in keys.items()}


def check_packable(config: ModelConfig, family: Family) -> None:
    """Raise OffmoeError where llama.cpp would compute otherwise than the config says."""
    rule, refused = config.moe.rule, f"{family.model_type} with {{}} cannot be packed: "
    arch = f"the GGUF architecture {family.arch}"
    if rule.renormalise != family.renormalise and rule.scores != "sigmoid":
        said = refused.format(f"norm_topk_prob = {rule.renormalise}")
        raise OffmoeError(f"{said}{arch} always means {family.renormalise}")
    clip = next((mixer.clip for mixer in config.kinds if isinstance(mixer, HeadsConfig) and mixer.clip), None)
    if clip:
        said = refused.format(f"clip_qkv = {clip}")
        raise OffmoeError(
            f"{said}llama.cpp ignores it for the architecture {family.arch}, and would answer differently"
        )
    if rule.scores == "mixer":
        raise OffmoeError(
            f"{family.model_type} cannot be packed: llama.cpp routes the architecture {family.arch} by another rule, "
            "and would answer differently"
        )
    if family.dense_first and config.dense != tuple(range(len(config.dense))):
        said = refused.format(f"experts in the layers {config.routed}")
        raise OffmoeError(f"{said}in a GGUF only the first layers are without")
    if rule.groups > rule.kept and rule.group_best != 2:
        said = refused.format(f"n_group = {rule.groups}")
        raise OffmoeError(f"{said}llama.cpp ranks groups by their two best experts, this model by {rule.group_best}")
    if config.moe.glu not in (SILU, GPT_OSS, GELU):
        raise OffmoeError(f"{refused.format(config.moe.glu)}{arch} always means {GPT_OSS}")


def scaling_keys(rope: Scaling, family: Family) -> dict[str, Any]:
    """`rope.scaling.*`, as models.rope.gguf_scaling reads them. Raises OffmoeError on what these keys cannot say."""
    if rope.kind == "default" or (rope.kind in FACTORED and family.gguf_factors):
        return {}
    keys = {"type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        keys |= {"original_context_length": rope.original, "yarn_beta_fast": rope.fast, "yarn_beta_slow": rope.slow}
        grown = yarn_mscale(rope.factor)
        if rope.scores != 1:
            keys["yarn_log_multiplier"] = (math.sqrt(rope.scores) - 1) / math.log(rope.factor)
            grown = 1.0
        elif not math.isclose(rope.attention, grown):
            keys["attn_factor"], grown = rope.attention / grown, rope.attention
        said = math.isclose(rope.attention, grown) and rope.truncate == (family.arch not in NOT_TRUNCATED)
    else:
        said = rope.kind == "linear"
    if not said:
        raise OffmoeError(f"{family.model_type} with {rope} cannot be packed: a GGUF has no keys for it")
    return {f"rope.scaling.{key}": value for key, value in keys.items()}


def rope_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Name → float32 values: divisors of the frequencies, where `scaling_keys` leaves scaling to a tensor."""
    scaled = next((rope for rope in config.ropes if rope.scaling.kind in FACTORED), None)
    return {GGUF_FACTORS: frequency_factors(scaled.rotary, scaled.theta, scaled.scaling)} if scaled else {}


def tokenizer_keys(checkpoint: Checkpoint, vocab_size: int) -> dict[str, Any]:
    """`tokenizer.json` and what stands beside it; without one, the file says that it has no vocabulary."""
    raw = checkpoint.json("tokenizer.json")
    if raw is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise OffmoeError(f"{checkpoint.path}/tokenizer.json is no BPE: pack cannot write this tokenizer")
    vocab = read_vocab(checkpoint)
    tokens, types = token_table(raw, model, vocab_size)
    keys: dict[str, Any] = {"tokens": tokens, "token_type": types}
    keys |= sentencepiece(raw, model, tokens) if model.get("byte_fallback") else byte_level(raw, model)
    keys |= special_ids(vocab) | {"add_bos_token": vocab.add_bos}
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return named | ({"tokenizer.chat_template": vocab.chat_template} if vocab.chat_template else {})


def token_table(raw: dict[str, Any], model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all `size` ids; ids that the tokenizer lacks are unused ones."""
    tokens, types = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
    fallback = bool(model.get("byte_fallback"))
    for text, id in model["vocab"].items():
        place(tokens, types, id, text, BYTE if fallback and BYTE_TOKEN.fullmatch(text) else NORMAL)
    for added in raw.get("added_tokens", []):
        place(tokens, types, added["id"], added["content"], CONTROL if added["special"] else USER_DEFINED)
    if (unknown := model.get("unk_token")) in model["vocab"]:
        types[model["vocab"][unknown]] = UNKNOWN
    return tokens, types


def place(tokens: list[str], types: list[int], id: int, text: str, kind: int) -> None:
    if not 0 <= id < len(tokens):
        raise OffmoeError(f"tokenizer.json has the token id {id}: the config's vocab_size is {len(tokens)}")
    tokens[id], types[id] = text, kind


def pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Merges, which older files write as `left right`, in order of rank."""
    cut = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return [(left, right) for left, right in cut]


def byte_level(raw: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    merges = [f"{left} {right}" for left, right in pairs(model)]
    name, ignore_merges = pre_tokenizer_name(raw), bool(model.get("ignore_merges"))
    keys = {"model": "gpt2", "pre": name, "merges": merges} | normalizer(raw)
    # A key of ours, as the normaliser's is; llama.cpp merges such words, which makes the same token but for a few.
    return keys | ({} if KINDS[name].ignore_merges == ignore_merges else {"ignore_merges": ignore_merges})


def normalizer(raw: dict[str, Any]) -> dict[str, str]:
    """A key of ours: llama.cpp knows no normaliser for these vocabularies and leaves text as it is."""
    step = raw.get("normalizer") or {}
    kinds = [step.get("type") for step in step.get("normalizers", [step]) if step]
    if kinds and kinds != ["NFC"]:
        raise OffmoeError(f"tokenizer.json normalises text by {kinds}: this has no GGUF name, so pack cannot write it")
    return {"normalizer": "nfc"} if kinds else {}


def sentencepiece(raw: dict[str, Any], model: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Scores instead of merges: the earlier a merge, the higher the score of what it makes."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs(model)):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks[text]) if text in ranks else UNMERGED for text in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": adds_space(raw)}


def adds_space(raw: dict[str, Any]) -> bool:
    """Whether a space is put before the text: by a Prepend normaliser or a Metaspace."""
    normalizer, metaspace = raw.get("normalizer") or {}, raw.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or metaspace.get("prepend_scheme", "never") != "never"


def special_ids(vocab: Vocab) -> dict[str, int]:
    ids = {key: vocab.tokenizer.token_to_id(vocab.names.get(name, "")) for key, name in NAMES.items()}
    return {f"{key}_token_id": id for key, id in ids.items() if id is not None}
