"""Which shape of trust weight."""

import numpy as np

from experiments import ablations
from experiments.store import Store
from experiments.training import Method
from gipo_jax.analysis import plots
from gipo_jax.config import KERNELS

QUESTION = "Does the shape of the trust weight matter: Gaussian, Laplacian or Cauchy?"

SIGMAS = (0.5, 1.0)


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Trains each kernel at two widths."""
    if part[0] > 1:
        return
    scale = ablations.SCALES[preset]
    methods = [Method("gipo", {"sigma": s}) for s in SIGMAS]
    settings = [{"kernel": kernel} for kernel in KERNELS]
    ablations.run(store, "kernel", scale.tasks, methods, scale, settings)


def draw(store: Store) -> None:
    """Final return of each kernel and width, a panel a task."""
    runs = store.read("kernel_runs", ["env", "kernel", "sigma", "age", "seed", "final_return"])
    envs = runs.env.unique().tolist()
    table = plots.summarize(runs, ["env", "kernel", "sigma", "age"], "final_return")
    figure, axes = plots.panels(1, len(envs), width=max(3.6, min(7.0, 3.4 * len(envs))), height=2.6)
    labels = [(kernel, sigma) for kernel in KERNELS for sigma in sorted(table.sigma.unique())]
    for axis, env in zip(axes[0], envs, strict=True):
        for shift, (age, look) in zip((-0.1, 0.1), ablations.AGE_LOOKS.items(), strict=True):
            part = table[(table.env == env) & (table.age == age)].set_index(["kernel", "sigma"])
            x = np.arange(len(labels)) + shift
            plots.points(axis, x, part.loc[labels], _unjoined(look))
        names = [f"{kernel}\nσ={sigma:g}" for kernel, sigma in labels]
        axis.set_xticks(range(len(labels)), names, fontsize=6, rotation=35)
        axis.set(title=env, ylabel="final return")
    plots.finish(
        figure, ablations.caption(runs), plots.legend(ablations.AGE_LOOKS.values()), columns=1
    )
    store.save(figure, "kernel", table)


def _unjoined(look: plots.Look) -> plots.Look:
    return plots.Look(look.color, look.marker, "none", look.label)
