"""Age of replayed data after a warm-up: what the runs share, and what a gain is."""

from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from experiments import age
from experiments.tasks import CATCH, GIPO, NO_CLIP
from gipo_jax import train
from scripts import reproduce

TASK = CATCH.lasting(96 * CATCH.block)
POINTS = 2


def test_gains_count_from_the_end_of_the_warm_up_over_equal_iterations_or_generations() -> None:
    runs = pd.DataFrame({"run": [0, 1], "min_age": [0, 64]})
    # Generations of 8 and 72 iterations: 152 is two generations of the old pool, 88 and 96 the
    # first two of the new one.
    iterations = [80, 88, 96, 152, 224]
    returns = {0: [1.0, 2, 3, 10, 20], 1: [1.0, 1, 1, 2, 4]}
    curves = pd.DataFrame(
        [
            (run, iteration, value)
            for run, values in returns.items()
            for iteration, value in zip(iterations, values, strict=True)
        ],
        columns=["run", "iteration", "eval_return_sampled"],
    )
    found = age.gains(runs, curves).set_index("run")
    assert found.gain.to_dict() == {0: 8.75 - 1, 1: 2 - 1}
    assert found.gain_by_generation.to_dict() == {0: 2.5 - 1, 1: 2 - 1}


@pytest.mark.slow
def test_ages_share_the_warm_up_and_the_pool_is_then_as_old_as_asked_for() -> None:
    config = age.configure(TASK)
    runs = [age.settings(TASK, GIPO, held, 1e-3, seed=3) for held in (0, 64)]
    found = age.run(config, runs, POINTS)
    returns, lag = found["eval_return_sampled"], found["log_ratio_abs_p95"]
    assert returns[0, 0] == returns[1, 0]
    assert lag[0, -1] != lag[1, -1]
    # Ages 0 to 15, and 64 to 79.
    np.testing.assert_allclose(found["policy_age"][:, -1], [7.5, 71.5], atol=2)


@pytest.mark.slow
def test_without_data_held_back_it_is_a_plain_run() -> None:
    config = age.configure(TASK)
    hparams = age.settings(TASK, NO_CLIP, 0, 1e-3, seed=5)
    _, plain = jax.jit(train.make_train(config))(hparams)
    found = age.run(config, [hparams], POINTS)
    for name in age.LOGGED:
        np.testing.assert_allclose(found[name][0, -1], plain[name][-1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_quick_stores_a_task_and_method_at_a_time(tmp_path: Path) -> None:
    command = ["width_age", "--preset", "quick", "--out", str(tmp_path)]
    assert reproduce.main(command) == 0
    runs = pd.read_csv(tmp_path / "data" / "width_age_runs.csv")
    assert len(runs) == runs.run.nunique() == len(age.METHODS) * len(age.AGES) * 2
    older = pd.read_csv(tmp_path / "tables" / "width_age_older.csv")
    assert set(older.method) == {method.label for method in age.METHODS}
    before = (tmp_path / "data" / "width_age_curves.csv").read_bytes()
    assert reproduce.main(command) == 0
    assert (tmp_path / "data" / "width_age_curves.csv").read_bytes() == before
