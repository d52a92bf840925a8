"""RESULTS.md: a verdict on each claim, by the rules of PLAN.md, from the numbers of the figures."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.store import DataError, Store
from gipo_jax.analysis import plots

_DEPARTURES = Path(__file__).with_name("DEPARTURES.md")

REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced here"
GIPO, PPO, SAPO, NO_CLIP = (
    plots.look("gipo", 1.0).label,
    plots.look("ppo_clip").label,
    plots.look("sapo").label,
    plots.look("no_clip").label,
)


class Section(NamedTuple):
    """A section of the report.

    Attributes:
        title: heading.
        verdict: one of the three, or empty.
        text: paragraphs and tables.
        figures: names under ``figures/``.
    """

    title: str
    verdict: str
    text: str
    figures: tuple[str, ...]


def write(out: Path, path: Path) -> None:
    """Writes the report on the tables in ``out`` to ``path``.

    Raises:
        DataError: a table is missing; the message names it.
    """
    sections = [
        _gradients(out),
        _bound(out),
        _concentration(out),
        _replay(out),
        _bias_variance(out),
        _stability(out),
        _efficiency(out),
        _utilization(out),
        _ablations(out),
        Section("Departures from the plan", "", _DEPARTURES.read_text().strip(), ()),
    ]
    folder = Path(os.path.relpath(out.resolve(), path.resolve().parent))
    manifest = Store(out, "report", "").manifest()
    lines = [
        "# Results",
        "",
        f"Written by `python scripts/reproduce.py --plot-only --out {out.as_posix()} --report "
        f"{path.as_posix()}` from the tables in `{folder.as_posix()}`; the rules are those of "
        "[experiments/PLAN.md](experiments/PLAN.md), fixed beforehand. Brackets hold 95 % "
        "bootstrap intervals over seeds.",
        "",
        "| claim | verdict |",
        "|---|---|",
        *(f"| {s.title} | **{s.verdict}** |" for s in sections if s.verdict),
        "",
    ]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.verdict:
            lines += [f"**Verdict: {section.verdict}.**", ""]
        lines += [section.text, ""]
        for figure in section.figures:
            lines += [f"![{figure}]({(folder / 'figures' / figure).as_posix()}.png)", ""]
            lines += [_source(manifest, figure), ""]
    path.write_text("\n".join(lines).rstrip() + "\n")


def _table(out: Path, name: str) -> pd.DataFrame:
    path = out / "tables" / f"{name}.csv"
    if not path.is_file():
        raise DataError(path, "missing; draw the experiment that makes it first")
    return pd.read_csv(path)


def _source(manifest: dict[str, dict[str, dict[str, object]]], figure: str) -> str:
    """Data, command and device of a figure, in one line."""
    entry = manifest["figures"].get(f"figures/{figure}.png")
    if entry is None:
        return ""
    data: dict[str, dict[str, str]] = dict(entry["data"])  # type: ignore[call-overload]
    commands = sorted({source["command"] for source in data.values()})
    devices = sorted({source.get("device", "unknown device") for source in data.values()})
    files = ", ".join(f"`{name}`" for name in data)
    ran = ", ".join(f"`{command}`" for command in commands)
    return f"<sub>{files}; {ran}; {', '.join(devices)}</sub>"


def _cell(row: pd.Series, name: str, low: str = "low", high: str = "high") -> str:
    return f"{row[name]:.3g} [{row[low]:.3g}, {row[high]:.3g}]"


def _markdown(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def signs(intervals: list[tuple[float, float]], better: int) -> str:
    """Verdict on intervals of differences: all on the better side, some and none worse, or not.

    Args:
        intervals: (low, high).
        better: 1 where above zero is better, -1 where below.
    """
    good = [low > 0 if better > 0 else high < 0 for low, high in intervals]
    bad = [high < 0 if better > 0 else low > 0 for low, high in intervals]
    if all(good):
        return REPRODUCED
    return PARTLY if any(good) and not any(bad) else NOT


def _gradients(out: Path) -> Section:
    table = _table(out, "trust_weights")
    far = table[table.log_ratio.abs() == 5]
    gipo = far[far.objective == "gipo"]
    wide = gipo[gipo.sigma >= 0.5]
    ppo = far[(far.objective == "ppo_clip") & (far.log_ratio * far.advantage > 0)]
    zeros = bool((ppo.u == 0).all())
    verdict = NOT
    if zeros and (wide.u > 0).all():
        verdict = REPRODUCED
    elif zeros and (gipo.u > 0).any():
        verdict = PARTLY
    rows = [
        [
            f"{sigma:g}",
            f"{part[part.log_ratio < 0].u.min():.2g}",
            f"{part[part.log_ratio > 0].u.min():.2g}",
        ]
        for sigma, part in gipo.groupby("sigma")
    ]
    text = (
        "Effective weight u of GIPO in float32 at log r = -5 and 5; PPO-Clip's is exactly 0 on the "
        "side it clips. A weight that is not zero can still be far too small to matter (the "
        "near-zero share below counts u < 0.001), and for sigma 0.2 it underflows.\n\n"
    )
    text += _markdown(["sigma", "u at log r = -5", "u at log r = 5"], rows)
    return Section("1. Non-zero gradients at extreme ratios", verdict, text, ("trust_weights",))


def _bound(out: Path) -> Section:
    path = out / "data" / "bounds_magnitude.csv"
    if not path.is_file():
        raise DataError(path, "missing; run experiment 'bounds' first")
    table = pd.read_csv(path)
    error = float((table.measured / table.bound - 1).abs().max())
    text = (
        f"Largest u over log ratios in [-12, 12] against exp(sigma^2 / 2), sigma "
        f"{table.sigma.min():g} to {table.sigma.max():g}: relative difference at most {error:.1g}. "
        f"The bound is tight, and loosens fast: {table.bound.iloc[-1]:.3g} at sigma "
        f"{table.sigma.iloc[-1]:g}."
    )
    verdict = REPRODUCED if error < 1e-3 else NOT
    return Section("2. Implicit, tunable bound on the update magnitude", verdict, text, ())


def _concentration(out: Path) -> Section:
    table = _table(out, "bounds")
    fails = table[["hoeffding_failures", "bernstein_failures"]].to_numpy().max()
    gipo = table[table.sigma == 1].set_index("n")
    plain = table[np.isinf(table.sigma)].set_index("n")
    closer = bool((gipo.error < plain.error).all())
    verdict = REPRODUCED if fails <= 0.05 and closer else PARTLY if fails <= 0.05 else NOT
    crossing = plain.index[plain.error_to_truth < gipo.error_to_truth]
    text = (
        f"Hoeffding's and the empirical Bernstein bound failed in at most {fails:.2%} of repeats "
        f"(5 % allowed). At n = 1024 the 95th percentile of the error about the estimator's own "
        f"mean is {gipo.error[1024]:.3g} for GIPO (sigma 1) and {plain.error[1024]:.3g} for "
        "No-Clip. That mean is not the true gradient: GIPO's error to the truth levels off at its "
        f"bias of {gipo.bias.iloc[0]:.3g}, and No-Clip is nearer to it from "
        + (f"n = {crossing.min()} on." if len(crossing) else "no n tried on.")
    )
    return Section("3. Finite-sample concentration", verdict, text, ("bounds",))


def _replay(out: Path) -> Section:
    table = _table(out, "replay_sizes_comparison")
    table = table[table.score == "final_return"]
    mean = table[table.age == 0]
    deciding = mean[mean.method.isin([PPO, SAPO])]
    verdict = signs(list(zip(deciding.difference_low, deciding.difference_high, strict=True)), 1)
    regimes = table.regime.unique().tolist()
    if len(regimes) < 2:
        verdict = NOT
    rows = []
    for (regime, method), part in table.groupby(["regime", "method"], sort=False):
        cells = [
            _cell(row, "difference", "difference_low", "difference_high")
            for _, row in part.sort_values("age").iterrows()
        ]
        better = part[part.age == 0].iloc[0]
        rows.append([regime, method, *cells, _cell(better, "better", "better_low", "better_high")])
    ages = [str(a) for a in sorted(table.age.unique()) if a]
    header = ["regime", "GIPO σ=1 minus", "all sizes", *(f"replay {a}" for a in ages), "P(better)"]
    text = (
        "IQM of the paired difference in normalised final return, GIPO (sigma 1) minus each "
        "method, and the probability that a run of GIPO is better, over all sizes. Above zero, or "
        "above one half, GIPO is better.\n\n" + _markdown(header, rows)
    )
    elo = _table(out, "replay_sizes_elo")
    rows = [
        [r.regime, r.method, f"{r.elo:.0f} [{r.low:.0f}, {r.high:.0f}]"] for r in elo.itertuples()
    ]
    text += "\n\n" + _markdown(["regime", "method", "Elo"], rows)
    names = [f"replay_sizes_{r.replace('-', '_')}" for r in regimes]
    figures = ("replay_sizes", "replay_sizes_comparison", *names)
    return Section(
        "4. Best among clipping-based baselines across replay sizes", verdict, text, figures
    )


def _bias_variance(out: Path) -> Section:
    table = _table(out, "gridworld_dominated")
    one = table[(table.study == "gridworld") & (table.settings > 0)]
    wins = {
        name: bool((one[one.objective == name].share_above_gipo >= 0.95).all())
        for name in ("ppo_clip", "sapo")
    }
    verdict = REPRODUCED if all(wins.values()) else PARTLY if any(wins.values()) else NOT
    rows = []
    for key, part in table.groupby(["study", "objective"], sort=False):
        study, name = str(key[0]), str(key[1])
        cells = [
            f"{r.share_above_gipo:.0%} of {r.settings!s}" if r.settings else "no setting left"
            for r in part.itertuples()
        ]
        what = "one logit" if study == "gridworld" else "all logits"
        rows.append([what, plots.look(name).label, *cells])
    text = (
        "Share of a baseline's settings (PPO's eps, SAPO's tau) that have more bias than GIPO at "
        "equal variance, exact. For one logit PPO-Clip at eps 0.2 has no gradient at all in cases "
        "A and B. For the whole gradient vector it has: other samples are left, and it is then on "
        "the frontier of the published settings in A and B, though above GIPO's curve.\n\n"
    )
    text += _markdown(["gradient", "baseline", "A", "B", "C"], rows)
    title = "5. Better bias-variance trade-off"
    return Section(title, verdict, text, ("gridworld", "gridworld_vector"))


def _stability(out: Path) -> Section:
    table = _table(out, "stability")
    drop = table[table.quantity == "drop_difference"]
    part = drop[(drop.regime == "reuse-heavy") & drop.method.isin([PPO, SAPO])]
    verdict = signs(list(zip(part.low, part.high, strict=True)), -1) if len(part) else NOT
    rows = []
    for row in drop[drop.method != GIPO].itertuples():
        own = table[(table.regime == row.regime) & (table.method == row.method)]
        counts = own[own.quantity == "diverged"].value
        rows.append(
            [
                row.regime,
                row.method,
                f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]",
                f"{own[own.quantity == 'spread'].value.mean():.3g}",
                f"{own[own.quantity == 'worst'].value.mean():.3g}",
                f"{counts.sum():.0f}",
            ]
        )
    text = (
        "Fall from the best logged return to the final one, GIPO (sigma 1) minus each method "
        "(below zero GIPO is steadier); spread over seeds and worst seed of the method, averaged "
        "over sizes; runs that diverged.\n\n"
    )
    header = ["regime", "method", "GIPO σ=1 minus it, drop", "its spread", "its worst seed"]
    text += _markdown([*header, "diverged"], rows)
    return Section("6. High training stability", verdict, text, ("stability",))


def _efficiency(out: Path) -> Section:
    table = _table(out, "sample_efficiency")
    whole = table[(table.regime == "all") & (table.method != GIPO)]
    part = whole[whole.method.isin([PPO, SAPO])]
    verdict = signs(list(zip(part.difference_low, part.difference_high, strict=True)), -1)
    rows = [
        [
            str(row["regime"]),
            str(row["method"]),
            _cell(row, "time", "time_low", "time_high"),
            f"{row['reached']:.0%}",
            _cell(row, "difference", "difference_low", "difference_high"),
        ]
        for _, row in table[table.age == 0].iterrows()
    ]
    text = (
        "Share of the step budget until the task's threshold, runs that never reach it counting as "
        "1, and the paired difference GIPO (sigma 1) minus each method (below zero GIPO is "
        "faster).\n\n"
    )
    header = ["regime", "method", "restricted mean time", "runs at threshold", "difference"]
    text += _markdown(header, rows)
    return Section("7. Better sample efficiency", verdict, text, ("sample_efficiency",))


def _utilization(out: Path) -> Section:
    table = _table(out, "utilization_groups")
    near = table[table.quantity.str.startswith("near_zero")]
    rows = []
    for (regime, method), part in near.groupby(["regime", "of"], sort=False):
        cells = [
            _cell(part[part.quantity == f"near_zero_fraction_{age}"].iloc[0], "value")
            for age in ("new", "old")
        ]
        rows.append([regime, method, *cells])
    text = (
        "Share of samples with an effective weight below 0.001 at the stalest replay, second half "
        "of training.\n\n" + _markdown(["regime", "method", "new data", "old data"], rows)
    )
    ranks = table[table.quantity == "spearman_near_zero_vs_return"].groupby("regime").value
    for regime, values in ranks:
        low, high = values.min(), values.max()
        text += (
            f"\n\nRank correlation of that share with final return over methods, {regime!s}: "
            f"median {values.median():.2f} over tasks, from {low:.2f} to {high:.2f}."
        )
    return Section(
        "Utilization: does clipping collapse, and does return follow?",
        "",
        text,
        ("utilization", "utilization_groups"),
    )


def _ablations(out: Path) -> Section:
    studies = ("sigma", "asymmetry", "kernel", "token_vs_joint")
    drawn = tuple(name for name in studies if (out / "figures" / f"{name}.png").is_file())
    text = "Described, not judged: see the plan. Final return, mean over seeds."
    missing = [name for name in studies if name not in drawn]
    if missing:
        text += f" Not run yet at this scale: {', '.join(missing)}."
    tables = [_ablation_table(_table(out, name)) for name in drawn]
    return Section("Ablations", "", "\n\n".join([text, *tables]), drawn)


def _ablation_table(table: pd.DataFrame) -> str:
    """A row a setting, a column a task and replay size."""
    where = [name for name in ("env", "age") if name in table]
    settings = [name for name in table if name not in (*where, "mean", "low", "high", "seeds")]
    places = list(dict.fromkeys(table[where].itertuples(index=False, name=None)))
    names = [" ".join([*map(str, place[:-1]), f"replay {place[-1]}"]) for place in places]
    rows = []
    for setting, part in table.groupby(settings, sort=True):
        cells = part.set_index(where)
        by_place = [cells.loc[place if len(where) > 1 else place[0]] for place in places]
        rows.append([*setting, *(_cell(cell, "mean") for cell in by_place)])
    return _markdown([*settings, *names], rows)
