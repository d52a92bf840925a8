"""What the stored tables say beyond the plan's verdicts, and how far those verdicts carry.

Nothing is trained here: the runs are those of other studies.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from gipo_jax.analysis import stats

from . import metaworld, scores
from .engine import KEYS, Tables, best_rates
from .scores import OURS, regimes_of, scored
from .store import NotRunError, Store
from .tasks import NO_CLIP, PPO, SAPO

PHASES = {"first tenth": (0.0, 0.1), "all of it": (0.0, 1.0), "second half": (0.5, 1.0)}
"""Shares of training over which policy lag on Meta-World is averaged."""


def tables(store: Store) -> Tables:
    """Policy lag, interaction, best widths, areas by rate, means; what has its tables stored.

    Raises:
        NotRunError: none has.
    """
    found: Tables = {}
    for part in (_lags, _interaction, _widths, _rates, _edges_of_rates, _compare):
        own = store.of(store.experiment)
        try:
            made = part(own)
        except NotRunError:
            continue
        found |= made
        # Each table comes from the data that its part has read.
        store.sources |= dict.fromkeys(made, own.has_read)
    if not found:
        raise NotRunError(store.out / "data", "holds none of the tables; run 'replay_sizes' first")
    return found


def _metaworld(store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of the runs on Meta-World, and their curves with ``progress`` in (0, 1]."""
    runs, curves = metaworld.load(store)
    curves["progress"] = curves.env_steps / curves.env_steps.max()
    return metaworld.score_runs(runs, curves), curves


def _lags(store: Store) -> Tables:
    """95th percentile of |log r| by replay size, second half of training; its course there."""
    _, curves = scores.load(store, curves=True)
    late = curves[curves.progress > 0.5]
    keys = ["regime", "method", "age", "env", "seed"]
    lags = late.groupby(keys, sort=False).log_ratio_abs_p95.mean().reset_index(name="lag")
    found: Tables = {}
    try:
        done, on_metaworld = _metaworld(store)
    except NotRunError:
        pass
    else:
        sizes = {name: size / metaworld.EPISODE for name, size in metaworld.REGIMES.items()}
        late = on_metaworld[on_metaworld.progress > 0.5]
        by = ["regime", "method", "task", "seed"]
        own = late.groupby(by, sort=False).log_ratio_abs_p95.mean().reset_index(name="lag")
        own["age"] = own.regime.map(sizes)
        own = own.assign(regime="Meta-World").rename(columns={"task": "env"})
        lags = pd.concat([lags, own[own.seed.isin(done.seed)]])
        phases = [
            (regime, method, phase, part.log_ratio_abs_p95.mean(), part.near_zero_fraction.mean())
            for phase, (start, end) in PHASES.items()
            for (regime, method), part in on_metaworld[
                (on_metaworld.progress > start) & (on_metaworld.progress <= end + 1e-6)
            ].groupby(["regime", "method"], sort=False)
        ]
        names = ["regime", "method", "phase", "log_ratio_abs_p95", "near_zero_fraction"]
        found["policy_lag_metaworld"] = pd.DataFrame(phases, columns=names)
    # The mean over tasks within a seed, so that the seed stays the unit.
    return found | {"policy_lag": scores.seed_means(lags, ["regime", "method", "age"], "lag")}


def _pivot(scored: pd.DataFrame, regime: str, method: str, score: str) -> np.ndarray:
    """Scores ``[seeds, tasks]``."""
    own = scored[(scored.regime == regime) & (scored.method == method)]
    return own.pivot(index="seed", columns="task", values=score).to_numpy(float)


def _interaction(store: Store) -> Tables:
    """Scores with the two-episode buffer and on stale data, and what replay adds."""
    done, _ = _metaworld(store)
    if set(done.regime) != set(metaworld.REGIMES):
        raise NotRunError("metaworld_runs", "has one replay size only")
    rows = [
        (regime, method, *stats.bootstrap(_pivot(done, regime, method, "final"), stats.mean))
        for method in done.method.unique()
        for regime in metaworld.REGIMES
    ]
    return {
        "metaworld_interaction": pd.DataFrame(
            rows, columns=["regime", "method", "mean", "low", "high"]
        ),
        "metaworld_interaction_differences": interactions(done),
    }


def interactions(scored: pd.DataFrame) -> pd.DataFrame:
    """What stale replay adds to each method, and how much more it adds to GIPO (sigma 1).

    Args:
        scored: as ``metaworld.score_runs`` gives it.

    Returns:
        a row an effect, method and score: the columns of ``scores.PAIRED`` over paired seeds within
        tasks. Effect ``stale`` or ``fresh`` is GIPO minus the method there,
        ``gain`` a method's stale minus its two-episode score, ``interaction`` the gain of GIPO
        minus that of the method; ``without TASK`` leaves a task out of it.
    """
    rows: list[tuple[Any, ...]] = []
    methods, tasks = scored.method.unique().tolist(), sorted(scored.task.unique())
    others = [name for name in methods if name != OURS and OURS in methods]
    tops = {
        (regime, method): _pivot(scored, regime, method, "top")
        for regime in metaworld.REGIMES
        for method in methods
    }
    all_top = {method: tops["stale", method] * tops["fresh", method] for method in methods}
    for score in ("final", "area"):
        for regime in metaworld.REGIMES:
            for method in others:
                left, right = (_pivot(scored, regime, name, score) for name in (OURS, method))
                both = tops[regime, OURS] * tops[regime, method]
                found = stats.trimmed_difference(left, right, both)
                rows.append((regime, method, score, *found))
        gain = {}
        for method in methods:
            stale, fresh = (_pivot(scored, regime, method, score) for regime in ("stale", "fresh"))
            found = stats.trimmed_difference(stale, fresh, all_top[method])
            rows.append(("gain", method, score, *found))
            gain[method] = stale - fresh
        for method in others:
            parts = gain[OURS], gain[method], all_top[OURS] * all_top[method]
            rows.append(("interaction", method, score, *stats.trimmed_difference(*parts)))
            for index, task in enumerate(tasks if len(tasks) > 1 else []):
                left, right, both = (np.delete(values, index, axis=1) for values in parts)
                found = stats.trimmed_difference(left, right, both)
                rows.append((f"without {task}", method, score, *found))
    return scores._frame(rows, f"effect method score {scores.PAIRED}")


def _widths(store: Store) -> Tables:
    columns = ["regime", "env", "objective", "age", "width", "learning_rate", "seed", "auc"]
    return {"best_width": widths(store.read("tuned_sizes_tuning", columns))}


def widths(tried: pd.DataFrame) -> pd.DataFrame:
    """How good every width is at every replay size, at its best rate in each task.

    Args:
        tried: tuning runs of protocol 2.

    Returns:
        a row a regime, objective, width and size: ``score``, the area normalised per unit (0 the
        worst and 1 the best mean of a setting) and averaged over tasks, ``best_in``, the number of
        tasks in which the width is the best of its objective, and ``tasks``. Ties go to the smaller
        width.
    """
    keys = ["regime", "env", "objective", "age", "width"]
    settings = [*keys[2:], "learning_rate"]
    scaled = scores.normalized(tried, "auc", ["regime", "env"], settings)
    means = scaled.groupby([*keys, "learning_rate"]).score.mean()
    best = means.groupby(keys).max().reset_index(name="score")
    first = best.groupby(keys[:-1]).score.idxmax()
    best["best_in"] = best.index.isin(first).astype(int)
    by = ["regime", "objective", "width", "age"]
    found = best.groupby(by).agg(
        score=("score", "mean"), best_in=("best_in", "sum"), tasks=("env", "nunique")
    )
    found = found.reset_index()
    return found[found.objective != "no_clip"].reset_index(drop=True)


def _tried(store: Store) -> pd.DataFrame:
    tried = store.read("proposal_tuning", [*KEYS, "learning_rate", "seed", "auc"])
    return tried[~tried.env.isin(scores.DROPPED)]


def _rates(store: Store) -> Tables:
    """Tuning area by learning rate at replay 16, and that of the reported runs."""
    tried = _tried(store)
    size = 16 if (tried.age == 16).any() else int(tried.age.max())
    keys = ["regime", "env", "method", "learning_rate"]
    areas = tried[tried.age == size].groupby(keys, sort=False).auc
    table = areas.agg(["mean", "min", "max", "size"]).reset_index()
    runs = store.read("proposal_runs", [*KEYS, "learning_rate", "auc"])
    runs = runs[~runs.env.isin(scores.DROPPED) & (runs.age == size)]
    reported = runs.groupby(keys, sort=False).auc.agg(["mean", "size"]).reset_index()
    table = table.rename(columns={"size": "seeds"}).sort_values(keys, kind="stable")
    reported = reported.rename(columns={"size": "seeds"})
    return {"rates_at_16": table, "rates_at_16_reported": reported}


def _edges_of_rates(store: Store) -> Tables:
    """How many best rates are the smallest or the largest that was tried."""
    tried = _tried(store)
    rates = tried.learning_rate.unique()
    edges = [_edges("proposal", best_rates(tried), rates)]
    try:
        tuning = store.read("tuned_sizes_tuning", ["objective", "width", "age", "auc"])
    except NotRunError:
        pass
    else:
        chosen = scores.choose(tuning)
        rates = tuning.learning_rate.unique()
        edges.append(_edges("protocol 2", chosen[chosen.case == "papers"], rates))
    return {"rates_at_edges": pd.concat(edges)}


def _edges(study: str, chosen: pd.DataFrame, rates: np.ndarray) -> pd.DataFrame:
    """Cells whose best rate is the smallest or the largest that was tried, by replay size."""
    rate = chosen.learning_rate.to_numpy(float)
    found = chosen.assign(
        smallest=np.isclose(rate, min(rates)), largest=np.isclose(rate, max(rates)), cells=1
    )
    counts = found.groupby("age")[["smallest", "largest", "cells"]].sum().reset_index()
    counts.insert(0, "study", study)
    return counts


def _compare(store: Store) -> Tables:
    """GIPO minus every other method, as IQM and as mean, with the share at the ceiling."""
    runs, _ = scores.load(store)
    shown = [OURS, PPO.label, SAPO.label, NO_CLIP.label]
    studies = {"protocol 1": (runs[runs.method.isin(shown)], runs)}
    found: Tables = {}
    try:
        cases, curves = scores.load_cases(store)
    except NotRunError:
        pass
    else:
        studies |= {case: (own, own) for case, own in cases.items()}
        times = [row for case, own in cases.items() for row in _times(case, own, curves)]
        names = ["case", "method", "age", "difference", "low", "high"]
        found["evidence_times"] = pd.DataFrame(times, columns=names)
    rows = [row for study, (own, normal) in studies.items() for row in _means(study, own, normal)]
    columns = f"study regime method age {scores.PAIRED} ceiling ceiling_other runs"
    return found | {"evidence_means": scores._frame(rows, columns)}


def _means(study: str, chosen: pd.DataFrame, all_runs: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Rows of ``evidence_means``: differences in final return by regime, method and size.

    Scores are normalised over ``all_runs``, as the verdicts are. ``ceiling`` and ``ceiling_other``
    are the shares of GIPO's and the other's runs at the ceiling, among the tasks that have one.
    """
    ours = scores.case_label(study if study in scores.CASES else "papers", "gipo")
    for regime in regimes_of(chosen):
        found = scored(all_runs, regime, "final_return")
        for method in (name for name in chosen.method.unique() if name != ours):
            for age in (None, *found.ages):
                tops = [found.at_ceiling(name, age=age) for name in (ours, method)]
                shares = map(stats.known_mean, tops)
                difference = found.minus(ours, method, age)
                count = int(np.isfinite(tops[0]).sum())
                yield (study, regime, method, age or 0, *difference, *shares, count)


def _times(case: str, runs: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """GIPO minus every other method in time to the threshold, by replay size (0: all together)."""
    keys = ["run", "regime", "env", "method", "age", "seed"]
    timed = scores.times(curves.merge(runs[keys], on="run"))
    ours = scores.case_label(case, "gipo")
    for method in (name for name in timed.method.unique() if name != ours):
        for age in (0, *sorted(timed.age.unique())):
            part = timed if age == 0 else timed[timed.age == age]
            left, right = (
                scores.by_seed(part[part.method == name], "time") for name in (ours, method)
            )
            yield (case, method, age, *stats.paired_difference(left, right, stats.mean))
