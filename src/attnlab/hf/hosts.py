"""Models of transformers whose attention is ours: each a class with a config of its own, built from it alone, so that
`from_pretrained` needs nothing but `import attnlab.hf`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from .. import attention
from ..config import from_dict
from ..errors import UserError, choose
from ..model import init_weights
from .decoder import cached, refuse
from .memory import Memory, Place, furnish, locate

TRAIN = ("all", "attention", "new")


@dataclass(frozen=True, kw_only=True)
class Patch:
    """What was put into some layers of a model; plain JSON in its config."""

    mechanism: str
    layers: tuple[int, ...]
    config: Mapping[str, Any]  # every field of the mechanism's Config
    keep_output: bool = False  # the model's own output projection follows the mechanism's
    carried: tuple[str, ...] = ()  # parameters of the mechanism whose values came from the model


class Adapter(nn.Module):
    """A mechanism where one layer of the model has its attention. What belongs to a call comes in with the call."""

    def __init__(self, patch: Patch, layer: int, after: Iterable[nn.Module]) -> None:
        super().__init__()
        self.patch, self.layer = patch, layer
        module = attention.module(patch.mechanism)
        self.mechanism = module.Attention(from_dict(module.Config, patch.config))
        self.after = nn.Sequential(*after)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: DynamicCache | None = None,
        attnlab_place: Place | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
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
    """The part that all patched models share. A class of transformers comes after it among the bases."""

    stack: str  # where the layers are
    slot: str  # the attention in a layer
    output: str  # the last projection of that
    tail: tuple[str, ...] = ()  # and what follows it

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for entry in config.attnlab:
            install(self, from_dict(Patch, entry))
        freeze(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As every model's; what was frozen when it was saved is frozen again."""
        found = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        freeze(found[0] if isinstance(found, tuple) else found)
        return found

    def blocks(self) -> list[nn.Module]:
        return list(self.get_submodule(self.stack))  # type: ignore[attr-defined]

    def adapters(self) -> dict[int, Adapter]:
        """The layers that hold a mechanism."""
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
        """As the model's own, with `UserError` where positions cannot be told. See `AttnlabForCausalLM` for caches."""
        refuse(kwargs, "output_attentions")
        config: PretrainedConfig = self.config  # type: ignore[attr-defined]
        memories: list[Memory] = []
        remember = cached(use_cache, config, past_key_values)
        if remember:
            past_key_values = DynamicCache(config=config) if past_key_values is None else past_key_values
            memories = furnish(past_key_values, [(i, a.mechanism.config) for i, a in self.adapters().items()])
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
    """Put a fresh mechanism into each of the layers, on the device and in the precision of what was there."""
    blocks = model.blocks()
    for i in patch.layers:
        host = getattr(blocks[i], model.slot)
        kept = ((model.output,) if patch.keep_output else ()) + model.tail
        like = getattr(host, model.output).weight
        with torch.device(like.device):
            adapter = Adapter(patch, i, [getattr(host, name) for name in kept])
            init_weights(adapter.mechanism, len(blocks), model.config.initializer_range)
        setattr(blocks[i], model.slot, adapter.to(like.dtype).train(host.training))


def freeze(model: Any) -> None:
    """Which parameters get gradients, as the config says: all, those of the mechanisms, or only what did not carry
    over."""
    choice = choose("train", model.config.attnlab_train, TRAIN)
    for parameter in model.parameters():
        parameter.requires_grad_(choice == "all")
    for adapter in model.adapters().values():
        for name, parameter in adapter.mechanism.named_parameters():
            parameter.requires_grad_(choice != "new" or name not in adapter.patch.carried)


def fused(host: Any) -> dict[str, Tensor]:
    """GPT-2's: one matrix for q, k and v, written from the left."""
    weights = (*host.c_attn.weight.T.chunk(3), host.c_proj.weight.T)
    biases = (*host.c_attn.bias.chunk(3), host.c_proj.bias)
    names = [f"{letter}.{kind}" for kind in ("weight", "bias") for letter in "qkvo"]
    return dict(zip(names, (*weights, *biases), strict=True))


def apart(host: nn.Module) -> dict[str, Tensor]:
    """Llama's: a matrix for each, and Qwen3's norms of heads."""
    return {name.replace("_proj", ""): tensor for name, tensor in host.named_parameters()}


class Fields:
    """What a patched model's config has besides the model's own."""

    attnlab: Sequence[Mapping[str, Any]] = ()  # one Patch after the other
    attnlab_train: str = "all"


class AttnlabGPT2Config(Fields, transformers.GPT2Config):
    model_type = "attnlab-gpt2"


class AttnlabLlamaConfig(Fields, transformers.LlamaConfig):
    model_type = "attnlab-llama"


class AttnlabMistralConfig(Fields, transformers.MistralConfig):
    model_type = "attnlab-mistral"


class AttnlabQwen2Config(Fields, transformers.Qwen2Config):
    model_type = "attnlab-qwen2"


class AttnlabQwen3Config(Fields, transformers.Qwen3Config):
    model_type = "attnlab-qwen3"


class AttnlabGPT2ForCausalLM(Patched, transformers.GPT2LMHeadModel):
    config_class = AttnlabGPT2Config
    stack, slot, output, tail = "transformer.h", "attn", "c_proj", ("resid_dropout",)
    read = staticmethod(fused)


class Llamalike(Patched):
    stack, slot, output = "model.layers", "self_attn", "o_proj"
    read = staticmethod(apart)


class AttnlabLlamaForCausalLM(Llamalike, transformers.LlamaForCausalLM):
    config_class = AttnlabLlamaConfig


class AttnlabMistralForCausalLM(Llamalike, transformers.MistralForCausalLM):
    config_class = AttnlabMistralConfig


class AttnlabQwen2ForCausalLM(Llamalike, transformers.Qwen2ForCausalLM):
    config_class = AttnlabQwen2Config


class AttnlabQwen3ForCausalLM(Llamalike, transformers.Qwen3ForCausalLM):
    config_class = AttnlabQwen3Config


MODELS: tuple[type[Patched], ...] = (
    AttnlabGPT2ForCausalLM,
    AttnlabLlamaForCausalLM,
    AttnlabMistralForCausalLM,
    AttnlabQwen2ForCausalLM,
    AttnlabQwen3ForCausalLM,
)
