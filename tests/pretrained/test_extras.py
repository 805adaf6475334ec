"""Tensors beyond those that a config needs: left out where they agree with it, taken or refused where they do not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from attnlab import pretrained
from attnlab.errors import UserError

LLAMA = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
}
MODELS: dict[str, Any] = {
    "llama": lambda: T.LlamaConfig(**LLAMA),
    "mistral": lambda: T.MistralConfig(**LLAMA, sliding_window=16),
    "qwen2": lambda: T.Qwen2Config(**LLAMA),
    "qwen3": lambda: T.Qwen3Config(**LLAMA, head_dim=8),
    "gpt2": lambda: T.GPT2Config(n_layer=2, n_embd=24, n_head=3, vocab_size=37, n_positions=48),
}
TOKENS = torch.randint(37, (2, 13), generator=torch.Generator().manual_seed(5))


def folder_of(kind: str, path: Path, tied_there: bool, tied_said: bool, **extra: torch.Tensor) -> Path:
    """A folder of transformers whose config.json says `tied_said`, with further tensors."""
    torch.manual_seed(len(kind))
    config = MODELS[kind]()
    config.tie_word_embeddings = tied_there
    T.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    about = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**about, "tie_word_embeddings": tied_said}))
    if extra:
        save_file({**load_file(path / "model.safetensors"), **extra}, path / "model.safetensors", {"format": "pt"})
    return path


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        return T.AutoModelForCausalLM.from_pretrained(path).eval()(TOKENS).logits


@pytest.mark.parametrize("kind", MODELS)
def test_the_head_of_the_file_is_the_head(kind, tmp_path, capsys):
    path = folder_of(kind, tmp_path / "model", tied_there=False, tied_said=True)
    loaded = pretrained.load(path)
    said = capsys.readouterr().err
    assert said.count("lm_head.weight is another matrix: that is the head") == 1 and str(path) in said
    assert not loaded.model.config.tied
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(TOKENS)[0], logits(path), rtol=1e-5, atol=1e-5)
    again = pretrained.load(pretrained.save(loaded, tmp_path / "ours", family=loaded.family))
    assert torch.equal(again.model.head.weight, loaded.model.head.weight) and "attnlab:" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_head_that_is_the_embedding_is_no_further_matrix(kind, tmp_path, capsys):
    path = folder_of(kind, tmp_path / "model", tied_there=True, tied_said=True)
    embedding = next(
        t for name, t in load_file(path / "model.safetensors").items() if name.endswith(("tokens.weight", "wte.weight"))
    )
    folder_of(kind, path, True, True, **{"lm_head.weight": embedding.clone()})
    model = pretrained.load(path).model
    assert model.config.tied and model.head.weight is model.embed.weight and "attnlab:" not in capsys.readouterr().err
    held = load_file(path / "model.safetensors")
    kept = {name: t for name, t in held.items() if not name.endswith(("tokens.weight", "wte.weight"))}
    save_file(kept, path / "model.safetensors", {"format": "pt"})  # of two names for one matrix, the head's
    assert torch.equal(pretrained.load(path).model.embed.weight, embedding)


def test_a_head_that_is_missing_is_not_made_up(tmp_path):
    path = folder_of("llama", tmp_path / "model", tied_there=True, tied_said=False)
    with pytest.raises(UserError, match=r"lacks the tensor lm_head\.weight"):
        pretrained.load(path)


def test_an_exported_folder_whose_head_was_untied(tmp_path, capsys):
    torch.manual_seed(0)
    config = pretrained.ModelConfig(vocab_size=31, n_layers=1, d_model=16, n_heads=2, context=8, mechanisms=("mla",))
    path = pretrained.save(pretrained.Loaded(pretrained.Decoder(config).eval(), None, "new", "run"), tmp_path / "model")
    held = load_file(path / "model.safetensors")
    head = torch.randn(31, 16)
    save_file({**held, "model.head.weight": head}, path / "model.safetensors", {"format": "pt"})
    assert torch.equal(pretrained.load(path).model.head.weight, head) and "model.head.weight" in capsys.readouterr().err


def nano(**changes: torch.Tensor) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"wte": (29, 16), "wpe": (8, 16), "h.0.attn.c_attn": (48, 16), "h.0.attn.c_proj": (16, 16)}
    shapes |= {
        "h.0.mlp.c_fc": (64, 16),
        "h.0.mlp.c_proj": (16, 64),
        "h.0.ln_1": (16,),
        "h.0.ln_2": (16,),
        "ln_f": (16,),
    }
    state = {f"transformer.{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    args = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": False, "vocab_size": 29, "dropout": 0.0}
    return {"model": {**state, "lm_head.weight": state["transformer.wte.weight"], **changes}, "model_args": args}


def test_the_head_of_a_checkpoint_of_nanogpt(tmp_path, capsys):
    head = torch.randn(29, 16)
    torch.save(nano(**{"lm_head.weight": head}), tmp_path / "ckpt.pt")
    model = pretrained.load(tmp_path / "ckpt.pt").model
    assert torch.equal(model.head.weight, head) and not torch.equal(model.embed.weight, head)
    assert "lm_head.weight is another matrix" in capsys.readouterr().err
    torch.save(nano(), tmp_path / "ckpt.pt")
    assert pretrained.load(tmp_path / "ckpt.pt").model.config.tied and "attnlab:" not in capsys.readouterr().err


def test_two_names_for_one_tensor_of_nanogpt(tmp_path):
    torch.save(nano(**{"_orig_mod.lm_head.weight": torch.ones(29, 16)}), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"lm_head\.weight twice"):
        pretrained.load(tmp_path / "ckpt.pt")


WINDOW = torch.ones(48, 48).tril().triu(-7)


@pytest.mark.parametrize(
    "kind, extra, good",
    [
        ("gpt2", {"h.0.attn.bias": torch.ones(48, 48).tril()[None, None]}, True),
        ("gpt2", {"h.1.attn.bias": (torch.ones(30, 30).tril() > 0)[None, None]}, True),
        ("gpt2", {"h.1.attn.masked_bias": torch.tensor(-1e4, dtype=torch.bfloat16)}, True),
        ("gpt2", {"h.0.attn.bias": WINDOW[None, None]}, False),
        ("gpt2", {"h.0.attn.bias": torch.ones(48, 48)[None, None].to(torch.uint8)}, False),
        ("gpt2", {"h.0.attn.bias": torch.ones(24)}, False),
        ("gpt2", {"h.0.attn.masked_bias": torch.tensor(-1.0)}, False),
        ("llama", {"layers.1.self_attn.rotary_emb.inv_freq": 1e4 ** -(torch.arange(4) / 4)}, True),
        ("qwen3", {"layers.1.self_attn.rotary_emb.inv_freq": (1e4 ** -(torch.arange(4) / 4)).bfloat16()}, True),
        ("llama", {"layers.1.self_attn.rotary_emb.inv_freq": 5e5 ** -(torch.arange(4) / 4)}, False),
        ("mistral", {"layers.0.self_attn.rotary_emb.inv_freq": 1e4 ** -(torch.arange(3) / 3)}, False),
        ("qwen2", {"rotary_emb.inv_freq": 1e4 ** -(torch.arange(4) / 4)}, True),
        ("gpt2", {"h.0.rotary_emb.inv_freq": 1e4 ** -(torch.arange(4) / 4)}, False),
    ],
)
def test_a_tensor_that_is_left_out_says_what_the_config_says(kind, extra, good, tmp_path):
    prefix = "transformer." if kind == "gpt2" else "model."
    plain = folder_of(kind, tmp_path / "plain", tied_there=True, tied_said=True)
    path = folder_of(kind, tmp_path / "more", True, True, **{f"{prefix}{name}": t for name, t in extra.items()})
    if good:
        same = zip(pretrained.load(path).model.parameters(), pretrained.load(plain).model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    else:
        with pytest.raises(UserError, match=r"not what its config.json makes of it|config does not explain"):
            pretrained.load(path)
