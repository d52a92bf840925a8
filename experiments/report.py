"""RESULTS.md: a verdict on each claim, by the rules of PLAN.md, from the numbers of the figures.

First what fits into five minutes: a table of verdicts, what they rest on, one figure per claim, and
what changed between the protocols; then the details.
"""

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import experiments
from experiments import age_and_size, evidence, metaworld, proposal, training, tuned_sizes
from experiments.evidence import REUSE
from experiments.markdown import markdown
from experiments.store import DataError, Store
from experiments.verdicts import NOT, OPEN, PARTLY, REPRODUCED, signs
from gipo_jax.analysis import plots

_DEPARTURES = Path(__file__).with_name("DEPARTURES.md")

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
        figures: names under ``figures/``; the first of a claim is its one figure up front.
        short: the finding in one sentence, for claims.
    """

    title: str
    verdict: str
    text: str
    figures: tuple[str, ...]
    short: str = ""


def write(out: Path, path: Path) -> None:
    """Writes the report on the tables in ``out`` to ``path``.

    Raises:
        DataError: a table is missing; the message names it.
    """
    claims = [
        _gradients(out),
        _bound(out),
        _concentration(out),
        _replay(out),
        _bias_variance(out),
        _stability(out),
        _efficiency(out),
    ]
    second = Protocol2(out)
    departures = _DEPARTURES.read_text().partition("\n")[2]  # without its title
    details = [
        *claims,
        second.section(),
        _metaworld(out),
        _age_and_size(out),
        _proposal(out),
        _utilization(out),
        _ablations(out),
        Section("Departures from the plan", "", departures.strip(), ()),
    ]
    folder = Path(os.path.relpath(out.resolve(), path.resolve().parent))
    manifest = Store(out, "report", "").manifest()

    shown = set()

    def figure(name: str) -> list[str]:
        if name in shown:
            return []
        shown.add(name)
        image = f"![{name}]({(folder / 'figures' / name).as_posix()}.png)"
        return [image, "", _source(manifest, name), ""]

    own_ground = _metaworld_verdicts(out)
    rows = [
        [
            section.title,
            f"**{section.verdict}**",
            *second.verdicts(number),
            own_ground.get(number, "not trained"),
            section.short,
        ]
        for number, section in enumerate(claims, 1)
    ]
    header = ["claim", "protocol 1", "protocol 2, paper's widths", "protocol 2, tuned widths"]
    header.append("Meta-World")
    lines = [
        "# Results",
        "",
        f"Written by `python scripts/reproduce.py --plot-only --out {out.as_posix()} --report "
        f"{path.as_posix()}` from the tables in `{folder.as_posix()}`; the rules are those of "
        "[experiments/PLAN.md](experiments/PLAN.md), fixed beforehand. Brackets hold 95 % "
        "bootstrap intervals over seeds. Final return is the mean training return of the episodes "
        "that ended in the last logged points covering at least a tenth of training, the last 2 of "
        "16 points. u is the effective weight, the factor on A * grad log pi "
        "([docs/objectives.md](docs/objectives.md)). Replay n holds the last n iterations of data. "
        "Low and high reuse are 4 and 16 updates an iteration (MinAtar 2 and 4); tables in `data` "
        "and some figures call them gentle and reuse-heavy. On Meta-World the two-episode buffer "
        "is `fresh` in the data: it is not fresh as the authors' regime is "
        "([docs/metaworld.md](docs/metaworld.md)).",
        "",
        "## Verdicts",
        "",
        markdown([*header, "what decides it in protocol 1"], rows),
        "",
        f"{second.status} Claims 1, 2, 3 and 5 are computed, not trained, and need no second "
        "protocol." + ("" if own_ground else " No comparison on Meta-World has been run."),
        "",
        "Claims 4, 6 and 7: width and shape are confounded, so that no verdict on them is one on "
        "the Gaussian.",
        "",
    ]
    commands = [str(entry["command"]) for entry in manifest["data"].values()]
    rest = []
    if all("--preset committed" in command for command in commands):
        rest = evidence.findings(functools.partial(_table, out))
    if rest:
        lines += ["## What the verdicts rest on", "", _AFTERWARDS, ""]
    for finding in rest:
        lines += [f"### {finding.title}", "", finding.text, ""]
        for name, caption in finding.figures:
            lines += [*figure(name), caption, ""]
    lines += ["## One figure per claim", ""]
    for number, section in enumerate(claims, 1):
        lines += [f"**{section.title}.** {section.short}", ""]
        for name in second.figure(number) or section.figures[:1]:
            lines += figure(name)
    lines += ["## What changed between the protocols, and why", "", second.changes(), ""]
    if second.finished:
        lines += figure("tuned_sizes_rates")
    lines += ["# Details", ""]
    for section in details:
        lines += [f"## {section.title}", ""]
        if section.verdict:
            trained = claims.index(section) + 1 in tuned_sizes.JUDGED
            which = "Verdict of protocol 1" if trained else "Verdict"
            lines += [f"**{which}: {section.verdict}.**", ""]
        lines += [section.text, ""]
        for name in section.figures:
            lines += figure(name)
    lines += ["## Further studies", "", "Beyond the claims of the paper.", ""]
    entries = manifest["figures"].items()
    left = {
        Path(name).stem: str(entry["experiment"])
        for name, entry in entries
        if name.endswith(".png") and Path(name).stem not in shown
    }
    for experiment in dict.fromkeys(left.values()):
        module = experiments.REGISTRY[experiment]
        lines += [f"**{experiment}**: {module.QUESTION}", ""]
        if hasattr(module, "findings"):
            lines += [module.findings(functools.partial(_table, out)), ""]
        for name in (name for name, owner in left.items() if owner == experiment):
            lines += figure(name)
    path.write_text("\n".join(lines).rstrip() + "\n")


_AFTERWARDS = (
    "Written after the results were seen; the verdicts above keep the rules fixed beforehand. "
    "Means are of paired differences, GIPO (sigma 1) minus the other method where nothing else "
    "is said, with 95 % bootstrap intervals over seeds within tasks."
)


class Protocol2:
    """Verdicts and tables of protocol 2, or of the part of it that has finished."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.finished = (out / "tables" / "tuned_sizes_comparison.csv").is_file()
        if self.finished:
            self.table = _table(out, "tuned_sizes_comparison")
            units = _table(out, "tuned_sizes_units")
            self.count, self.planned = int(units.finished.sum()), len(units)
        else:
            self.count = 0
            self.planned = len(tuned_sizes.units(tuned_sizes.SCALES["committed"]))

    @property
    def status(self) -> str:
        """How much of it has finished."""
        text = f"Protocol 2: {self.count} of {self.planned} units have finished"
        return text + ("." if self.count == self.planned else "; what is shown of it is partial.")

    def verdict(self, claim: int, case: str, *, corrected: bool = True) -> str:
        """The verdict on a claim; ``corrected`` for the number of comparisons."""
        if not self.finished:
            return OPEN
        table = self.table
        part = table[table.judged & (table.claim == claim) & (table.case == case)]
        regimes = set(table.regime) - {"all"}
        if len(part) < tuned_sizes.JUDGED[claim] or len(regimes) < len(training.REGIMES):
            return OPEN
        low, high = part.low.to_numpy(float), part.high.to_numpy(float)
        if corrected:
            counts = part.p_holm.to_numpy(float) < tuned_sizes.LEVEL
            estimate = part.difference.to_numpy(float)
            low, high = np.where(counts, estimate, -np.inf), np.where(counts, estimate, np.inf)
        intervals = list(zip(low.tolist(), high.tolist(), strict=True))
        return signs(intervals, 1 if claim == 4 else -1)

    def verdicts(self, claim: int) -> list[str]:
        """Cells of the table of verdicts, one per case."""
        if claim not in tuned_sizes.JUDGED:
            return ["not trained"] * 2
        partial = "" if self.count == self.planned else f" ({self.count} of {self.planned} units)"
        return [f"**{self.verdict(claim, case)}**{partial}" for case in tuned_sizes.JUDGED_CASES]

    def figure(self, claim: int) -> tuple[str, ...]:
        """The figure that shows the claim under protocol 2, once anything has finished."""
        if not self.finished:
            return ()
        return {4: ("tuned_sizes",), 6: ("tuned_sizes_comparison",)}.get(claim, ())

    def changes(self) -> str:
        """What differs from protocol 1, why, and what it did."""
        text = (
            "Protocol 1 tuned the learning rate at 16 iterations of replay, on two seeds, and used "
            "it at 1 and 128: a method whose best rate moves with the replay size is then judged "
            "at a bad rate. Protocol 2 tunes it at each size, among four rates on five seeds that "
            "are never reported; judges the methods twice, with the paper's widths and with widths "
            "tuned on the same budget; drops Pendulum, which nothing learnt with low reuse; "
            "leaves MinAtar, which had been cut short, to the full scale; and corrects "
            "for its 16 comparisons (Holm)."
        )
        if not self.finished:
            return text
        choices = _table(self.out, "tuned_sizes_choices")
        papers = choices[choices.case == "papers"]
        rates = papers.pivot(
            index=["regime", "env", "objective"], columns="age", values="learning_rate"
        )
        sizes = [age for age in rates if age != 16]
        moved = sum(int((rates[age] != rates[16]).sum()) for age in sizes) if 16 in rates else 0
        judged = self.table[self.table.judged]
        alone = int(((judged.low > 0) | (judged.high < 0)).sum())
        holm = int((judged.p_holm < tuned_sizes.LEVEL).sum())
        return text + (
            f"\n\nThe best rate at another size differs from the one at 16 in {moved} of "
            f"{len(rates) * len(sizes)} cases (method, unit, size), with the paper's widths. "
            f"Of {len(judged)} judged comparisons {alone} have an interval without zero, and "
            f"the correction leaves {holm}."
        )

    def section(self) -> Section:
        """The details."""
        title = "Protocol 2: every method tuned at every replay size"
        if not self.finished:
            return Section(title, "", f"{self.status} Nothing is reported yet.", ())
        judged = self.table[self.table.judged].sort_values("claim", kind="stable")
        rows = [
            [
                f"{row['claim']}",
                row["case"],
                REUSE.get(row["regime"], row["regime"]),
                row["method"],
                _cell(row, "difference"),
                self.mean(row),
                f"{row['p']:.2g}",
                f"{row['p_holm']:.2g}",
            ]
            for _, row in judged.iterrows()
        ]
        header = ["claim", "case", "reuse", "GIPO minus", "difference", "mean", "p", "Holm p"]
        text = (
            f"{self.status} Claim 4: final return, above zero GIPO is better. Claim 6: drop from "
            "the peak, and claim 7: time to the threshold, below zero GIPO is better. Differences "
            "are IQMs for claims 4 and 6 and means for claim 7; beside claim 4 stands its mean. "
            f"{_CONFOUNDED}\n\n" + markdown(header, rows)
        )
        rows = [
            [
                f"{claim}",
                *(
                    self.verdict(claim, case, corrected=corrected)
                    for case in tuned_sizes.JUDGED_CASES
                    for corrected in (True, False)
                ),
            ]
            for claim in tuned_sizes.JUDGED
        ]
        header = ["claim", "papers", "papers, uncorrected", "tuned", "tuned, uncorrected"]
        text += "\n\nVerdicts with and without the correction:\n\n" + markdown(header, rows)
        finals = self.table[self.table.claim == 4]
        ages = sorted(age for age in finals.age.unique() if age)
        rows = [
            [str(case), REUSE[str(regime)], str(method)]
            + [_cell(part[part.age == age].iloc[0], "difference") for age in (0, *ages)]
            for (case, regime, method), part in finals.groupby(
                ["case", "regime", "method"], sort=False
            )
        ]
        header = ["case", "reuse", "GIPO minus", "all sizes", *(f"replay {age}" for age in ages)]
        text += "\n\nFinal return by size, IQM, all cases (one rate: not judged):\n\n"
        text += markdown(header, rows)
        means = _table(self.out, "evidence_means")
        text += f"\n\nThe same as means. {_SHARES}\n\n"
        text += evidence.means_table(means, tuned_sizes.CASES)
        text += "\n\nChosen widths and rates: `tables/tuned_sizes_choices.csv`."
        text += "\n\n" + self.cell()
        return Section(title, "", text, ("tuned_sizes", "tuned_sizes_comparison"))

    def mean(self, row: pd.Series) -> str:
        """The mean beside the IQM of a comparison of claim 4, else a dash."""
        if row["claim"] != 4:
            return "-"
        means: Any = _table(self.out, "evidence_means")
        means = means.set_index(["study", "regime", "method", "age"])
        return evidence.signed(means.loc[(row["case"], row["regime"], row["method"], 0)], "mean")

    def cell(self) -> str:
        """How to train one cell again with other seeds, and what to compare it with."""
        choices, runs = _table(self.out, "tuned_sizes_choices"), _data(self.out, "tuned_sizes_runs")
        papers = choices[(choices.case == "papers") & (choices.objective == "gipo")]
        chosen = papers[papers.age == sorted(papers.age.unique())[len(papers.age.unique()) // 2]]
        regime, env, age, rate = chosen.iloc[0][["regime", "env", "age", "learning_rate"]]
        own = runs[(runs.regime == regime) & (runs.env == env) & (runs.objective == "gipo")]
        own = own[(own.age == age) & (own.width == 1) & np.isclose(own.learning_rate, rate)]
        found = plots.summarize(own, ["env"], "final_return").iloc[0]
        unit = next(
            unit
            for unit in tuned_sizes.units(tuned_sizes.SCALES["committed"])
            if unit.regime == regime and unit.task.env == env
        )
        settings = training.COMMON | unit.task.settings
        settings |= {
            "env": env,
            "objective": "gipo",
            "sigma": 1.0,
            "learning_rate": rate,
            "updates_per_iteration": unit.task.updates[regime],
            "buffer_size": age * unit.task.block,
            "seeds": 10,
            "seed_offset": 5100,
            "out": "runs/cell",
        }
        options = " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in settings.items()
        )
        return (
            f"One cell again with other seeds ({env}, {REUSE[str(regime)]}, GIPO sigma 1, "
            f"replay of {age}, final return {_cell(found, 'mean')}):\n\n"
            f"    gipo-jax sweep {options}"
        )


_WORDS = {11: "eleven"}
_CONFOUNDED = "Width and shape are confounded: see what the verdicts rest on."
_SHARES = (
    "In brackets the shares of GIPO's and of the other's runs that end at the ceiling, of the "
    "tasks that have one."
)


def _metaworld(out: Path) -> Section:
    title = "Meta-World, the paper's own ground"
    if not _has_metaworld(out):
        return Section(title, "", "Planned, not run yet.", ())
    text = metaworld.findings(functools.partial(_table, out))
    if (out / "tables" / "metaworld_interaction_differences.csv").is_file():
        both: Any = _table(out, "metaworld_interaction_differences")
        rows = [
            [
                metaworld.SHOWN_AS[str(regime)],
                method,
                *(
                    evidence.signed(part.set_index("score").loc[score])
                    for score in ("final", "area")
                ),
            ]
            for (regime, method), part in both[
                both.effect.isin(metaworld.REGIMES) & (both.statistic == "mean")
            ].groupby(["effect", "method"], sort=False)
        ]
        text += "\n\nMeans beside the IQMs. " + _CONFOUNDED + "\n\n"
        text += markdown(["regime", "GIPO σ=1 minus", "final return", "area"], rows)
    names = ("metaworld", "metaworld_scores", "metaworld_utilization")
    return Section(title, "", text, names)


def _metaworld_verdicts(out: Path) -> dict[int, str]:
    """Cells of the table of verdicts by claim; none while nothing has run."""
    if not _has_metaworld(out):
        return {}
    table = _table(out, "metaworld_comparison")
    seeds = f"{table.seeds.min()} of {len(metaworld.SCALES['committed'].seeds)} seeds"
    return {
        claim: f"**{verdict}** ({seeds})" for claim, verdict in metaworld.verdicts(table).items()
    }


def _has_metaworld(out: Path) -> bool:
    return (out / "tables" / "metaworld_comparison.csv").is_file()


def _age_and_size(out: Path) -> Section:
    title = "Age of the data apart from the size of the buffer"
    if not (out / "tables" / "age_and_size_effects.csv").is_file():
        return Section(title, "", "Planned, not run yet.", ())
    effects, units = _table(out, "age_and_size_effects"), _table(out, "age_and_size_units")
    rows = [
        [
            str(method),
            *(
                _cell(part[part.effect == name].iloc[0], "difference")
                for name in ("older", "wider")
            ),
        ]
        for method, part in effects.groupby("method", sort=False)
    ]
    text = (
        f"**This measures a cold start, not the age of data alone.** {_cold_start()}\n\n"
        f"{units.finished.sum()} of {len(units)} tasks, high reuse. Change of the normalised "
        "final return from the fewest to the most iterations held back, the amount of data being "
        "equal (older), and from the narrowest to the widest window, what is held back being equal "
        "(wider).\n\n"
    )
    text += markdown(["method", "older", "wider"], rows)
    below = {
        name: f"{(part.high < 0).sum()} of {len(part)} methods"
        for name, part in effects.groupby("effect")
    }
    text += (
        f"\n\nIntervals below zero: older {below['older']}, wider {below['wider']}. Mean change "
        "over methods: "
        + ", ".join(
            f"{name} {part.difference.mean():.2f}"
            for name, part in effects.groupby("effect", sort=False)
        )
        + "."
    )
    return Section(title, "", text, ("age_and_size", "age_and_size_utilization"))


def _cold_start() -> str:
    """How often the first block is used before a held-back window moves on."""
    scale = age_and_size.SCALES["committed"]
    held_back = max(scale.min_ages)
    task = scale.tasks[0]
    block = task.block
    passes = held_back * task.updates[age_and_size.REGIME] * training.COMMON["batch_size"] // block
    lengths = " or ".join(str(unit.settings["total_steps"] // unit.block) for unit in scale.tasks)
    return (
        f"While no data is as old as asked for, a run samples the oldest block. With {held_back} "
        f"iterations held back that is the first one for {held_back} iterations of {lengths}: "
        f"{passes} passes over {block} transitions of an untrained policy before the first other "
        "block can be drawn. How much of `older` is this start and how much the age is not known."
    )


def _proposal(out: Path) -> Section:
    title = "The project's own objective"
    if not (out / "tables" / "proposal.csv").is_file():
        developed = (out / "figures" / "proposal_development.png").is_file()
        figures = ("proposal_development",) if developed else ()
        state = "Its development has run; the" if developed else "Its development and the"
        return Section(title, "", f"{state} comparison of the plan has not run yet.", figures)
    table, units = _table(out, "proposal"), _table(out, "proposal_units")
    overall = table[table.age == 0]
    best = table[table.best & (table.age > 0)]
    no_worse = bool((best.high >= 0).all())
    better = (overall.difference > 0) & (overall.p_holm < tuned_sizes.LEVEL)
    verdict = "reached" if no_worse and better.all() else "missed"
    if verdict == "missed" and (no_worse or better.any()):
        verdict = "partly reached"
    if not units.finished.all():
        verdict = "open"
    worse = (overall.difference < 0) & (overall.p_holm < tuned_sizes.LEVEL)
    found = (
        f"It beats {'none' if not better.any() else int(better.sum())} of the "
        f"{_WORDS.get(len(overall), len(overall))} baselines over all sizes, and is worse than "
        f"{' and '.join(overall[worse].method) or 'none'} after Holm's correction."
    )
    rows = [
        [str(row["method"]), _cell(row, "difference"), f"{row['p_holm']:.2g}"]
        for _, row in overall.iterrows()
    ]
    text = (
        f"Aim: **{verdict}**, {units.finished.sum()} of {len(units)} units. {found} Normalised "
        "area, the proposal minus every other method, over all sizes:\n\n"
        + markdown(["method", "difference", "Holm p"], rows)
        + "\n\nAgainst the best other method at each size:\n\n"
        + markdown(
            ["replay", "best other", "difference"],
            [[row["age"], row["method"], _cell(row, "difference")] for _, row in best.iterrows()],
        )
    )
    by_unit = _table(out, "proposal_by_unit")
    missed = by_unit[by_unit.high < 0]
    text += (
        f"\n\nUnits and sizes where the best other method is ahead: {len(missed)} of {len(by_unit)}"
        f" (ours is ahead in {(by_unit.low > 0).sum()}, open in the rest).\n\n"
    )
    text += markdown(
        ["reuse", "task", "replay", "best other", "difference"],
        [
            [REUSE[row["regime"]], row["env"], row["age"], row["best"], _cell(row, "difference")]
            for _, row in missed.iterrows()
        ],
    )
    text += (
        "\n\nWidths are not tuned, and many best rates are the largest tried: see what the "
        "verdicts rest on, with the tuning areas at replay 16."
    )
    if dropped := sorted(set(units.env) & set(proposal.DROPPED)):
        whole = _table(out, "proposal_without_dropping")
        ahead = whole[(whole.age == 0) & (whole.low > 0)].method
        behind = whole[(whole.age == 0) & (whole.high < 0)].method
        text += (
            f"\n\n{', '.join(dropped)} is dropped by the plan's rule. With it the proposal is ahead"
            f" of {', '.join(ahead) or 'none'} over all sizes, and behind"
            f" {', '.join(behind) or 'none'} (intervals without 0)."
        )
    return Section(title, "", text, ("proposal",))


def _table(out: Path, name: str) -> pd.DataFrame:
    path = out / "tables" / f"{name}.csv"
    if not path.is_file():
        raise DataError(path, "missing; draw the experiment that makes it first")
    return pd.read_csv(path)


def _data(out: Path, name: str) -> pd.DataFrame:
    return Store(out, "report", "").read(name, [])


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
    text += markdown(["sigma", "u at log r = -5", "u at log r = 5"], rows)
    short = (
        f"At log r = -5 and 5 the smallest u of GIPO is {wide.u.min():.1g} for sigma >= 0.5 and "
        f"{gipo[gipo.sigma < 0.5].u.min():.1g} below; PPO-Clip's is {abs(ppo.u).max():.1g}."
    )
    title = "1. Non-zero gradients at extreme ratios"
    return Section(title, verdict, text, ("trust_weights",), short)


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
    short = (
        f"The largest u is exp(sigma^2 / 2) to {error:.0e}: the peaks of GIPO's curves in the "
        "figure of claim 1."
    )
    return Section("2. Implicit, tunable bound on the update magnitude", verdict, text, (), short)


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
    short = (
        f"The bounds fail in at most {fails:.2%} of repeats; 95 % error about the own mean at "
        f"n = 1024 {gipo.error[1024]:.2g}, No-Clip {plain.error[1024]:.2g}. About the truth "
        "No-Clip is nearer"
        + (f" from n = {crossing.min()} on." if len(crossing) else " at no n tried.")
    )
    return Section("3. Finite-sample concentration", verdict, text, ("bounds",), short)


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
        cells.append(_cell(better, "better", "better_low", "better_high"))
        rows.append([REUSE[str(regime)], method, *cells])
    ages = [str(a) for a in sorted(table.age.unique()) if a]
    header = ["reuse", "GIPO σ=1 minus", "all sizes", *(f"replay {a}" for a in ages), "P(better)"]
    text = (
        "IQM of the paired difference in normalised final return, GIPO (sigma 1) minus each "
        "method, and the probability that a run of GIPO is better, over all sizes. Above zero, or "
        f"above one half, GIPO is better. {_CONFOUNDED}\n\n" + markdown(header, rows)
    )
    means = _table(out, "evidence_means")
    text += f"\n\nThe same as means. {_SHARES}\n\n"
    text += evidence.means_table(means, ["protocol 1"])
    elo = _table(out, "replay_sizes_elo")
    rows = [
        [REUSE[str(r.regime)], r.method, f"{r.elo:.0f} [{r.low:.0f}, {r.high:.0f}]"]
        for r in elo.itertuples()
    ]
    text += "\n\n" + markdown(["reuse", "method", "Elo"], rows)
    names = [f"replay_sizes_{r.replace('-', '_')}" for r in regimes]
    figures = ("replay_sizes", "replay_sizes_comparison", *names)
    own: Any = means[(means.study == "protocol 1") & (means.age == 0)]
    own = own.set_index(["regime", "method"])
    cells = [
        f"{REUSE[row['regime']]}, {row['method']}: "
        + _cell(row, "difference", "difference_low", "difference_high")
        + f", mean {evidence.signed(own.loc[(row['regime'], row['method'])], 'mean')}"
        for _, row in deciding.iterrows()
    ]
    short = f"Final return, GIPO (sigma 1) minus the baseline, IQM and mean. {'; '.join(cells)}."
    title = "4. Best among clipping-based baselines across replay sizes"
    return Section(title, verdict, text, figures, short)


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
        "equal variance, exact. The data comes from a uniform policy (A), from one near the target "
        "(C), or from one between (B). For one logit PPO-Clip at eps 0.2 has no gradient at all in "
        "cases A and B. For the whole gradient vector it has: other samples are left, and it is "
        "then on the frontier of the published settings in A and B, though above GIPO's curve.\n\n"
    )
    text += markdown(["gradient", "baseline", "A", "B", "C"], rows)
    title = "5. Better bias-variance trade-off"
    shares = [
        f"{plots.look(str(name)).label} {part.share_above_gipo.min():.0%}"
        for name, part in one.groupby("objective")
    ]
    short = (
        "Share of a baseline's settings that have more bias than GIPO at equal variance in an "
        f"exact GridWorld, the least of three behaviour policies: {', '.join(shares)}."
    )
    return Section(title, verdict, text, ("gridworld", "gridworld_vector"), short)


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
                REUSE[str(row.regime)],
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
        "over sizes; runs that diverged. Both returns are scores of training episodes, with the "
        f"bias of these. {_CONFOUNDED}\n\n"
    )
    header = ["reuse", "method", "GIPO σ=1 minus it, drop", "its spread", "its worst seed"]
    text += markdown([*header, "diverged"], rows)
    cells = [f"{row['method']} {_cell(row, 'value')}" for _, row in part.iterrows()]
    short = f"Drop from the peak, GIPO (sigma 1) minus the baseline: {', '.join(cells)}."
    return Section("6. High training stability", verdict, text, ("stability",), short)


def _efficiency(out: Path) -> Section:
    table = _table(out, "sample_efficiency")
    whole = table[(table.regime == "all") & (table.method != GIPO)]
    part = whole[whole.method.isin([PPO, SAPO])]
    verdict = signs(list(zip(part.difference_low, part.difference_high, strict=True)), -1)
    rows = [
        [
            REUSE.get(str(row["regime"]), str(row["regime"])),
            str(row["method"]),
            _cell(row, "time", "time_low", "time_high"),
            f"{row['reached']:.0%}",
            _cell(row, "difference", "difference_low", "difference_high"),
        ]
        for _, row in table[table.age == 0].iterrows()
    ]
    text = (
        "Share of the step budget until the task's threshold, runs that never reach it counting as "
        "1, and the mean paired difference GIPO (sigma 1) minus each method (below zero GIPO is "
        f"faster). {_CONFOUNDED}\n\n"
    )
    header = ["reuse", "method", "restricted mean time", "runs at threshold", "difference"]
    text += markdown(header, rows)
    cells = [
        f"{row['method']} {_cell(row, 'difference', 'difference_low', 'difference_high')}"
        for _, row in part.iterrows()
    ]
    short = f"Time to the threshold, GIPO (sigma 1) minus the baseline: {', '.join(cells)}."
    return Section("7. Better sample efficiency", verdict, text, ("sample_efficiency",), short)


def _utilization(out: Path) -> Section:
    table = _table(out, "utilization_groups")
    near = table[table.quantity.str.startswith("near_zero")]
    rows = []
    for (regime, method), part in near.groupby(["regime", "of"], sort=False):
        cells = [
            _cell(part[part.quantity == f"near_zero_fraction_{age}"].iloc[0], "value")
            for age in ("new", "old")
        ]
        rows.append([REUSE[str(regime)], method, *cells])
    text = (
        "Share of samples with an effective weight below 0.001 at the stalest replay, second half "
        "of training.\n\n" + markdown(["reuse", "method", "new data", "old data"], rows)
    )
    ranks = table[table.quantity == "spearman_near_zero_vs_return"].groupby("regime").value
    for regime, values in ranks:
        low, high = values.min(), values.max()
        text += (
            "\n\nRank correlation of that share with final return over methods, "
            f"{REUSE[str(regime)]}: median {values.median():.2f} over tasks, from {low:.2f} to "
            f"{high:.2f}."
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
    """One row per setting, one column per task and replay size."""
    where = [name for name in ("env", "age") if name in table]
    settings = [name for name in table if name not in (*where, "mean", "low", "high", "seeds")]
    places = list(dict.fromkeys(table[where].itertuples(index=False, name=None)))
    names = [" ".join([*map(str, place[:-1]), f"replay {place[-1]}"]) for place in places]
    rows = []
    for setting, part in table.groupby(settings, sort=True):
        cells = part.set_index(where)
        by_place = [cells.loc[place if len(where) > 1 else place[0]] for place in places]
        rows.append([*setting, *(_cell(cell, "mean") for cell in by_place)])
    return markdown([*settings, *names], rows)
