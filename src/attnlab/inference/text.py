"""Continuations of texts by any trained model: prompts to tokens, `generate`, tokens to text as they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import pretrained
from ..data import Tokenizer
from ..data.declared import tokens_in
from ..device import find_device
from ..errors import UserError
from ..feed_forward import Experts
from ..measure.counters import tensor_bytes
from ..model import Decoder
from ..ranges import Size, checked
from ..runs.folder import RunFolder
from . import chat
from .generate import Continuation, Sampling, check_request, continuation


@dataclass(frozen=True)
class Samples:
    """Continuations in the order of the prompts, without the prompts, and what it took to make them."""

    prompts: list[str]
    texts: list[str]
    tokens: int  # generated, all prompts together
    seconds: float  # prefill and decoding, model loading left out
    tokens_per_s: float
    prompt_tokens: int
    prefill_tokens_per_s: float  # prompt tokens, until every prompt has its first new one
    decode_tokens_per_s: float | None  # the new ones after the first; None where there are none
    read_bytes_per_s: float | None  # weights and cache, read once in each step; None where there are no steps
    cache_bytes: int  # live, all prompts and layers, after the last step
    mechanism: str
    dtype: str
    device: str
    step: int | None  # of a run's checkpoint; None: not from a run

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as one JSON object."""
        return asdict(self)


@checked
def continue_texts(
    loaded: pretrained.Loaded,
    prompts: Sequence[str],
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    chatting: bool = False,
    system: str | None = None,
    compile: bool = False,
    on_text: Callable[[int, str], None] | None = None,
) -> Samples:
    """Return continuations of `prompts`, each until the end of a text or for `sampling.n` tokens.

    A prompt begins with the tokens that the tokenizer puts before every text. `chatting`: each prompt is what a user
    says, after `system`, in the form of the model's chat template. `on_text` is told (number of the prompt, piece of
    text) as it comes. Pieces are whole characters, and joined they are the text. Raises `UserError` as `generate` does,
    for a model without a tokenizer, and without a template where one is asked for.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    if tokenizer is None:
        raise UserError(f"{loaded.source} has no tokenizer that we read; put its tokenizer.json beside config.json")
    if system is not None and not chatting:
        raise UserError("a system message is for a chat; add --chat, or put it into the prompt")
    ids = [
        in_chat(loaded, prompt, system) if chatting else [*tokenizer.starts, *tokenizer.encode(prompt)]
        for prompt in prompts
    ]
    check_request(model, ids, sampling)
    if not ids or not sampling.n:
        raise UserError(f"there are {len(ids)} prompts and {sampling.n} tokens to sample; give at least one of each")
    stop = ends(loaded, tokenizer)
    if on_text is None:
        found = continuation(model, ids, sampling, stop=stop, compile=compile)
    else:
        streams = Streams(tokenizer, len(ids), on_text)
        found = continuation(model, ids, sampling, streams.add, stop=stop, compile=compile)
        streams.rest()
    texts = [tokenizer.decode(row) for row in found.rows]
    return samples(loaded, list(prompts), texts, found, sum(map(len, ids)))


def samples(
    loaded: pretrained.Loaded, prompts: list[str], texts: list[str], found: Continuation, prompt_tokens: int
) -> Samples:
    """Return the texts with what it took to make them."""
    model = loaded.model
    cache_bytes = sum(layer.nbytes() for layer in found.cache)
    read_bytes = (weight_bytes(model) + cache_bytes) * found.steps
    tokens = sum(map(len, found.rows))
    later = tokens - len(prompts)  # after the first of each prompt
    seconds = found.prefill_seconds + found.step_seconds
    return Samples(
        prompts=prompts,
        texts=texts,
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        prompt_tokens=prompt_tokens,
        prefill_tokens_per_s=prompt_tokens / found.prefill_seconds,
        decode_tokens_per_s=later / found.step_seconds if later else None,
        read_bytes_per_s=read_bytes / found.step_seconds if later else None,
        cache_bytes=cache_bytes,
        mechanism="+".join(dict.fromkeys(model.config.layers)),
        dtype=str(model.embed.weight.dtype).removeprefix("torch."),
        device=model.embed.weight.device.type,
        step=loaded.about.get("step"),
    )


@checked
def sample_run(
    path: str | Path,
    prompts: Sequence[str],
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    checkpoint: Size | None = None,
    device: str = "auto",
    on_text: Callable[[int, str], None] | None = None,
) -> Samples:
    """Return `continue_texts` of the model in the run folder `path`; `checkpoint` is a step, None the newest.

    Raises `UserError` as that does, for a character that the run's tokenizer lacks, and for a folder that holds no
    whole run.
    """
    RunFolder.open(path)  # refuses what is no run folder before it is looked for on a hub
    loaded = pretrained.load(path, checkpoint=checkpoint, device=find_device(device))
    return continue_texts(loaded, prompts, sampling, on_text=on_text)


class Stream:
    """Tokens that come one by one, as text. The first bytes of a character are held back, as it may still change."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.told = 0  # characters that were returned

    def add(self, token: int) -> str:
        """Return the text that is certain once `token` has come."""
        self.ids.append(token)
        return self._new(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def rest(self) -> str:
        """Return the text that was held back, when no more tokens will come."""
        return self._new(self.tokenizer.decode(self.ids))

    def _new(self, text: str) -> str:
        piece = text[self.told :]
        self.told = max(self.told, len(text))
        return piece


class Streams:
    """The streams of several prompts: `tell` gets (number of the prompt, piece of text)."""

    def __init__(self, tokenizer: Tokenizer, count: int, tell: Callable[[int, str], None]) -> None:
        self.streams = [Stream(tokenizer) for _ in range(count)]
        self.tell = tell

    def add(self, number: int, token: int) -> None:
        """Tell the text that is certain once `token` of prompt `number` has come."""
        self._pass_on(number, self.streams[number].add(token))

    def rest(self) -> None:
        """Tell the text that was held back, when no more tokens will come."""
        for number, stream in enumerate(self.streams):
            self._pass_on(number, stream.rest())

    def _pass_on(self, number: int, piece: str) -> None:
        if piece:
            self.tell(number, piece)


def in_chat(loaded: pretrained.Loaded, prompt: str, system: str | None) -> list[int]:
    """Return the token ids of a conversation in which the user has said `prompt`."""
    template, tokenizer = loaded.about.get("chat_template"), loaded.tokenizer
    assert tokenizer is not None
    if template is None:
        raise UserError(f"{loaded.source} has no chat template, so it was not made for chats; leave --chat out")
    if not prompt:
        raise UserError("the user says nothing in this chat; give a --prompt")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    names: dict[Any, str] = {i: name for name, i in chat.special_tokens(tokenizer).items()}
    special = {}
    for key in pretrained.TOKENS:
        name = key.removesuffix("_id")
        said = (
            *tokens_in(loaded.about.get("tokenizer_config", {}).get(name)),
            *tokens_in(loaded.about.get("config", {}).get(key)),
        )
        special[name] = next(
            (names.get(each, str(each)) for each in said if isinstance(each, str) or each in names), ""
        )
    return chat.encode(tokenizer, chat.render_chat(template, messages, special))


def ends(loaded: pretrained.Loaded, tokenizer: Tokenizer) -> Collection[int]:
    """Return the tokens that end a text: those that the model's configs name, and the tokenizer's."""
    configs = (loaded.about.get(name, {}) for name in ("config", "generation_config"))
    said = [i for config in configs for i in tokens_in(config.get("eos_token_id"))]
    return {i for i in (*said, *tokenizer.ends) if isinstance(i, int)}


def weight_bytes(model: Decoder) -> int:
    """Return the bytes of weights that a step reads: no table of which it takes one row, nor experts that it skips."""
    tables = [model.place, None if model.config.tied else model.embed]
    skipped = sum(tensor_bytes([table.weight]) for table in tables if table is not None)
    for experts in (block.ff for block in model.blocks() if isinstance(block.ff, Experts)):
        skipped += int(tensor_bytes([experts.into, experts.out]) * (1 - experts.k / len(experts.into)))
    return tensor_bytes(model.parameters()) - skipped
