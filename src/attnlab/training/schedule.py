"""The learning rate by step: a linear warm-up, then what `train.schedule` says."""

from __future__ import annotations

import math
from dataclasses import replace

from ..config import RunConfig, TrainConfig
from ..errors import UserError
from ..ranges import Size, checked
from ..runs.folder import RunFolder


@checked
def learning_rate(config: TrainConfig, step: Size) -> float:
    """Return the learning rate of step 0, 1, ...

    After the warm-up it is a cosine to `min_lr`, a constant rate with a linear fall at the end (wsd), or constant.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "cosine":
        share = (step - config.warmup) / max(1, config.steps - config.warmup)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    elif config.schedule == "wsd":
        height = min(
            1.0, (config.steps - step) / min(config.decay * config.steps, max(1, config.steps - config.warmup))
        )
    else:
        height = 1.0
    return config.min_lr + height * (config.lr - config.min_lr)


def check_rates(config: TrainConfig) -> None:
    """Raise `UserError` where the rate would not fall from `lr` to `min_lr`."""
    if not 0 < config.lr < math.inf:
        raise UserError(f"train.lr is {config.lr}: give a number above 0")
    if not 0 <= config.min_lr <= config.lr:
        how = "above" if config.min_lr > config.lr else "no rate below"
        raise UserError(
            f"train.min_lr {config.min_lr:g} is {how} train.lr {config.lr:g}, from which the rate falls to it: give "
            f"--train.min-lr {config.lr / 10:g}, a tenth, or another one from 0 to {config.lr:g}"
        )


def cautions(config: TrainConfig) -> list[str]:
    """Return a sentence for each part of the schedule that has no room in the steps."""
    left = config.steps - config.warmup
    if left <= 0:
        most = learning_rate(config, config.steps - 1)
        long = "longer than" if left else "as long as"
        return [
            f"the warm-up of {config.warmup} steps (train.warmup) is {long} the run of {config.steps}: "
            f"the rate ends at {most:.3g} and never reaches train.lr {config.lr:g}; give a shorter one, or more"
        ]
    fall = config.decay * config.steps
    if config.schedule == "wsd" and fall > left:
        return [
            f"the decay of {fall:g} steps (train.decay {config.decay:g} of {config.steps}) is longer than the {left} "
            f"that the warm-up leaves, and begins when that ends; give a smaller train.decay, or a shorter train.warmup"
        ]
    return []


def goes_on(folder: RunFolder, config: RunConfig) -> bool:
    """Return whether the run in `folder` may go on with the `train.steps` of `config`, which else is its own.

    The steps that are done must be those that a run with this config would have made. Raises `UserError` where their
    rates would have been others, and for fewer steps than are done.
    """
    held = folder.config
    done = folder.newest() or 0
    steps = config.train.steps
    own = replace(config.train, steps=held.train.steps)
    rhythm = replace(own, eval_every=held.train.eval_every, save_every=held.train.save_every)
    if steps == held.train.steps or replace(config, train=rhythm).key != held.key:
        return False
    if steps < done:
        raise UserError(f"{folder.path} is at step {done} already, and train.steps is {steps}: give {done} or more")
    for step in range(done):
        if learning_rate(config.train, step) != learning_rate(held.train, step):
            raise UserError(
                f"{folder.path} was begun with train.steps {held.train.steps}, and with {steps} its rate (schedule "
                f"{held.train.schedule}) would have been another from step {step} on, of which {done} are done: begin "
                f"another run from its weights with --init {folder.path}, or one with --train.schedule wsd, which can "
                "be made longer until its decay begins, or constant"
            )
    return replace(config, train=own).key == held.key
