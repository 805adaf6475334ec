"""Decoder as a model of transformers, which `AutoModelForCausalLM` loads from an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..config import ModelConfig
from ..errors import UserError
from ..model import Decoder
from ..pretrained.families import attnlab as form
from .memory import add_memories, locate


class AttnlabConfig(PretrainedConfig):
    """ModelConfig under the names that transformers expects; the field `attnlab` holds the rest of it, as JSON."""

    model_type = "attnlab"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, attnlab: Mapping[str, Any] | None = None, use_cache: bool = True, **fields: Any) -> None:
        written = form.from_model_config(form.to_model_config({"attnlab": attnlab or {}, **fields}))
        super().__init__(**{**fields, **written})
        self.use_cache = use_cache

    @property
    def model_config(self) -> ModelConfig:
        """The ModelConfig, as the fields are now: resize_token_embeddings changes `vocab_size`."""
        return form.to_model_config(vars(self))

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to config.json: no field of the model is left out for being the default."""
        own = ("attnlab", *form.NAMES.values())
        return {**super().to_diff_dict(), **{name: getattr(self, name) for name in own}}


class AttnlabForCausalLM(PreTrainedModel, GenerationMixin):
    """Decoder with any mechanism in any layer.

    Its caches are the mechanisms' own. Without gradients they are used as `config.use_cache` says. They are written in
    place and give no gradients, so with gradients they are used only where `use_cache=True` is given.
    """

    config_class = AttnlabConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}

    def __init__(self, config: AttnlabConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config.model_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the Decoder has set its initial weights itself."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        assert isinstance(value, nn.Embedding)
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits B L V, the cache, and with labels the loss in nats per token.

        input_ids: B L. attention_mask: B S over all tokens so far. labels: B L, -100 where there is none; they are
        shifted here. Raises `UserError` for what the Decoder cannot do: inputs_embeds, output_attentions, a mask of
        more dimensions, several documents in one row.
        """
        if input_ids is None:
            raise UserError("there are no input_ids: attnlab's Decoder reads token ids, not embeddings")
        refuse(kwargs, "inputs_embeds", "output_attentions", "output_hidden_states")
        if cached(use_cache, self.config, past_key_values):
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            blocks = self.model.blocks()
            memories = add_memories(past_key_values, [(i, b.attention.config) for i, b in enumerate(blocks)])
        else:
            past_key_values = None
            memories = []
        place = locate(input_ids, memories, attention_mask, position_ids)
        if not place.mask.plain:
            self.model._check_length(int(place.positions.max()) + 1)
        like = self.model.embed.weight[:1, :1].expand(*input_ids.shape)  # has the dtype and device of the cache
        x, kept = self.model.hidden(
            input_ids,
            None if place.mask.plain else place.positions,
            [memory.ready(like, place) for memory in memories] or None,
        )
        for memory, cache in zip(memories, kept or [], strict=True):
            memory.cache = cache
        at = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(x[:, at])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def cached(use_cache: bool | None, config: PretrainedConfig, past_key_values: object) -> bool:
    """Return whether this call reads and writes a cache."""
    if past_key_values is not None or use_cache is not None:
        return past_key_values is not None or bool(use_cache)
    return config.use_cache and not torch.is_grad_enabled()


def refuse(kwargs: Mapping[str, Any], *names: str) -> None:
    """Raise `UserError` where one of these arguments is given, which models of transformers have and ours do not."""
    for name in names:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UserError(
                f"{name} was given, which attnlab's models cannot do: see attnlab.record_attention for maps"
            )
