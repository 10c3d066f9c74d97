"""Which candidates are shipped, from their times: pure functions over what a run measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aot.configs import MOST_IN_REGIME
from aot.rules import LEAST_GAIN, gains_enough

# Of a shape that no chosen kernel runs, as many times as slow as the best: more than any gain elsewhere is worth.
MISSING = 100.0
# A choice that this device made before changes only by what stands out from the noise of a median: a challenger must
# gain that much more than the rule's 2 %, and a row stays that far below it.
MARGIN = 0.015
MEASURED_WEIGHT = 0.1  # of a measured time where predicted ones decide

Times = Sequence[Mapping[str, float]]  # us of each candidate by symbol, a shape each


@dataclass(frozen=True)
class Choice:
    chosen: tuple[str, ...]
    log: tuple[str, ...]  # what changed and why, in order


def blended(predicted: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """A score in us for a chip that the run did not have: its predicted time, and a tenth of the measured ranking."""
    best = min(measured.values())
    return {symbol: predicted[symbol] * (us / best) ** MEASURED_WEIGHT for symbol, us in measured.items()}


def losses(times: Times, chosen: Iterable[str]) -> list[float]:
    """Of each shape, log(time of the best chosen / of the best there is)."""
    chosen = list(chosen)
    found = []
    for us in filter(None, times):
        best = min(us.values())
        found.append(math.log(min((us[symbol] for symbol in chosen if symbol in us), default=MISSING * best) / best))
    return found


def worth(times: Times, chosen: Iterable[str], symbol: str) -> float:
    """The most that doing without `symbol` would cost at any shape, as the log of a ratio of times."""
    others = [each for each in chosen if each != symbol]
    with_it, without = losses(times, [*others, symbol]), losses(times, others)
    return max((after - before for before, after in zip(with_it, without)), default=0.0)


def choose(times: Times, incumbents: Sequence[str], regime: Mapping[str, str], margin: float = 0.0) -> Choice:
    """At most MOST_IN_REGIME candidates a regime, the conservative one, which is not among `times`, counted in.

    A greedy cover: from the incumbents on, the challenger that lowers the sum of log(time of the best chosen / best of
    all) the most enters, as long as it gains LEAST_GAIN at some shape; in a full regime it takes another's place if the
    shapes that the two decide gain LEAST_GAIN in the mean. Then whatever can be spared at under LEAST_GAIN on every
    shape goes, the least needed first. `margin` moves both thresholds apart.
    """
    every = sorted({symbol for us in times for symbol in us})
    chosen = [symbol for symbol in incumbents if symbol in every]
    log: list[str] = []

    def total(symbols: Iterable[str]) -> float:
        return sum(losses(times, symbols))

    while True:
        found: tuple[float, str, str] | None = None  # sum of losses after, who enters, who leaves
        for symbol in every:
            if symbol in chosen or not _enough(worth(times, [*chosen, symbol], symbol), margin):
                continue
            rivals = [other for other in chosen if regime[other] == regime[symbol]]
            if len(rivals) < MOST_IN_REGIME - 1:
                option = (total([*chosen, symbol]), symbol, "")
                found = min(found or option, option)
                continue
            for rival in rivals:
                after = [each for each in chosen if each != rival] + [symbol]
                if _enough(_mean_gain(times, chosen, after), margin):
                    option = (total(after), symbol, rival)
                    found = min(found or option, option)
        if found is None:
            break
        _, symbol, rival = found
        gained = math.exp(worth(times, [*chosen, symbol], symbol))
        chosen = [each for each in chosen if each != rival] + [symbol]
        log.append(f"{symbol} enters{f' for {rival}' if rival else ''}: up to {gained - 1:.1%} faster than the others")
    while len(chosen) > 1:
        spared = min(chosen, key=lambda symbol: (worth(times, chosen, symbol), symbol))
        if _enough(least := worth(times, chosen, spared), -margin):
            break
        chosen.remove(spared)
        bound, most = LEAST_GAIN * math.exp(-margin) - 1, math.exp(least) - 1
        log.append(f"{spared} is dropped: without it no shape takes {bound:.1%} longer, at most {most:.1%}")
    return Choice(tuple(chosen), tuple(log))


def _enough(log_gain: float, margin: float) -> bool:
    return gains_enough(1.0, math.exp(log_gain), margin)


def _mean_gain(times: Times, before: Sequence[str], after: Sequence[str]) -> float:
    """Over the shapes whose best chosen time changes."""
    gains = [old - new for old, new in zip(losses(times, before), losses(times, after)) if old != new]
    return sum(gains) / len(gains) if gains else 0.0
