"""Every objective on the same tasks, fresh and stale, and what each does to a sample.

Three programs, one a task, serve all of them: see ``family``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from experiments import training
from experiments.ablations import AGE_LOOKS, FRESH, REGIME, STALE
from experiments.family import NAMES, any_of_them
from experiments.store import Store
from experiments.training import Sweep, Task
from gipo_jax import objectives, sweep
from gipo_jax.analysis import plots, stats
from gipo_jax.sweep import results

QUESTION = "How does GIPO compare with the whole family of objectives, on fresh and stale data?"

TASKS = (training.CARTPOLE, training.ACROBOT, training.CATCH)
SCALES: dict[str, tuple[int, float]] = {
    "quick": (2, 0.125),
    "committed": (5, 1.0),
    "full": (20, 16.0),
}
"""Seeds, and factor on the tasks' steps."""

LEARNING_RATE = 1e-3


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Evaluates all effective weights, then trains every objective on every task.

    Args:
        part: (i, n): this call takes the i-th of n shares of the tasks.
    """
    store.write("objective_family_weights", weights())
    sweeps = [_sweep(task, preset) for task in TASKS]
    training.store_sweeps(store, training.take_slice(sweeps, part))
    tables = []
    for task, item in zip(TASKS, sweeps, strict=True):
        folder = store.out / "sweeps" / item.name
        if not (folder / results.RUNS).exists():
            continue
        table = results.read_runs(folder)
        table["objective"] = [NAMES[int(index)] for index in table["which"]]
        table["age"] = table["buffer_size"] // task.block
        if table.status.isin(["done", "diverged"]).all():
            tables.append(table)
    if tables:
        columns = ["env", "objective", "age", "seed", "status", "env_steps", "final_return"]
        store.write("objective_family", pd.concat(tables)[columns])


def _sweep(task: Task, preset: str) -> Sweep:
    seeds, scale = SCALES[preset]
    steps = int(task.settings["total_steps"] * scale) // task.block * task.block
    runs = sweep.expand(
        **training.COMMON | task.settings | {"total_steps": steps},
        env=task.env,
        objective=any_of_them,
        which=[float(index) for index in range(len(NAMES))],
        learning_rate=LEARNING_RATE,
        updates_per_iteration=task.updates[REGIME],
        buffer_size=[FRESH * task.block, STALE * task.block],
        seeds=seeds,
    )
    return Sweep(f"objective_family_{task.env}", tuple(runs), {})


REFERENCE_SHIFT = 0.3
"""Distance, in standard deviations, between the two Gaussian policies of the reference batch."""

MU, START = 0.25, 0.5
"""Behaviour probability shown for DPPO, and log-ratio at the start of the phase for GePPO."""


def weights() -> pd.DataFrame:
    """u of every objective on a grid of log-ratios, for A = 1 and A = -1.

    A batch statistic is that of a reference batch of 255 samples, log-ratios between two Gaussian
    policies, which the sample joins.
    """
    grid = np.linspace(-3, 3, 241)
    quantiles = jax.scipy.stats.norm.ppf((jnp.arange(255) + 0.5) / 255)
    reference = REFERENCE_SHIFT * quantiles - REFERENCE_SHIFT**2 / 2
    inputs = {"behavior_log_prob": jnp.log(MU), "log_ratio_start": jnp.float32(START)}
    frames = []
    for name in NAMES:
        spec = objectives.spec(name)
        given = {key: jnp.full(256, inputs[key]) for key in spec.inputs}
        for advantage in (1.0, -1.0):

            def weight(
                x: Array, name: str = name, a: float = advantage, given: Any = given
            ) -> Array:
                batch = jnp.concatenate([x[None], reference])
                return objectives.gradient_weight(name, batch, a, **given)[0]

            u = np.asarray(jax.vmap(weight)(jnp.asarray(grid)), float)
            possible = grid <= (-np.log(MU) if spec.discrete_only else np.inf)
            frames.append(
                pd.DataFrame(
                    {
                        "objective": name,
                        "kind": spec.kind,
                        "advantage": advantage,
                        "log_ratio": grid[possible],
                        "u": u[possible],
                    }
                )
            )
    return pd.concat(frames)


def draw(store: Store) -> None:
    """Small multiples of the effective weights, and the ranking."""
    _draw_weights(store)
    _draw_ranking(store)


_KIND_COLORS = {"per-sample": "#0072B2", "batch": "#D55E00", "other-input": "#009E73"}


def _draw_weights(store: Store) -> None:
    columns = ["objective", "kind", "advantage", "log_ratio", "u"]
    frame = store.read("objective_family_weights", columns)
    names = list(dict.fromkeys(frame.objective))
    rows = -(-len(names) // 4)
    figure, axes = plots.panels(rows, 4, height=1.45, sharex=True, sharey=True)
    handles = {}
    for axis, name in zip(axes.flat, names, strict=False):
        mine = frame[frame.objective == name]
        color = _KIND_COLORS[mine.kind.iloc[0]]
        x = np.linspace(-3, 3, 121)
        (handles["No-Clip, u = r"],) = axis.plot(x, np.exp(x), color="0.75", linewidth=1)
        for advantage, line, sign in ((1, "-", "A > 0"), (-1, "--", "A < 0")):
            part = mine[mine.advantage == advantage]
            (drawn,) = axis.plot(part.log_ratio, part.u, color=color, linestyle=line)
            handles.setdefault(f"{mine.kind.iloc[0]}, {sign}", drawn)
        axis.set_title(plots.look(name).label, pad=3)
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.set(ylim=(-2, 4), xlim=(-3, 3))
    for axis in axes.flat:
        axis.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("u")
    for axis in axes[-1]:
        axis.set_xlabel("log ratio  log r")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for label, handle in handles.items():
        handle.set_label(label)
    caption = (
        "Every sample's gradient is u · A · ∇ log π; here A = ±1 and each objective's defaults. "
        "awr: u = 20 for A = 1.\n"
        f"batch: joined to 255 log-ratios between Gaussian policies {REFERENCE_SHIFT:g} standard "
        f"deviations apart;\ngeppo: update phase started at log r = {START:g}; dppo: μ = {MU:g}."
    )
    plots.finish(figure, caption, list(handles.values()), columns=4)
    shown = frame[np.isclose(frame.log_ratio % 1, 0) | np.isclose(frame.log_ratio % 1, 1)]
    store.save(figure, "objective_family_weights", shown)


def scores(frame: pd.DataFrame) -> tuple[list[tuple[str, int]], np.ndarray]:
    """Normalised scores ``[methods, seeds, tasks]``; methods are (objective, replay in iterations).

    A run that never finished an episode in the last logged points counts as its task's worst.
    """
    worst = frame.groupby("env").final_return.transform("min")
    filled = frame.assign(final_return=frame.final_return.fillna(worst))
    table = filled.pivot_table(
        index=["objective", "age"], columns=["seed", "env"], values="final_return"
    )
    seeds, tasks = frame.seed.nunique(), frame.env.nunique()
    methods = [(str(name), int(age)) for name, age in table.index]
    return methods, stats.normalize(table.to_numpy().reshape(len(methods), seeds, tasks))


def _draw_ranking(store: Store) -> None:
    columns = ["env", "objective", "age", "seed", "final_return"]
    frame = store.read("objective_family", columns)
    methods, normalized = scores(frame)
    rows = []
    for (name, age), score in zip(methods, normalized, strict=True):
        interval = stats.bootstrap(score)
        rows.append((name, age, *interval, score.shape[0]))
    table = pd.DataFrame(rows, columns=["objective", "age", "iqm", "low", "high", "seeds"])
    order = list(table[table.age == STALE].sort_values("iqm").objective)

    figure, axes = plots.panels(1, 1, width=5.2, height=4.6)
    axis = axes[0, 0]
    for offset, (age, look) in zip((0.18, -0.18), AGE_LOOKS.items(), strict=True):
        part = table[table.age == age].set_index("objective").loc[order]
        axis.errorbar(
            part.iqm,
            np.arange(len(order)) + offset,
            xerr=np.stack([part.iqm - part.low, part.high - part.iqm]).clip(min=0),
            fmt=look.marker,
            color=look.color,
            markersize=4,
            elinewidth=1.2,
        )
    axis.set_yticks(np.arange(len(order)), [plots.look(name).label for name in order])
    for label, name in zip(axis.get_yticklabels(), order, strict=True):
        label.set_fontweight("bold" if name == "gipo" else "normal")
    axis.set(
        xlabel="normalised final return (IQM over tasks and seeds)", ylim=(-0.6, len(order) - 0.4)
    )
    tasks = ", ".join(sorted(frame.env.unique()))
    caption = (
        f"{tasks}; {REGIME}; {frame.seed.nunique()} seeds.\n"
        "Bars: 95 % stratified bootstrap interval over seeds. 0 and 1: worst and best mean\n"
        "among these methods on each task, so that scores depend on the set."
    )
    plots.finish(figure, caption, plots.legend(AGE_LOOKS.values()), columns=2)
    store.save(figure, "objective_family", table)
