"""Configs made equal to a baseline in one size, by changing one width.

Equal parameters: the feed-forward width changes. Equal cache: the mechanism's own width changes, which its Config names
in `cache_width`. Parameters are counted on the meta device, cache floats by `cache_spec`; nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..config import RunConfig
from ..errors import UserError, choose
from ..model import attention_configs, cache_floats, parameters
from ..presets import with_options
from ..results import Record
from ..spec import AttentionConfig, CacheSpec

What = Literal["params", "cache", "none"]
TOLERANCE = 0.01  # relative difference up to which two counts are equal


@dataclass(frozen=True, kw_only=True)
class Matched(Record):
    """The width that was changed, and how near the result came to the baseline."""

    field: str | None  # the width; None: there is none to change
    before: int | None  # its value before
    after: int | None  # its value now
    count: int  # parameters, or cache floats of one sequence at full context
    target: int  # the baseline's count

    @property
    def off(self) -> float:
        """Relative distance from the baseline, with its sign."""
        return self.count / self.target - 1

    @property
    def equal(self) -> bool:
        """Whether it equals the baseline, within 1 %."""
        return abs(self.off) <= TOLERANCE

    def __str__(self) -> str:
        change = "unchanged" if self.before == self.after else f"{self.field} {self.before} -> {self.after}"
        why = f"no {self.field} comes nearer" if self.field else "it has no width to change"
        return change if self.equal else f"{change}, and still {self.off:+.1%}: {why}"


def match(config: RunConfig, baseline: RunConfig, what: What) -> tuple[RunConfig, Matched | None]:
    """Return `config` with the free width set so that it equals `baseline` as nearly as whole numbers allow, and how.

    `what`: "params", "cache", or "none", which changes nothing. Raises `UserError` for another word, and where the
    baseline has no cache to match.
    """
    choose("match", what, ("params", "cache", "none"))
    if what == "none":
        return config, None
    return (match_parameters if what == "params" else match_cache)(config, baseline)


def match_parameters(config: RunConfig, baseline: RunConfig) -> tuple[RunConfig, Matched]:
    """Solve `model.ff_dim`: a multiple of 8, for speed, where that is near enough, else any."""
    target = parameters(baseline.model)
    before = config.model.resolved_ff_dim

    def count(width: int) -> int:
        return parameters(replace(config.model, ff_dim=width))

    own = count(before)
    if own == target:
        return config, Matched(field="ff_dim", before=before, after=before, count=own, target=target)
    exact = before + (target - own) / (count(before + 1) - own)  # parameters are linear in the width
    for grain in (8, 1):
        width = max(grain, round(exact / grain) * grain)
        found = Matched(field="ff_dim", before=before, after=width, count=count(width), target=target)
        if found.equal:
            break
    return replace(config, model=replace(config.model, ff_dim=width)), found


def match_cache(config: RunConfig, baseline: RunConfig) -> tuple[RunConfig, Matched]:
    """Solve the width that the mechanism's Config names; of a hybrid's several, the one that comes nearest."""
    target = cache_floats(baseline.model)
    if not target:
        raise UserError(
            f"{baseline.mechanism} keeps no cache, so nothing can be matched to it: name another mechanism first, "
            "or use match params"
        )
    own = cache_floats(config.model)
    best = config, Matched(field=None, before=None, after=None, count=own, target=target)
    if own == target:
        return best
    context = config.model.context
    placed = list(zip(config.model.layers, attention_configs(config.model), strict=True))
    keeping = [(name, each) for name, each in placed if each.cache_spec.floats(context)]
    layers = Counter(name for name, _ in keeping)
    for name, attention in dict(keeping).items():
        field = attention.cache_width
        if field is None:
            continue
        others = own - layers[name] * attention.cache_spec.floats(context)
        width = _nearest(attention, field, context, (target - others) / layers[name])
        count = others + layers[name] * _with(attention, field, width).cache_spec.floats(context)
        result = Matched(field=field, before=getattr(attention, field), after=width, count=count, target=target)
        if best[1].field is None or abs(result.off) < abs(best[1].off):
            best = with_options(config, {name: {field: width}}), result
    return best


def _nearest(attention: AttentionConfig, field: str, tokens: int, target: float) -> int:
    """The value of `field` whose cache comes nearest to `target` floats, among those that the Config accepts."""
    # a unit of width costs a row, of which there are `tokens`, or a float per token or per few tokens
    limit = max(tokens, 4 * round(target / tokens), getattr(attention, field)) + 1

    def distance(width: int) -> float:
        spec = _spec(attention, field, width)
        return abs(spec.floats(tokens) - target) if spec is not None else float("inf")

    return min(range(1, limit), key=distance)


def _with(attention: AttentionConfig, field: str, width: int) -> AttentionConfig:
    change: dict[str, Any] = {field: width}
    return replace(attention, **change)


def _spec(attention: AttentionConfig, field: str, width: int) -> CacheSpec | None:
    try:
        return _with(attention, field, width).cache_spec
    except UserError:
        return None  # such as a number of heads that does not divide
