"""The subjects of a benchmark: a training step, a prefill, decoding. Each prepares, runs and checks itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from .. import data
from ..cache import Cache
from ..config import RunConfig
from ..device import find_device, find_precision, wait_for
from ..inference.generate import prefill, step
from ..measure.counters import tensor_bytes
from ..model import Decoder
from ..training.step import Trainer, train_step

Kind = Literal["train", "prefill", "decode"]
CHUNK = 512  # tokens by which a long cache is filled
CHECKED = 67  # tokens whose logits are compared before anything is timed
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


@dataclass(frozen=True, eq=False)
class Case:
    """A mechanism in a mode, at a context, to be measured."""

    kind: Kind
    label: str
    mode: str
    config: RunConfig
    batch: int | None  # sequences; None: the preset's for training, else 1
    steps: int  # decode: calls in a repeat
    queries: int  # decode: new tokens in a call

    def __str__(self) -> str:
        return " ".join(filter(None, (self.label, self.mode, f"at {self.config.model.context}")))

    def subject(self, corpus: data.Corpus | None) -> Workload:
        """Return the case ready to be measured; `corpus` is for training alone."""
        if self.kind == "train":
            assert corpus is not None
            return Training(self, corpus)
        return (Prefilling if self.kind == "prefill" else Decoding)(self)


class Workload(Protocol):
    """A case, ready to be measured. One repeat makes `calls` calls, which process `tokens` tokens."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    calls: int
    tokens: int
    model: Decoder

    def check(self) -> str:
        """Return what is wrong with its outputs; "" where nothing is."""

    def timed(self) -> float:
        """Return the seconds of one repeat, without its preparation."""

    def prepare(self) -> Callable[[], object]:
        """Prepare one call and return it, uncompiled, to have its FLOPs and memory counted."""

    def resident(self) -> int:
        """Return the bytes of the tensors that stay between calls."""

    def cache_bytes(self) -> int | None:
        """Return the live bytes of the cache, all sequences, after the last repeat; None where there is none."""


class Training:
    """A training step."""

    def __init__(self, case: Case, corpus: data.Corpus) -> None:
        config = case.config
        vocabulary = max(config.model.vocab_size, corpus.vocab_size)
        self.trainer = Trainer.of(
            replace(
                config,
                model=replace(config.model, vocab_size=vocabulary),
                train=replace(config.train, batch_size=case.batch or config.train.batch_size),
            ),
            corpus,
        )
        train = self.trainer.config.train
        self.model, self.device = self.trainer.model, self.trainer.device
        self.dtype = torch.bfloat16 if self.trainer.precision == "bf16" else torch.float32
        self.batch, self.calls = train.batch_size * train.accumulate, 1
        self.tokens = self.batch * config.model.context
        self.counts: list[int] = []  # of each step, where rows of whole documents are not full
        self.step = 0

    def check(self) -> str:
        """Compare the loss with that in float64 by the reference kernel, and check that all gradients are finite."""
        few = self.trainer.batch(0)[0].rows(0, 2).to(self.device)
        self.model.eval()
        with torch.no_grad():
            exact = reference_twin(self.model).loss(*few).item()
        with self.trainer.autocast():
            loss = self.model.loss(*few)
        loss.backward()
        broken = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        self.model.train()
        self.model.zero_grad()
        allowed = TOLERANCE[self.dtype] * abs(exact)
        if not abs(loss.item() - exact) <= allowed:  # NaN is not either
            return f"the loss is {loss.item():.6g} and should be {exact:.6g}, give or take {allowed:.1g}"
        return f"the gradient of {broken[0]} is not finite" if broken else ""

    def timed(self) -> float:
        """Return the seconds of one step."""
        wait_for(self.device)
        began = time.perf_counter()
        done = train_step(self.trainer, self.step)
        wait_for(self.device)
        took = time.perf_counter() - began
        self.step += 1
        self.counts.append(done.tokens)
        self.tokens = round(sum(self.counts) / len(self.counts))
        return took

    def prepare(self) -> Callable[[], object]:
        """Return a step, uncompiled."""

        def uncompiled() -> None:
            with torch.compiler.set_stance("force_eager"):
                train_step(self.trainer, self.step)

        return uncompiled

    def resident(self) -> int:
        """Return the bytes of weights, buffers and optimizer states."""
        states = [s for o in self.trainer.strategy.optimizers.values() for s in o.state.values()]
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return tensor_bytes([*self.model.parameters(), *self.model.buffers(), *moments])

    def cache_bytes(self) -> int | None:
        """Return None: training has no cache."""
        return None


class Inference:
    """A model with random weights, and random tokens: neither changes what a call costs."""

    def __init__(self, case: Case) -> None:
        config = case.config
        self.device = find_device(config.train.device)
        self.dtype = _inference_dtype(config.train.precision, self.device)
        with torch.random.fork_rng([]):
            torch.manual_seed(config.seed)
            self.model = Decoder(config.model).to(self.device, self.dtype).eval()
        self.batch, self.context = case.batch or 1, config.model.context
        draw = torch.Generator().manual_seed(config.seed)
        self.text = torch.randint(config.model.vocab_size, (self.batch, self.context), generator=draw).to(self.device)
        self.after: list[Cache] = []  # the last repeat

    @torch.inference_mode()
    def check(self) -> str:
        """Compare logits, at once and through a cache, with those in float64 by the reference kernel."""
        text = self.text[:, :CHECKED]
        length = text.shape[1]
        exact = reference_twin(self.model)(text)[0]
        cache = self.model.empty_cache(*text.shape)
        parts = []
        for part in text.split([length - length // 2, length // 2 - length // 4, *[1] * (length // 4)], 1):
            logits, kept = self.model(part, cache=cache)
            parts.append(logits)
            cache = kept or []
        found = {"at once": self.model(text)[0], "in chunks and steps through the cache": torch.cat(parts, 1)}
        allowed = TOLERANCE[self.dtype] * exact.abs().max().item()
        for how, logits in found.items():
            error = (logits - exact).abs().max().item()
            if not error <= allowed:  # NaN is not either
                return f"the logits of {length} tokens {how} are off by {error:.3g}, and {allowed:.1g} is allowed"
        return ""

    def resident(self) -> int:
        """Return the bytes of weights, buffers and cache."""
        weights = tensor_bytes([*self.model.parameters(), *self.model.buffers()])
        return weights + sum(cache.allocated_bytes() for cache in self.after)

    def cache_bytes(self) -> int | None:
        """Return the live bytes of the cache after the last repeat."""
        return sum(cache.nbytes() for cache in self.after)


class Prefilling(Inference):
    """Reading prompts into an empty cache."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.calls, self.tokens = 1, self.batch * self.context

    @torch.inference_mode()
    def timed(self) -> float:
        """Return the seconds of reading the prompts once."""
        call = self.prepare()
        wait_for(self.device)
        began = time.perf_counter()
        self.after = call()
        wait_for(self.device)
        return time.perf_counter() - began

    def prepare(self) -> Callable[[], list[Cache]]:
        """Return the reading of the prompts."""
        with torch.inference_mode():
            cache = self.model.empty_cache(self.batch, self.context)
        return torch.inference_mode()(lambda: prefill(self.model, self.text, cache)[1])


class Decoding(Inference):
    """Decoding. Each repeat reads the last `queries` x `calls` tokens of the context; the others are held before."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.calls, self.queries = case.steps, case.queries
        self.tokens = self.batch * self.calls * self.queries
        self.new = self.text[:, self.context - self.calls * self.queries :].split(self.queries, 1)
        self.held: list[Cache] = []

    def fill(self) -> list[Cache]:
        """Return a fork of the cache that reading the first tokens leaves, so that each repeat begins from the same."""
        if not self.held:
            self.held = self.model.empty_cache(self.batch, self.context)
            for part in self.text[:, : self.context - self.calls * self.queries].split(CHUNK, 1):
                self.held = prefill(self.model, part, self.held)[1]
        return [cache.fork() for cache in self.held]

    def read(self, tokens: Tensor, cache: list[Cache]) -> list[Cache]:
        """Return the cache after one call on tokens [B queries]."""
        if self.queries == 1:
            return step(self.model, tokens[:, 0], cache)[1]
        return prefill(self.model, tokens, cache)[1]

    @torch.inference_mode()
    def timed(self) -> float:
        """Return the seconds of all calls of a repeat."""
        cache = self.fill()
        wait_for(self.device)
        began = time.perf_counter()
        for tokens in self.new:
            cache = self.read(tokens, cache)
        wait_for(self.device)
        seconds = time.perf_counter() - began
        self.after = cache
        return seconds

    def prepare(self) -> Callable[[], object]:
        """Return the last call of a repeat: all tokens are held but those that it reads."""
        with torch.inference_mode():
            cache = self.fill()
            for tokens in self.new[:-1]:
                cache = self.read(tokens, cache)
        return torch.inference_mode()(lambda: self.read(self.new[-1], cache))


def reference_twin(model: Decoder) -> Decoder:
    """Return a model with the same weights in float64, through the reference kernel."""
    config = model.config
    options = {name: {**fields, "impl": "reference"} for name, fields in config.options.items()}
    twin = Decoder(replace(config, impl="reference", options=options))
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).device, torch.float64).eval()


def _inference_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and cache. "auto" is float32 on a CPU, as in `attnlab sample`."""
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else find_precision(precision, device)
    return torch.bfloat16 if precision == "bf16" else torch.float32
