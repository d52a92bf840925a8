"""Every objective on the same tasks, fresh and stale, and what each does to a sample.

The objective is part of a compiled program, so a sweep over objectives compiles one for each. Here
their choice is traced instead (``any_of_them``): three programs, one a task, serve all of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from experiments.store import Store
from gipo_jax import objectives, plots, results, stats, sweep

QUESTION = "How does GIPO compare with the whole family of objectives, on fresh and stale data?"

NAMES = tuple(objectives.REGISTRY)
TASKS = ("CartPole-v1", "Acrobot-v1", "Catch-bsuite")
BLOCK = {"num_envs": 8, "rollout_length": 32}
FRESH, STALE = 256, 64 * 256
"""Transitions in replay: those of the newest iteration, and of the newest 64."""

SETTINGS: dict[str, Any] = {
    **BLOCK,
    "batch_size": 256,
    "updates_per_iteration": 4,
    "learning_rate": 1e-3,
    "num_logs": 20,
    "eval_episodes": 0,
}
SCALES: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 2, "total_steps": 80 * 256},
    "committed": {"seeds": 10, "total_steps": 400 * 256},
    "full": {"seeds": 20, "total_steps": 2000 * 256},
}


def _first_states(params: Mapping[str, Any]) -> dict[str, Any]:
    specs = [objectives.spec(name) for name in NAMES]
    return {s.name: s.initial_state(s.params) for s in specs if s.initial_state is not None}


@objectives.declare(kind="other-input", initial_state=_first_states, discrete_only=True)
def any_of_them(
    log_ratio: Array,
    advantage: Array,
    behavior_log_prob: Array,
    log_ratio_start: Array,
    state: dict[str, Any],
    which: float = 0.0,
) -> tuple[Array, dict[str, Any]]:
    """The objective of index ``which`` in ``NAMES``, with its defaults."""
    given = {"behavior_log_prob": behavior_log_prob, "log_ratio_start": log_ratio_start}

    def branch(name: str) -> Any:
        spec = objectives.spec(name)
        inputs = {key: given[key] for key in spec.inputs}

        def apply() -> tuple[Array, dict[str, Any]]:
            if spec.initial_state is None:
                return spec.function(log_ratio, advantage, **inputs), state
            surrogate, new = spec.function(log_ratio, advantage, state=state[name], **inputs)
            return surrogate, state | {name: new}

        return apply

    return jax.lax.switch(jnp.int32(which), [branch(name) for name in NAMES])


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Evaluates all effective weights, then trains every objective on every task."""
    store.write("objective_family_weights", weights())
    rows = []
    for task in TASKS:
        runs = sweep.expand(
            env=task,
            objective=any_of_them,
            which=[float(i) for i in range(len(NAMES))],
            buffer_size=[FRESH, STALE],
            **SETTINGS | SCALES[preset],
        )
        folder = store.out / "sweeps" / f"objective_family_{task}_{preset}"
        sweep.run(runs, folder, resume=(folder / results.CONFIG).exists())
        table = results.read_runs(folder)
        table["objective"] = [NAMES[int(i)] for i in table["which"]]
        rows.append(table)
    columns = ["env", "objective", "buffer_size", "seed", "status", "env_steps", "final_return"]
    store.write("objective_family", pd.concat(rows)[columns])


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
    """Normalised scores: methods (objective, buffer size), and ``[methods, seeds, tasks]``.

    A run that never finished an episode in the last tenth of training counts as its task's worst.
    """
    worst = frame.groupby("env").final_return.transform("min")
    filled = frame.assign(final_return=frame.final_return.fillna(worst))
    table = filled.pivot_table(
        index=["objective", "buffer_size"], columns=["seed", "env"], values="final_return"
    )
    seeds, tasks = frame.seed.nunique(), frame.env.nunique()
    methods = [(str(name), int(size)) for name, size in table.index]
    return methods, stats.normalize(table.to_numpy().reshape(len(methods), seeds, tasks))


def _draw_ranking(store: Store) -> None:
    columns = ["env", "objective", "buffer_size", "seed", "final_return"]
    frame = store.read("objective_family", columns)
    methods, normalized = scores(frame)
    rows = []
    for (name, size), score in zip(methods, normalized, strict=True):
        interval = stats.bootstrap(score)
        rows.append((name, size, *interval, score.shape[0]))
    table = pd.DataFrame(rows, columns=["objective", "buffer_size", "iqm", "low", "high", "seeds"])
    sizes = sorted(table.buffer_size.unique())
    stale = table[table.buffer_size == sizes[-1]].sort_values("iqm")
    order = list(stale.objective)

    figure, axes = plots.panels(1, 1, width=5.2, height=4.6)
    axis = axes[0, 0]
    handles = []
    for offset, size in zip((0.18, -0.18), sizes, strict=True):
        part = table[table.buffer_size == size].set_index("objective").loc[order]
        fresh = size == sizes[0]
        place = np.arange(len(order)) + offset
        bars = np.stack([part.iqm - part.low, part.high - part.iqm]).clip(min=0)
        handles.append(
            axis.errorbar(
                part.iqm,
                place,
                xerr=bars,
                fmt="o",
                color="0.55" if fresh else "#0072B2",
                mfc="white" if fresh else "#0072B2",
                markersize=4.5,
                elinewidth=1.2,
                label=f"{'fresh' if fresh else 'stale'}: buffer of {plots.short_number(size)}",
            )
        )
    axis.set_yticks(np.arange(len(order)), [plots.look(name).label for name in order])
    for label, name in zip(axis.get_yticklabels(), order, strict=True):
        label.set_fontweight("bold" if name == "gipo" else "normal")
    axis.set(
        xlabel="normalised final return (IQM over tasks and seeds)", ylim=(-0.6, len(order) - 0.4)
    )
    tasks = ", ".join(sorted(frame.env.unique()))
    caption = (
        f"{tasks}; {frame.seed.nunique()} seeds.\n"
        "Bars: 95 % stratified bootstrap interval over seeds. 0 and 1: worst and best mean\n"
        "among these methods on each task, so that scores depend on the set."
    )
    plots.finish(figure, caption, handles, columns=2)
    store.save(figure, "objective_family", table)
