"""The main job: four objectives on ever staler replay, in minutes."""

from experiments import training
from experiments.store import Store
from experiments.training import GIPO, Method, Sweep
from gipo_jax.analysis import plots

QUESTION = "What does stale replay cost each objective on CartPole and Acrobot?"

METHODS = (GIPO, Method("ppo_clip", {}), Method("sapo", {}), Method("no_clip", {}))
TASKS = (training.CARTPOLE, training.ACROBOT)
AGES = (1, 8, 64)
SEEDS = {"quick": range(5), "committed": range(10), "full": range(20)}
STEPS = {"quick": 0.5, "committed": 1.0, "full": 8.0}
"""Factor on the tasks' 65,536 steps."""


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Trains the sweep and draws what any sweep's figures show; one sweep, so one share."""
    if part[0] > 1:
        return
    runs = [
        run
        for task in TASKS
        for run in training.expand(
            task, task.updates["reuse-heavy"], METHODS, AGES, SEEDS[preset], STEPS[preset]
        )
    ]
    sweep = Sweep("staleness", tuple(runs), {"regime": "reuse-heavy"})
    training.store_sweeps(store, [sweep])
    finished = training.collect(store, [sweep])
    assert finished is not None, "store_sweeps returns when all runs are through"
    store.write("staleness_runs", finished[0], 6)
    store.write("staleness_curves", finished[1], 4)


def draw(store: Store) -> None:
    """The figures of ``gipo-jax plot``, from stored tables."""
    columns = ["run", "env", "objective", "sigma", "buffer_size", "seed", "final_return"]
    runs = store.read("staleness_runs", columns)[columns]
    names = ["run", "env_steps", "episode_return", "ess", "near_zero_fraction", "policy_age"]
    curves = store.read("staleness_curves", names)
    for name, figure, numbers in plots.sweep_figures(runs, curves):
        store.save(figure, f"staleness_{name}", numbers)
