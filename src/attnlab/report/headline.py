"""Headline of the report: what was found, in words no stronger than the intervals allow."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from ..contrasts import needed
from ..formatting import parameter_difference, words
from .results_folder import Findings, Standing, finite_number


@dataclass(frozen=True)
class Verdicts:
    """The mechanisms that are compared with the baseline, by what their intervals say."""

    better: list[Standing]
    worse: list[Standing]
    equal: list[Standing]  # within the margin
    undecided: list[Standing]
    unknown: list[Standing]  # too few seeds

    @property
    def judged(self) -> int:
        """The number of mechanisms with an interval."""
        return len(self.better) + len(self.worse) + len(self.equal) + len(self.undecided)


def headline(found: Findings) -> tuple[str, list[str]]:
    """Return one sentence for the title, and up to two short paragraphs: what else was found, and its limits."""
    others = [s for s in found.standings if s.mechanism != found.baseline and s.val_loss is not None]
    kinds = {word: [s for s in others if s.verdict == word] for word in ("better", "worse", "equal", "undecided")}
    verdicts = Verdicts(**kinds, unknown=[s for s in others if s.verdict not in kinds])
    if not others or not found.compare or not found.done(found.baseline):
        title = _without_comparison(found)
    elif not verdicts.judged:
        title = _too_few_seeds(found, others)
    else:
        title = _title(found, verdicts)
    paragraphs = (_details(found, verdicts), _limits(found, verdicts))
    return title + ".", [" ".join(sentences) for sentences in paragraphs if sentences]


def _title(found: Findings, verdicts: Verdicts) -> str:
    base = found.baseline
    if verdicts.better:
        first = min(verdicts.better, key=_loss)
        title = f"{_list(found, verdicts.better)} {_learn(verdicts.better)} better than {base}"
        one = len(verdicts.better) == 1
        return title + (f", by {abs(first.difference or 0):.3f} nats per token" if one else "")
    lean = _lean(found, verdicts)
    if lean:
        return f"{lean.sentence}; nothing learns better for certain"
    if verdicts.equal:
        return (
            f"{_list(found, verdicts.equal)} {_learn(verdicts.equal)} as well as {base}, within {found.margin:g} nats"
        )
    if not verdicts.undecided:
        return f"{_list(found, verdicts.worse)} {_learn(verdicts.worse)} worse than {base}; nothing learns better"
    if verdicts.worse:
        worse = f"{_list(found, verdicts.worse)} {_learn(verdicts.worse)} worse than {base}"
        return f"{worse}; nothing learns better for certain"
    return f"{_seeds(found)} seeds do not decide whether any mechanism learns better or worse than {base}"


@dataclass(frozen=True)
class Lean:
    """A mechanism with a smaller cache that is shown to be no worse by the margin."""

    standing: Standing
    sentence: str


def _lean(found: Findings, verdicts: Verdicts) -> Lean | None:
    """Return the smallest cache among those that are not worse by the margin, or None.

    Not worse is shown: the whole interval lies below the margin. That it holds 0 is not enough, for the widest interval
    holds it most easily.
    """
    able = [s for s in (*verdicts.equal, *verdicts.undecided) if s.interval and s.interval[1] < found.margin]
    smallest = _smallest(found, able)
    if smallest is None:
        return None
    standing, name, cache = smallest
    learns = f"learns at most {found.margin:g} nats worse than {found.baseline}"
    if standing.verdict == "equal":
        learns = f"learns as well as {found.baseline}, within {found.margin:g} nats"
    return Lean(standing, f"{name} {learns}, with {cache} cache")


def _too_few_seeds(found: Findings, others: list[Standing]) -> str:
    lowest = min(others, key=_loss)
    few = "One seed each: too few" if _seeds(found) < 2 else "Too few paired seeds"
    luck = f"; {lowest.mechanism} happened to end lowest" if _loss(lowest) < _base_loss(found) else ""
    return f"{few} to tell any mechanism from {found.baseline}{luck}"


def _details(found: Findings, verdicts: Verdicts) -> list[str]:
    said = []
    base = found.baseline
    lean = _lean(found, verdicts)
    if verdicts.better and lean:
        said.append(f"{lean.sentence}.")
    if verdicts.equal and (verdicts.better or verdicts.worse or verdicts.undecided or len(verdicts.equal) > 1):
        equal = _list(found, verdicts.equal)
        said.append(f"{equal} {_are(verdicts.equal)} equal to {base} within {found.margin:g} nats.")
    undecided = [s for s in verdicts.undecided if lean is None or s is not lean.standing]
    if undecided:
        named = f"{_list(found, undecided)} {_are(undecided)} undecided"
        said.append(f"{named}: neither better nor worse than {base}, nor equal within {found.margin:g} nats.")
    if verdicts.worse and (verdicts.better or verdicts.equal or verdicts.undecided):
        said.append(f"{_list(found, verdicts.worse)} {_learn(verdicts.worse)} worse.")
    return said + _about_laws(found)


def _about_laws(found: Findings) -> list[str]:
    if not found.laws:
        return []
    broken: dict[str, list[str]] = {}
    for law in found.laws:
        if law.status == "broken":
            broken.setdefault(law.mechanism, []).append(law.law)
    if not broken:
        return ["Every law that applies holds."]
    parts = []
    for mechanism, laws in broken.items():
        parts.append(f"{mechanism} breaks the {'law' if len(laws) == 1 else 'laws'} of {words(laws)}")
    return [f"{'; '.join(parts)}."]


def _limits(found: Findings, verdicts: Verdicts) -> list[str]:
    limits = _limits_of_intervals(found, verdicts)
    if verdicts.unknown and verdicts.judged:
        limits.append(f"Too few paired seeds to judge {words(s.mechanism for s in verdicts.unknown)}.")
    if found.sizes:
        limits.append(f"All of this is about the largest size, {found.compare.get('size')}; see Sizes for the others.")
    planned = len(found.compare.get("mechanisms") or []) * len(found.compare.get("seeds") or [])
    if planned > len(found.cells):
        limits.append(f"The comparison is not finished: {len(found.cells)} of its {planned} runs have started.")
    failed = [c for c in found.cells if c.status != "done"]
    if failed:
        names = words(f"{c.mechanism} with seed {c.seed} ({c.status})" for c in failed)
        limits.append(f"{len(failed)} of {len(found.cells)} runs did not finish and count nowhere: {names}.")
    return limits


def _limits_of_intervals(found: Findings, verdicts: Verdicts) -> list[str]:
    limits = []
    if verdicts.judged and found.statistics.get("why"):
        limits.append(str(found.statistics["why"]))
    halves = [(s.interval[1] - s.interval[0]) / 2 for s in verdicts.undecided if s.interval]
    if halves:
        limits.append(
            f"Undecided does not mean equal: with {_seeds(found)} seeds these intervals reach ±{median(halves):.3f} "
            f"nats (median). {needed(found.statistics)}".strip()
        )
    return limits


def _without_comparison(found: Findings) -> str:
    finished = [m for m in found.mechanisms if found.done(m)]
    if finished:
        alone = found.baseline not in finished or len(finished) == 1
        rest = f"nothing to compare with {found.baseline} yet" if alone else "the comparison is not finished"
        return f"{words(finished)} {'has' if len(finished) == 1 else 'have'} trained; {rest}"
    broken = list(dict.fromkeys(law.mechanism for law in found.laws if law.status == "broken"))
    if broken:
        return f"{words(broken)} {'breaks' if len(broken) == 1 else 'break'} laws; no finished training run here"
    return "No finished training run in this folder yet"


def _smallest(found: Findings, standings: list[Standing]) -> tuple[Standing, str, str] | None:
    """Return the lawful mechanism with the smallest cache, its name, and how small; None: not below the baseline's."""
    base = found.mean(found.baseline, "cache_bytes")
    unsound = {law.mechanism for law in found.laws if law.status == "broken"}
    sizes = {s.mechanism: x for s in standings if (x := found.mean(s.mechanism, "cache_bytes")) is not None}
    sizes = {m: x for m, x in sizes.items() if not unsound & set(m.split("+"))}
    if not base or not sizes:
        return None
    name = min(sizes, key=sizes.__getitem__)
    if sizes[name] >= base:
        return None
    standing = next(s for s in standings if s.mechanism == name)
    return standing, _named(found, name), "no" if sizes[name] == 0 else f"a {base / sizes[name]:.1f} times smaller"


def _learn(standings: list[Standing]) -> str:
    return "learns" if len(standings) == 1 else "learn"


def _are(standings: list[Standing]) -> str:
    return "is" if len(standings) == 1 else "are"


def _list(found: Findings, standings: list[Standing]) -> str:
    return words(_named(found, s.mechanism) for s in sorted(standings, key=_loss))


def _named(found: Findings, mechanism: str) -> str:
    """Return the mechanism, and how its parameters differ from the baseline's where they do."""
    own, base = (found.mean(name, "parameters") for name in (mechanism, found.baseline))
    difference = parameter_difference(own, base)
    return f"{mechanism} ({difference})" if difference else mechanism


def _loss(standing: Standing) -> float:
    value = finite_number(standing.val_loss)
    return float("inf") if value is None else value


def _base_loss(found: Findings) -> float:
    standing = found.standing(found.baseline)
    return _loss(standing) if standing else float("inf")


def _seeds(found: Findings) -> int:
    return len({c.seed for c in found.cells if c.status == "done"})
