"""Models of transformers whose attention is ours.

Each is a class with a config class of its own and is built from that config alone, so `from_pretrained` needs nothing
but `import attnlab.hf`. To add a family, write these two classes, and `SLOT` in its file in `pretrained/families/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from .. import attention
from ..config import from_dict
from ..errors import UserError, choose
from ..layers import default_weights
from ..model import init_weights
from ..pretrained.families import gpt2, llama
from .decoder import cached, refuse
from .memory import LayerPlace, Memory, add_memories, locate

TRAIN = ("all", "attention", "new")
MODELS: list[type[Patched]] = []  # the classes below, in their order


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Mechanism in some layers of a model; plain JSON in the model's config."""

    mechanism: str
    layers: tuple[int, ...]  # from 0
    config: Mapping[str, Any]  # every field of the mechanism's Config
    keep_output: bool = False  # the model's own output projection follows the mechanism's
    carried: tuple[str, ...] = ()  # parameters of the mechanism whose values came from the model


class Adapter(nn.Module):
    """Mechanism in the place of the attention of one of `depth` layers."""

    def __init__(self, patch: Patch, layer: int, depth: int, after: Iterable[nn.Module]) -> None:
        super().__init__()
        self.patch = patch
        self.layer = layer
        module = attention.module(patch.mechanism)
        config = from_dict(module.Config, patch.config)
        self.mechanism = module.Attention(config.placed([config] * layer, depth))
        self.after = nn.Sequential(*after)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: DynamicCache | None = None,
        attnlab_place: LayerPlace | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Return the output B L D for hidden_states B L D. Raises `UserError` where the model was not called whole."""
        place = attnlab_place
        if place is None:
            raise UserError("call the whole model: the part inside it cannot know where its tokens stand")
        if past_key_values is None:
            y, _ = self.mechanism(hidden_states, place.positions, None, place.mask)
        else:
            memory = past_key_values.layers[self.layer]
            assert isinstance(memory, Memory)
            before = memory.ready(hidden_states, place)
            y, memory.cache = self.mechanism(hidden_states, place.positions, before, place.mask)
        return self.after(y), None


class Patched:
    """Base class of all patched models. A class of transformers comes after it among the bases."""

    family: ModuleType  # of pretrained/families, whose SLOT is the attention in a layer
    output: str  # the last projection in the attention
    tail: tuple[str, ...] = ()  # the modules in the attention that follow it
    stack: str  # the list of layers
    slot: str  # the attention in a layer
    turns = True  # whether queries and keys turn by position
    dropout = "attention_dropout"  # the config's field for attention weights

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.stack, cls.slot = cls.family.SLOT.split(".{}.")
        if "config_class" in cls.__dict__:
            MODELS.append(cls)

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for entry in config.attnlab:
            install(self, from_dict(Patch, entry))
        freeze_host(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the model as transformers does, with the parameters frozen that were frozen when it was saved."""
        found = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        freeze_host(found[0] if isinstance(found, tuple) else found)
        return found

    @staticmethod
    def windows(config: PretrainedConfig) -> list[int | None]:
        """Return the tokens that each layer sees within the context, None: all."""
        return [None] * config.num_hidden_layers

    def blocks(self) -> list[nn.Module]:
        """Return the layers."""
        return list(self.get_submodule(self.stack))  # type: ignore[attr-defined]

    def adapters(self) -> dict[int, Adapter]:
        """Return the mechanisms by layer."""
        inside = {i: getattr(block, self.slot) for i, block in enumerate(self.blocks())}
        return {i: each for i, each in inside.items() if isinstance(each, Adapter)}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Return what the model's own forward does. See `AttnlabForCausalLM` for caches.

        Raises `UserError` where positions cannot be told, and for output_attentions.
        """
        refuse(kwargs, "output_attentions")
        config: PretrainedConfig = self.config  # type: ignore[attr-defined]
        memories: list[Memory] = []
        remember = cached(use_cache, config, past_key_values)
        if remember:
            past_key_values = DynamicCache(config=config) if past_key_values is None else past_key_values
            memories = add_memories(past_key_values, [(i, a.mechanism.config) for i, a in self.adapters().items()])
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise UserError("there are neither input_ids nor inputs_embeds: give one of them")
        place = locate(tokens, memories, attention_mask, position_ids)
        return super().forward(  # type: ignore[misc]
            input_ids,
            attention_mask=attention_mask,
            position_ids=place.positions.clamp(min=0),
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=remember,
            logits_to_keep=logits_to_keep,
            attnlab_place=place,
            **kwargs,
        )


def install(model: Any, patch: Patch) -> None:
    """Put a mechanism with initial weights into each of the layers, on the device and in the dtype of the original."""
    blocks = model.blocks()
    for i in patch.layers:
        host = getattr(blocks[i], model.slot)
        kept = ((model.output,) if patch.keep_output else ()) + model.tail
        like = getattr(host, model.output).weight
        with torch.device(like.device):
            with default_weights() as untouched:
                adapter = Adapter(patch, i, len(blocks), [getattr(host, name) for name in kept])
            init_weights(adapter.mechanism, len(blocks), untouched, model.config.initializer_range)
        setattr(blocks[i], model.slot, adapter.to(like.dtype).train(host.training))


def freeze_host(model: Any) -> None:
    """Let parameters train as the config says: all, those of the mechanisms, or of these what did not carry over."""
    choice = choose("train", model.config.attnlab_train, TRAIN)
    for parameter in model.parameters():
        parameter.requires_grad_(choice == "all")
    for adapter in model.adapters().values():
        for name, parameter in adapter.mechanism.named_parameters():
            parameter.requires_grad_(choice != "new" or name not in adapter.patch.carried)


def gpt2_projections(host: Any) -> dict[str, Tensor]:
    """Return q, k, v and o of GPT-2's attention, which stores the first three in one transposed matrix.

    Queries are so large that scores divided by sqrt(H) are the host's, whatever it divides by.
    """
    weights = [*host.c_attn.weight.T.chunk(3), host.c_proj.weight.T]
    biases = [*host.c_attn.bias.chunk(3), host.c_proj.bias]
    for parts in (weights, biases):
        parts[0] = parts[0] * (host.scaling * host.head_dim**0.5)
    names = [f"{projection}.{kind}" for kind in ("weight", "bias") for projection in "qkvo"]
    return dict(zip(names, (*weights, *biases), strict=True))


def llama_projections(host: nn.Module) -> dict[str, Tensor]:
    """Return q, k, v and o of Llama's attention, with Qwen3's norms of heads."""
    return {name.replace("_proj", ""): tensor for name, tensor in host.named_parameters()}


def window_within(config: PretrainedConfig) -> int | None:
    """Return the window that a config names; None where there is none, or the context is no longer."""
    size: int | None = config.sliding_window
    return None if size is None or size >= config.max_position_embeddings else size


def windows_everywhere(config: PretrainedConfig) -> list[int | None]:
    """Return Mistral's windows: one for all layers."""
    return [window_within(config)] * config.num_hidden_layers


def windows_by_layer(config: PretrainedConfig) -> list[int | None]:
    """Return Qwen's windows: those of the layers whose type says so."""
    return [window_within(config) if kind == "sliding_attention" else None for kind in config.layer_types]


class PatchFields:
    """Fields of a patched model's config besides the model's own."""

    attnlab: Sequence[Mapping[str, Any]] = ()  # each `Patch`, in order
    attnlab_train: str = "all"  # what trains: one of TRAIN


class AttnlabGPT2Config(PatchFields, transformers.GPT2Config):
    """Config of a patched GPT-2."""

    model_type = "attnlab-gpt2"


class AttnlabGPT2ForCausalLM(Patched, transformers.GPT2LMHeadModel):
    """GPT-2 with mechanisms of ours in some layers."""

    config_class = AttnlabGPT2Config
    family = gpt2
    output = "c_proj"
    tail = ("resid_dropout",)
    turns = False
    dropout = "attn_pdrop"
    read = staticmethod(gpt2_projections)


class PatchedLlama(Patched):
    """Base class of the models whose layers are like Llama's."""

    family = llama
    output = "o_proj"
    read = staticmethod(llama_projections)


class AttnlabLlamaConfig(PatchFields, transformers.LlamaConfig):
    """Config of a patched Llama."""

    model_type = "attnlab-llama"


class AttnlabLlamaForCausalLM(PatchedLlama, transformers.LlamaForCausalLM):
    """Llama with mechanisms of ours in some layers."""

    config_class = AttnlabLlamaConfig


class AttnlabMistralConfig(PatchFields, transformers.MistralConfig):
    """Config of a patched Mistral."""

    model_type = "attnlab-mistral"


class AttnlabMistralForCausalLM(PatchedLlama, transformers.MistralForCausalLM):
    """Mistral with mechanisms of ours in some layers."""

    config_class = AttnlabMistralConfig
    windows = staticmethod(windows_everywhere)


class AttnlabQwen2Config(PatchFields, transformers.Qwen2Config):
    """Config of a patched Qwen2."""

    model_type = "attnlab-qwen2"


class AttnlabQwen2ForCausalLM(PatchedLlama, transformers.Qwen2ForCausalLM):
    """Qwen2 with mechanisms of ours in some layers."""

    config_class = AttnlabQwen2Config
    windows = staticmethod(windows_by_layer)


class AttnlabQwen3Config(PatchFields, transformers.Qwen3Config):
    """Config of a patched Qwen3."""

    model_type = "attnlab-qwen3"


class AttnlabQwen3ForCausalLM(PatchedLlama, transformers.Qwen3ForCausalLM):
    """Qwen3 with mechanisms of ours in some layers."""

    config_class = AttnlabQwen3Config
    windows = staticmethod(windows_by_layer)
