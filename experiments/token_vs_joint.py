"""One importance ratio for each action token, or one for the whole action."""

from experiments import ablations, training
from experiments.store import Store
from experiments.training import Method
from gipo_jax.analysis import plots

QUESTION = "With several action tokens, should the ratio be per token or joint?"

SIGMAS = (0.25, 0.5, 1.0, 2.0)
LOOKS = {
    "token": plots.Look("#0072B2", "o", "-", "ratio per token"),
    "joint": plots.Look("#CC79A7", "X", "--", "joint ratio"),
}


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Trains both kinds of ratio on a task with two action dimensions."""
    if part[0] > 1:
        return
    methods = [Method("gipo", {"sigma": s}) for s in SIGMAS]
    settings = [{"ratio_level": level} for level in LOOKS]
    scale = ablations.SCALES[preset]
    ablations.run(store, "token_vs_joint", (training.REACHER,), methods, scale, settings)


def draw(store: Store) -> None:
    """Final return against sigma, a panel a replay size."""
    runs = store.read("token_vs_joint_runs", ["ratio_level", "sigma", "age", "final_return"])
    table = plots.summarize(runs, ["age", "ratio_level", "sigma"], "final_return")
    figure, axes = plots.panels(1, 2, height=2.5, sharey=True)
    for axis, age in zip(axes[0], ablations.AGE_LOOKS, strict=True):
        for level, look in LOOKS.items():
            line = table[(table.age == age) & (table.ratio_level == level)]
            plots.points(axis, line.sigma, line, look)
        plots.log_sizes(axis, table.sigma, "σ (nats, log scale)")
        axis.set(title=f"{runs.env.iloc[0]}, replay of {age}", ylabel="final return")
    plots.finish(figure, ablations.caption(runs), plots.legend(LOOKS.values()))
    store.save(figure, "token_vs_joint", table)
