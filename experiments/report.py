"""Fills the tables of a report: Markdown written by hand, with blocks that are generated.

A block begins with a line ``<!-- table: NAME -->`` and ends with ``<!-- end -->``; what is between
them comes from ``OUT/tables``. Prose is nobody's but the author's:
``tests/experiments/test_evidence.py`` computes its numbers again from the stored data.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gipo_jax.analysis import plots

from . import claims, flow, metaworld, scores, sequences
from .claims import Read, cell, ends
from .store import NotRunError, Store
from .tasks import NO_CLIP, PPO, REGIMES, REUSE

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

STUDIES = {
    "protocol 1": "protocol 1",
    "papers": "protocol 2, paper's widths",
    "tuned": "protocol 2, tuned widths",
    "one rate": "protocol 2, one rate for all sizes",
}
"""What tables call the cases of ``evidence_means``."""


def write(out: Path, path: Path) -> None:
    """Fills the blocks of the report at ``path`` with the tables in ``out``.

    Where there is no such file one with all blocks is made. A block whose study has not run says
    so.
    """
    stored = Store(out, "report", "")

    def read(name: str) -> pd.DataFrame:
        # The one table of stored data that a verdict needs.
        return stored.read(name, []) if name == "bounds_magnitude" else stored.scores(name)

    def filled(match: re.Match[str]) -> str:
        name = match[2]
        try:
            text = sources(stored) if name == "sources" else BLOCKS[name](read)
        except NotRunError:
            text = "Not run: nothing is stored yet."
        return f"{match[1]}\n{text}\n\n{match[3]}"

    if path.exists():
        report = path.read_text()
    else:
        blocks = [f"<!-- table: {name} -->\n<!-- end -->\n" for name in (*BLOCKS, "sources")]
        report = "\n".join(["# Results\n", *blocks])
    path.write_text(BLOCK.sub(filled, report))


def markdown(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table with a row of column names."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def signed(row: Any, name: str = "difference") -> str:
    """An estimate with its sign and its interval, two digits each."""
    low, high = ("low", "high") if name == "difference" else ends(name)[1:]
    return f"{row[name]:+.2f} [{row[low]:.2f}, {row[high]:.2f}]"


BESIDE = ["mean", "both at ceiling"]
"""Columns beside a paired difference by its interquartile mean."""


def beside(row: Any) -> list[str]:
    """What stands in them."""
    return [signed(row, "mean"), claims.share(row.both_at_ceiling)]


def sources(store: Store) -> str:
    """Data, command and device of every figure."""
    rows = []
    for name, entry in store.manifest()["figures"].items():
        if name.endswith(".png"):
            data = entry["data"].values()
            files = [Path(file).name for file in entry["data"]]
            commands = dict.fromkeys(f"`{source['command']}`" for source in data)
            devices = dict.fromkeys(source.get("device", "unknown") for source in data)
            figure = Path(name).stem
            rows.append([figure, ", ".join(files), ", ".join(commands), ", ".join(devices)])
    return markdown(["figure", "data", "command", "device"], rows)


# The blocks.


def _wide(
    table: pd.DataFrame, index: Sequence[str], value: Callable[[Any], str], first: Any = 0
) -> str:
    """A row for each of ``index`` and a column for each replay size, 0 being all of them."""
    ages = [first, *sorted(age for age in table.age.unique() if age)]
    rows = [
        [
            *(REUSE.get(str(k), k) for k in key),
            *(value(own.set_index("age").loc[age]) for age in ages),
        ]
        for key, own in table.groupby(list(index), sort=False)
    ]
    names = ["all sizes", *(f"replay {age}" for age in ages[1:])]
    header = ["reuse" if name == "regime" else name for name in index]
    return markdown([*("GIPO minus" if n == "method" else n for n in header), *names], rows)


def _verdicts(read: Read) -> str:
    header = ["claim", "protocol 1", "protocol 2, paper's widths", "protocol 2, tuned widths"]
    return markdown([*header, "Meta-World", "what decides it in protocol 1"], claims.table(read))


def _no_clip(read: Read) -> str:
    means, times = read("evidence_means"), read("evidence_times")
    own = means[(means.method == NO_CLIP.label) & (means.age == 0)]
    times = times[(times.method == NO_CLIP.label) & (times.age == 0)].set_index("case")
    rows = []
    for study, name in STUDIES.items():
        part = own[own.study == study].set_index("regime")
        time = signed(times.loc[study]) if study in times.index else "-"
        rows.append([name, *(signed(part.loc[regime], "mean") for regime in REGIMES), time])
    finals = [f"final return, {REUSE[regime]}" for regime in REGIMES]
    return markdown(["study", *finals, "time to the threshold"], rows)


def _ceilings(read: Read) -> str:
    means: Any = read("evidence_means").set_index(["study", "regime", "method", "age"])
    pairs = [(study, "reuse-heavy") for study in ("papers", "tuned", "one rate", "protocol 1")]
    rows = []
    for study, regime in [*pairs, ("papers", "gentle"), ("protocol 1", "gentle")]:
        row = means.loc[(study, regime, PPO.label, 16)]
        shares = [f"{row.ceiling:.0%}", f"{row.ceiling_other:.0%}"]
        rows.append([STUDIES[study], REUSE[regime], signed(row), *beside(row), *shares])
    header = ["study", "reuse", "IQM", *BESIDE, "GIPO at ceiling", "PPO at ceiling"]
    return markdown(header, rows)


def _weights(read: Read) -> str:
    table = read("trust_weights")
    far = table[(table.log_ratio.abs() == 5) & (table.objective == "gipo")]
    rows = [
        [f"{sigma:g}", *(f"{part[part.log_ratio == x].u.min():.2g}" for x in (-5, 5))]
        for sigma, part in far.groupby("sigma")
    ]
    return markdown(["sigma", "u at log r = -5", "u at log r = 5"], rows)


def _protocol_1(read: Read) -> str:
    table = read("replay_sizes_comparison")
    table = table[table.score == "final_return"]
    sizes = _wide(table, ["regime", "method"], claims.paired)
    better = [cell(row, *ends("better")) for _, row in table[table.age == 0].iterrows()]
    lines = sizes.splitlines()
    extra = ["P(better)", "---", *better]
    return "\n".join(f"{line} {own} |" for line, own in zip(lines, extra, strict=True))


def _means(read: Read, *studies: str) -> str:
    means = read("evidence_means")
    part = means[means.study.isin(studies)]
    index = ["study", "regime", "method"] if len(studies) > 1 else ["regime", "method"]
    return _wide(
        part.assign(study=part.study.map(STUDIES)),
        index,
        lambda row: f"{signed(row, 'mean')} ({row.ceiling:.0%}, {row.ceiling_other:.0%})",
    )


def _elo(read: Read) -> str:
    rows = [
        [REUSE[row.regime], row.method, f"{row.elo:.0f} [{row.low:.0f}, {row.high:.0f}]"]
        for _, row in read("replay_sizes_elo").iterrows()
    ]
    return markdown(["reuse", "method", "Elo"], rows)


def _dominated(read: Read) -> str:
    rows = []
    for (study, name), part in read("gridworld_dominated").groupby(
        ["study", "objective"], sort=False
    ):
        cells = [
            f"{r.share_above_gipo:.0%} of {r.settings}" if r.settings else "no setting left"
            for _, r in part.iterrows()
        ]
        what = "one logit" if study == "gridworld" else "all logits"
        rows.append([what, plots.look(str(name)).label, *cells])
    return markdown(["gradient", "baseline", "A", "B", "C"], rows)


def _stability(read: Read) -> str:
    table = read("stability")
    rows = []
    for _, row in table[table.quantity == "drop_difference"].iterrows():
        if row.method != scores.OURS:
            own = table[(table.regime == row.regime) & (table.method == row.method)]
            values = own.groupby("quantity").value
            cells = [f"{values.mean()[name]:.3g}" for name in ("spread", "worst")]
            count = f"{values.sum()['diverged']:.0f}"
            drop = [cell(row, "value"), *beside(row)]
            rows.append([REUSE[row.regime], row.method, *drop, *cells, count])
    header = ["reuse", "method", "GIPO σ=1 minus it, drop", *BESIDE]
    header += ["its spread", "its worst seed"]
    return markdown([*header, "diverged"], rows)


def _efficiency(read: Read) -> str:
    table = read("sample_efficiency")
    rows = [
        [
            REUSE.get(row.regime, row.regime),
            row.method,
            cell(row, *ends("time")),
            f"{row.reached:.0%}",
            cell(row, *ends("difference")),
        ]
        for _, row in table[table.age == 0].iterrows()
    ]
    header = ["reuse", "method", "restricted mean time", "runs at threshold", "difference"]
    return markdown(header, rows)


def _protocol_2(read: Read) -> str:
    table = read("tuned_sizes_comparison")
    rows = []
    for _, row in table[table.judged].sort_values("claim", kind="stable").iterrows():
        where = [row.claim, row.case, REUSE.get(row.regime, row.regime), row.method]
        rows.append([*where, cell(row), *beside(row), f"{row.p:.2g}", f"{row.p_holm:.2g}"])
    header = ["claim", "case", "reuse", "GIPO minus", "difference", *BESIDE, "p", "Holm p"]
    return markdown(header, rows)


def _protocol_2_verdicts(read: Read) -> str:
    rows = [
        [claim]
        + [
            claims.second(read, claim, case, corrected=corrected)
            for case in scores.JUDGED_CASES
            for corrected in (True, False)
        ]
        for claim in scores.JUDGED
    ]
    header = ["claim", "papers", "papers, uncorrected", "tuned", "tuned, uncorrected"]
    return markdown(header, rows)


def _protocol_2_sizes(read: Read) -> str:
    table = read("tuned_sizes_comparison")
    return _wide(table[table.claim == 4], ["case", "regime", "method"], claims.paired)


def _metaworld_scores(read: Read) -> str:
    rows = [
        [
            metaworld.SHOWN_AS[row.regime],
            row.method,
            f"{row.iqm:.2f} [{row.low:.2f}, {row.high:.2f}]",
            f"{row.success_rate:.0%}",
            f"{row.elo:.0f} [{row.elo_low:.0f}, {row.elo_high:.0f}]",
        ]
        for _, row in read("metaworld_scores").iterrows()
    ]
    return markdown(["regime", "method", "IQM", "success", "Elo"], rows)


def _metaworld_comparison(read: Read) -> str:
    rows = [
        [
            row.claim,
            metaworld.SHOWN_AS.get(row.regime, row.regime),
            row.method,
            f"{row.difference:.3f} [{row.low:.3f}, {row.high:.3f}]",
            *beside(row),
            "yes" if row.judged else "no",
        ]
        for _, row in read("metaworld_comparison").iterrows()
    ]
    header = ["claim", "regime", "GIPO σ=1 minus", "difference", *BESIDE, "judged"]
    return markdown(header, rows)


def _metaworld_means(read: Read) -> str:
    both = read("metaworld_interaction_differences")
    both = both[both.effect.isin(metaworld.REGIMES)]
    rows = [
        [
            metaworld.SHOWN_AS[str(regime)],
            method,
            *(signed(part.set_index("score").loc[score], "mean") for score in ("final", "area")),
        ]
        for (regime, method), part in both.groupby(["effect", "method"], sort=False)
    ]
    return markdown(["regime", "GIPO σ=1 minus", "final return", "area"], rows)


def _width_tasks(read: Read) -> str:
    rows = [
        [
            *(row.task, row.method, f"{row.early_success:.0%}", f"{row.late_success:.0%}"),
            *(f"{row.success:.2f}", "yes" if row.usable else "no", "yes" if row.chosen else "no"),
        ]
        for _, row in read("width_tasks_choice").iterrows()
    ]
    header = ["task", "method", "first tenth", "last tenth", "area", "usable", "chosen"]
    return markdown(header, rows)


def _width(read: Read) -> str:
    compared = read("width_comparison").fillna({"question": "", "without": ""})
    own = compared[(compared.without == "") & (compared.question != "")].set_index("method")
    rows = [
        [
            row.method,
            f"{row.success:.2f} [{row.low:.2f}, {row.high:.2f}]",
            f"{row.late_success:.0%}",
            f"{row.log_ratio_abs_p95:.2f}",
            *(
                (signed(own.loc[row.method]), f"{own.p_holm[row.method]:.2g}")
                if row.method in own.index
                else ("-", "-")
            ),
        ]
        for _, row in read("width_scores").iterrows()
    ]
    header = ["method", "area of success", "last tenth", "D95", "GIPO σ=1 minus it", "p (Holm)"]
    return markdown(header, rows)


def _age(read: Read) -> str:
    rows = [
        [method, *(cell(part.set_index("effect").loc[effect]) for effect in ("older", "wider"))]
        for method, part in read("age_and_size_effects").groupby("method", sort=False)
    ]
    return markdown(["method", "older", "wider"], rows)


def _proposal(read: Read) -> str:
    table, units = read("proposal"), read("proposal_units")
    rows = [
        [row.method, cell(row), *beside(row), f"{row.p_holm:.2g}"]
        for _, row in table[table.age == 0].iterrows()
    ]
    aim = f"Aim: **{claims.proposal(read)}**, {units.finished.sum()} of {len(units)} units."
    return f"{aim}\n\n" + markdown(["method", "difference", *BESIDE, "Holm p"], rows)


def _proposal_by_size(read: Read) -> str:
    table = read("proposal")
    best = table[table.best & (table.age > 0)]
    rows = [[row.age, row.method, cell(row), *beside(row)] for _, row in best.iterrows()]
    return markdown(["replay", "best other", "difference", *BESIDE], rows)


def _proposal_missed(read: Read) -> str:
    table = read("proposal_by_unit")
    rows = [
        [REUSE[row.regime], row.env, row.age, row.best, cell(row), *beside(row)]
        for _, row in table[table.high < 0].iterrows()
    ]
    header = ["reuse", "task", "replay", "best other", "difference", *BESIDE]
    return markdown(header, rows)


def _utilization(read: Read) -> str:
    table = read("utilization_groups")
    near = table[table.quantity.str.startswith("near_zero")]
    rows = []
    for (regime, method), part in near.groupby(["regime", "of"], sort=False):
        own = part.set_index("quantity")
        cells = [cell(own.loc[f"near_zero_fraction_{age}"], "value") for age in ("new", "old")]
        rows.append([REUSE[str(regime)], method, *cells])
    return markdown(["reuse", "method", "new data", "old data"], rows)


def _ablation(read: Read, name: str) -> str:
    """One row per setting, one column per task and replay size."""
    table = read(name)
    where = [name for name in ("env", "age") if name in table]
    settings = [name for name in table if name not in (*where, "mean", "low", "high", "seeds")]
    places = list(dict.fromkeys(table[where].itertuples(index=False, name=None)))
    names = [" ".join([*map(str, place[:-1]), f"replay {place[-1]}"]) for place in places]
    rows = []
    for setting, part in table.groupby(settings, sort=True):
        cells: Any = part.set_index(where)
        by_place = [cells.loc[place if len(where) > 1 else place[0]] for place in places]
        rows.append([*setting, *(cell(own, "mean") for own in by_place)])
    return markdown([*settings, *names], rows)


def _flow(read: Read) -> str:
    rows = []
    for (regime, method), part in read("flow_scores").groupby(["regime", "method"], sort=False):
        own: Any = part.set_index("score")
        ahead = own.filter(like="minus_ppo").loc["eval_return_sampled"].tolist()
        rise, modes = own.loc["rise"], own.loc["modes_covered"]
        rows.append(
            [
                regime,
                flow.METHODS[str(method)].look.label,
                f"{rise.estimate:.3f} [{rise.low:.3f}, {rise.high:.3f}]",
                "{:+.3f} [{:.3f}, {:.3f}]".format(*ahead),
                f"{modes.estimate:.1f} [{modes.low:.1f}, {modes.high:.1f}]",
                "no" if modes.estimate >= 3 else "**yes**",
            ]
        )
    header = ["regime", "method", "reward rose by", "reward minus PPO-Clip's", "modes of 4"]
    return markdown([*header, "collapse"], rows)


def _learning(read: Read) -> str:
    rows = [
        [
            row.case,
            plots.look(row.objective).label,
            f"{row.start:.3f}",
            f"{row['mean']:.3f} [{row.low:.3f}, {row.high:.3f}]",
            f"{row.worst:.3f}",
            "**reached**" if row.reached else "**missed**",
        ]
        for _, row in read("sequence_learning").iterrows()
    ]
    header = ["case", "method", "before", "mean at the end", "worst seed", "thresholds"]
    return markdown(header, rows)


def _lags(table: pd.DataFrame) -> str:
    rows = []
    for (level, lag), part in table[table.lag > 0].groupby(["level", "lag"], sort=False):
        found = [", ".join(part[part.verdict == v].method) or "-" for v in sequences.VERDICTS]
        rows.append([level, lag, *found])
    return markdown(["level", "lag", *sequences.VERDICTS], rows)


BLOCKS: dict[str, Callable[[Read], str]] = {
    "verdicts": _verdicts,
    "no_clip": _no_clip,
    "ceilings": _ceilings,
    "weights": _weights,
    "protocol_1": _protocol_1,
    "protocol_1_means": lambda read: _means(read, "protocol 1"),
    "elo": _elo,
    "dominated": _dominated,
    "stability": _stability,
    "efficiency": _efficiency,
    "protocol_2": _protocol_2,
    "protocol_2_verdicts": _protocol_2_verdicts,
    "protocol_2_sizes": _protocol_2_sizes,
    "protocol_2_means": lambda read: _means(read, *scores.CASES),
    "metaworld_scores": _metaworld_scores,
    "metaworld_comparison": _metaworld_comparison,
    "metaworld_means": _metaworld_means,
    "width_tasks": _width_tasks,
    "width": _width,
    "age": _age,
    "proposal": _proposal,
    "proposal_by_size": _proposal_by_size,
    "proposal_missed": _proposal_missed,
    "utilization": _utilization,
    "sigma": lambda read: _ablation(read, "sigma"),
    "asymmetry": lambda read: _ablation(read, "asymmetry"),
    "kernel": lambda read: _ablation(read, "kernel"),
    "token_vs_joint": lambda read: _ablation(read, "token_vs_joint"),
    "flow": _flow,
    "learning": _learning,
    "lags": lambda read: _lags(read("sequence_staleness_levels")),
    "sequence_lag": lambda read: _lags(read("sequence_lag")),
}
"""Tables of the report by the names of their blocks, in the order of RESULTS.md."""
