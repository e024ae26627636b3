"""pack: the GGUF has the values of the safetensors, for our reader, gguf and llama.cpp; or there is no file."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import PACKABLE_UNHEARD, saved
from tolerance import assert_close

from offmoe.checkpoint.base import Checkpoint
from offmoe.checkpoint.open import open_checkpoint
from offmoe.errors import OffmoeError
from offmoe.kernels.formats import GGML
from offmoe.kernels.rope import PLAIN, inverse_frequencies
from offmoe.mixers.deltanet.config import DeltaConfig
from offmoe.mixers.heads.config import HeadsConfig, interleave_rope_rows
from offmoe.mixers.latent.config import LatentConfig
from offmoe.mixers.rope import RopeConfig
from offmoe.models.config import ModelConfig, NormConfig, StreamConfig
from offmoe.models.model import Model, described
from offmoe.models.shapes import trunk_roles
from offmoe.pack import ggml_library
from offmoe.pack.convert import EXPERT_ROLES, PackReport, pack
from offmoe.pack.gguf_keys import rope_tensors
from offmoe.pack.quantise import BY_GGML, BY_IMPORTANCE, packable, quantise

RATIO = {"q8_0": 0.01, "bf16": 0.003, "f16": 0.0005, "f32": 0.0, "q4_0": 0.1, "q4_1": 0.1, "q5_0": 0.05,
         "q5_1": 0.05, "mxfp4": 0.15, "q2_k": 0.35, "q3_k": 0.18, "q4_k": 0.1, "q5_k": 0.05, "q6_k": 0.03,
         "iq2_s": 0.3, "iq3_xxs": 0.25, "iq3_s": 0.2, "iq4_nl": 0.1, "iq4_xs": 0.1}  # fmt: skip
has_ggml = importlib.util.find_spec("llama_cpp") is not None


def packed(source: Path, out: Path, fmt: str) -> PackReport:
    with open_checkpoint(source) as checkpoint:
        return pack(checkpoint, out, fmt, lambda done, total: None)


def error_line(source: Path, out: Path, fmt: str) -> str:
    with pytest.raises(OffmoeError) as caught:
        packed(source, out, fmt)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the values that the GGUF should have, by GGUF names, in float32."""
    model = described(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for layer, mixer in enumerate(model.config.mixers):
        if isinstance(mixer, DeltaConfig):
            tensors |= deltanet(checkpoint, mixer, layer, model.family.tiled_gguf)
    for role, layer, shape in trunk_roles(model.config, split=True):
        if not role.startswith("delta"):
            info = model.find("kv_b" if role in ("k_b", "v_b") else role, layer)
            assert info is not None
            value = checkpoint.tensor(info.name)
            mixer = model.config.mixers[layer]
            if role in ("k_b", "v_b"):
                assert isinstance(mixer, LatentConfig)
                z, heads = mixer.latent, mixer.heads
                both = value.view(heads, z.qk_nope + z.value, z.kv_rank)
                value = both[:, : z.qk_nope].transpose(1, 2) if role == "k_b" else both[:, z.qk_nope :]
            value = value.reshape(shape)
            if role in ("q", "k") and model.family.interleaved_gguf:
                assert isinstance(mixer, HeadsConfig)
                value = interleave_rope_rows(value, mixer.heads if role == "q" else mixer.kv_heads)
            from_one = model.config.model_type.startswith(("qwen3_next", "qwen3_5")) and role.endswith("norm")
            tensors[model.family.gguf_names[role][0].format(l=layer)] = value + 1 if from_one else value
    for layer in model.config.routed:
        for role in EXPERT_ROLES:
            tensors[model.family.gguf_names[role][0].format(l=layer)] = stacked(checkpoint, model, role, layer)
            if model.config.moe.expert_bias:
                name = model.family.gguf_names[f"{role}_bias"][0].format(l=layer)
                tensors[name] = stacked(checkpoint, model, role, layer, "_bias")
    return tensors


def deltanet(checkpoint: Checkpoint, config: DeltaConfig, layer: int, tiled: bool) -> dict[str, torch.Tensor]:
    """Return a layer's DeltaNet in llama.cpp's layout: value heads grouped by key head, or tiled."""
    d = config.delta
    each = d.value_heads // d.key_heads

    def read(name: str) -> torch.Tensor:
        return checkpoint.tensor(f"model.layers.{layer}.linear_attn.{name}")

    def heads(value: torch.Tensor, dim: int = 0) -> torch.Tensor:
        if not tiled:
            return value
        cut = value.unflatten(dim, (d.key_heads, each, -1))
        return cut.transpose(dim, dim + 1).flatten(dim, dim + 2)

    def behind_keys(value: torch.Tensor) -> torch.Tensor:
        return torch.cat((value[: 2 * d.keys], heads(value[2 * d.keys :])))

    small = {
        "ssm_conv1d.weight": behind_keys(read("conv1d.weight").flatten(1)), "ssm_dt.bias": heads(read("dt_bias")),
        "ssm_a": heads(-read("A_log").exp()), "ssm_norm.weight": read("norm.weight"),
        "ssm_out.weight": heads(read("out_proj.weight"), dim=1),
    }  # fmt: skip
    if tiled:
        large = {
            "attn_qkv.weight": behind_keys(read("in_proj_qkv.weight")),
            "attn_gate.weight": heads(read("in_proj_z.weight")),
            "ssm_beta.weight": heads(read("in_proj_b.weight")), "ssm_alpha.weight": heads(read("in_proj_a.weight")),
        }  # fmt: skip
    else:
        sizes = (d.key_dim, d.key_dim, each * d.value_dim, each * d.value_dim)
        parts = read("in_proj_qkvz.weight").unflatten(0, (d.key_heads, -1)).split(sizes, dim=1)
        q, k, v, z = (part.flatten(0, 1) for part in parts)
        large = {"attn_qkv.weight": torch.cat((q, k, v)), "attn_gate.weight": z,
                 "ssm_ba.weight": read("in_proj_ba.weight")}  # fmt: skip
    return {f"blk.{layer}.{name}": value for name, value in {**large, **small}.items()}


def stacked(checkpoint: Checkpoint, model: Model, role: str, layer: int, kind: str = "") -> torch.Tensor:
    """Return [E, rows, cols], or [E, rows] of biases, from separate matrices, a stack, or a stack of gate and up."""
    found = [model.find(role + kind, layer, e) for e in range(model.config.experts)]
    if found[0] is None:
        info = model.find(f"gate_up{kind}", layer)
        assert info is not None
        both = checkpoint.tensor(info.name)
        halves = (both[:, ::2], both[:, 1::2]) if model.family.interleaved_experts else both.chunk(2, dim=1)
        return halves[role == "up"]
    each = [checkpoint.tensor(info.name) for info in found if info is not None]
    if each[0].dim() == (2 if kind else 3):
        return each[0]
    return torch.stack(each)


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", PACKABLE_UNHEARD)
def test_f32_holds_every_weight(family: str, fused: bool, tmp_path: Path) -> None:
    source, out = saved(family, tmp_path), tmp_path / "m.gguf"
    report = packed(saved(family, tmp_path, fused), out, "f32")
    assert report == PackReport([], out.stat().st_size)
    with open_checkpoint(source) as checkpoint, open_checkpoint(out) as result:
        described_by = described(checkpoint)
        want = expected(checkpoint) | rope_tensors(described_by.config)
        assert result.tensors.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(result.tensor(name), value), name
        config, again = described(checkpoint).config, described(result).config
        for ours, theirs in zip(again.ropes, config.ropes, strict=True):
            assert ours.scaling.scores == pytest.approx(theirs.scaling.scores)  # by way of a logarithm
            turns = [inverse_frequencies(r.rotary, r.theta, config.ctx, r.scaling) for r in (ours, theirs)]
            rotated = turns[1] > 0
            ratio = turns[0][rotated] / turns[1][rotated]
            assert_close("frequencies", ratio, torch.ones_like(ratio), 1e-6)
            assert torch.equal(turns[0] > 0, rotated)
        again = replace(again, model_type=config.model_type)  # some share an arch
        assert unscaled(again) == unscaled(rounded(config))
        assert result.metadata["tokenizer.ggml.model"] == "no_vocab"


def rounded(config: Any) -> Any:
    """Return `config` with its floats in float32, as a GGUF keeps them."""
    own = {name: torch.tensor(value).item() for name, value in vars(config).items() if type(value) is float}
    nested = (NormConfig, StreamConfig, RopeConfig)
    parts = {name: rounded(value) for name, value in vars(config).items() if isinstance(value, nested)}
    if isinstance(config, ModelConfig):
        parts["mixers"] = tuple(rounded(mixer) for mixer in config.mixers)
    return replace(config, **own, **parts)


def unscaled(config: ModelConfig) -> ModelConfig:
    """Return `config` without rotary scaling, which is compared by itself."""
    mixers = (replace(m, rope=replace(m.rope, scaling=PLAIN)) if m.position else m for m in config.mixers)
    return replace(config, mixers=tuple(mixers))


def test_interleaved_is_what_llama_cpp_converts_to() -> None:
    """Two heads of four rows: row i of the first half is next to row i of the second."""
    rows = torch.arange(8.0)[:, None]
    assert interleave_rope_rows(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("fmt", [name.lower() for name in GGML if name not in (*BY_GGML, *BY_IMPORTANCE)])
def test_every_format(fmt: str, tmp_path: Path) -> None:
    """Both readers see equal bytes, and values near the source's; norms and routers are exact."""
    source, out = saved("qwen3_moe", tmp_path), tmp_path / "m.gguf"
    assert packed(source, out, fmt).fallbacks == []
    other = {t.name: t for t in gguf.GGUFReader(out).tensors}
    with open_checkpoint(source) as checkpoint, open_checkpoint(out) as result:
        for name, value in expected(checkpoint).items():
            info, got = result.tensors[name], result.tensor(name)
            exact = info.format == "F32"
            assert exact == ("norm" in name or "ffn_gate_inp" in name or fmt == "f32")
            assert_close(name, got, value, 0.0 if exact else RATIO[fmt])
            theirs = gguf.quants.dequantize(other[name].data, other[name].tensor_type)
            assert torch.equal(torch.tensor(theirs).reshape(got.shape), got), name
        formats = {info.format for name, info in result.tensors.items() if "_exps" in name}
        assert formats == {fmt.upper()}
        if fmt == "mxfp4":
            assert result.tensors["token_embd.weight"].format == "Q8_0"


def test_rows_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    """Down projections of experts with 32 neurons have rows of 32, which fit no K-quant; rows of 24 fit no format."""
    source, out = saved("qwen3_moe", tmp_path), tmp_path / "m.gguf"
    shrink(source, 24)
    report = packed(source, out, "q4_0")
    assert [str(fell) for fell in report.fallbacks] == [
        f"blk.{layer}.ffn_down_exps.weight: rows of 24 weights do not fit Q4_0, stored as F32" for layer in range(3)
    ]
    with open_checkpoint(out) as result:
        assert result.tensors["blk.1.ffn_down_exps.weight"].format == "F32"
        assert result.tensors["blk.1.ffn_up_exps.weight"].format == "Q4_0"


def shrink(source: Path, neurons: int) -> None:
    """Cut every expert of a saved qwen3_moe to fewer neurons."""
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if ".experts." in name:
            cut = value[:, :neurons] if "down_proj" in name else value[:neurons]
            tensors[name] = cut.contiguous()
    save_file(tensors, source / "model.safetensors")
    edit(source / "config.json", moe_intermediate_size=neurons)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


@pytest.mark.llama
@pytest.mark.skipif(not has_ggml, reason="needs llama-cpp-python: pip install 'offmoe[llama]'")
@pytest.mark.parametrize(
    "fmt", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs"]
)
def test_what_ggml_quantises(fmt: str, tmp_path: Path) -> None:
    weights = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    raw = quantise(weights, packable(fmt))
    theirs = gguf.quants.dequantize(raw.view(6, -1).numpy(), gguf.GGMLQuantizationType[fmt.upper()])
    assert_close(fmt, torch.from_numpy(theirs), weights, RATIO[fmt])
    report = packed(saved("olmoe", tmp_path), tmp_path / "m.gguf", fmt)  # no row is 256 long
    assert [fell.format for fell in report.fallbacks] == ([] if fmt == "iq4_nl" else ["Q8_0"] * (2 + 3 * 7))


def test_k_quants_without_ggml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ggml_library.load_library.cache_clear()
    source, out = saved("olmoe", tmp_path), tmp_path / "m.gguf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert error_line(source, out, "q4_k") == "q4_k needs ggml: install it with pip install 'offmoe[llama]'"
    assert not out.exists()


@pytest.mark.parametrize("fmt", ["iq1_s", "iq1_m", "iq2_xxs", "IQ2_XS"])
def test_what_needs_an_importance_matrix(fmt: str, tmp_path: Path) -> None:
    line = error_line(saved("olmoe", tmp_path), tmp_path / "m.gguf", fmt)
    assert line.startswith(f"{fmt} needs an importance matrix, which offmoe does not make: choose iq2_s, iq3_xxs or ")
    assert not (tmp_path / "m.gguf").exists()


def test_what_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, out = saved("olmoe", tmp_path), tmp_path / "m.gguf"
    assert "format 'q3_x' is unknown: choose one of f32, f16, bf16, q8_0" in error_line(source, out, "q3_x")
    assert "m.bin ends with '.bin': expected .gguf" in error_line(source, tmp_path / "m.bin", "f32")
    assert "is not a directory: create it first" in error_line(source, tmp_path / "no" / "m.gguf", "f32")
    edit(source / "config.json", norm_topk_prob=True)
    assert "the GGUF architecture olmoe always means False" in error_line(source, out, "f32")
    edit(source / "config.json", norm_topk_prob=False)
    packed(source, out, "f16")
    assert "is already a GGUF" in error_line(out, tmp_path / "n.gguf", "q8_0")
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", source.name]


def test_progress_runs_to_the_end_and_never_back(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with open_checkpoint(saved("mixtral", tmp_path)) as checkpoint:
        pack(checkpoint, tmp_path / "m.gguf", "q8_0", lambda done, total: seen.append((done, total)))
    dones, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert list(dones) == sorted(set(dones))
    assert dones[-1] == totals[0]


def test_memory_is_pieces_not_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of 128 weights no read is larger, except of q and k, which are permuted as a whole."""
    monkeypatch.setattr("offmoe.pack.convert.PIECE", 128)
    largest = 0
    read = Checkpoint.read_range

    def spy(self: Checkpoint, r: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, r.nbytes)
        return read(self, r)

    monkeypatch.setattr(Checkpoint, "read_range", spy)
    source = saved("qwen3_moe", tmp_path, fused=True)
    packed(source, tmp_path / "small.gguf", "q8_0")
    assert largest == 4 * 128
    monkeypatch.undo()
    packed(source, tmp_path / "large.gguf", "q8_0")
    assert (tmp_path / "small.gguf").read_bytes() == (tmp_path / "large.gguf").read_bytes()


class TestFailure:
    """A failure at any time gives a one-line error and no incomplete file, and leaves an older file unchanged."""

    def check(self, folder: Path, before: bytes | None) -> None:
        out = folder / "m.gguf"
        assert (out.read_bytes() if out.exists() else None) == before
        assert sorted(path.name for path in folder.iterdir() if path.name != "m.gguf") == ["olmoe-split"]

    def test_no_space_from_the_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        assert "1000 B are free" in error_line(saved("olmoe", tmp_path), tmp_path / "m.gguf", "f32")
        self.check(tmp_path, None)

    def test_the_disk_fills_up(self, tmp_path: Path) -> None:
        """RLIMIT_FSIZE in a process of its own; the older file remains."""
        source, out = saved("olmoe", tmp_path), tmp_path / "m.gguf"
        out.write_bytes(b"older")
        code = (
            "import sys\nfrom pathlib import Path\nfrom offmoe.checkpoint.open import open_checkpoint\n"
            "from offmoe.errors import OffmoeError\nfrom offmoe.pack.convert import pack\n"
            "try: pack(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), 'f32', lambda *_: None)\n"
            "except OffmoeError as error: print(error)\n"
        )
        limit = (300_000, 300_000)
        done = subprocess.run(
            [sys.executable, "-c", code, source, out],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )
        assert done.stdout == f"cannot write {out}, which takes 825 KiB: {os.strerror(errno.EFBIG)}\n", done.stderr
        self.check(tmp_path, b"older")

    def test_ctrl_c(self, tmp_path: Path) -> None:
        def stop(done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        with open_checkpoint(saved("olmoe", tmp_path)) as checkpoint, pytest.raises(KeyboardInterrupt):
            pack(checkpoint, tmp_path / "m.gguf", "f32", stop)
        self.check(tmp_path, None)

    def test_the_source_shrinks(self, tmp_path: Path) -> None:
        source = saved("olmoe", tmp_path)
        with open_checkpoint(source) as checkpoint:
            os.truncate(source / "model.safetensors", 100_000)
            with pytest.raises(OffmoeError, match="shrank while in use"):
                pack(checkpoint, tmp_path / "m.gguf", "f32", lambda done, total: None)
        self.check(tmp_path, None)

    @pytest.mark.parametrize(("value", "fmt"), [(float("nan"), "q8_0"), (float("inf"), "f32"), (1e5, "f16")])
    def test_weights_that_the_format_cannot_hold(self, value: float, fmt: str, tmp_path: Path) -> None:
        source = saved("olmoe", tmp_path)
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] = value
        save_file(tensors, source / "model.safetensors")
        assert "blk.1.ffn_up_exps.weight has NaN or weights beyond" in error_line(source, tmp_path / "m.gguf", fmt)
        self.check(tmp_path, None)


@pytest.mark.llama
@pytest.mark.skipif(not has_ggml, reason="needs llama-cpp-python: pip install 'offmoe[llama]'")
@pytest.mark.parametrize("fmt", ["f32", "q4_0", "mxfp4", "bf16"])
def test_llama_cpp_loads_it(fmt: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    packed(saved("mixtral", tmp_path), tmp_path / "m.gguf", fmt)
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False)
    llama.eval([1, 2, 3])
    assert llama.n_vocab() == 96
