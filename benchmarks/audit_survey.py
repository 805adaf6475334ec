"""The audit, put to attention classes that others wrote: every kind that transformers has, torch, x-transformers, timm.

    python benchmarks/audit_survey.py --out survey.jsonl --workers 2        about 40 minutes on two cores
    python benchmarks/audit_survey.py --packages transformers --only llama,gpt2 --document -

A class is built from a small config of its family (32 wide, 4 heads, 2 of keys and values), by its eager kernel, and
called with a causal mask where it takes one and with the rotary tables of its own file. Many families hold the same
text under other names: one of each text is audited, and the others are counted beside it. Every class runs in a process
of its own, with limits of time and memory. What is in --out is not asked again. The words about broken laws, which were
found by hand, are in audit_findings.json.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import resource
import shlex
import sys
import time
import typing
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from speed import markdown, say
from torch import Tensor, nn

from attnlab.audit import audit_target
from attnlab.audit.call import find_caller
from attnlab.errors import UserError
from attnlab.laws import check_subject, prepare
from attnlab.laws.call import CACHES, Caller, first_tensor, one_line
from attnlab.laws.state import seeded
from attnlab.results import LawResult

DOCUMENT = Path(__file__).parents[1] / "docs" / "audit.md"
FINDINGS = Path(__file__).with_name("audit_findings.json")
PACKAGES = ("torch", "transformers", "x-transformers", "timm")
LONGEST, TILES = 67, (129,)  # tokens; shorter than the audit tries, which takes several times as long
BEGIN, END = "<!-- begin survey -->", "<!-- end survey -->"
MEMORY = 8 << 30  # bytes that a class may take
DECODING = ("chunks", "rewind", "fork", "cache size")

NAMES = re.compile(r"(Attention|GatedDeltaNet|Mixer|RecurrentBlock|ShortConv|ShortConvolution)$")
NOT_ALONE = re.compile(r"Cross|Pool|Mask|Deformable|Encoder|FlashAttention|Layer")

KNOWN = ("llama", "bert", "bart", "gpt2", "clip")  # families to name a text after, where they hold it

WIDTH, HEADS = 32, 4
SIZES: dict[int, tuple[str, ...]] = {
    WIDTH: (
        *("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "model_dim", "emb_dim", "encoder_hidden_size"),
        *("embedding_size", "attention_hidden_size", "word_embed_proj_dim", "lru_width", "encoder_embed_dim"),
    ),
    HEADS: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads"),
        *("decoder_attention_heads", "time_step_rank", "linear_num_value_heads", "mamba_dt_rank", "num_q_heads"),
        *("encoder_num_attention_heads", "decoder_num_attention_heads", "index_n_heads"),
    ),
    2: (
        *("num_key_value_heads", "n_head_kv", "num_kv_heads", "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        *(
            "encoder_layers",
            "decoder_layers",
            "linear_num_key_heads",
            "decoder_num_key_value_heads",
            "num_ln_in_parallel_attn",
        ),
        *("encoder_num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts"),
    ),
    8: (
        *("head_dim", "d_kv", "d_head", "attention_head_dim", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim"),
        *("v_head_dim", "state_size", "ssm_state_size", "mamba_d_state", "linear_key_head_dim", "rotary_dim"),
        *("linear_value_head_dim", "attention_head_size", "mamba_d_head", "mamba_head_dim", "mamba_n_heads"),
        *("mamba_num_heads", "n_mamba_heads", "index_topk", "index_head_dim", "swa_head_dim", "global_head_dim"),
    ),
    16: ("q_lora_rank", "kv_lora_rank", "chunk_size", "mamba_chunk_size", "o_lora_rank", "index_head_dim"),
    64: ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "vocab_size", "encoder_ffn_dim", "decoder_ffn_dim"),
    100: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"),
}
TINY = {name: size for size, names in SIZES.items() for name in names}
DECODER = {"is_decoder": True, "is_causal": True, "causal": True}
OVERRIDES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mamba": {"expand": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "rwkv": {"attention_hidden_size": 32},
    "nemotron_h": {"n_groups": 2},
    "zamba2": {"mamba_ngroups": 1},
    "bamba": {"mamba_n_groups": 1},
    "falcon_h1": {"mamba_n_groups": 1, "mamba_d_ssm": 64},
    "granitemoehybrid": {"mamba_n_groups": 1},
}
ARGUMENTS: dict[str, Any] = {  # of constructors
    **dict.fromkeys(("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "mamba_layer_idx"), 0),
    **dict.fromkeys(("embed_dim", "hidden_size", "dim", "d_model", "embedding_dim", "input_dim", "dim_embed"), WIDTH),
    **dict.fromkeys(("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"), HEADS),
    **dict.fromkeys(("is_decoder", "is_causal", "has_relative_attention_bias"), True),
    **dict.fromkeys(("layer_type", "attention_type"), "full_attention"),
    "dropout": 0.0,
    "head_dim": 8,
}
GIVEN = {  # to forward
    "position_ids": "positions",
    "cache_position": "positions[0]",
    "residual": "torch.zeros_like(x)",
    **dict.fromkeys(("attention_mask", "attn_mask", "mask", "causal_mask"), "mask"),
    **dict.fromkeys(("key", "value", "keys", "values", "k", "v", "q", "query", "key_states", "value_states"), "x"),
    **dict.fromkeys(("query_tensor", "key_tensor", "value_tensor", "key_value_states", "to_tensor"), "x"),
}
MASKS = ("attention_mask", "attn_mask", "mask", "causal_mask")
PADS = re.compile(
    r"GatedDelta|Mixer|RecurrentBlock|ShortConv|DeltaAttention|LightningAttention"
)  # whose masks are of pads
OWN_ROTARY = "__import__('sys').modules[type(module).__module__].{}(module.config).to(x.device)(x, positions{})"


class Skipped(Exception):
    """Why a class is not audited."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A class to audit."""

    package: str
    family: str  # or the file it is in
    cls: str
    place: str  # package.module
    same: tuple[str, ...] = ()  # families that hold the same text
    kwargs: Mapping[str, Any] | None = None
    call: str | None = None
    mask: str = "additive"
    bidirectional: bool = False  # nothing tells it to look back only

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.family}/{self.cls}"


# what there is


def candidates(packages: Sequence[str], only: Sequence[str]) -> tuple[list[Candidate], Counter[str]]:
    """The classes to audit, and how many were left out for which reason."""
    left: Counter[str] = Counter()
    found = []
    if "torch" in packages:
        found += of_torch()
    if "transformers" in packages:
        found += sorted(of_transformers(left, only), key=lambda c: only.index(c.family) if only else 0)
    if "x-transformers" in packages and importlib.util.find_spec("x_transformers"):
        found += of_x_transformers()
    if "timm" in packages and importlib.util.find_spec("timm"):
        found += of_timm(left)
    return [c for c in found if not only or c.family in only], left


def of_torch() -> list[Candidate]:
    """The attention layers of torch."""
    heads = {"embed_dim": WIDTH, "num_heads": HEADS}
    layer = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 64}
    attend, layers = "module(x, x, x, attn_mask=drop)", "module(x, src_mask=drop)"
    decoder = "module(x, x, tgt_mask=drop, memory_mask=drop)"
    rnn = {"input_size": WIDTH, "hidden_size": WIDTH}
    first = {"batch_first": True}

    def made(
        name: str, kwargs: Mapping[str, Any] | None, call: str | None, words: str, place: str = "torch.nn"
    ) -> Candidate:
        return Candidate("torch", words or name, name, place, kwargs=kwargs, call=call)

    found = [
        made("MultiheadAttention", heads | first, attend, "batch first"),
        made("MultiheadAttention", heads, "module(x, x, x, attn_mask=drop)", "sequence first"),
        made(
            "MultiheadAttention",
            heads | first | {"add_bias_kv": True, "add_zero_attn": True},
            attend,
            "bias_kv, zero_attn",
        ),
        made("TransformerEncoderLayer", layer | first, layers, "norm last"),
        made("TransformerEncoderLayer", layer | first | {"norm_first": True}, layers, "norm first"),
        made("TransformerEncoderLayer", layer, layers, "sequence first"),
        made("TransformerDecoderLayer", layer | first, decoder, "norm last"),
        made("TransformerDecoderLayer", layer | first | {"norm_first": True}, decoder, "norm first"),
        *(made(name, rnn | first, None, "batch first") for name in ("RNN", "GRU", "LSTM")),
        *(made(name, rnn, None, "sequence first") for name in ("GRU", "LSTM")),
    ]
    place = "torch.nn.functional"
    for call in ("function(q, k, v, is_causal=True)", "function(q, k, v, attn_mask=keep)"):
        found.append(made("scaled_dot_product_attention", None, call, call.split(", ")[-1].rstrip(")"), place))
    return found


def of_x_transformers() -> list[Candidate]:
    """The attention of x-transformers, with some of its many options."""
    base = {"dim": WIDTH, "heads": HEADS, "dim_head": 8, "causal": True}
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "flash": {"flash": True},
        "kv_heads": {"kv_heads": 2},
        "one_kv_head": {"one_kv_head": True},
        "qk_norm": {"qk_norm": True},
        "talking_heads": {"pre_talking_heads": True, "post_talking_heads": True},
        "sparse_topk": {"sparse_topk": 4},
        "num_mem_kv": {"num_mem_kv": 2},
        "add_zero_kv": {"add_zero_kv": True},
        "sigmoid": {"sigmoid": True},
        "gate_values": {"gate_values": True},
        "shared_kv": {"shared_kv": True},
        "tensor_product": {"tensor_product": True},
        "softclamp_logits": {"softclamp_logits": True},
        "selective": {"selective": True},
        "cog_signed": {"cog_signed": True},
        "use_latent_kv": {"use_latent_kv": True, "use_latent_q": True},
        "hard": {"hard": True},
        "laser": {"laser": True},
        "orthog_projected_values": {"orthog_projected_values": True},
        "value_rmsnorm": {"value_rmsnorm": True},
        "onnxable": {"onnxable": True},
        "rotate_num_heads": {"rotate_num_heads": 2},
        "data_dependent_alibi": {"data_dependent_alibi": True},
    }
    place = "x_transformers.x_transformers"
    return [Candidate("x-transformers", name, "Attention", place, kwargs=base | more) for name, more in options.items()]


TIMM: dict[str, tuple[str, dict[str, Any], str | None]] = {  # class: module, arguments, call
    "Attention": ("timm.layers.attention", {"dim": WIDTH, "num_heads": HEADS}, "module(x, attn_mask=mask)"),
    "AttentionRope": ("timm.layers.attention", {"dim": WIDTH, "num_heads": HEADS}, "module(x, attn_mask=mask)"),
    "DiffAttention": ("timm.layers.diff_attention", {"dim": WIDTH, "num_heads": 2}, "module(x, attn_mask=mask)"),
    "EvaAttention": (
        "timm.models.eva",
        {"dim": WIDTH, "num_heads": HEADS, "qk_norm": False},
        "module(x, attn_mask=mask)",
    ),
    "Block": ("timm.models.vision_transformer", {"dim": WIDTH, "num_heads": HEADS}, "module(x, attn_mask=mask)"),
    "ResPostBlock": ("timm.models.vision_transformer", {"dim": WIDTH, "num_heads": HEADS}, "module(x, attn_mask=mask)"),
    "ParallelScalingBlock": (
        "timm.models.vision_transformer",
        {"dim": WIDTH, "num_heads": HEADS},
        "module(x, attn_mask=mask)",
    ),
    "ParallelThingsBlock": (
        "timm.models.vision_transformer",
        {"dim": WIDTH, "num_heads": HEADS},
        "module(x, attn_mask=mask)",
    ),
    "EvaBlock": ("timm.models.eva", {"dim": WIDTH, "num_heads": HEADS}, "module(x, attn_mask=mask)"),
    "RelPosAttention": ("timm.models.vision_transformer_relpos", {"dim": WIDTH, "num_heads": HEADS}, None),
    "ClassAttentionBlock": ("timm.models.xcit", {"dim": WIDTH, "num_heads": HEADS, "eta": 1.0}, None),
    "XCA": ("timm.models.xcit", {"dim": WIDTH, "num_heads": HEADS}, None),
    "CrossAttention": ("timm.models.crossvit", {"dim": WIDTH, "num_heads": HEADS}, None),
    "ClassAttn": ("timm.models.cait", {"dim": WIDTH, "num_heads": HEADS}, None),
    "TalkingHeadAttn": ("timm.models.cait", {"dim": WIDTH, "num_heads": HEADS}, None),
    "EfficientAdditiveAttention": ("timm.models.swiftformer", {"in_dims": WIDTH, "token_dim": WIDTH}, None),
}


def of_timm(left: Counter[str]) -> list[Candidate]:
    """The attention of timm that takes x [B T D]; most of it takes images [B C H W]."""
    folder = Path(importlib.util.find_spec("timm").submodule_search_locations[0])  # type: ignore[union-attr, index]
    classes = [c.name for f in folder.rglob("*.py") for c in parsed(f) if "Atten" in c.name]
    left["timm: takes images, or a grid of tokens"] += sum(name not in TIMM for name in classes)
    return [
        Candidate("timm", place.rpartition(".")[2], name, place, kwargs=kwargs, call=call, bidirectional=call is None)
        for name, (place, kwargs, call) in TIMM.items()
    ]


def of_transformers(left: Counter[str], only: Sequence[str]) -> list[Candidate]:
    """One class of each text, with the families that hold the same."""
    folder = Path(importlib.util.find_spec("transformers").submodule_search_locations[0]) / "models"  # type: ignore[union-attr, index]
    groups: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    ranks: dict[tuple[str, str, str], int] = {}  # 0: decodes; 1: takes a mask; 2: looks at all it is given
    for file in sorted(folder.glob("*/modeling_*.py")):
        family = file.parent.name
        nodes = {node.name: node for node in ast.parse(file.read_text("utf-8")).body if hasattr(node, "name")}
        known: dict[str, tuple[str, list[str]]] = {}
        for name, node in nodes.items():
            if not isinstance(node, ast.ClassDef) or not NAMES.search(name):
                continue
            if reason := not_alone(node, nodes):
                left[f"transformers: {reason}"] += 1
                continue
            if name.endswith("Attention") and f"{name.removesuffix('Attention')}SelfAttention" in nodes:
                left["transformers: a wrapper of its family's self-attention"] += 1
                continue
            member = (family, name, f"transformers.models.{family}.{file.stem}")
            ranks[member] = rank(node, nodes)
            groups[text_of(name, nodes, known)].append(member)
    found = []
    for members in sorted(groups.values(), key=lambda group: (min(ranks[m] for m in group), -len(group))):
        asked = [m for m in members if m[0] in only or not only]
        if not asked:
            continue
        first = next((m for m in asked if m[0] in KNOWN), asked[0])
        same = tuple(sorted({m[0] for m in members if m != first}))
        found.append(Candidate("transformers", first[0], first[1], first[2], same))
    return found


def rank(node: ast.ClassDef, nodes: Mapping[str, Any]) -> int:
    """0 for a class that takes a cache, 1 for one that takes a mask, 2 for others."""
    forward = method(node, "forward", nodes)
    names = {a.arg for a in forward.args.args} if forward else set()
    if names & set(CACHES):
        return 0
    return 1 if names & set(MASKS) else 2


def parsed(file: Path) -> list[ast.ClassDef]:
    """The classes of a file."""
    return [node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]


def not_alone(node: ast.ClassDef, nodes: Mapping[str, Any]) -> str | None:
    """Why the class is not one to be given x alone; None: it may be."""
    if NOT_ALONE.search(node.name):
        return "a block, a head, or attention across to something else"
    forward = method(node, "forward", nodes)
    if forward is None:
        return "no forward of its own"
    names = [a.arg for a in forward.args.args][1:]
    required = names[: len(names) - len(forward.args.defaults)]
    known = {*GIVEN, "position_embeddings", "alibi"}
    for name in required[1:]:
        if name not in known:
            return f"forward also wants {name}"
    return None if names else "forward takes no x"


def method(node: ast.ClassDef, name: str, nodes: Mapping[str, Any]) -> ast.FunctionDef | None:
    """A method of a class, or of one in the same file that it inherits from."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == name:
            return item
    for base in node.bases:
        other = nodes.get(base.id) if isinstance(base, ast.Name) else None
        if isinstance(other, ast.ClassDef) and other is not node:
            return method(other, name, nodes)
    return None


def text_of(name: str, nodes: Mapping[str, Any], known: dict[str, tuple[str, list[str]]]) -> str:
    """The text of a class and of all in its file that it uses, without comments and the family's own names.

    known: texts of the file's parts, and the names in each; filled here.
    """
    wanted, seen = [name], {}
    while wanted:
        this = wanted.pop()
        if this in seen or this not in nodes:
            continue
        if this not in known:
            bare = without_words(nodes[this])
            known[this] = ast.unparse(bare), [n.id for n in ast.walk(bare) if isinstance(n, ast.Name)]
        seen[this], names = known[this]
        wanted += names
    found = NAMES.search(name)
    prefix = name[: found.start()] if found else ""
    text = "\n".join(seen[key] for key in [name, *sorted(set(seen) - {name}, key=lambda n: n.replace(prefix, ""))])
    return re.sub(rf"\b{prefix}(?=[A-Z])|(?<=\W){prefix}(?=\w*Config)", "X", text) if prefix else text


def without_words(node: ast.AST) -> ast.AST:
    """The same without docstrings and annotations."""
    for part in ast.walk(node):
        body = getattr(part, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            part.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
        if isinstance(part, ast.FunctionDef):
            part.returns = None
            for argument in [*part.args.args, *part.args.kwonlyargs]:
                argument.annotation = None
    return node


# one class of transformers


def small_config(cls: type[nn.Module], family: str) -> Any:
    """A small config of the family, of the class that annotates the constructor or whose name is nearest."""
    module = sys.modules[cls.__module__]
    kind = annotated(cls) or nearest(cls, module)
    if kind is None:
        return None
    if not hasattr(kind(), "hidden_size"):  # of a model that has one for its text
        kind = getattr(kind, "sub_configs", {}).get("text_config", kind)
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "attribute_map", {}))
    alias = getattr(kind, "attribute_map", {})
    wanted = {**TINY, **OVERRIDES.get(family, {})}
    values = {name: value for name, value in wanted.items() if name in fields and alias.get(name) not in wanted}
    values |= {name: value for name, value in DECODER.items() if name in fields}
    if "kv_lora_rank" in values:
        values |= {"num_key_value_heads": HEADS}  # each head has keys of its own, made from a latent
    config = kind(**values)
    config._attn_implementation = "eager"
    return config


def annotated(cls: type[nn.Module]) -> Any:
    """The config class that the constructor says it takes."""
    try:
        hints = typing.get_type_hints(cls.__init__, vars(sys.modules[cls.__module__]))
    except Exception:
        return None
    found = [h for name, h in hints.items() if inspect.isclass(h) and h.__name__.endswith("Config")]
    return found[0] if found and found[0].__name__ != "PreTrainedConfig" else None


def nearest(cls: type[nn.Module], module: Any) -> Any:
    """The config class in the file that shares most of its name with the class, or that is of text."""
    found = [
        c for n, c in vars(module).items() if inspect.isclass(c) and n.endswith("Config") and n != "PreTrainedConfig"
    ]
    return max(
        found, key=lambda c: (shared(c.__name__, cls.__name__), "Text" in c.__name__, -len(c.__name__)), default=None
    )


def shared(a: str, b: str) -> int:
    """How many letters both begin with."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def maker(cls: type[nn.Module], family: str) -> tuple[Callable[[], nn.Module], Any]:
    """What makes the module, and its config."""
    config = small_config(cls, family)
    values = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in ("config", "cfg", "text_config"):
            values[name] = config
        elif name in ARGUMENTS:
            values[name] = ARGUMENTS[name]
        elif parameter.default is parameter.empty:
            raise Skipped(f"its constructor also wants {name}")

    begin = initializer(cls, config)

    def make() -> nn.Module:
        return cls(**values).apply(begin)

    return make, config


def initializer(cls: type[nn.Module], config: Any) -> Callable[[nn.Module], Any]:
    """What the family's models do to each module they are made of: some parameters are not even drawn before."""
    module = sys.modules[cls.__module__]
    bases: list[Any] = [c for n, c in vars(module).items() if n.endswith("PreTrainedModel") and inspect.isclass(c)]
    for base in bases:
        if base.__module__ == cls.__module__:
            with contextlib.suppress(Exception):
                return base(config)._init_weights
    return lambda module: None


def calls(cls: type[nn.Module], module: nn.Module, config: Any) -> Iterator[str]:
    """The ways to call it, from all that its model gives it to x alone."""
    parameters = {
        name: p
        for name, p in inspect.signature(cls.forward).parameters.items()
        if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    masks = [False] if PADS.search(cls.__name__) else [True, False]
    for masked in masks:
        for tables in rotary(cls, module, config) if "position_embeddings" in parameters else [""]:
            words = []
            for place, (name, parameter) in enumerate(parameters.items()):
                required = parameter.default is parameter.empty
                if name in MASKS:
                    value = "mask" if masked else "None"
                elif place == 0:
                    value = "x"
                elif name == "position_embeddings":
                    value = tables
                elif required and name == "alibi":
                    value = ALIBI
                elif required or name in ("position_ids",):
                    value = GIVEN.get(name, "")
                else:
                    continue
                if value == "None" and not required:
                    continue
                words.append(value if place == 0 else f"{name}={value}")
            yield f"module({', '.join(words)})"


ALIBI = (
    "__import__('sys').modules[type(module).__module__].build_alibi_tensor("
    "torch.ones(x.shape[0], mask.shape[-1]), module.num_heads, x.dtype)"
)


def rotary(cls: type[nn.Module], module: nn.Module, config: Any) -> Iterator[str]:
    """The ways to make rotary tables: those of the file's own class, else plain ones; None last."""
    names = [n for n in vars(sys.modules[cls.__module__]) if n.endswith("RotaryEmbedding") and "Vision" not in n]
    names.sort(key=lambda n: -shared(n, cls.__name__))
    for name in names:
        yield OWN_ROTARY.format(name, "")
        yield OWN_ROTARY.format(name, ", layer_type='full_attention'")
    size = getattr(module, "head_dim", None) or 8
    yield f"rotary({size})"
    yield "None"


def audit_of_transformers(candidate: Candidate) -> dict[str, Any]:
    """Audit a class of transformers."""
    cls = getattr(importlib.import_module(candidate.place), candidate.cls)
    if not issubclass(cls, nn.Module):
        raise Skipped("not a module")
    try:
        make, config = maker(cls, candidate.family)
        with seeded(0):
            module = make().eval()
    except Skipped:
        raise
    except Exception as error:
        raise Skipped(f"cannot be built from a small config: {one_line(error)}") from None
    width = getattr(config, "hidden_size", WIDTH)
    width = width if isinstance(width, int) else WIDTH
    if not hasattr(module, "config"):
        module.config = config
    build = with_config(make, config)
    x = torch.randn(2, 13, width)
    caller = first_that_runs(calls(cls, module, config), module, x)
    allow = () if "mask" in caller.expression or PADS.search(candidate.cls) else ("causality", "prefix")
    s = prepare.subject(module, name=candidate.cls, d_model=width, call=caller, build=build)
    results = check_subject(s, allow=allow)
    return {
        "call": caller.expression,
        "four": caller.four,
        "guess": guessed(module, caller, x),
        "longest": s.longest,
        "precision": str(s.dtype).removeprefix("torch."),
        "step": getattr(s.step, "expression", None if s.step is None else "given"),
        "laws": [r.to_dict() for r in results],
    }


def with_config(make: Callable[[], nn.Module], config: Any) -> Callable[[], nn.Module]:
    """What makes the module, and gives it its config where it keeps none: calls may ask for it."""

    def build() -> nn.Module:
        module = make()
        if not hasattr(module, "config"):
            module.config = config
        return module

    return build


def first_that_runs(expressions: Iterator[str], module: nn.Module, x: Tensor) -> Caller:
    """The first call that runs and gives numbers."""
    why = ""
    for expression in expressions:
        for four in (True, False) if "mask" in expression else (False,):
            caller = Caller(expression, four=four)
            try:
                with torch.no_grad(), seeded(0):
                    y = first_tensor(caller(module, x), x)
                    first_tensor(caller(module, x[:1, :7]), x[:1, :7])
            except Exception as error:
                why = why or one_line(error)
                continue
            if bool(y.isfinite().all()):
                return caller
            why = why or "its output is not finite"
    raise Skipped(f"cannot be called on x: {why}")


def guessed(module: nn.Module, caller: Caller, x: Tensor) -> str:
    """What becomes of the call that the audit finds by itself: same, other, refused or stops."""
    try:
        own = find_caller(module, None, "additive", "auto", x)
    except UserError:
        return "refused"
    try:
        with torch.no_grad():
            y, other = first_tensor(caller(module, x), x), first_tensor(own(module, x), x)
    except Exception:
        return "stops"
    return "same" if torch.allclose(y, other, atol=1e-5, equal_nan=True) else "other"


# processes


def audit_one(candidate: Candidate) -> dict[str, Any]:
    """The row of one class."""
    warnings.simplefilter("ignore")
    if candidate.package == "transformers":
        return audit_of_transformers(candidate)
    audit = audit_target(
        f"{candidate.place}:{candidate.cls}",
        kwargs=candidate.kwargs,
        call=candidate.call,
        mask=candidate.mask,
        d_model=None if candidate.kwargs is None else WIDTH,
        allow=("causality", "prefix") if candidate.bidirectional else (),
    )
    step = next((n.removeprefix("decoded as ") for n in audit.notes if n.startswith("decoded as ")), None)
    told = {"call": audit.notes[0] if audit.notes else "", "step": step, "longest": audit.longest}
    return {**told, "laws": [r.to_dict() for r in audit.results]}


def child(candidate: Candidate, pipe: Connection) -> None:
    """Audit in this process, and send the row."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    torch.set_num_threads(1)
    try:
        row = audit_one(candidate)
    except Skipped as reason:
        row = {"skipped": str(reason)}
    except (Exception, SystemExit) as error:
        row = {"skipped": one_line(error)}
    pipe.send(row)


def audit_all(todo: Sequence[Candidate], out: Path, workers: int, seconds: float) -> None:
    """Audit each in a process of its own, and append the rows to `out` as they come."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(todo))
    running: dict[Any, tuple[Candidate, Any, float]] = {}  # by the end of the pipe that is read here
    done = 0
    while waiting or running:
        while waiting and len(running) < workers:
            candidate = waiting.pop()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(candidate, theirs), daemon=True)
            process.start()
            theirs.close()
            running[mine] = (candidate, process, time.monotonic())
        ready: list[Any] = wait(list(running), timeout=1)
        late = [pipe for pipe, (_, _, begun) in running.items() if time.monotonic() - begun > seconds]
        for pipe in {*ready, *late}:
            candidate, process, begun = running.pop(pipe)
            row: dict[str, Any] = {"skipped": f"took longer than {seconds:g} s"}
            if pipe in ready:
                row = received(pipe)
            process.kill()
            process.join()
            done += 1
            keep(out, candidate, row, time.monotonic() - begun)
            say(f"{done}/{len(todo)} {candidate.name}: {short(row)}")


def received(pipe: Any) -> dict[str, Any]:
    """The row that a child sent."""
    try:
        row: dict[str, Any] = pipe.recv()
    except EOFError:
        return {"skipped": "ended its process"}
    return row


def keep(out: Path, candidate: Candidate, row: Mapping[str, Any], seconds: float) -> None:
    """Append a row."""
    told = {"package": candidate.package, "family": candidate.family, "cls": candidate.cls, "same": candidate.same}
    with out.open("a") as file:
        print(json.dumps({**told, **row, "seconds": round(seconds, 1)}), file=file)


def short(row: Mapping[str, Any]) -> str:
    """A row in a few words."""
    if "skipped" in row:
        return f"skipped, {row['skipped']}"
    broken = [law["law"] for law in row["laws"] if law["status"] == "broken"]
    return f"breaks {', '.join(broken)}" if broken else "holds"


# the document


def rows_of(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The rows that there are, the last of each class."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {(row["package"], row["family"], row["cls"]): row for row in lines}


def document_text(rows: Sequence[Mapping[str, Any]], left: Mapping[str, int]) -> str:
    """The tables."""
    findings = json.loads(FINDINGS.read_text("utf-8")) if FINDINGS.exists() else {}
    audited = [row for row in rows if "laws" in row]
    parts = [made_by(), totals(rows, audited)]
    for package in PACKAGES:
        mine = [row for row in audited if row["package"] == package]
        if mine:
            parts += [f"### {package}", class_table(mine, findings)]
    skipped = Counter(left)
    for row in rows:
        if "skipped" in row:
            skipped[f"{row['package']}: {kind_of(row['skipped'])}"] += 1
    if skipped:
        parts += ["### Left out", markdown(["why", "classes"], [[why, str(n)] for why, n in gathered(skipped)])]
    return "\n\n".join(parts)


def gathered(skipped: Mapping[str, int]) -> list[tuple[str, int]]:
    """The reasons, most frequent first; those of a kind together."""
    kinds: Counter[str] = Counter()
    for why, count in skipped.items():
        package, _, reason = why.partition(": ")
        wants = reason.startswith(("forward also wants", "its constructor also wants"))
        kinds[f"{package}: wants more than x, a mask and positions" if wants else why] += count
    return kinds.most_common()


def kind_of(reason: str) -> str:
    """A reason without what is particular to a class."""
    return reason.partition(": ")[0].partition(" also wants")[0].replace("|", "/")


def totals(rows: Sequence[Mapping[str, Any]], audited: Sequence[Mapping[str, Any]]) -> str:
    """A line per package."""
    table = []
    for package in PACKAGES:
        mine = [row for row in audited if row["package"] == package]
        if not mine:
            continue
        broken = sum(any(law["status"] == "broken" for law in row["laws"]) for row in mine)
        decoded = sum(row["step"] is not None for row in mine)
        families = len({f for row in mine for f in (row["family"], *row["same"])})
        counts = [len(mine), families, len(mine) - broken, broken, decoded]
        table.append([f"{package} {version(package)}", *map(str, counts)])
    return markdown(["package", "classes of different text", "families", "obey all", "break some", "decoded"], table)


def version(package: str) -> str:
    """The version that is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def class_table(rows: Sequence[Mapping[str, Any]], findings: Mapping[str, Any]) -> str:
    """A row per class."""
    table = []
    for row in sorted(rows, key=lambda row: (row["family"], row["cls"])):
        laws = [LawResult.from_dict(law) for law in row["laws"]]
        judged = [law for law in laws if law.status != "n/a"]
        held = sum(law.status == "holds" for law in judged)
        broken = [law.law for law in judged if law.status == "broken"]
        allowed = [law.law for law in judged if law.status == "allowed"]
        words = [told(findings, row, law) for law in broken]
        words += [f"not asked to be causal ({', '.join(allowed)})"] * bool(allowed)
        same = f" (and {len(row['same'])} more)" if row["same"] else ""
        cells = [f"{row['family']}/{row['cls']}{same}", f"{held} of {len(judged)}", ", ".join(broken)]
        table.append([*cells, floats(row, laws), "; ".join(dict.fromkeys(filter(None, words)))])
    return markdown(["class", "laws held", "broken", "floats a token", "by hand"], table).replace("---: |", "--- |")


def told(findings: Mapping[str, Any], row: Mapping[str, Any], law: str) -> str:
    """What was found by hand about a broken law."""
    for key in (f"{row['package']}/{row['family']}/{row['cls']}", row["cls"], row["family"], row["package"], "*"):
        words = findings.get(key, {}).get(law) or findings.get(key, {}).get("*")
        if words:
            return str(words)
    return ""


def floats(row: Mapping[str, Any], laws: Sequence[LawResult]) -> str:
    """How many floats a token the cache holds."""
    if row["step"] is None:
        return "not decoded"
    size = next(law for law in laws if law.law == "cache size")
    found = re.search(r"([\d.e+-]+) a token", size.detail)
    return f"{float(found[1]):.4g}" if found and size.status == "holds" else "decoded"


def made_by() -> str:
    """The command, the day and the versions."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    for i, word in enumerate(words[:-1]):
        if word in ("--out", "--document"):
            words[i + 1] = "PATH"
    kinds = ", ".join(f"{package} {version(package)}" for package in PACKAGES if version(package))
    tiles = ", ".join(map(str, TILES))
    return (
        f"`{shlex.join(words)}`, {date.today():%d %B %Y}, {kinds}, Python {sys.version.split()[0]}. "
        f"Lengths: those of the audit up to {prepare.LONGEST} tokens, and {tiles}."
    )


def write(document: Path, text: str) -> None:
    """Between the markers, which are added at the end where they are missing; the rest stays as it is."""
    old = document.read_text("utf-8") if document.exists() else "# The audit, put to others' attention\n"
    if BEGIN not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = old.split(BEGIN, 1)
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default=",".join(PACKAGES), help="separated by commas")
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument(
        "--most", type=int, default=10**6, help="audit at most so many classes; 0: only write the document"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=240, help="for one class")
    parser.add_argument("--out", type=Path, default=Path("audit-survey.jsonl"), help="rows, one a class; goes on there")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="-: print it")
    options = parser.parse_args()
    setattr(prepare, "LONGEST", LONGEST)  # noqa: B010
    setattr(prepare, "TILES", TILES)  # noqa: B010
    found, left = candidates(options.packages.split(","), [w for w in options.only.split(",") if w])
    if not found:
        parser.error(f"--only {options.only!r} names no family of {options.packages}")
    have = rows_of(options.out)
    todo = [c for c in found if (c.package, c.family, c.cls) not in have][: options.most]
    say(f"{len(found)} classes of different text, {len(todo)} to audit")
    audit_all(todo, options.out, options.workers, options.seconds)
    families = {c.family for c in found}
    rows = [row for row in rows_of(options.out).values() if row["family"] in families]
    for package, count in (Counter(c.package for c in found) - Counter(row["package"] for row in rows)).items():
        left[f"{package}: not asked yet"] += count
    text = document_text(rows, left)
    if str(options.document) == "-":
        print(text)
    else:
        write(options.document, text)


if __name__ == "__main__":
    main()
