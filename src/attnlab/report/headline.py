"""What was found, in words: no stronger than the intervals allow."""

from __future__ import annotations

from statistics import median

from ..formatting import words
from .findings import Findings, Standing, number


def headline(found: Findings) -> tuple[str, list[str]]:
    """One sentence for the title, and two short paragraphs: what else was found, and how far it can be trusted."""
    base = found.baseline
    others = [s for s in found.standings if s.mechanism != base and s.val_loss is not None]
    by_verdict = {v: [s for s in others if s.verdict == v] for v in ("better", "worse", "not distinguishable")}
    better, worse, same = by_verdict.values()
    unknown = [s for s in others if s not in better and s not in worse and s not in same]
    if not others or not found.compare or not found.done(base):
        title = _without_comparison(found)
    elif not better and not worse and not same:
        lowest = min(others, key=_loss)
        few = "One seed each: too few" if _seeds(found) < 2 else "Too few paired seeds"
        title = f"{few} to tell any mechanism from {base}"
        title += f"; {lowest.mechanism} happened to end lowest" if _loss(lowest) < _base_loss(found) else ""
    elif better:
        first = min(better, key=_loss)
        title = f"{words(s.mechanism for s in sorted(better, key=_loss))} {_learn(better)} better than {base}"
        title += "" if len(better) > 1 else f", by {abs(first.difference or 0):.3f} nats per token"
    elif same:
        lean = _smallest(found, same)
        if worse:
            title = f"Nothing learns distinguishably better than {base}"
            if lean:
                title = f"{lean[0]} is not distinguishable from {base} with {lean[1]} cache"
                title += "; nothing learns better for certain"
        else:
            title = f"No mechanism is distinguishable from {base}" + (
                f"; {lean[0]} keeps {lean[1]} cache" if lean else ""
            )
    else:
        title = f"{_list(worse)} {_learn(worse)} worse than {base}; nothing learns better"
    return title + ".", [" ".join(part) for part in _details(found, better, worse, same, unknown) if part]


def _details(
    found: Findings, better: list[Standing], worse: list[Standing], same: list[Standing], unknown: list[Standing]
) -> tuple[list[str], list[str]]:
    base, said, limits = found.baseline, [], []
    if same:
        said.append(f"At 95 % confidence {_list(same)} {_are(same)} not distinguishable from {base}.")
        if better and (lean := _smallest(found, same)) is not None:
            said[-1] = said[-1][:-1] + f"; {lean[0]} keeps {lean[1]} cache."
    if worse and (better or same):
        said.append(f"{_list(worse)} {_learn(worse)} worse.")
    broken = [law for law in found.laws if law.status == "broken"]
    if broken:
        guilty = dict.fromkeys(law.mechanism for law in broken)
        parts = (f"{m} breaks the law{'s' * (n > 1)} of {laws}" for m in guilty for n, laws in [_broken(found, m)])
        said.append(f"{'; '.join(parts)}.")
    elif found.laws:
        said.append("Every law that applies holds.")
    halves = [(s.interval[1] - s.interval[0]) / 2 for s in same if s.interval]
    if halves:
        limits.append(
            f"Not distinguishable does not mean equal: with {_seeds(found)} seeds these intervals reach "
            f"±{median(halves):.3f} nats (median), so smaller differences stay unseen."
        )
    if (better or worse) and (calls := len(better) + len(worse) + len(same)) > 2:
        limits.append(
            f"Each interval stands alone: of {calls} comparisons at 95 %, {calls / 20:.2g} would be called different "
            "by luck on average even if all were equal."
        )
    if unknown and (better or worse or same):
        limits.append(f"Too few paired seeds to judge {words(s.mechanism for s in unknown)}.")
    if found.sizes:
        limits.append(f"All of this is about the largest size, {found.compare.get('size')}; see Sizes for the others.")
    planned = len(found.compare.get("mechanisms") or []) * len(found.compare.get("seeds") or [])
    if planned > len(found.cells):
        limits.append(f"The comparison is not finished: {len(found.cells)} of its {planned} runs have started.")
    failed = [c for c in found.cells if c.status != "done"]
    if failed:
        names = words(f"{c.mechanism} with seed {c.seed} ({c.status})" for c in failed)
        limits.append(f"{len(failed)} of {len(found.cells)} runs did not finish and count nowhere: {names}.")
    return said, limits


def _broken(found: Findings, mechanism: str) -> tuple[int, str]:
    laws = [law.law for law in found.laws if law.status == "broken" and law.mechanism == mechanism]
    return len(laws), words(laws)


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


def _smallest(found: Findings, standings: list[Standing]) -> tuple[str, str] | None:
    """The sound mechanism with the smallest cache, and how small: only if it is smaller than the baseline's."""
    base = found.mean(found.baseline, "cache_bytes")
    unsound = {law.mechanism for law in found.laws if law.status == "broken"}
    sizes = {s.mechanism: x for s in standings if (x := found.mean(s.mechanism, "cache_bytes")) is not None}
    sizes = {m: x for m, x in sizes.items() if not unsound & set(m.split("+"))}
    if not base or not sizes:
        return None
    name = min(sizes, key=sizes.__getitem__)
    if sizes[name] >= base:
        return None
    return name, "no" if sizes[name] == 0 else f"a {base / sizes[name]:.1f} times smaller"


def _learn(standings: list[Standing]) -> str:
    return "learns" if len(standings) == 1 else "learn"


def _are(standings: list[Standing]) -> str:
    return "is" if len(standings) == 1 else "are"


def _list(standings: list[Standing]) -> str:
    return words(s.mechanism for s in sorted(standings, key=_loss))


def _loss(standing: Standing) -> float:
    value = number(standing.val_loss)
    return float("inf") if value is None else value


def _base_loss(found: Findings) -> float:
    standing = found.standing(found.baseline)
    return _loss(standing) if standing else float("inf")


def _seeds(found: Findings) -> int:
    return len({c.seed for c in found.cells if c.status == "done"})
