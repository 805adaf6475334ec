"""What was found, in words: no stronger than the intervals allow."""

from __future__ import annotations

from statistics import median

from .folder import Findings, Standing, number
from .look import words


def headline(found: Findings) -> tuple[str, list[str]]:
    """One sentence for the title, and the sentences that qualify it."""
    base = found.baseline
    others = [s for s in found.standings if s.mechanism != base and s.val_loss is not None]
    by_verdict = {v: [s for s in others if s.verdict == v] for v in ("better", "worse", "not distinguishable")}
    better, worse, same = by_verdict.values()
    unknown = [s for s in others if s not in better and s not in worse and s not in same]
    if not others:
        title = _without_comparison(found)
    elif not better and not worse and not same:
        lowest = min(others, key=_loss)
        title = f"One seed each: too few to tell any mechanism from {base}" if _seeds(found) < 2 else (
            f"Too few paired seeds to tell any mechanism from {base}")  # fmt: skip
        if _seeds(found) >= 1:
            title += f"; {lowest.mechanism} happened to end lowest" if _loss(lowest) < _base_loss(found) else ""
    elif better:
        first = min(better, key=_loss)
        title = f"{words(s.mechanism for s in sorted(better, key=_loss))} {_learn(better)} better than {base}"
        title += "" if len(better) > 1 else f", by {abs(first.difference or 0):.3f} nats per token"
    elif same and (lean := _smallest(found, same)) is not None:
        title = f"Nothing beats {base}, but {lean[0]} is not distinguishable from it with {lean[1]} cache"
    else:
        title = f"Nothing beats {base}" + (f"; {words(s.mechanism for s in worse)} {_learn(worse)} worse" if worse else "")
    return title + ".", [x for x in _details(found, better, worse, same, unknown) if x]


def _details(
    found: Findings, better: list[Standing], worse: list[Standing], same: list[Standing], unknown: list[Standing]
) -> list[str]:
    base, said = found.baseline, []
    if better and same and (lean := _smallest(found, same)) is not None:
        said.append(f"{lean[0]} is not distinguishable from {base} and keeps {lean[1]} cache.")
    if worse and (better or same):
        said.append(f"{_list(worse)} {_learn(worse)} worse than {base}.")
    if same:
        said.append(f"Not distinguishable from {base} at 95 %: {_list(same)}.")
        halves = [(s.interval[1] - s.interval[0]) / 2 for s in same if s.interval]
        if halves:
            said.append(
                f"That does not mean equal: with {_seeds(found)} seeds each, these intervals reach "
                f"±{median(halves):.3f} nats (median), and smaller differences stay unseen."
            )
    if unknown and (better or worse or same):
        said.append(f"Too few paired seeds to judge: {words(s.mechanism for s in unknown)}.")
    failed = [c for c in found.cells if c.status != "done"]
    if failed:
        names = words(f"{c.mechanism} with seed {c.seed} ({c.status})" for c in failed)
        said.append(f"{len(failed)} of {len(found.cells)} runs did not finish, and count nowhere: {names}.")
    broken = [law for law in found.laws if law.status == "broken"]
    if broken:
        guilty = dict.fromkeys(law.mechanism for law in broken)
        parts = (f"{m} breaks {words(law.law for law in broken if law.mechanism == m)}" for m in guilty)
        said.append(f"Laws: {'; '.join(parts)}.")
    elif found.laws:
        said.append("Every law that applies holds.")
    return said


def _without_comparison(found: Findings) -> str:
    finished = [m for m in found.mechanisms if found.done(m)]
    if finished:
        return f"{words(finished)} trained; nothing to compare with {found.baseline} yet"
    broken = list(dict.fromkeys(law.mechanism for law in found.laws if law.status == "broken"))
    if broken:
        return f"{words(broken)} {'breaks' if len(broken) == 1 else 'break'} laws; no finished training run here"
    return "No finished training run in this folder yet"


def _smallest(found: Findings, standings: list[Standing]) -> tuple[str, str] | None:
    """The mechanism with the smallest cache, and how small: only if it is smaller than the baseline's."""
    base = found.mean(found.baseline, "cache_bytes")
    sizes = {s.mechanism: x for s in standings if (x := found.mean(s.mechanism, "cache_bytes")) is not None}
    if not base or not sizes:
        return None
    name = min(sizes, key=sizes.__getitem__)
    if sizes[name] >= base:
        return None
    return name, "no" if sizes[name] == 0 else f"a {base / sizes[name]:.1f} times smaller"


def _learn(standings: list[Standing]) -> str:
    return "learns" if len(standings) == 1 else "learn"


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
