"""The family experiment end to end at a tiny size, and its objective of many objectives."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import engine, figures
from experiments.exact import weights
from experiments.store import Store
from experiments.studies import STUDIES
from experiments.switch import any_of_them
from experiments.tasks import CATCH, COMMON, replay
from gipo_jax import objectives, sweep
from gipo_jax.analysis import plots
from gipo_jax.sweep import results

pytestmark = pytest.mark.slow

STUDY = STUDIES["objective_family"]
TASK = dataclasses.replace(
    CATCH,
    settings={"num_envs": 4, "rollout_length": 8, "total_steps": 16 * 32},
    updates={"reuse-heavy": 4},
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A folder in which the experiment ran with one task and one seed."""
    with pytest.MonkeyPatch.context() as patch:
        quick = STUDY.presets["quick"]
        tiny = dataclasses.replace(
            quick, tasks=(TASK,), seeds=range(1), steps=1.0, cells=replay(1, 8)
        )
        patch.setitem(STUDY.presets, "quick", tiny)
        patch.setattr(engine, "COMMON", COMMON | {"batch_size": 32, "num_logs": 2})
        made = Store(tmp_path_factory.mktemp("family"), "objective_family", "test")
        engine.run(STUDY, made, "quick")
        for name, table in STUDY.scores(made).items():
            made.numbers(name, table)
        with plots.style():
            figures.draw(made)
        # Run again: everything is there already, and stays.
        before = (made.out / "data" / "objective_family.csv").read_bytes()
        engine.run(STUDY, made, "quick")
        assert (made.out / "data" / "objective_family.csv").read_bytes() == before
    return made


def test_every_objective_is_measured_and_drawn(store: Store) -> None:
    table = pd.read_csv(store.out / "data" / "objective_family.csv")
    assert sorted(table.age.unique()) == [1, 8]
    assert len(table) == 2 * len(objectives.REGISTRY)
    assert list(dict.fromkeys(table.objective)) == list(objectives.REGISTRY)
    assert (table.status == "done").all()
    ranking = pd.read_csv(store.out / "tables" / "objective_family.csv")
    assert len(ranking) == 2 * len(objectives.REGISTRY)
    assert (ranking.low <= ranking.iqm).all() and (ranking.iqm <= ranking.high).all()
    assert (store.out / "figures" / "objective_family.png").stat().st_size > 10_000


def test_an_objective_trains_in_the_shared_program_as_it_does_alone(
    store: Store, tmp_path: Path
) -> None:
    name = "r2vpo"
    folder = store.out / "sweeps" / "objective_family_Catch-bsuite"
    runs = results.read_runs(folder)
    mine = runs[
        (runs.which == any_of_them.names.index(name)) & (runs.buffer_size == 8 * TASK.block)
    ]
    together = results.read_metrics(folder).set_index("run").loc[mine.run.item()]
    settings = COMMON | {"batch_size": 32, "num_logs": 2} | TASK.settings
    alone = sweep.expand(
        **settings,
        env=TASK.env,
        objective=name,
        learning_rate=1e-3,
        updates_per_iteration=4,
        buffer_size=8 * TASK.block,
    )
    sweep.run(alone, tmp_path / "alone")
    metrics = results.read_metrics(tmp_path / "alone").set_index("run").loc[0]
    for column in ("episode_return", "policy_loss", "kl", "grad_norm"):
        np.testing.assert_allclose(together[column], metrics[column], rtol=1e-3, err_msg=column)


def test_stored_weights_equal_known_values() -> None:
    u = weights.weights().set_index(["objective", "advantage", "log_ratio"])["u"]
    assert u["gipo", 1.0, 1.0] == pytest.approx(np.exp(0.5), rel=1e-5)
    assert u["tis", -1.0, 3.0] == pytest.approx(2)
    assert u["awr", 1.0, 0.0] == pytest.approx(20)
    # The start of the phase, not r = 1, is where GePPO's interval lies.
    assert u["geppo", 1.0, 0.5] == pytest.approx(np.exp(0.5), rel=1e-5)
    assert u["geppo", -1.0, 0.0] == 0
    # The reference batch is mild, so that M2PO keeps the middle and drops the edge.
    assert u["m2po", 1.0, 0.0] == pytest.approx(1) and u["m2po", 1.0, 3.0] == 0
