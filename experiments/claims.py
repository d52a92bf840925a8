"""Verdicts on the paper's claims, by the rules of PLAN.md, from tables of scores.

Every function takes ``read``, which gives a table of ``OUT/tables`` by its name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from . import metaworld, scores
from .store import NotRunError
from .tasks import PPO, REGIMES, REUSE, SAPO

Read = Callable[[str], pd.DataFrame]

REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced here"
OPEN = "open"
"""While what a verdict needs has not finished."""

HIDDEN = "beside it the mean, and the share of pairs of which both end at the ceiling"

CLAIMS = {
    1: "Non-zero gradients at extreme ratios",
    2: "Implicit, tunable bound on the update magnitude",
    3: "Finite-sample concentration",
    4: "Best among clipping-based baselines across replay sizes",
    5: "Better bias-variance trade-off",
    6: "High training stability",
    7: "Better sample efficiency",
}


def verdict(intervals: Sequence[tuple[float, float]], better: int) -> str:
    """Verdict on intervals of differences: all on the better side, some and none worse, or not.

    Args:
        intervals: (low, high).
        better: 1 where above zero is better, -1 where below.
    """
    good = [low > 0 if better > 0 else high < 0 for low, high in intervals]
    bad = [high < 0 if better > 0 else low > 0 for low, high in intervals]
    if good and all(good):
        return REPRODUCED
    return PARTLY if any(good) and not any(bad) else NOT


def cell(row: Any, name: str = "difference", low: str = "", high: str = "") -> str:
    """An estimate with its interval."""
    low, high = low or "low", high or "high"
    return f"{row[name]:.3g} [{row[low]:.3g}, {row[high]:.3g}]"


def share(value: float) -> str:
    """A share of runs or pairs; "-" where there is none."""
    return "-" if np.isnan(value) else f"{value:.0%}"


def paired(row: Any, name: str = "difference") -> str:
    """A paired difference by its interquartile mean, with what that may hide beside it."""
    return f"{cell(row, name)}; mean {row['mean']:+.2g}, {share(row.both_at_ceiling)}"


def ends(name: str) -> tuple[str, str, str]:
    """Columns of an estimate and of its interval."""
    return name, f"{name}_low", f"{name}_high"


def _on(part: pd.DataFrame, low: str, high: str, better: int) -> str:
    return verdict(list(zip(part[low], part[high], strict=True)), better)


def _gradients(read: Read) -> tuple[str, str]:
    table = read("trust_weights")
    far = table[table.log_ratio.abs() == 5]
    gipo = far[far.objective == "gipo"]
    wide = gipo[gipo.sigma >= 0.5]
    ppo = far[(far.objective == "ppo_clip") & (far.log_ratio * far.advantage > 0)]
    found = NOT
    if (ppo.u == 0).all():
        found = REPRODUCED if (wide.u > 0).all() else PARTLY if (gipo.u > 0).any() else NOT
    return found, (
        f"smallest u of GIPO at log r = -5 and 5: {wide.u.min():.1g} for sigma >= 0.5, "
        f"{gipo[gipo.sigma < 0.5].u.min():.1g} below; PPO-Clip's: {abs(ppo.u).max():.1g}"
    )


def _bound(read: Read) -> tuple[str, str]:
    table = read("bounds_magnitude")
    error = float((table.measured / table.bound - 1).abs().max())
    return (
        REPRODUCED if error < 1e-3 else NOT,
        f"the largest u is exp(sigma^2 / 2) to {error:.0e}",
    )


def _concentration(read: Read) -> tuple[str, str]:
    table = read("bounds")
    fails = table[["hoeffding_failures", "bernstein_failures"]].to_numpy().max()
    gipo, plain = (
        table[table.sigma == 1].set_index("n"),
        table[np.isinf(table.sigma)].set_index("n"),
    )
    closer = bool((gipo.error < plain.error).all())
    found = REPRODUCED if fails <= 0.05 and closer else PARTLY if fails <= 0.05 else NOT
    return found, (
        f"the bounds fail in at most {fails:.2%} of repeats; 95 % error about the own mean at n = "
        f"1024: {gipo.error[1024]:.2g}, No-Clip {plain.error[1024]:.2g}"
    )


def _replay(read: Read) -> tuple[str, str]:
    table = read("replay_sizes_comparison")
    part = table[(table.score == "final_return") & (table.age == 0)]
    part = part[part.method.isin([PPO.label, SAPO.label])]
    found = _on(part, "low", "high", 1) if part.regime.nunique() == len(REGIMES) else NOT
    cells = [f"{REUSE[row.regime]}, {row.method}: {paired(row)}" for _, row in part.iterrows()]
    return found, f"final return, IQM of GIPO minus the baseline ({HIDDEN}): {'; '.join(cells)}"


def _bias_variance(read: Read) -> tuple[str, str]:
    table = read("gridworld_dominated")
    one = table[(table.study == "gridworld") & (table.settings > 0)]
    least = one.groupby("objective").share_above_gipo.min()
    wins = [least.get(name, 0.0) >= 0.95 for name in ("ppo_clip", "sapo")]
    return (
        REPRODUCED if all(wins) else PARTLY if any(wins) else NOT,
        "share of a baseline's settings with more bias than GIPO at equal variance, the least of "
        f"three policies: PPO-Clip {least['ppo_clip']:.0%}, SAPO {least['sapo']:.0%}",
    )


def _stability(read: Read) -> tuple[str, str]:
    table = read("stability")
    part = table[(table.quantity == "drop_difference") & (table.regime == "reuse-heavy")]
    part = part[part.method.isin([PPO.label, SAPO.label])]
    cells = [f"{row.method} {paired(row, 'value')}" for _, row in part.iterrows()]
    decides = f"drop from the peak, IQM of GIPO minus ({HIDDEN}): {'; '.join(cells)}"
    return _on(part, "low", "high", -1), decides


def _efficiency(read: Read) -> tuple[str, str]:
    table = read("sample_efficiency")
    part = table[(table.regime == "all") & table.method.isin([PPO.label, SAPO.label])]
    names = ends("difference")
    cells = [f"{row.method} {cell(row, *names)}" for _, row in part.iterrows()]
    return _on(part, *names[1:], -1), f"time to the threshold, GIPO minus: {', '.join(cells)}"


FIRST: dict[int, Callable[[Read], tuple[str, str]]] = {
    1: _gradients,
    2: _bound,
    3: _concentration,
    4: _replay,
    5: _bias_variance,
    6: _stability,
    7: _efficiency,
}
"""Verdict of protocol 1 and what decides it, by claim."""


def second(read: Read, claim: int, case: str, *, corrected: bool = True) -> str:
    """Verdict of protocol 2; ``corrected`` for the number of comparisons."""
    table = read("tuned_sizes_comparison")
    part = table[table.judged & (table.claim == claim) & (table.case == case)]
    regimes = set(table.regime) - {"all"}
    if len(part) < scores.JUDGED[claim] or len(regimes) < len(REGIMES):
        return OPEN
    low, high = part.low.to_numpy(float), part.high.to_numpy(float)
    if corrected:
        counts = part.p_holm.to_numpy(float) < scores.LEVEL
        estimate = part.difference.to_numpy(float)
        low, high = np.where(counts, estimate, -np.inf), np.where(counts, estimate, np.inf)
    return verdict(list(zip(low.tolist(), high.tolist(), strict=True)), 1 if claim == 4 else -1)


def on_metaworld(compared: pd.DataFrame) -> dict[int, str]:
    """The verdict on each of ``metaworld.JUDGED``, by the rule of protocol 1."""
    found = {}
    for claim, (_, better) in metaworld.JUDGED.items():
        part = compared[compared.judged & (compared.claim == claim)]
        found[claim] = OPEN
        if len(part) and part.seeds.min() >= metaworld.LEAST_SEEDS:
            found[claim] = _on(part, "low", "high", better)
    return found


def proposal(read: Read) -> str:
    """Whether the aim of the project's own objective is reached."""
    table, units = read("proposal"), read("proposal_units")
    overall, best = table[table.age == 0], table[table.best & (table.age > 0)]
    no_worse = bool((best.high >= 0).all())
    better = (overall.difference > 0) & (overall.p_holm < scores.LEVEL)
    if not units.finished.all():
        return OPEN
    if no_worse and better.all():
        return "reached"
    return "partly reached" if no_worse or better.any() else "missed"


def table(read: Read) -> list[list[str]]:
    """Rows of the table of verdicts, one per claim; what has not run is said to be open."""
    planned = [OPEN] * len(scores.JUDGED_CASES)
    try:
        own_ground = read("metaworld_comparison")
        seeds = (
            f"{own_ground.seeds.min()} of {len(metaworld.STUDY.presets['committed'].seeds)} seeds"
        )
        there = {claim: f"**{v}** ({seeds})" for claim, v in on_metaworld(own_ground).items()}
    except NotRunError:
        there = {}
    rows = []
    for claim, title in CLAIMS.items():
        try:
            found, decides = FIRST[claim](read)
        except NotRunError:
            found, decides = OPEN, "not run"
        tuned = ["not trained"] * len(scores.JUDGED_CASES)
        if claim in scores.JUDGED:
            try:
                tuned = [f"**{second(read, claim, case)}**" for case in scores.JUDGED_CASES]
            except NotRunError:
                tuned = planned
        own = there.get(claim, "not trained")
        rows.append([f"{claim}. {title}", f"**{found}**", *tuned, own, decides])
    return rows
