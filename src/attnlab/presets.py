"""Runs by name: complete and reproducible configs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import hybrids
from .attention import module
from .config import DataConfig, ExpertsConfig, ModelConfig, RunConfig, TrainConfig
from .errors import UserError, choose
from .ranges import checked

BASELINE = "mha"  # the mechanism that others are compared with, where it is among them
# the mechanisms of a default comparison; docs/mechanisms.md says why these
COMPARED = ("mha", "mqa", "gqa", "mla", "msla", "mka", "fast_mka", "sliding")


def quick() -> RunConfig:
    """The run of `make demo`: a small model on Shakespeare's characters, seconds per run on two cores."""
    model = ModelConfig(context=64, n_layers=4, d_model=128, n_heads=8, positions="rope")
    train = TrainConfig(
        steps=400, batch_size=12, lr=4e-3, min_lr=4e-4, warmup=40, eval_every=100, eval_batches=20, save_every=200
    )
    return RunConfig(name="quick", model=model, train=train)


def shakespeare_cpu() -> RunConfig:
    """nanoGPT's recipe for a laptop: 0.8M parameters, 2000 steps. With its learning rate of 1e-3 the validation loss is
    1.88, as there; with this one it is 1.77."""
    model = ModelConfig(context=64, n_layers=4, d_model=128, n_heads=4, positions="learned")
    train = TrainConfig(steps=2000, batch_size=12, lr=3e-3, min_lr=3e-4, warmup=100, betas=(0.9, 0.99))
    return RunConfig(name="shakespeare-cpu", model=model, train=train)


def shakespeare_gpu() -> RunConfig:
    """nanoGPT's recipe for one GPU: 10.6M parameters, 5000 steps, validation loss 1.4697."""
    model = ModelConfig(context=256, n_layers=6, d_model=384, n_heads=6, positions="learned", dropout=0.2)
    train = TrainConfig(steps=5000, batch_size=64, lr=1e-3, min_lr=1e-4, warmup=100, betas=(0.9, 0.99))
    return RunConfig(name="shakespeare-gpu", model=model, train=train)


def gpt2_124m() -> RunConfig:
    """GPT-2 small's shape: 124,439,808 parameters."""
    model = ModelConfig(
        vocab_size=50257, context=1024, n_layers=12, d_model=768, n_heads=12, positions="learned", bias=True
    )
    train = TrainConfig(
        steps=600_000, accumulate=40, lr=6e-4, min_lr=6e-5, warmup=2000, betas=(0.9, 0.95), eval_every=1000
    )
    return RunConfig(name="gpt2-124m", model=model, train=train)


def nanogpt_mla_124m() -> RunConfig:
    """The nanoGPT-MLA shape: GPT-2 small with a latent of 384 floats per token, no biases, no norms on the latent."""
    base = gpt2_124m()
    options = {"mla": {"kv_rank": 384, "rope_dim": 0, "norm": "none"}}
    return replace(
        base, name="nanogpt-mla-124m", model=replace(base.model, mechanisms=("mla",), options=options, bias=False)
    )


def llama_1b() -> RunConfig:
    """Llama 3.2 1B's shape: grouped queries, RMSNorm, SwiGLU, rotary positions with theta 500,000; 1,235,814,400."""
    model = ModelConfig(
        vocab_size=128_256,
        context=8192,
        n_layers=16,
        d_model=2048,
        n_heads=32,
        mechanisms=("gqa",),
        options={"gqa": {"n_kv_heads": 8}},
        positions="rope",
        rope_theta=500_000.0,
        norm="rms",
        ff="swiglu",
        ff_dim=8192,
    )
    return RunConfig(name="llama-1b", model=model, train=TrainConfig(steps=100_000, lr=3e-4, min_lr=3e-5, warmup=2000))


def llama_8b() -> RunConfig:
    """Llama 3 8B's shape (arXiv 2407.21783, table 3), 8,030,261,248 parameters, and its rate; batch and steps,
    419 billion tokens in all, are ours."""
    return llama3("llama-8b", n_layers=32, d_model=4096, n_heads=32, ff_dim=14_336, lr=3e-4)


def llama_70b() -> RunConfig:
    """Llama 3 70B's shape (arXiv 2407.21783, table 3), 70,553,706,496 parameters, and its rate; batch and
    steps, 419 billion tokens in all, are ours."""
    return llama3("llama-70b", n_layers=80, d_model=8192, n_heads=64, ff_dim=28_672, lr=1.5e-4)


def llama3(name: str, lr: float, **shape: int) -> RunConfig:
    """Return a preset in the style of Llama 3, with this shape and peak learning rate."""
    base = llama_1b()
    model = replace(base.model, **shape, norm_eps=1e-5, tied=False)  # type: ignore[arg-type]
    train = replace(base.train, batch_size=1, accumulate=512, lr=lr, min_lr=lr / 100, warmup=8000, betas=(0.9, 0.95))
    return RunConfig(name=name, model=model, train=train)


def deepseek_v3_671b() -> RunConfig:
    """DeepSeek-V3's shape and pretraining (arXiv 2412.19437, section 4.2, and the config.json beside its weights):
    671,026,404,352 parameters, 256 experts of which a token passes 8, 4096 tokens, 62.9M a step, 14.8 trillion in all.

    Left out: the module that guesses a second token ahead, and the growth of the batch over the first 469 billion
    tokens. A step's 15,360 sequences are given as one at a time, accumulated."""
    model = ModelConfig(
        vocab_size=129_280,
        context=4096,
        n_layers=61,
        d_model=7168,
        n_heads=128,
        head_dim=128,
        mechanisms=("mla",),
        options={"mla": {"kv_rank": 512, "q_rank": 1536, "rope_dim": 64, "v_dim": 128}},
        norm="rms",
        ff="moe",
        ff_dim=18_432,
        n_experts=256,
        experts_per_token=8,
        experts=ExpertsConfig(
            kind="swiglu",
            width=2048,
            shared=1,
            dense_layers=3,
            score="sigmoid",
            scale=2.5,
            groups=8,
            groups_kept=4,
            group_best=2,
        ),
        balance="bias",
        tied=False,
    )
    train = TrainConfig(
        steps=235_240, batch_size=1, accumulate=15_360, lr=2.2e-4, min_lr=2.2e-5, warmup=2000, betas=(0.9, 0.95)
    )
    return RunConfig(name="deepseek-v3-671b", model=model, train=train)


def openwebtext_124m(mechanism: str = "mha") -> RunConfig:
    """nanoGPT and nanoGPT-MLA on OpenWebText, 491,520 tokens a step. Published, at 27,000 iterations: 3.0978 for GPT,
    3.1149 for MLA with a latent of 384 (and no norm on it, no rotary part, no biases).

    Mended: GPT had 50,304 rows of vocabulary and MLA 50,257; here both have 50,304, so that they differ in their
    attention alone. The rate falls to its end within the 27,000 steps (ours)."""
    base = gpt2_124m()
    latent = nanogpt_mla_124m().model.options
    model = replace(base.model, vocab_size=50304, bias=False, mechanisms=(mechanism,), options=used(latent, mechanism))
    train = replace(base.train, steps=27_000, eval_batches=200)
    name = "-".join(["openwebtext-124m", *(f"{m}{fields['kv_rank']}" for m, fields in model.options.items())])
    return RunConfig(name=name, model=model, data=prepared("openwebtext"), train=train)


def tinystories_gpt2_msla() -> RunConfig:
    """GPT-2 small with multi-head sparse latent attention, 1000 steps on 2000 stories.

    Published as a patch called MSLA: each token looked up 16 of 256 learned latents per head, 30,707,712 of 133,886,208
    parameters trained. Mended: the published layer looked at no other token and had a key projection that was never
    used (it is `latent_lookup` here); this is `msla`, whose queries read the 128 best earlier tokens. The published run
    began with GPT-2's weights: attnlab convert gpt2 --to msla --rank 384, and that folder as --init, with
    --train.train attention to leave the rest as it is. Without --init it begins with random weights."""
    base = gpt2_124m()
    options = {"msla": {"kv_rank": 384, "norm": "none", "top_k": 128, "local": 16}}
    train = TrainConfig(
        steps=1000, batch_size=4, lr=3e-4, min_lr=3e-5, warmup=50, betas=(0.9, 0.95), eval_every=100, save_every=100
    )
    model = replace(base.model, mechanisms=("msla",), options=options, ff="gelu_tanh", dropout=0.1)  # as GPT-2 has them
    data = replace(prepared("tinystories-2000"), pack="documents")  # a story sees no other
    return RunConfig(name="tinystories-gpt2-msla", model=model, data=data, train=train)


def wikitext103_35m(mechanism: str) -> RunConfig:
    """The WikiText-MLA comparison: 512 wide, 16 heads, 8 layers, 10,000 BPE tokens, about 35M parameters. Its MLA has a
    latent of 341 and one of 256 for queries, LayerNorm on both, 16 content and 16 rotary dimensions, values of 32.

    Mended: the cosine has a warm-up that is really applied, and what is reported is held out: the validation part is
    never trained on, and perplexity is that of `attnlab eval`. Context, batch and steps are ours."""
    form = {"head_dim": 16, "rope_dim": 16, "v_dim": 32, "q_rank": 256, "kv_rank": 341, "norm": "layer"}
    model = ModelConfig(
        vocab_size=10_000,
        context=512,
        n_layers=8,
        d_model=512,
        n_heads=16,
        mechanisms=(mechanism,),
        options=used({"mla": form}, mechanism),
        tied=False,
        dropout=0.1,
    )
    train = TrainConfig(
        steps=20_000, batch_size=32, lr=6e-4, min_lr=6e-5, warmup=1000, betas=(0.9, 0.95), eval_every=500
    )
    return RunConfig(name=f"wikitext103-35m-{mechanism}", model=model, data=prepared("wikitext-103-10k"), train=train)


def wikitext2_gpt2(mechanism: str) -> RunConfig:
    """The memory-keyed comparison: GPT-2 small's shape on WikiText-2 with GPT-2's own tokens, by mechanism.

    Mended: the published session memory was the mean over the whole sequence, which leaks the future whatever the mask,
    recalled chunks were zeros, and decoding dropped the running state; here memories are causal, chunks are recalled,
    and the state is in the cache. What it called MLA was not DeepSeek's (it is `mlp_latent` here); this is `mla`. Text
    is packed, so that every token trained on and counted is real. Batch, steps and rates are ours. With --init gpt2, or
    what `attnlab convert` made of it, it begins with those weights instead of random ones."""
    base = gpt2_124m()
    latent = {"mla": {"kv_rank": 384, "norm": "none"}}
    model = replace(base.model, mechanisms=(mechanism,), options=used(latent, mechanism), ff="gelu_tanh", dropout=0.1)
    train = TrainConfig(
        steps=1000, batch_size=8, lr=3e-4, min_lr=3e-5, warmup=100, betas=(0.9, 0.95), eval_every=100, save_every=100
    )
    return RunConfig(name=f"wikitext2-gpt2-{mechanism}", model=model, data=prepared("wikitext-2"), train=train)


def task_preset(name: str, steps: int) -> RunConfig:
    """A synthetic task, for two layers and one core: one minute or two of it (docs/tasks.md)."""
    model = ModelConfig(vocab_size=28, context=64, n_layers=2, d_model=64, n_heads=2)
    train = TrainConfig(steps=steps, batch_size=32, eval_every=500, eval_batches=4, save_every=1000, precision="fp32")
    return RunConfig(name=name, model=model, data=DataConfig(source=f"task:{name}"), train=train)


def repeats() -> RunConfig:
    """Induction among 64 symbols, with a checkpoint every 100 steps, so that `attnlab compare repeats --heads` shows
    when induction heads appear; docs/induction.md is made with it. 16 sequences a step and this rate are what small
    models of all mechanisms learn it with in half a minute of one core."""
    base = task_preset("repeats", 1400)
    model = replace(base.model, n_heads=4)
    train = replace(
        base.train, batch_size=16, lr=1.5e-3, min_lr=1.5e-4, warmup=50, eval_every=350, save_every=100, keep=0
    )
    return replace(base, model=model, train=train)


PATCHES: Mapping[str, Mapping[str, Any]] = {  # published patches of models of transformers: settings of `attnlab.patch`
    # for GPT-2, under the name "MSLA": it replaces c_attn, and c_proj after it stays and is frozen
    "published-msla": {
        "mechanism": "latent_lookup",
        "options": {"n_latents": 256, "top_k": 16},
        "keep_output": True,
        "train": "attention",
    }
}


def used(options: Mapping[str, Mapping[str, Any]], *mechanisms: str) -> dict[str, Mapping[str, Any]]:
    """Return the options of these mechanisms alone."""
    return {name: fields for name, fields in options.items() if name in mechanisms}


CORPORA = {  # name -> the commands that make it
    "tinystories-2000": ["attnlab prepare tinystories --max-documents 2000 --out data/tinystories-2000"],
    "openwebtext": ["attnlab prepare openwebtext --out data/openwebtext"],
    "wikitext-103-10k": [
        "attnlab tokenizer train wikitext-103 --vocab-size 10000 --out bpe-10k.json",
        "attnlab prepare wikitext-103 --tokenizer bpe-10k.json --out data/wikitext-103-10k",
    ],
    "wikitext-2": ["attnlab prepare wikitext-2 --out data/wikitext-2"],
}


@checked
def prepared(name: str) -> DataConfig:
    """Return the data of a corpus in `CORPORA`."""
    choose("name", name, CORPORA)
    return DataConfig(source=f"prepared:data/{name}")


@checked
def check_corpus(config: RunConfig) -> None:
    """Raise `UserError` where a corpus of these presets is missing, with the commands that make it."""
    path = Path(config.data.source.removeprefix("prepared:"))
    if config.data.source.startswith("prepared:") and path.name in CORPORA and not path.exists():
        raise UserError(f"{path} is not there; make it with {' and then '.join(CORPORA[path.name])}")


_ALL: tuple[Callable[[], RunConfig], ...] = (
    quick,
    shakespeare_cpu,
    shakespeare_gpu,
    gpt2_124m,
    nanogpt_mla_124m,
    llama_1b,
    llama_8b,
    llama_70b,
    deepseek_v3_671b,
    *hybrids.WHOLE,
    *hybrids.SMALL,
    tinystories_gpt2_msla,
    *(partial(openwebtext_124m, name) for name in ("mha", "mla")),
    *(partial(wikitext103_35m, name) for name in ("mha", "mqa", "mla")),
    *(partial(wikitext2_gpt2, name) for name in ("mha", "mqa", "gqa", "mla", "mka", "fast_mka")),
    *(partial(task_preset, name, 2000) for name in ("mqar", "induction", "copying")),
    *(partial(task_preset, name, 3000) for name in ("selective", "needle")),
    repeats,
)
_PRESETS = {preset().name: preset for preset in _ALL}


def names() -> list[str]:
    """Return the names of all presets."""
    return list(_PRESETS)


def get(name: str) -> RunConfig:
    """Return the preset called `name`. Raise `UserError` for an unknown one."""
    return _PRESETS[choose("preset", name, names())]()


def about(name: str) -> str:
    """Return the description of a preset, and for a recipe of another project what is mended in it."""
    preset = _PRESETS[choose("preset", name, names())]
    return inspect.getdoc(preset.func if isinstance(preset, partial) else preset) or ""


Options = Mapping[str, Mapping[str, Any]]


@checked
def variant(preset: RunConfig, label: str, options: Options | None = None) -> RunConfig:
    """Return `preset` with the mechanism `label`: "mla", or a hybrid "sliding+sliding+mla", one per layer, repeated.

    `options` holds Config fields by mechanism; those that no layer uses are left out. Raises `UserError` for an unknown
    mechanism.
    """
    names = tuple(label.split("+"))
    for name in names:
        module(name)
    given = {**preset.model.options, **(options or {})}
    chosen = {name: fields for name, fields in given.items() if name in names}
    return replace(preset, name=label, model=replace(preset.model, mechanisms=names, options=chosen))


@checked
def with_options(config: RunConfig, options: Options) -> RunConfig:
    """Return `config` with these Config fields of mechanisms set as well."""
    merged = {name: {**config.model.options.get(name, {}), **fields} for name, fields in options.items()}
    return replace(config, model=replace(config.model, options={**config.model.options, **merged}))
