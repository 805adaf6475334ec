"""The schemas of the JSON files in a folder of Hugging Face's: what every family relies on."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from ..ranges import Count, Layers, Positive, Probability, Range

ORIGINAL = "take the file that came with the model"
Token = Annotated[int, Range(-1, 2**31 - 1)]  # an id; some configs write -1 for none


class ModelFile(TypedDict, total=False):
    """Fields of config.json that several families have. Each family asks for those that it needs."""

    vocab_size: Count
    hidden_size: Count
    n_embd: Count
    num_hidden_layers: Layers
    n_layer: Layers
    num_attention_heads: Count
    n_head: Count
    num_key_value_heads: Count | None
    head_dim: Count | None
    intermediate_size: Count | None
    n_inner: Count | None
    max_position_embeddings: Count
    n_positions: Count
    original_max_position_embeddings: Count | None
    rms_norm_eps: Positive
    layer_norm_epsilon: Positive
    attention_dropout: Probability | None
    rope_theta: Positive | None
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None
    quantization_config: dict[str, Any] | None
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: Token | list[Token] | None
    eos_token_id: Token | list[Token] | None
    pad_token_id: Token | None
    dtype: str | None
    torch_dtype: str | None
    architectures: list[str] | None


class Template(TypedDict):
    """One chat template of several."""

    name: str
    template: str


class TokenizerSettings(TypedDict, total=False):
    """Fields of tokenizer_config.json."""

    chat_template: str | list[Template] | None
