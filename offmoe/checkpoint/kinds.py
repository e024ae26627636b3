"""Kind of a checkpoint that is no language model with experts: adapters, projectors, encoders, dense models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from offmoe.checkpoint.base import quote

EXPERTS = "offmoe runs mixture-of-experts models"
GGUF_TYPES = {  # general.type, as gguf's GGUFType has it
    "adapter": "a LoRA adapter, not a model: give the base model; offmoe applies no adapters",
    "imatrix": "an importance matrix (imatrix), which helps to quantise a model: give the model itself",
    "mmproj": "a multimodal projector (mmproj), not a language model: give the model that it belongs to",
    "vocab": "a vocabulary without weights: give the model itself",
}
GGUF_ARCHS = {
    "clip": GGUF_TYPES["mmproj"],
    "controlvector": "a control vector, not a model: give the base model; offmoe applies no control vectors",
    **dict.fromkeys(
        (
            "bert",
            "nomic-bert",
            "nomic-bert-moe",
            "jina-bert-v2",
            "jina-bert-v3",
            "modern-bert",
            "neo-bert",
            "eurobert",
            "gemma-embedding",
            "llama-embed",
            "pangu-embedded",
            "t5encoder",
        ),
        "an encoder for embeddings, which writes no text: give a language model",
    ),
    **dict.fromkeys(("whisper", "wavtokenizer-dec", "qwen3tts"), "a speech model: give a language model"),
    **dict.fromkeys(
        (
            "flux",
            "sd1",
            "sd3",
            "sdxl",
            "aura",
            "hidream",
            "ltxv",
            "wan",
            "hyvid",
            "cosmos",
            "lumina2",
            "qwen_image",
            "z_image",
            "pig",
            "vae",
        ),
        "an image or video model: give a language model",
    ),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), "a diffusion language model, which offmoe cannot run"),
}
ENCODERS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "BertModel",
    "RobertaModel",
    "ForMultipleChoice",
    "ForPreTraining",
)
VISION = ("clip", "siglip", "siglip2", "vit", "dinov2", "dinov3_vit", "swin", "convnext", "detr", "sam", "pixtral")
SPEECH = ("whisper", "wav2vec2", "hubert", "encodec", "bark", "vits", "speecht5", "moonshine", "voxtral", "csm")


def gguf_kind(metadata: Mapping[str, Any], tensors: Iterable[str]) -> str:
    """Return what a GGUF is that is no language model, and what to give instead; "" for a language model."""
    kind, arch, names = metadata.get("general.type"), metadata.get("general.architecture"), list(tensors)
    if isinstance(kind, str) and kind in GGUF_TYPES:
        return GGUF_TYPES[kind]
    if isinstance(arch, str) and arch in GGUF_ARCHS:
        return GGUF_ARCHS[arch]
    if kind not in (None, "", "model"):
        return f"of general.type {quote(kind)}, not a model: give the model itself"
    if not names and metadata.get("split.count", 0) in (0, 1):
        has_tokens = "tokenizer.ggml.tokens" in metadata
        return GGUF_TYPES["vocab"] if has_tokens else "without any tensor: give the model itself"
    if any(name.endswith((".lora_a", ".lora_b")) for name in names) and "token_embd.weight" not in names:
        return GGUF_TYPES["adapter"]
    if any(name.endswith((".in_sum2", ".in_sum")) for name in names):
        return GGUF_TYPES["imatrix"]
    return GGUF_TYPES["mmproj"] if names and all(name.startswith(("v.", "mm.", "a.")) for name in names) else ""


def gguf_without_experts(metadata: Mapping[str, Any]) -> str:
    """Return what a GGUF of a language model without experts is; "" for one with experts."""
    arch = metadata.get("general.architecture")
    if arch is None:
        return "without general.architecture, which says of what kind it is: convert the model again"
    if metadata.get(f"{arch}.expert_count"):
        return ""
    return f"a dense {str(arch)[:60]} model: {EXPERTS}" if is_known(arch, metadata) else ""


def is_known(arch: object, metadata: Mapping[str, Any]) -> bool:
    """Return whether a GGUF is a language model: its architecture is llama.cpp's, or it says how many layers it has."""
    from gguf.constants import MODEL_ARCH_NAMES

    return arch in MODEL_ARCH_NAMES.values() or f"{arch}.block_count" in metadata


def config_kind(raw: Mapping[str, Any]) -> str:
    """Return what the model of a config.json is that is no language model with experts; "" for one with experts."""
    if "peft_type" in raw:
        return adapter_kind(raw)
    if "_class_name" in raw or "_diffusers_version" in raw:
        name = quote(raw.get("_class_name"))
        return f"a part of a diffusers pipeline ({name}), which makes images: give a language model"
    model_type, classes = raw.get("model_type"), raw.get("architectures")
    named = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    if any("expert" in key or "moe" in key for key in all_keys(raw)):
        return ""
    base = str(model_type)
    if base in SPEECH:
        return f"a speech model ({base}): give a language model"
    if base in VISION or "_vision" in base:
        return f"a vision model ({base}): give a language model"
    if any(name.endswith(ENCODERS) for name in named) or "bert" in base:
        return f"an encoder ({base}), which writes no text: give a language model"
    if raw.get("is_encoder_decoder") is True:
        return f"an encoder with a decoder ({base}), and {EXPERTS} with a decoder only"
    sized = any(key in all_keys(raw) for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
    return f"a dense {base[:60]} model: {EXPERTS}" if isinstance(model_type, str) and sized else ""


def adapter_kind(raw: Mapping[str, Any]) -> str:
    """Return what an adapter_config.json describes."""
    base, kind = raw.get("base_model_name_or_path"), str(raw.get("peft_type", "LoRA"))[:20]
    of = f" {base[:80]}" if isinstance(base, str) and base else ""
    return f"a {kind} adapter, not a model: give the base model{of}; offmoe applies no adapters"


def all_keys(raw: Mapping[str, Any]) -> set[str]:
    """Return the keys of a config and of the tables in it."""
    tables = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    return {str(key).lower() for table in tables for key in table}
