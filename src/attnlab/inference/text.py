"""Text in, text out, with any trained model: prompts to tokens, `decode.generate`, tokens to text as they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import pretrained
from ..data import Tokenizer
from ..device import find_device
from ..errors import UserError
from ..feed_forward import Experts
from ..measure.counters import tensor_bytes
from ..model import Decoder
from ..runs.folder import RunFolder
from . import chat
from .generate import check, continuation


@dataclass(frozen=True)
class Samples:
    """Texts in the order of the prompts, prompts left out, and what it took."""

    prompts: list[str]
    texts: list[str]
    tokens: int  # generated, all prompts together
    seconds: float  # prefill and decoding, model loading left out
    tokens_per_s: float
    prompt_tokens: int
    prefill_tokens_per_s: float  # prompt tokens, until every prompt has its first new one
    decode_tokens_per_s: float | None  # the new ones after the first; None where there are none
    read_bytes_per_s: float | None  # weights and cache, each step once
    cache_bytes: int  # live, all prompts and layers, after the last step
    mechanism: str
    dtype: str
    device: str
    step: int | None  # of a run's checkpoint

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def continue_texts(
    loaded: pretrained.Loaded,
    prompts: Sequence[str],
    n: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    *,
    chatting: bool = False,
    system: str | None = None,
    compile: bool = False,
    on_text: Callable[[int, str], None] | None = None,
) -> Samples:
    """Continue `prompts`, each until the end of a text or for `n` tokens.

    `chatting`: each is what a user says, after `system`, in the form of the model's chat template. `on_text` is told
    (number of the prompt, piece of text) as it comes; pieces are whole characters, and joined they are the text. Raises
    `UserError` as `generate` does, for a model without a tokenizer, and without a template where one is asked for.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    if tokenizer is None:
        raise UserError(f"{loaded.source} has no tokenizer that we read; put its tokenizer.json beside config.json")
    if system is not None and not chatting:
        raise UserError("a system message is for a chat; add --chat, or put it into the prompt")
    ids = [in_chat(loaded, prompt, system) if chatting else tokenizer.encode(prompt) for prompt in prompts]
    check(model, ids, n, temperature, top_k, top_p, seed)
    if not ids or not n:
        raise UserError(f"there are {len(ids)} prompts and {n} tokens to sample; give at least one of each")
    streams = [Stream(tokenizer) for _ in ids]

    def tell(number: int, token: int) -> None:
        if on_text is not None and (piece := streams[number].add(token)):
            on_text(number, piece)

    listen = tell if on_text is not None else None
    found = continuation(
        model, ids, n, temperature, top_k, top_p, seed, listen, stop=ends(loaded, tokenizer), compile=compile
    )
    for number, stream in enumerate(streams):
        if on_text is not None and (piece := stream.rest()):
            on_text(number, piece)
    cache_bytes = sum(layer.nbytes() for layer in found.cache)
    tokens, asked = sum(map(len, found.rows)), sum(map(len, ids))
    seconds = found.prefill_seconds + found.step_seconds
    later = tokens - len(ids)
    return Samples(
        prompts=list(prompts),
        texts=[tokenizer.decode(row) for row in found.rows],
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        prompt_tokens=asked,
        prefill_tokens_per_s=asked / found.prefill_seconds,
        decode_tokens_per_s=later / found.step_seconds if later else None,
        read_bytes_per_s=(weight_bytes(model) + cache_bytes) * found.steps / found.step_seconds if later else None,
        cache_bytes=cache_bytes,
        mechanism="+".join(dict.fromkeys(model.config.layers)),
        dtype=str(model.embed.weight.dtype).removeprefix("torch."),
        device=model.embed.weight.device.type,
        step=loaded.about.get("step"),
    )


def sample_run(
    path: str | Path,
    prompts: Sequence[str],
    n: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    *,
    checkpoint: int | None = None,
    device: str = "auto",
    on_text: Callable[[int, str], None] | None = None,
) -> Samples:
    """`continue_texts` with the model in the run folder `path`; `checkpoint` is a step, None the newest.

    Raises `UserError` as that does, for a character that the run's tokenizer lacks, and for a folder that holds no
    whole run.
    """
    RunFolder.open(path)  # refuses what is no run folder before anyone looks for it on a hub
    loaded = pretrained.load(path, checkpoint=checkpoint, device=find_device(device))
    return continue_texts(loaded, prompts, n, temperature, top_k, top_p, seed, on_text=on_text)


class Stream:
    """Tokens that come one by one as text: what may still change, the beginning of a character, is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.told = 0  # characters

    def add(self, token: int) -> str:
        """What can be said now that `token` has come."""
        self.ids.append(token)
        return self._say(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def rest(self) -> str:
        """What was held back, when nothing more will come."""
        return self._say(self.tokenizer.decode(self.ids))

    def _say(self, text: str) -> str:
        piece, self.told = text[self.told :], max(self.told, len(text))
        return piece


def in_chat(loaded: pretrained.Loaded, prompt: str, system: str | None) -> list[int]:
    """Token ids of a conversation in which the user has said `prompt`."""
    template, tokenizer = loaded.about.get("chat_template"), loaded.tokenizer
    assert tokenizer is not None
    if template is None:
        raise UserError(f"{loaded.source} has no chat template, so it was not made for chats; leave --chat out")
    if not prompt:
        raise UserError("the user says nothing in this chat; give a --prompt")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    names: dict[int | None, str] = {i: name for name, i in chat.special_tokens(tokenizer).items()}
    config = loaded.about.get("config", {})
    special = {key.removesuffix("_id"): names.get(several(config.get(key))[0], "") for key in pretrained.TOKENS}
    return chat.encode(tokenizer, chat.render(template, messages, special))


def ends(loaded: pretrained.Loaded, tokenizer: Tokenizer) -> Collection[int]:
    """The tokens that end a text: as the model's config says, which may name several, and as its tokenizer says."""
    said = loaded.about.get("config", {}).get("eos_token_id")
    return {i for i in (*several(said), tokenizer.end) if i is not None}


def several(said: int | list[int] | None) -> list[int | None]:
    """A config names one token, or a list of them."""
    return [*said] if isinstance(said, list) else [said]


def weight_bytes(model: Decoder) -> int:
    """Of the weights that a step reads: no table of which it takes a row, nor experts that do not answer."""
    tables = [model.place, None if model.config.tied else model.embed]
    skipped = sum(tensor_bytes([table.weight]) for table in tables if table is not None)
    for experts in (block.ff for block in model.blocks() if isinstance(block.ff, Experts)):
        skipped += int(tensor_bytes([experts.into, experts.out]) * (1 - experts.k / len(experts.into)))
    return tensor_bytes(model.parameters()) - skipped
