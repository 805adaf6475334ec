"""Models of other libraries, read and written: their own code is the witness, on tiny models with random weights."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnlab import data, hub
from attnlab.config import ModelConfig, RunConfig, TrainConfig, from_dict, to_dict
from attnlab.model import Decoder
from attnlab.spec import RopeScaling, UserError

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
            if "inv_freq" not in name:
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
    loaded = hub.load(witness.folder, dtype=dtype)
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
    loaded = hub.load(witness.folder)
    config = RunConfig(model=loaded.model.config)
    assert from_dict(RunConfig, to_dict(config)) == config
    folder = hub.save(loaded, tmp_path / "ours", family=loaded.family)
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
