"""Training. Step `n` is a pure function of (weights, optimizer state, config, n): no iterator, no random state.

So a run that was interrupted goes on bit for bit as if it had not been, and runs with one seed see the same batches
whatever their mechanism is.
"""

from __future__ import annotations

import gc
import math
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import data, ops
from .checkpoint import RunFolder, load_optimizer_tensors, load_weights, optimizer_tensors
from .config import RunConfig, TrainConfig
from .convert.heal import distilled, freeze, start_from
from .model import Decoder, attention_configs, flops_per_token
from .results import RunResult
from .spec import UserError, need

Listener = Callable[[dict[str, Any]], None]


class Diverged(UserError):
    """The loss or its gradient is no longer a finite number."""


def train(config: RunConfig, out: str | Path, *, resume: bool = False, progress: Listener | None = None) -> RunResult:
    """Train `config` into the run folder `out`; `resume` goes on from its newest checkpoint, if there is one.

    `progress` is told {"step", "loss", "val_loss", "tokens_per_s", ...}, parts of it at a time. Ctrl-C and SIGTERM
    finish the step, save, and raise KeyboardInterrupt; a second one does not wait. Raises `UserError` for what cannot
    be run and `Diverged` for a loss that is not finite; the last good checkpoint stays.
    """
    _reset_peak()
    config, corpus = resolve(config)
    with _own_random_state(), _stop_requests() as stop:
        trainer = Trainer.of(config, corpus)
        folder = (RunFolder.resume if resume else RunFolder.create)(out, config, corpus)
        result = folder.result()
        if result is not None and result.status == "done":
            return result
        log = Log.of(trainer, folder)
        try:
            _run(trainer, folder, log, stop, progress or (lambda event: None))
        except Diverged as error:
            folder.write_result(summary(trainer, folder, log, "failed", str(error)))
            raise
        status = "done" if log.step == config.train.steps else "interrupted"
        result = summary(trainer, folder, log, status)
        folder.write_result(result)
    if status == "interrupted":
        raise KeyboardInterrupt(f"stopped after step {log.step}; the run is saved in {out}")
    return result


def resolve(config: RunConfig) -> tuple[RunConfig, data.Corpus]:
    """The config as it will be run, and its corpus: a vocabulary too small for the text grows to fit it."""
    if not 0 <= config.seed < 2**63:
        raise UserError(f"the seed is {config.seed}; give a whole number from 0 up")
    corpus = data.load(config.data)
    corpus.check(config.model.context)
    if config.model.vocab_size < corpus.vocab_size:
        config = replace(config, model=replace(config.model, vocab_size=corpus.vocab_size))
    return config, corpus


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up, then cosine to `min_lr`, or flat and a linear fall at the end."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "cosine":
        share = (step - config.warmup) / max(1, config.steps - config.warmup)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    else:
        height = min(1.0, (config.steps - step) / (config.decay * config.steps))
    return config.min_lr + height * (config.lr - config.min_lr)


def make_optimizers(config: TrainConfig, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """By name. Weight decay pulls on matrices, embeddings among them, not on norms and biases (nanoGPT's rule).

    With Muon, it takes the matrices between embedding and head, and AdamW everything else.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    outer = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outer |= {id(p) for name, p in model.named_parameters() if name.split(".")[0] == "head"}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon":
        hidden = [p for p in parameters if p.ndim == 2 and id(p) not in outer]
        parameters = [p for p in parameters if p.ndim != 2 or id(p) in outer]
        optimizers["muon"] = torch.optim.Muon(
            hidden,
            lr=config.lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",  # one rate then suits both optimizers
        )
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers["adamw"] = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        fused=all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters),
    )
    return optimizers


@dataclass
class Trainer:
    """What a step needs."""

    config: RunConfig
    corpus: data.Corpus
    model: Decoder
    loss: Callable[..., Tensor]  # (x, y, documents); compiled, where the config asks for it
    objective: Callable[..., Tensor]  # what a step makes smaller: the loss, where no teacher has a say
    optimizers: dict[str, torch.optim.Optimizer]
    accelerator: Any
    precision: str  # fp32 or bf16
    device: torch.device

    @classmethod
    def of(cls, config: RunConfig, corpus: data.Corpus) -> Trainer:
        """Initial weights depend on the seed alone. Changes torch's global random state."""
        device = find_device(config.train.device)
        accelerator = _accelerator(device)
        torch.manual_seed(config.seed)
        model = Decoder(config.model)
        if config.init:
            start_from(model, config.init)
        freeze(model, config.train.train)
        model = model.to(device)
        optimizers = make_optimizers(config.train, model)
        model, *prepared = accelerator.prepare(model, *optimizers.values())
        loss = _compiled(model.loss, device) if config.train.compile else model.loss
        return cls(
            config=config,
            corpus=corpus,
            model=model,
            loss=loss,
            objective=distilled(model, config.teacher, config.train.distill, device) if config.teacher else loss,
            optimizers=dict(zip(optimizers, prepared, strict=True)),
            accelerator=accelerator,
            precision=find_precision(config.train.precision, device),
            device=device,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Weights stay float32; with bf16 the matrix products read them rounded."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def batch(self, step: int) -> list[data.Batch]:
        """The parts of step `step` that are accumulated, on the host."""
        size, seed = self.config.train.batch_size, self.config.seed
        whole = self.corpus.batch(seed, step, size * self.config.train.accumulate, self.config.model.context)
        return [whole.rows(at, at + size) for at in range(0, len(whole.x), size)]


class Step(NamedTuple):
    """What a step tells."""

    loss: Tensor  # mean over its targets
    norm: Tensor  # of the gradient, before clipping
    tokens: int  # targets that counted


def train_step(trainer: Trainer, step: int) -> Step:
    """One optimizer step, number `step` from 0."""
    config, model = trainer.config.train, trainer.model
    seed_dropout(trainer.config.seed, step, trainer.device)
    parts = trainer.batch(step)
    total, counts = torch.zeros((), device=trainer.device), [part.counted() for part in parts]
    for part, count, before in zip(parts, counts, [counts[0], *counts], strict=False):
        divide_gradients(model, count / before)
        with trainer.autocast():
            loss = trainer.objective(*part.to(trainer.device))
        trainer.accelerator.backward(loss)
        total += loss.detach() * count
    divide_gradients(model, sum(counts) / counts[-1])
    norm = trainer.accelerator.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    rate = learning_rate(config, step)
    for optimizer in trainer.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return Step(total / sum(counts), norm, sum(counts))


def divide_gradients(model: nn.Module, by: float) -> None:
    """So that each accumulated part weighs as much as it has targets: before a part, those gathered are brought to its
    size. No factor on the loss would do, because auxiliary losses add gradients of their own."""
    if by != 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(by)


@torch.no_grad()
def validate(trainer: Trainer) -> float:
    """Mean loss in nats over the targets of the fixed held-out rows."""
    size, context = trainer.config.train.batch_size, trainer.config.model.context
    whole = trainer.corpus.windows(trainer.config.train.eval_batches * size, context)
    parts = [whole.rows(at, at + size) for at in range(0, len(whole.x), size)]
    losses = []
    trainer.model.eval()
    for part in parts:
        with trainer.autocast():
            losses.append(trainer.loss(*part.to(trainer.device)).float())
    trainer.model.train()
    each = zip(torch.stack(losses).tolist(), (part.counted() for part in parts), strict=True)
    return sum(loss * count for loss, count in each) / whole.counted()


def seed_dropout(seed: int, step: int, device: torch.device) -> None:
    """What is random within a step is a function of (seed, step)."""
    number = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    torch.default_generator.manual_seed(
        number
    )  # torch.manual_seed would also note down a stack trace for each GPU kind
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def find_device(name: str) -> torch.device:
    """ "auto" takes a GPU where there is one. `UserError` lists what is there."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        return torch.device(there[min(1, len(there) - 1)])
    if name not in there:
        raise UserError(f"the device {name!r} is not there: allowed here are auto, {', '.join(there)}")
    return torch.device(name)


def find_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 where the processor multiplies it in hardware, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bf16" if fast else "fp32"


@dataclass
class Log:
    """How far a run is. Its records are the folder's metrics; what is here goes into the checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0  # learnt from: padding does not count
    interval: list[float] = field(default_factory=list)  # losses since the last record
    # of this sitting only:
    norm: float = 0.0
    recent: int = 0  # tokens since the last record
    busy: float = 0.0  # seconds of those steps
    warm: bool = False  # whether a whole interval has passed
    saved: int | None = None

    @classmethod
    def of(cls, trainer: Trainer, folder: RunFolder) -> Log:
        """From the newest checkpoint, whose weights and optimizer state go into `trainer`; else from the start."""
        if folder.newest() is None:
            folder.forget_after(-1)
            return cls()
        step, model, optimizer, state = folder.load(device=trainer.device)
        folder.forget_after(step)
        load_weights(trainer.model, model)
        load_optimizer_tensors(trainer.model, _bare(trainer.optimizers), optimizer)
        return cls(step, state["seconds"], state["tokens"], state["interval"], saved=step)


def _run(trainer: Trainer, folder: RunFolder, log: Log, stop: threading.Event, tell: Listener) -> None:
    config = trainer.config.train
    began = time.perf_counter() - log.seconds
    fresh: list[tuple[Tensor, Tensor]] = []  # (loss, norm) of steps whose numbers have not been looked at
    trainer.model.train()
    if log.step == 0 and trainer.config.init:
        _validate(trainer, folder, log, tell)  # what there is to heal
    while log.step < config.steps and not stop.is_set():
        started = time.perf_counter()
        reports = _due(log.step + 1, config.log_every, config.steps)
        with _auxiliary_losses(reports) as auxiliary:
            done = train_step(trainer, log.step)
        fresh.append((done.loss, done.norm))
        log.step += 1
        log.tokens += done.tokens
        log.recent += done.tokens
        validates = _due(log.step, config.eval_every, config.steps)
        saves = _due(log.step, config.save_every, config.steps)
        if reports or validates or saves:
            _look(trainer, folder, log, fresh)
        log.busy += time.perf_counter() - started
        if reports:
            tell(_report(trainer, folder, log, auxiliary))
        if validates:
            _validate(trainer, folder, log, tell)
        log.seconds = time.perf_counter() - began
        if saves:
            _save(trainer, folder, log)
    _look(trainer, folder, log, fresh)
    _save(trainer, folder, log)


def _validate(trainer: Trainer, folder: RunFolder, log: Log, tell: Listener) -> None:
    loss = validate(trainer)
    if not math.isfinite(loss):
        raise _diverged(trainer, folder, "validation loss", loss, log.step)
    folder.log({"step": log.step, "tokens": log.tokens, "val_loss": loss})
    tell({"step": log.step, "val_loss": loss})


def _auxiliary_losses(wanted: bool) -> AbstractContextManager[dict[str, list[Tensor]]]:
    return ops.record_losses() if wanted else nullcontext({})


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _look(trainer: Trainer, folder: RunFolder, log: Log, fresh: list[tuple[Tensor, Tensor]]) -> None:
    """Wait for the steps' numbers and refuse what is not finite; done before anything is reported or saved."""
    if not fresh:
        return
    first = log.step - len(fresh) + 1
    values = torch.stack([torch.stack(pair) for pair in fresh]).tolist()
    fresh.clear()
    for step, (loss, norm) in enumerate(values, first):
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise _diverged(trainer, folder, what, value, step)
        log.interval.append(loss)
        log.norm = norm


def _diverged(trainer: Trainer, folder: RunFolder, what: str, value: float, step: int) -> Diverged:
    config, newest = trainer.config.train, folder.newest()
    kept = "no checkpoint was written yet" if newest is None else f"the checkpoint of step {newest} is kept"
    return Diverged(
        f"the {what} became {value} at step {step} of {config.steps}, and {kept}; train again into another folder with "
        f"a lower train.lr (it is {config.lr}), a longer train.warmup ({config.warmup}) or a smaller train.clip "
        f"({config.clip})"
    )


def _report(trainer: Trainer, folder: RunFolder, log: Log, auxiliary: Mapping[str, list[Tensor]]) -> dict[str, Any]:
    config = trainer.config
    record = {
        "step": log.step,
        "loss": statistics.fmean(log.interval),
        "lr": learning_rate(config.train, log.step - 1),
        "grad_norm": log.norm,
        "tokens_per_s": log.recent / log.busy,
        **{name: statistics.fmean(map(float, values)) for name, values in auxiliary.items()},
    }
    folder.log(record if log.warm else record | {"warm_up": True})
    log.interval, log.recent, log.busy, log.warm = [], 0, 0.0, True
    return record


def _save(trainer: Trainer, folder: RunFolder, log: Log) -> None:
    if log.saved != log.step:
        state = {"seconds": log.seconds, "tokens": log.tokens, "interval": log.interval}
        folder.save(log.step, trainer.model, optimizer_tensors(trainer.model, _bare(trainer.optimizers)), state)
        log.saved = log.step


def summary(trainer: Trainer, folder: RunFolder, log: Log, status: str, error: str = "") -> RunResult:
    """Everything a comparison needs to know about a run."""
    config, model, records = trainer.config, trainer.model, folder.metrics()
    curve = [[r["step"], r["val_loss"]] for r in records if "val_loss" in r]
    train_curve = [[r["step"], r["loss"]] for r in records if "loss" in r]
    timed = [r for r in records if "tokens_per_s" in r]
    rates = [r["tokens_per_s"] for r in timed if "warm_up" not in r] or [r["tokens_per_s"] for r in timed]
    specs = [layer.cache_spec for layer in attention_configs(config.model)]
    context = config.model.context
    return RunResult(
        name=config.name,
        mechanism=config.mechanism,
        seed=config.seed,
        key=config.key,
        status=status,
        error=error,
        parameters=model.parameter_count(),
        floats_per_token=sum(spec.per_token for spec in specs),
        cache_bytes=sum(spec.floats(context) for spec in specs) * next(model.parameters()).element_size(),
        flops_per_token=flops_per_token(config.model, context),
        steps=log.step,
        tokens=log.tokens,
        context=context,
        train_loss=train_curve[-1][1] if train_curve else None,
        val_loss=curve[-1][1] if curve else None,
        best_val_loss=min((loss for _, loss in curve), default=None),
        tokens_per_s=statistics.median(rates) if rates else None,
        seconds=log.seconds,
        peak_bytes=_peak_bytes(trainer.device),
        precision=trainer.precision,
        impl=config.model.impl,
        threads=torch.get_num_threads(),
        device=_device_name(trainer.device),
        command=_command(),
        options={name: dict(fields) for name, fields in config.model.options.items()},
        curve=curve,
        train_curve=train_curve,
    )


def _accelerator(device: torch.device) -> Any:
    need("accelerate", "train")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # global: an earlier run's device
    if device.index is not None:
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", device_placement=False)
    if accelerator.num_processes > 1:
        raise UserError(
            f"this was started as {accelerator.num_processes} processes, and training runs in one so far; "
            "start it without a launcher"
        )
    return accelerator


def check_compiler(option: str, device: torch.device) -> None:
    """UserError where `option` asks torch.compile for what it cannot do on this machine."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                f"{option} needs a C++ compiler, and none was found; install g++ or clang++, or leave it off"
            ) from None


def _compiled(loss: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    check_compiler("train.compile", device)
    return torch.compile(loss)


def _bare(optimizers: Mapping[str, Any]) -> dict[str, torch.optim.Optimizer]:
    """The optimizers inside Accelerate's wrappers."""
    return {name: optimizer.optimizer for name, optimizer in optimizers.items()}


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Leaves the caller's random numbers as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; the next one interrupts at once. Elsewhere than in the main thread: never."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from what is resident now
    except OSError:
        pass


def _peak_bytes(device: torch.device) -> int:
    """Most memory resident at once: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _command() -> str:
    program = Path(sys.argv[0]).name
    return shlex.join(["attnlab", *sys.argv[1:]]) if program in ("attnlab", "__main__.py") else ""
