"""Several sweeps as one: what is the same is merged, and what only has the same name is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax import Array

from gipo_jax import sweep
from gipo_jax.analysis import plots, sweeps
from gipo_jax.config import ConfigError
from gipo_jax.sweep import grid, results


def make(power: float) -> Callable[[Array, Array], Array]:
    def mine(log_ratio: Array, advantage: Array) -> Array:
        return power * jnp.exp(log_ratio) * advantage

    return mine


def runs(power: float, seeds: int = 1) -> list[sweep.Run]:
    return sweep.expand(
        env="Catch-bsuite",
        objective=make(power),
        seeds=seeds,
        num_envs=2,
        rollout_length=8,
        batch_size=16,
        buffer_size=16,
        hidden_sizes=(8,),
        total_steps=32,
        num_logs=2,
        eval_episodes=0,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Sweeps of an objective, of another that closes over another value, and of the first again."""
    folder = tmp_path_factory.mktemp("closures")
    first = folder / "first"
    sweep.run(runs(1.0), first, sweep.Options(quiet=True))
    stored = results.read_config(first)
    for name, power in (("other", -1.0), ("again", 1.0)):
        # What would be stored of it, with another seed, without training.
        shutil.copytree(first, folder / name)
        encoded = grid.encode(runs(power, seeds=2)[1:])
        encoded[0]["runs"][0]["run"] = 0
        (folder / name / results.CONFIG).write_text(json.dumps(stored | {"groups": encoded}))
        table = results.read_runs(folder / name).assign(seed=1)
        table.to_csv(folder / name / results.RUNS, index=False)
    return first, folder / "other", folder / "again"


def test_two_closures_of_one_name_in_two_sweeps_are_two_methods(
    folders: tuple[Path, Path, Path],
) -> None:
    first, other, _ = folders
    table, metrics = sweeps.read([first, other])
    assert table.objective.tolist() == [f"mine of {first}", f"mine of {other}"]
    assert plots.methods(table.drop(columns="sweep"))[0].nunique() == 2
    assert set(metrics.run) == {0, 1}


def test_one_closure_in_two_sweeps_is_one_method_with_the_seeds_of_both(
    folders: tuple[Path, Path, Path],
) -> None:
    first, other, again = folders
    table, _ = sweeps.read([first, again])
    assert table.objective.tolist() == ["mine", "mine"] and table.seed.tolist() == [0, 1]
    table, _ = sweeps.read([other, first, again])
    assert table.objective.tolist() == [f"mine of {place}" for place in (other, first, first)]


@pytest.mark.parametrize("name", ["", "  ", "two\nlines"])
def test_an_objective_whose_name_a_table_cannot_show_is_refused(name: str, tmp_path: Path) -> None:
    objective = make(1.0)
    objective.__name__ = name
    with pytest.raises(ConfigError, match=r"^objective: .* tables can show"):
        sweep.run(sweep.expand(objective=objective), tmp_path / "out")
    assert not (tmp_path / "out").exists()
