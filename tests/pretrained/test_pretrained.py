"""Models of other libraries, read and written: their own code is the witness, on tiny models with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from attnlab import data, pretrained
from attnlab.config import DataConfig, ExpertsConfig, ModelConfig, RunConfig, TrainConfig, from_dict, to_dict
from attnlab.errors import UserError
from attnlab.model import Decoder, flops_per_token
from attnlab.pretrained import tensor_names
from attnlab.pretrained.folders import LazyTensor
from attnlab.recording import record_notes
from attnlab.spec import RopeScaling
from attnlab.training.train import train

T = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'attnlab[hf]'")

SHAPE = {"vocab_size": 43, "hidden_size": 24, "num_hidden_layers": 3, "max_position_embeddings": 64}
LLAMA = {**SHAPE, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {
    **SHAPE,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 43, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64}
MIXED = ["full_attention", "sliding_attention", "full_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied, another width": (
        "GPT2",
        {**GPT2, "tie_word_embeddings": False, "n_inner": 36, "layer_norm_epsilon": 1e-3},
    ),
    "gpt2 exact gelu": ("GPT2", {**GPT2, "activation_function": "gelu"}),
    "llama": ("Llama", {**LLAMA, "rms_norm_eps": 1e-3}),
    "llama tied, biased, wide heads": (
        "Llama",
        {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
    ),
    "llama of one key head": ("Llama", {**LLAMA, "num_key_value_heads": 1, "attention_bias": True}),
    "llama3 frequencies": ("Llama", {**LLAMA, "head_dim": 16, "rope_parameters": LLAMA3}),
    "linear frequencies": (
        "Llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "yarn frequencies": ("Llama", {**LLAMA, "head_dim": 16, "rope_parameters": YARN}),
    "yarn, its ramp not rounded": (
        "Llama",
        {
            **LLAMA,
            "head_dim": 16,
            "rope_parameters": {**YARN, "truncate": False, "beta_fast": 8.0, "attention_factor": 1.3},
        },
    ),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": None}),
    "mistral with a window": ("Mistral", {**LLAMA, "sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 with windows": (
        "Qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 10}),
    "qwen3 biased, with windows": (
        "Qwen3",
        {
            **LLAMA,
            "head_dim": 6,
            "attention_bias": True,
            "layer_types": MIXED,
            "use_sliding_window": True,
            "sliding_window": 3,
        },
    ),
    "deepseek v2": ("DeepseekV2", {**LATENT, "topk_method": "greedy", "routed_scaling_factor": 1.7}),
    "deepseek v2 lite, grouped": (
        "DeepseekV2",
        {
            **LATENT,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "mlp_bias": True,
        },
    ),
    "deepseek v2 yarn": ("DeepseekV2", {**LATENT, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
    "deepseek v3": ("DeepseekV3", {**LATENT, "n_group": 4, "topk_group": 2}),
    "deepseek v3 plain queries, biased": (
        "DeepseekV3",
        {**LATENT, "q_lora_rank": None, "attention_bias": True, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    ),
    "deepseek v3 yarn": (
        "DeepseekV3",
        {**LATENT, "n_group": 2, "topk_group": 1, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.9}},
    ),
}
INDEXER = {"index_topk": 6, "index_n_heads": 12, "index_head_dim": 10, "n_group": 4, "topk_group": 2}
CASES["deepseek v3.2"] = ("DeepseekV32", {**LATENT, **INDEXER})
CASES["deepseek v3.2 yarn"] = (
    "DeepseekV32",
    {**LATENT, **INDEXER, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}},
)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Widened(TorchFunctionMode):
    """The witness casts to float32 in norms, angles and routers; in here it casts to float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = [torch.float64 if each is torch.float32 else each for each in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)


def randomise(model: torch.nn.Module) -> None:
    """No norm stays at one and no bias at zero."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name and tensor.is_floating_point():
                tensor.normal_(std=0.2)
                tensor += "norm" in name or ".ln_" in name


class Witness:
    """A model of transformers, and the folder it wrote."""

    def __init__(self, case: str, dtype: torch.dtype, folder: Path) -> None:
        name, fields = CASES[case]
        self.mode: Callable[[], Any] = Widened if dtype == torch.float64 else nullcontext
        torch.manual_seed(sum(map(ord, case)))
        with self.mode():
            config = getattr(T, f"{name}Config")(**fields)
            self.model = T.AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
        randomise(self.model)
        self.model.save_pretrained(folder / "theirs")
        self.folder = folder / "theirs"

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        with self.mode():
            return self.model(
                tokens, attention_mask=(positions >= 0).long(), position_ids=positions.clamp(min=0), use_cache=False
            ).logits


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    witness, bound = Witness(case, dtype, tmp_path), TOLERANCE[dtype]
    loaded = pretrained.load(witness.folder, dtype=dtype)
    model, n = loaded.model, 23
    tokens = torch.randint(43, (2, n))
    plain = torch.arange(n).expand(2, n)
    want = witness.logits(tokens, plain)
    assert want.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], want, rtol=bound, atol=bound)
        for sizes in ([1] * n, [9, 1, 1, 7, 5]):
            cache, parts = model.empty_cache(2, n), []
            for part in tokens.split(sizes, 1):
                logits, cache = model(part, cache=cache)
                parts.append(logits)
            torch.testing.assert_close(torch.cat(parts, 1), want, rtol=bound, atol=bound)
        ragged = torch.stack([torch.arange(n), (torch.arange(n) - 8).clamp(min=-1)])
        want, cache = witness.logits(tokens, ragged), model.empty_cache(2, n, ragged=True)
        whole = model(tokens, ragged)[0]
        first, cache = model(tokens[:, :14], ragged[:, :14], cache)
        then, cache = model(tokens[:, 14:], ragged[:, 14:], cache)
    for got in (whole, torch.cat([first, then], 1)):
        torch.testing.assert_close(got[ragged >= 0], want[ragged >= 0], rtol=bound, atol=bound)


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_transformers_reads(case: str, tmp_path: Path) -> None:
    witness = Witness(case, torch.float32, tmp_path)
    loaded = pretrained.load(witness.folder)
    config = RunConfig(model=loaded.model.config)
    assert from_dict(RunConfig, to_dict(config)) == config
    folder = pretrained.save(loaded, tmp_path / "ours", family=loaded.family)
    again = T.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again) is type(witness.model)
    mine, theirs = again.state_dict(), witness.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    tokens, positions = torch.randint(43, (1, 40)), torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            again(tokens, use_cache=False).logits, witness.logits(tokens, positions), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("case", ["deepseek v2 yarn", "deepseek v3 plain queries, biased"])
def test_both_ways_to_compute_latent_attention_agree(case: str, tmp_path: Path) -> None:
    """Expanded for a whole text, absorbed for every step, and the other way round."""
    witness = Witness(case, torch.float64, tmp_path)
    loaded = pretrained.load(witness.folder, dtype=torch.float64)
    tokens, positions = torch.randint(43, (2, 21)), torch.arange(21).expand(2, 21)
    want = witness.logits(tokens, positions)
    for mode in ("expanded", "absorbed"):
        options = {"mla": {**loaded.model.config.options["mla"], "mode": mode}}
        model = Decoder(replace(loaded.model.config, options=options)).double().eval()
        model.load_state_dict(loaded.model.state_dict())
        cache, parts = model.empty_cache(2, 21), []
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[0], want, rtol=1e-10, atol=1e-10)
            for part in tokens.split([12] + [1] * 9, 1):
                logits, cache = model(part, cache=cache)
                parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-10, atol=1e-10)


SMALL = ModelConfig(vocab_size=41, context=48, n_layers=2, d_model=32, n_heads=4)


def made(config: ModelConfig, tokenizer: data.Tokenizer | None = None) -> pretrained.Loaded:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    randomise(model)
    return pretrained.Loaded(model, tokenizer, "made here", "run")


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_folder_is_the_model(tied: bool, tmp_path: Path) -> None:
    mixed = replace(SMALL, mechanisms=("mla", "msla", "gqa"), options={"gqa": {"qk_norm": 1e-5}}, n_layers=3, tied=tied)
    scaled = RopeScaling(kind="yarn", factor=4, original=16, fast=32, magnitude=1.2)
    experts = ExpertsConfig(kind="swiglu", shared=1, dense_layers=1, score="sigmoid")
    given = made(replace(mixed, rope_scaling=scaled, ff="moe", experts=experts), data.CharTokenizer("abc"))
    folder = pretrained.save(given, tmp_path / "new" / "out", results={"validation loss": 1.25})
    again = pretrained.load(folder)
    assert (again.family, again.model.config) == ("attnlab", given.model.config)
    assert again.tokenizer is not None and again.tokenizer.to_json() == {"kind": "char", "chars": "abc"}
    assert not again.model.training
    tokens = torch.randint(41, (2, 20))
    assert torch.equal(again.model(tokens)[0], given.model(tokens)[0])
    assert all(p.requires_grad for p in again.model.parameters())
    files = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder.iterdir()} == files
    card = (folder / "README.md").read_text()
    per_token = (32 + 4) + (32 + 4 + 16) + 2 * 8  # mla, msla with its indexer, one key head
    assert f"{per_token} floats, {4 * per_token} bytes" in card
    assert f"{given.model.parameter_count():,} parameters" in card
    assert "msla" in card and "1.2500" in card and str(tmp_path) not in card
    assert pretrained.load(folder, dtype=torch.bfloat16).model.head.weight.dtype == torch.bfloat16


def test_a_run_folder_opens_at_any_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a cat sat on a mat, that is that. " * 40)
    config = RunConfig(
        model=replace(SMALL, context=8, n_layers=1, vocab_size=64),
        data=DataConfig(source=f"text:{text}"),
        train=TrainConfig(steps=4, batch_size=2, eval_every=2, eval_batches=1, save_every=2, precision="fp32"),
    )
    train(config, tmp_path / "run")
    newest, first = pretrained.load(tmp_path / "run"), pretrained.load(tmp_path / "run", checkpoint=2)
    assert (newest.family, newest.about["step"], first.about["step"]) == ("run", 4, 2)
    assert newest.tokenizer is not None and newest.tokenizer.decode(newest.tokenizer.encode("a mat")) == "a mat"
    assert not torch.equal(newest.model.embed.weight, first.model.embed.weight)
    again = pretrained.load(pretrained.save(newest, tmp_path / "out"))
    assert torch.equal(again.model.embed.weight, newest.model.embed.weight)
    assert "validation loss" in (tmp_path / "out" / "README.md").read_text()


def nano(bias: bool, vocab: int) -> dict[str, Any]:
    """What nanoGPT's train.py saves."""
    torch.manual_seed(0)
    D, state = 24, {}
    shapes = {"transformer.wte": (vocab, D), "transformer.wpe": (16, D)}
    for i in range(2):
        layer = f"transformer.h.{i}"
        shapes |= {f"{layer}.ln_1": (D,), f"{layer}.ln_2": (D,), f"{layer}.attn.c_attn": (3 * D, D)}
        shapes |= {f"{layer}.attn.c_proj": (D, D), f"{layer}.mlp.c_fc": (4 * D, D), f"{layer}.mlp.c_proj": (D, 4 * D)}
    shapes["transformer.ln_f"] = (D,)
    for name, shape in shapes.items():
        state[f"_orig_mod.{name}.weight"] = torch.randn(shape) * 0.3
        if bias and "wte" not in name and "wpe" not in name:
            state[f"_orig_mod.{name}.bias"] = torch.randn(shape[0]) * 0.3
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    args = {"n_layer": 2, "n_head": 4, "n_embd": D, "block_size": 16, "bias": bias, "vocab_size": vocab, "dropout": 0.0}
    return {"model": state, "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {}}


@pytest.mark.parametrize(("bias", "vocab"), [(True, 50304), (False, 43)])
def test_nanogpt_checkpoints(bias: bool, vocab: int, tmp_path: Path) -> None:
    """GPT-2 of transformers, with the matrices turned and zeros for biases, is the witness."""
    held = nano(bias, vocab)
    torch.save(held, tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # never opened
    loaded = pretrained.load(tmp_path / "ckpt.pt")
    assert (loaded.family, loaded.about["step"], loaded.tokenizer) == ("nanogpt", 7, None)
    shape = {**GPT2, "n_layer": 2, "n_positions": 16, "vocab_size": vocab}
    witness = T.GPT2LMHeadModel(T.GPT2Config(**shape, activation_function="gelu")).eval()
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in held["model"].items()}
    for name, tensor in witness.state_dict().items():
        found = state.get(name, torch.zeros(()))
        tensor.copy_(found.T if ".c_" in name and found.ndim == 2 else found)
    tokens = torch.randint(vocab, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens)[0], witness(tokens).logits, rtol=1e-5, atol=1e-5)
    refuses(lambda: pretrained.save(loaded, tmp_path / "x", family="nanogpt"), "nanogpt", "only be read")
    if bias:
        again = pretrained.load(pretrained.save(loaded, tmp_path / "gpt2", family="gpt2"))
        assert torch.equal(again.model(tokens)[0], loaded.model(tokens)[0])


def refuses(call: Callable[[], Any], *words: str) -> None:
    """In one sentence that says all of `words`."""
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in a folder, to be spoilt."""
    return Witness("llama", torch.float32, tmp_path).folder


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "lama"}, ["'lama'", "did you mean 'llama'?"]),
        ({"model_type": "gone"}, ["None", "llama"]),
        ({"hidden_size": "gone"}, ["hidden_size", "lacks"]),
        ({"hidden_size": "wide"}, ["hidden_size", "whole number"]),
        ({"num_key_value_heads": 3}, ["n_kv_heads 3", "1, 2, 4"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type", "'dynamic'", "yarn"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantized"]),
        ({"num_hidden_layers": 4}, ["lacks the tensor", "model.layers.3", "and 8 more"]),
        ({"num_hidden_layers": 2}, ["model.layers.2", "does not explain"]),
        ({"intermediate_size": 21}, ["mlp.gate_proj.weight", "[20, 24]", "[21, 24]"]),
        ({"num_attention_heads": 5}, ["n_heads", "5"]),
        ({"attention_bias": True}, ["lacks the tensor", "q_proj.bias"]),
    ],
)
def test_a_config_that_does_not_fit_is_refused(fields: dict[str, Any], words: list[str], folder: Path) -> None:
    change(folder, **fields)
    refuses(lambda: pretrained.load(folder), *words)


class Foreign:
    """Unpickling it would run code."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("opened"),)


def test_folders_and_files_that_are_no_models_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(lambda: pretrained.load(folder, checkpoint=3), "checkpoint 3", "not a run folder")
    (tmp_path / "empty").mkdir()
    refuses(lambda: pretrained.load(tmp_path / "empty"), "run.json", "config.json")
    weights = folder / "model.safetensors"
    state, whole = load_file(weights), weights.read_bytes()
    weights.write_bytes(whole[:-10])
    refuses(lambda: pretrained.load(folder), "model.safetensors", "damaged")
    weights.unlink()
    refuses(lambda: pretrained.load(folder), "no model.safetensors")

    torch.save(state, folder / "pytorch_model.bin")
    tokens = torch.randint(43, (1, 9))
    plain = pretrained.load(folder).model(tokens)[0]
    torch.save({**state, "extra": Foreign()}, folder / "pytorch_model.bin")
    refuses(lambda: pretrained.load(folder), "pytorch_model.bin", "--trust")
    assert not Path("opened").exists()
    refuses(lambda: pretrained.load(folder, trust=True), "something else than named tensors")
    assert Path("opened").exists()
    (folder / "pytorch_model.bin").write_bytes(b"no archive at all")
    refuses(lambda: pretrained.load(folder), "pytorch_model.bin")
    torch.save({"weights": 3}, tmp_path / "ckpt.pt")
    refuses(lambda: pretrained.load(tmp_path / "ckpt.pt"), "ckpt.pt", "nanoGPT")

    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    for part, some in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: state[name] for name in some}, folder / f"{part}.safetensors")
    where = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert torch.equal(pretrained.load(folder).model(tokens)[0], plain)
    (folder / "b.safetensors").unlink()
    refuses(lambda: pretrained.load(folder), "b.safetensors", "missing")


def test_names_that_are_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuses(lambda: pretrained.load("nobody/nothing-at-all"), "nobody/nothing-at-all", "no folder here")
    refuses(lambda: pretrained.load("./no/such/folder"), "./no/such/folder", "does not exist")


def test_a_bare_model_and_old_names_load(tmp_path: Path) -> None:
    """As the first GPT-2 files were: no prefix, causal masks among the tensors, and rope_scaling in a Llama config."""
    witness = Witness("gpt2", torch.float32, tmp_path)
    weights = witness.folder / "model.safetensors"
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
    save_file({**state, "h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}, weights)
    tokens, positions = torch.randint(43, (2, 11)), torch.arange(11).expand(2, 11)
    torch.testing.assert_close(pretrained.load(witness.folder).model(tokens)[0], witness.logits(tokens, positions))
    other = Witness("llama3 frequencies", torch.float32, tmp_path / "llama")
    scaling = {name: value for name, value in LLAMA3.items() if name not in ("rope_type", "rope_theta")}
    old = {"rope_parameters": "gone", "rope_scaling": {**scaling, "type": "llama3"}, "rope_theta": 500.0}
    change(other.folder, **old)
    torch.testing.assert_close(pretrained.load(other.folder).model(tokens)[0], other.logits(tokens, positions))


@pytest.mark.parametrize(
    ("config", "family", "words"),
    [
        (replace(SMALL, mechanisms=("mla",)), "gpt2", ["mechanisms", "mla here"]),
        (SMALL, "gpt2", ["positions", "bias"]),
        (replace(SMALL, positions="learned", bias=True, ff="relu2"), "gpt2", ["ff (gelu there, relu2 here)"]),
        (SMALL, "llama", ["norm (rms there, layer here)", "ff"]),
        (
            replace(SMALL, norm="rms", ff="swiglu", mechanisms=("gqa",), options={"gqa": {"qk_norm": 1e-6}}),
            "llama",
            ["qk_norm"],
        ),
        (replace(SMALL, norm="rms", ff="swiglu"), "qwen2", ["bias"]),
        (replace(SMALL, norm="rms", ff="swiglu"), "mlistral", ["did you mean 'mistral'?"]),
        (replace(SMALL, norm="rms", ff="moe", mechanisms=("mla",)), "deepseek_v3", ["experts.kind", "experts.score"]),
        (replace(SMALL, norm="rms", ff="swiglu", mechanisms=("sliding", "mha")), "mistral", ["layer 1"]),
    ],
)
def test_a_family_refuses_what_it_cannot_express(
    config: ModelConfig, family: str, words: list[str], tmp_path: Path
) -> None:
    refuses(lambda: pretrained.save(made(config), tmp_path / "out", family=family), *words)
    assert not [*tmp_path.iterdir()], "nothing half-written"


def test_what_a_family_has_no_place_for_is_not_dropped(tmp_path: Path) -> None:
    loaded = pretrained.load(Witness("deepseek v3 plain queries, biased", torch.float32, tmp_path).folder)
    with torch.no_grad():
        loaded.model.blocks()[1].attention.q.bias += 0.1
    refuses(
        lambda: pretrained.save(loaded, tmp_path / "out", family="deepseek_v3"), "layers.1.attention.q.bias", "not zero"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "mine.txt").write_text("keep")
    refuses(lambda: pretrained.save(loaded, tmp_path / "held"), "exists already")
    assert [file.name for file in (tmp_path / "held").iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained.folders, "save_file", full)
    refuses(lambda: pretrained.save(made(SMALL), tmp_path / "out"), "out", "free space")
    assert not [*tmp_path.iterdir()]


def test_our_own_model_becomes_a_llama(tmp_path: Path) -> None:
    config = replace(SMALL, norm="rms", ff="swiglu", mechanisms=("gqa",), rope_theta=700.0, tied=False)
    given = made(config)
    folder = pretrained.save(given, tmp_path / "out", family="llama")
    witness = T.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(41, (2, 19))
    with torch.no_grad():
        torch.testing.assert_close(given.model(tokens)[0], witness(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_and_its_template_travel(tmp_path: Path) -> None:
    words = T.PreTrainedTokenizerFast(tokenizer_object=byte_pairs(), eos_token="<|endoftext|>")
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    witness = Witness("qwen2", torch.float32, tmp_path)
    words.save_pretrained(witness.folder)
    change(witness.folder, eos_token_id=words.eos_token_id, bos_token_id=5)
    loaded = pretrained.load(witness.folder)
    assert loaded.tokenizer.encode("a cat sat") == words.encode("a cat sat")
    assert loaded.about["chat_template"] == words.chat_template
    for family in ("qwen2", "attnlab"):
        folder = pretrained.save(loaded, tmp_path / family, family=family)
        again = T.PreTrainedTokenizerFast.from_pretrained(folder)
        assert again.encode("a cat sat") == words.encode("a cat sat")
        assert again.chat_template == words.chat_template
        said = json.loads((folder / "config.json").read_text())
        assert (said["eos_token_id"], said["bos_token_id"]) == (words.eos_token_id, 5)


def byte_pairs() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["a cat sat on a mat"] * 9, trainer)
    return made


@pytest.mark.parametrize("case", ["llama of one key head", "deepseek v2 lite, grouped", "deepseek v3"])
def test_flops_are_those_of_the_parts(case: str, tmp_path: Path) -> None:
    """Counted by PyTorch on one text, against the formula; embeddings and norms cost no products."""
    model = pretrained.load(Witness(case, torch.float32, tmp_path).folder).model
    model = Decoder(replace(model.config, impl="reference")).eval()
    n = 32
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(43, (1, n)), torch.arange(n)[None])
    assert counter.get_total_flops() == pytest.approx(n * flops_per_token(model.config, n), rel=1e-6)


def test_narrow_weights_do_not_narrow_the_choice_of_experts(tmp_path: Path) -> None:
    """Published biases on the choice differ by less than bfloat16 can tell apart."""
    witness = Witness("deepseek v3 plain queries, biased", torch.float32, tmp_path)
    gate = witness.model.model.layers[2].mlp.gate
    with torch.no_grad():
        gate.e_score_correction_bias.copy_(50 + torch.randn(8) / 10)
    witness.model.save_pretrained(witness.folder)
    experts = pretrained.load(witness.folder, dtype=torch.bfloat16).model.blocks()[2].ff
    assert experts.router.weight.dtype == torch.bfloat16
    assert torch.equal(experts.bias, gate.e_score_correction_bias)
    x = torch.randn(1, 40, 24, dtype=torch.bfloat16)
    gate.weight.data = gate.weight.data.bfloat16()
    with torch.no_grad():
        _, _, want = gate(x)
        with record_notes() as notes:
            experts(x)
    assert torch.equal(notes["load"][0], torch.bincount(want.flatten(), minlength=8))


def looped_heads(x: Tensor, heads: int, sizes: list[int]) -> list[Tensor]:
    """What `split_heads` reads, row by row."""
    found: list[list[Tensor]] = [[] for _ in sizes]
    lines = iter(x)
    for _ in range(heads):
        for part, size in enumerate(sizes):
            found[part] += [next(lines) for _ in range(size)]
    return [torch.stack(part) for part in found]


ORDER = torch.tensor([4, 2, 0, 5, 1, 3])
ROWS: dict[str, tuple[tensor_names.Row, list[tuple[int, ...]], Callable[..., list[Tensor]]]] = {
    "same": (tensor_names.same("a", "x"), [(5, 3)], lambda x: [x]),
    "transposed": (tensor_names.transposed("a", "x"), [(5, 3)], lambda x: [torch.einsum("ij->ji", x)]),
    "fused": (
        tensor_names.fused("a", ["x", "y", "z"], [3, 1, 4]),
        [(3, 5), (1, 5), (4, 5)],
        lambda x, y, z: [torch.stack([*x, *y, *z])],
    ),
    "stacked": (tensor_names.stacked("a", [*"uvw"], 3), [(4, 5)] * 3, lambda *all: [torch.stack(all)]),
    "stacked in pairs": (
        tensor_names.stacked("a", [*"uvwxyz"], 3),
        [(2, 5)] * 6,
        lambda u, v, w, x, y, z: [torch.stack([torch.stack([*a, *b]) for a, b in ((u, v), (w, x), (y, z))])],
    ),
    "permuted": (
        tensor_names.permuted("a", "x", ORDER),
        [(6, 2)],
        lambda x: [torch.stack([x[i] for i in ORDER.tolist()])],
    ),
    "split heads": (
        tensor_names.split_heads(["a", "b"], "x", 3, [2, 5]),
        [(21, 4)],
        lambda x: looped_heads(x, 3, [2, 5]),
    ),
}


def on_disk(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_read_as_it_says_and_written_back(kind: str) -> None:
    row, shapes, witness = ROWS[kind]
    theirs = {name: torch.randn(shape) for name, shape in zip(row.theirs, shapes, strict=True)}
    held = {name: tensor.clone() for name, tensor in theirs.items()}
    mine = tensor_names.read_tensors([row], on_disk(theirs), {})
    wanted = witness(*theirs.values())
    assert list(mine) == list(row.ours) and len(wanted) == len(mine)
    assert all(torch.equal(mine[name], want) for name, want in zip(row.ours, wanted, strict=True))
    written = tensor_names.write_tensors([row], {name: tensor.requires_grad_() for name, tensor in mine.items()})
    assert list(written) == list(row.theirs)
    for name, tensor in written.items():
        assert torch.equal(tensor, held[name]) and tensor.is_contiguous() and not tensor.requires_grad
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in mine.items()}
    assert tensor_names.expected([row], empty) == {name: tensor.shape for name, tensor in theirs.items()}
    with torch.no_grad():
        for tensor in mine.values():
            assert tensor.is_contiguous()
            tensor.zero_()  # it was a copy
    assert all(torch.equal(theirs[name], held[name]) for name in held)


def test_what_is_read_has_the_kind_that_was_asked_for_or_its_own() -> None:
    rows = [tensor_names.same("a", "x"), tensor_names.transposed("b", "y")]
    theirs = {"x": torch.randn(3, 2).half(), "y": torch.randn(3, 2).double()}
    mine = tensor_names.read_tensors(rows, on_disk(theirs), {"b": torch.bfloat16})
    assert {name: tensor.dtype for name, tensor in mine.items()} == {"a": torch.float16, "b": torch.bfloat16}
    assert torch.equal(mine["a"], theirs["x"]) and torch.equal(mine["b"], theirs["y"].T.bfloat16())


def test_a_vector_that_they_lack_is_zero_or_refused() -> None:
    row = tensor_names.absent("b", 7)
    assert torch.equal(tensor_names.read_tensors([row], {}, {})["b"], torch.zeros(7))
    assert tensor_names.write_tensors([row], {"b": torch.zeros(7)}) == {}
    assert tensor_names.expected([row], {"b": torch.empty(7, device="meta")}) == {}
    refuses(
        lambda: tensor_names.write_tensors([row], {"b": torch.eye(7)[3]}), "b is not zero", "write family 'attnlab'"
    )


def test_a_row_that_gives_more_or_less_than_it_names_is_an_error() -> None:
    for names, made in ((["a"], 2), (["a", "b"], 1)):
        row = tensor_names.Row(names, ["x"], lambda x, made=made: [x] * made, lambda *x: [x[0]])
        with pytest.raises(ValueError, match="zip"):
            tensor_names.read_tensors([row], on_disk({"x": torch.ones(2)}), {})
        row = tensor_names.Row(["a"], names, lambda *x: [x[0]], lambda x, made=made: [x] * made)
        for use in (tensor_names.write_tensors, tensor_names.expected):
            with pytest.raises(ValueError, match="zip"):
                use([row], {"a": torch.ones(2)})


def checked(found: dict[str, tuple[int, ...]], **wanted: tuple[int, ...]) -> set[str]:
    full = {f"body.{name}": torch.Size(shape) for name, shape in wanted.items()} | {"head": torch.Size((2, 3))}
    stored = on_disk({name: torch.empty(shape) for name, shape in found.items()})
    return set(tensor_names.check_tensors(full, tensor_names.full_names(stored, "body."), "it"))


def test_tensors_are_checked_by_name_and_shape() -> None:
    head, a, b = {"head": (2, 3)}, {"body.a": (2, 3)}, {"body.b": (5,)}
    assert checked(head | a | b, a=(2, 3), b=(5,)) == {"head", "body.a", "body.b"}
    wrong = "its weights do not belong to its config.json"
    refuses(lambda: checked(head | a, a=(2, 3), b=(5,)), f"it lacks the tensor body.b; {wrong}")
    refuses(lambda: checked(head | a, a=(2, 3), b=(5,), c=(1,)), f"lacks the tensor body.b and 1 more; {wrong}")
    refuses(lambda: checked(a | b, a=(2, 3), c=(5,), d=(5,)), f"lacks the tensor body.c and 2 more; {wrong}")
    unexplained = "it has a tensor that its config does not explain,"
    refuses(lambda: checked(head | a | b, a=(2, 3)), f"{unexplained} body.b; {wrong}")
    refuses(
        lambda: checked(head | a | b | {"c": (1,), "d": (1,)}, a=(2, 3)), f"{unexplained} body.b and 2 more; {wrong}"
    )
    refuses(lambda: checked(head | a | {"a.masked": (1,)}, a=(2, 3)), f"{unexplained} a.masked; {wrong}")
    for shape, said in (((3, 2), "[3, 2]"), ((6,), "[6]"), ((2, 3, 1), "[2, 3, 1]")):
        refuses(lambda shape=shape: checked(head | {"body.a": shape}, a=(2, 3)), "body.a of shape", said, "[2, 3]")


def test_a_prefix_is_added_to_all_names_or_to_none() -> None:
    """A bare model has it nowhere; where one tensor has it, another that lacks it is not ours."""
    wanted = {f"body.{name}": torch.Size((2,)) for name in "ab"}
    bare, half = ({name: torch.empty(2) for name in names} for names in ("ab", ("body.a", "b")))
    found = tensor_names.check_tensors(wanted, tensor_names.full_names(on_disk(bare), "body."), "it")
    assert {name: each.load() is bare[name[-1]] for name, each in found.items()} == {"body.a": True, "body.b": True}
    refuses(
        lambda: tensor_names.check_tensors(wanted, tensor_names.full_names(on_disk(half), "body."), "it"),
        "lacks the tensor body.b;",
    )


def test_a_config_may_say_nothing_or_the_one_value() -> None:
    for hf in ({}, {"width": 3}, {"width": None}, {"width": 3.0, "depth": 9}):
        tensor_names.only(hf, width=3)
    for value in (4, 0, False, "3"):
        refuses(
            lambda value=value: tensor_names.only({"depth": 1, "width": value}, depth=1, width=3),
            f"width = {value!r}",
            "3",
        )


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_says_nothing_of_what_a_model_lacks_and_all_of_what_it_has(tied: bool) -> None:
    model = pretrained.empty(replace(SMALL, tied=tied, n_layers=1))
    names = set(model.state_dict()) - ({"head.weight"} if tied else set())
    assert set(tensor_names.ours(model)) == names
    every = [tensor_names.same(name, f"their.{name}") for name in (*sorted(names), "head.weight", "head.bias")]
    every.append(tensor_names.split_heads(["embed.weight", "head.bias"], "both", 1, [1, 1]))  # of which it has one
    family: Any = SimpleNamespace(__name__="mine", table=lambda model: every)
    left = [row for row in tensor_names.rows(family, model) if row.ours[0] != "head.weight"]
    assert [row.ours[0] for row in left] == sorted(names - {"head.weight"})
    family.table = lambda model: every[1:]
    with pytest.raises(AssertionError, match=f"the table of mine lacks \\['{sorted(names)[0]}'\\]"):
        tensor_names.rows(family, model)
