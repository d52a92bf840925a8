"""Grids, groups, and that a run's numbers do not depend on the runs beside it."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from gipo_jax import agents, sweep, train, user_files
from gipo_jax.config import Config, ConfigError
from gipo_jax.domains.tokens import tasks
from gipo_jax.sweep import checkpoint, folder, grid, plan, program, report, results

pytestmark = pytest.mark.optimized  # bits are those that users get

QUIET = sweep.Options(quiet=True, checkpoint_seconds=0, devices=1)
SMALL: dict[str, Any] = {
    "num_envs": 2,
    "rollout_length": 4,
    "batch_size": 8,
    "total_steps": 96,
    "hidden_sizes": (8,),
    "num_logs": 3,
    "eval_episodes": 0,
    "buffer_size": 16,
    # The same for all, so that sweeps of one width share a compiled program.
    "max_buffer_size": 64,
}


def rows(directory: Path, run: int) -> pd.DataFrame:
    table = results.read_metrics(directory)
    return table[table.run == run].drop(columns="run").reset_index(drop=True)


def names(runs: list[sweep.Run]) -> list[str]:
    return [run.name for run in runs]


def test_a_list_sweeps_and_seeds_vary_fastest() -> None:
    runs = sweep.expand(**SMALL | {"buffer_size": [16, 32]}, gamma=[0.9, 0.99], seeds=2)
    assert len(runs) == 8
    assert [run.hparams.seed for run in runs[:4]] == [0, 1, 0, 1]
    assert [run.hparams.buffer_size for run in runs] == [16] * 4 + [32] * 4


def test_seed_offset_moves_the_seeds() -> None:
    runs = sweep.expand(**SMALL, seeds=3, seed_offset=5)
    assert [run.hparams.seed for run in runs] == [5, 6, 7]


def test_parameters_go_to_the_objectives_that_have_them_and_no_run_is_made_twice() -> None:
    runs = sweep.expand(**SMALL, objective=["gipo", "ppo_clip", "no_clip"], sigma=[0.5, 1.0])
    assert [(r.config.objective, r.hparams.objective_params.get("sigma")) for r in runs] == [
        ("gipo", 0.5),
        ("gipo", 1.0),
        ("ppo_clip", None),
        ("no_clip", None),
    ]


def test_a_kernel_multiplies_only_the_objectives_that_take_one() -> None:
    runs = sweep.expand(**SMALL, objective=["gipo", "no_clip"], kernel=["gaussian", "cauchy"])
    assert len(runs) == 3


def test_a_value_given_twice_makes_one_run() -> None:
    assert len(sweep.expand(**SMALL, gamma=[0.9, 0.9], sigma=[1, 1.0])) == 1


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"sgima": 1.0}, "sgima"),
        ({"objective": "ppo_clip", "sigma": 1.0}, "sigma"),
        ({"sigma": [1.0, -1.0]}, "sigma"),
        ({"gamma": 1.5}, "gamma"),
        ({"seeds": 0}, "seeds"),
        ({"seed_offset": -1}, "seed_offset"),
        ({"seed": 3}, "seed"),
        ({"gamma": []}, "gamma"),
        ({"env": "CartPole-v9"}, "env"),
        ({"objective": "gippo"}, "objective"),
        ({"buffer_size": 12}, "buffer_size"),
        ({"total_steps": 97}, "total_steps"),
    ],
)
def test_expand_names_the_setting_that_is_not_usable(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: ") as caught:
        sweep.expand(**SMALL | settings)
    assert "\n" not in str(caught.value)


def test_a_misspelt_setting_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        sweep.expand(**SMALL, learning_rat=0.1)


def test_runs_written_as_json_are_read_back_equal() -> None:
    runs = sweep.expand(**SMALL, objective=["gipo", "ppo_clip"], sigma=[0.5, 1.0], seeds=2)
    text = json.dumps(grid.encode(runs), allow_nan=False)
    assert grid.decode(json.loads(text)) == runs


def test_the_first_difference_between_two_sweeps_is_named() -> None:
    one = grid.encode(sweep.expand(**SMALL, gamma=0.9))
    other = grid.encode(sweep.expand(**SMALL, gamma=0.95))
    more = grid.encode(sweep.expand(**SMALL, gamma=0.9, seeds=2))
    assert grid.difference(one, one) is None
    assert grid.difference(one, other) == ("gamma", 0.9, 0.95)
    assert grid.difference(one, more) == ("seed", [0], [0, 1])
    assert grid.difference(more, more[:1]) is None
    both = grid.encode(sweep.expand(**SMALL | {"buffer_size": [16, 32]}, gamma=[0.9, 0.95]))
    fewer = [both[0] | {"runs": both[0]["runs"][:3]}]
    assert grid.difference(both, fewer) == ("number of runs", 4, 3)


def scaled(power: float) -> Any:
    def mine(log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
        return power * log_ratio * advantage

    return mine


def test_two_objects_of_one_name_are_refused_in_a_sweep() -> None:
    with pytest.raises(ConfigError, match=r"^objective: 'mine' .* two of this sweep"):
        grid.encode(sweep.expand(**SMALL, objective=[scaled(1.0), scaled(-1.0)]))
    one = scaled(1.0)
    runs = [*sweep.expand(**SMALL, objective=one), *sweep.expand(**SMALL, objective=one, gamma=0.5)]
    assert len(grid.encode(runs)) == 1


def test_two_closures_of_one_name_are_two_sweeps() -> None:
    one, same, other = (grid.encode(sweep.expand(**SMALL, objective=scaled(p))) for p in (1, 1, 2))
    assert grid.difference(one, same) is None
    assert grid.difference(one, other)[0] == "objective"  # type: ignore[index]
    assert len(grid.decode(one, objective=scaled(1))) == 1
    with pytest.raises(ConfigError, match=r"^objective: 'mine' .* closes over other values now"):
        grid.decode(one, objective=scaled(2))
    # A folder of an earlier version does not say.
    earlier, other = (json.loads(json.dumps(encoded)) for encoded in (one, other))
    del earlier[0]["config"]["objective"]["values"]
    assert grid.difference(earlier, other) is None
    assert len(grid.decode(earlier, objective=scaled(2))) == 1


def test_two_environments_of_one_class_are_two_sweeps(toy: Any) -> None:
    one, same, other = (grid.encode(sweep.expand(**SMALL, env=toy(pay=p))) for p in (0.5, 0.5, 1.0))
    assert grid.difference(one, same) is None
    assert grid.difference(one, other)[0] == "env"  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"^env: 'Toy' .* closes over other values now"):
        grid.decode(one, env=toy(pay=1.0))


class Carrier:
    """Values of every kind, one of them reached in a circle."""

    def __init__(self, value: Any) -> None:
        self.value, self.me, self.names = value, self, {"b", "a"}

    def shown(self) -> Any:
        return self.value

    @functools.cached_property
    def computed(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, 1.0),
        ("a", b"a"),
        (None, 0),
        ([1, 2], (1, 2)),
        ({"a": 1}, {"a": 2}),
        (np.arange(3), np.arange(3.0)),
        (jnp.zeros(2), jnp.zeros((2, 1))),
        (jax.random.key(0), jax.random.key(1)),
        (functools.partial(pow, exp=2), functools.partial(pow, exp=3)),
        (scaled(1.0), scaled(2.0)),
        (jax.jit(scaled(1.0)), jax.jit(scaled(2.0))),
        (lambda x, y=1: x, lambda x, y=2: x),
        (Carrier(1).shown, Carrier(2).shown),
        (grid.CONFIG_FIELDS, grid.HPARAM_FIELDS),
    ],
)
def test_a_digest_tells_values_apart_and_knows_them_again(one: Any, other: Any) -> None:
    digest = user_files.values_digest
    assert digest(one) == digest(one) != digest(other)
    carriers = [Carrier(one), Carrier(one), Carrier(other)]
    assert carriers[0].computed == 3
    assert digest(carriers[0]) == digest(carriers[1]) != digest(carriers[2])


TASK = """
import jax
import jax.numpy as jnp
from gipo_jax.domains.tokens import tasks
SORT = tasks.Task(
    lambda key: jax.random.randint(key, (2,), 0, 2),
    lambda prompt, answer: jnp.mean(answer == jnp.sort(prompt)),
    vocab=2, prompt_length=2, answer_length=2,
)
"""


def test_a_task_whose_folder_moved_is_found_beside_the_sweep_or_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sorting.py").write_text(TASK)
    monkeypatch.chdir(tmp_path / "old")
    small = {k: v for k, v in SMALL.items() if k != "hidden_sizes"}
    runs = sweep.expand(**small, env="sorting.py:SORT", decoder_layers=1, decoder_width=8)
    stored = grid.encode(runs)
    # From elsewhere, by its whole path: the same sweep.
    monkeypatch.chdir(tmp_path)
    found = grid.decode(stored)
    assert found[0].config.env == f"{tmp_path}/old/sorting.py:SORT"
    assert grid.difference(stored, grid.encode(found)) is None
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(
        ConfigError, match=r"^env: None .* sorting.py:SORT of this sweep, whose file"
    ):
        grid.decode(stored)
    task = tasks.TASKS["tokens/reverse"]
    assert grid.decode(stored, env=task)[0].config.env is task
    monkeypatch.chdir(tmp_path / "new")
    assert grid.decode(stored)[0].config.env == "sorting.py:SORT"
    (tmp_path / "new" / "sorting.py").write_text(TASK + "# another")
    with pytest.raises(ConfigError, match="changed since"):
        grid.decode(stored)


def test_groups_share_what_is_static_and_allocate_for_the_largest() -> None:
    settings = SMALL | {"buffer_size": [16, 40], "max_buffer_size": None}
    runs = sweep.expand(**settings, objective=["gipo", "no_clip"], sigma=[0.5, 1], seeds=2)
    groups = plan.group_runs(runs)
    assert [len(group.runs) for group in groups] == [8, 4]
    assert {group.domain.config.max_buffer_size for group in groups} == {40}


@pytest.mark.parametrize("runs", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("mode", ["vmap", "map", "loop"])
@pytest.mark.parametrize("count", [1, 4])
def test_a_layout_has_room_for_all_runs_and_little_more(mode: str, count: int, runs: int) -> None:
    layout = program.layout(mode, None, jax.devices() * count, runs)
    per_device = layout.blocks * layout.lanes
    assert layout.width >= (min(runs, count) if mode == "loop" else runs)
    assert layout.width - runs < layout.lanes * len(layout.devices)
    assert per_device * (len(layout.devices) - 1) < max(runs, layout.lanes * len(layout.devices))


@pytest.mark.parametrize("mode", ["vmap", "map", "loop"])
def test_every_device_of_several_processes_is_used_however_few_the_runs(mode: str) -> None:
    devices: Any = [SimpleNamespace(platform="cpu", process_index=index // 2) for index in range(4)]
    assert program.layout(mode, None, devices, 1).devices == tuple(devices)
    assert program.layout(mode, None, devices[:2], 1).devices == tuple(devices[:1])


@pytest.mark.parametrize(("points", "covered"), [(16, 2), (5, 1), (10, 1), (20, 2), (3, 1)])
def test_final_return_is_of_the_fewest_last_points_that_cover_a_tenth_of_training(
    tmp_path: Path, points: int, covered: int
) -> None:
    iterations = 240
    rows = [
        (0, iterations * (i + 1) // points, 8 * i, float(i), float(i % 3 + 1), 7.0)
        for i in range(points)
    ]
    names = ["run", "iteration", "env_steps", "episode_return", "episodes", "eval_return"]
    pd.DataFrame(rows, columns=names).to_csv(tmp_path / "metrics.csv", index=False)
    first, second = folder.summaries(tmp_path / "metrics.csv", [iterations, iterations])
    late = np.array(rows[-covered:])
    assert first["final_return"] == pytest.approx(np.average(late[:, 3], weights=late[:, 4]))
    assert first["env_steps"] == rows[-1][2] and first["eval_return"] == 7
    assert second["env_steps"] == 0 and np.isnan(second["final_return"])


def test_final_return_is_empty_where_no_episode_ended_late(tmp_path: Path) -> None:
    text = "run,iteration,env_steps,episode_return,episodes\n0,50,400,3.0,2.0\n0,100,800,,0.0\n"
    (tmp_path / "metrics.csv").write_text(text)
    (only,) = folder.summaries(tmp_path / "metrics.csv", [100])
    assert np.isnan(only["final_return"]) and np.isnan(only["eval_return"])
    assert only["env_steps"] == 800


def test_final_return_is_empty_where_a_late_return_is_no_number(tmp_path: Path) -> None:
    text = "run,iteration,env_steps,episode_return,episodes\n0,95,760,,2.0\n0,100,800,3.0,2.0\n"
    (tmp_path / "metrics.csv").write_text(text)
    (only,) = folder.summaries(tmp_path / "metrics.csv", [100])
    assert np.isnan(only["final_return"])


def test_median_returns_do_not_mix_environments() -> None:
    settings = [
        {"env": "CartPole-v1", "objective": "gipo"},
        {"env": "CartPole-v1", "objective": "gipo"},
        {"env": "CartPole-v1", "objective": "ppo_clip"},
        {"env": "Acrobot-v1", "objective": "gipo"},
    ]
    latest = {0: 10.0, 1: 20.0, 2: np.nan, 3: -500.0}
    assert report.median_returns(latest, settings, "CartPole-v1") == {"gipo": 15.0}
    assert report.median_returns(latest, settings, "Acrobot-v1") == {"gipo": -500.0}


def test_settings_have_one_type_whatever_was_given() -> None:
    config = Config(**{k: v for k, v in SMALL.items() if k != "buffer_size"})
    settings = [
        train.make_hparams(config, buffer_size=16, learning_rate=1, gamma=g) for g in (0, 0.5, 1)
    ]
    stacked = program.stack(settings, 4)
    assert np.asarray(stacked.learning_rate).dtype == np.float32
    assert np.asarray(stacked.seed).dtype == np.int32
    assert np.asarray(stacked.gamma).tolist() == [0, 0.5, 1, 1]


@pytest.fixture(scope="module")
def grid_of_six() -> list[sweep.Run]:
    return sweep.expand(**SMALL | {"buffer_size": [16, 64]}, sigma=[0.5, 1.0, 2.0], seed_offset=3)


@pytest.fixture(scope="module")
def swept(grid_of_six: list[sweep.Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("swept")
    sweep.run(grid_of_six, directory, QUIET)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [pytest.param([4], marks=pytest.mark.long), [1, 4]])
def test_a_run_is_the_same_bits_in_a_sweep_of_any_shape(
    grid_of_six: list[sweep.Run], swept: Path, tmp_path: Path, chosen: list[int]
) -> None:
    sweep.run([grid_of_six[i] for i in chosen], tmp_path, QUIET)
    alone = rows(tmp_path, chosen.index(4))
    pd.testing.assert_frame_equal(alone, rows(swept, 4), check_exact=True)


@pytest.mark.slow
@pytest.mark.long
def test_vmap_is_the_same_bits_in_a_sweep_of_any_shape_and_close_to_map(
    grid_of_six: list[sweep.Run], swept: Path, tmp_path: Path
) -> None:
    options = dataclasses.replace(QUIET, batch_mode="vmap")
    sweep.run(grid_of_six, tmp_path / "all", options)
    sweep.run(grid_of_six[4:5], tmp_path / "alone", options)
    together = rows(tmp_path / "all", 4)
    pd.testing.assert_frame_equal(rows(tmp_path / "alone", 0), together, check_exact=True)
    # The first logged point: later ones part ways as rounding does its work.
    pd.testing.assert_frame_equal(together[:1], rows(swept, 4)[:1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_loop_is_the_same_bits_as_map(grid_of_six: list[sweep.Run], tmp_path: Path) -> None:
    for mode in ("loop", "map"):
        sweep.run(grid_of_six, tmp_path / mode, dataclasses.replace(QUIET, batch_mode=mode))
    for name in (results.RUNS, results.METRICS):
        assert (tmp_path / "loop" / name).read_bytes() == (tmp_path / "map" / name).read_bytes()


def test_runs_with_different_seeds_get_different_losses(tmp_path: Path) -> None:
    sweep.run(sweep.expand(**SMALL, seeds=6), tmp_path, QUIET)
    values = [tuple(rows(tmp_path, run).value_loss) for run in range(6)]
    assert len(set(values)) == 6


@pytest.mark.slow
def test_one_program_a_group_is_made_however_many_runs(tmp_path: Path) -> None:
    made: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            made.append(event)

    runs = sweep.expand(**SMALL, objective=["gipo", "no_clip"], sigma=[0.5, 1.0, 2.0], seeds=2)
    assert len(runs) == 8
    jax.monitoring.register_event_duration_secs_listener(listen)
    summary = sweep.run(runs, tmp_path, QUIET)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert summary.compilations == 2
    # Two functions a group: first states, and train_and_log.
    assert len(made) == 4


def test_a_run_that_diverges_is_frozen_and_named_and_harms_no_other(
    grid_of_six: list[sweep.Run], swept: Path, tmp_path: Path
) -> None:
    bad = grid_of_six[0]
    hparams = dataclasses.replace(bad.hparams, learning_rate=1e38, value_learning_rate=1e38)
    runs = [dataclasses.replace(bad, hparams=hparams), *grid_of_six[1:]]
    summary = sweep.run(runs, tmp_path, QUIET)
    assert summary.diverged == (0,)
    table = results.read_runs(tmp_path)
    assert table.status.tolist() == ["diverged"] + ["done"] * 5
    assert 0 <= table.diverged_step[0] < SMALL["total_steps"]
    for run in range(1, 6):
        pd.testing.assert_frame_equal(rows(tmp_path, run), rows(swept, run), check_exact=True)

    params = agents.load(tmp_path, 0).params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_runs_csv_has_the_settings_that_vary(swept: Path) -> None:
    table = results.read_runs(swept)
    assert list(table.columns[:7]) == [
        "run",
        "env",
        "objective",
        "sigma",
        "sigma_neg_ratio",
        "buffer_size",
        "seed",
    ]
    assert table.sigma.tolist() == [0.5, 1.0, 2.0] * 2
    assert table.buffer_size.tolist() == [16] * 3 + [64] * 3
    assert (table.env_steps == SMALL["total_steps"]).all()
    assert "gamma" not in table


def test_metrics_csv_has_a_row_a_run_and_logged_point_in_order(swept: Path) -> None:
    table = results.read_metrics(swept)
    assert table.run.tolist() == [run for run in range(6) for _ in range(3)]
    assert table.iteration.tolist() == [4, 8, 12] * 6
    assert (table.env_steps == table.iteration * 8).all()


def test_config_json_says_where_results_come_from(swept: Path) -> None:
    stored = results.read_config(swept)
    assert stored["provenance"]["packages"]["jax"] == jax.__version__
    assert stored["provenance"]["device"]["kind"]
    assert stored["command"]
    assert stored["groups"][0]["config"]["num_envs"] == 2


def test_another_sweep_is_not_overwritten(grid_of_six: list[sweep.Run], swept: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*")}
    with pytest.raises(ConfigError, match="resume"):
        sweep.run(grid_of_six, swept, QUIET)
    assert before == {path: path.stat().st_mtime_ns for path in swept.rglob("*")}


@pytest.mark.parametrize(
    "name", ["metrics.csv", "runs.csv", "params/000000/mine", "checkpoints/1/mine", "figures/mine"]
)
def test_a_folder_with_a_file_that_a_sweep_would_write_is_refused(
    grid_of_six: list[sweep.Run], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"^out: .*{name.partition('/')[0]}"):
        sweep.run(grid_of_six, tmp_path, QUIET)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_a_folder_that_another_process_writes_to_is_refused(
    grid_of_six: list[sweep.Run], tmp_path: Path
) -> None:
    with folder.Folder(tmp_path, grid_of_six, resume=False).owned():
        with pytest.raises(ConfigError, match=rf"^out: .* process {os.getpid()} on "):
            sweep.run(grid_of_six, tmp_path, QUIET)
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_process_that_died_counts_no_more(
    grid_of_six: list[sweep.Run], tmp_path: Path
) -> None:
    program = "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); os._exit(9)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "lock")], check=False)
    assert (tmp_path / "lock").exists()
    with folder.Folder(tmp_path, grid_of_six, resume=False).owned():
        pass


def test_a_sweep_that_another_process_has_moved_on_is_not_resumed_from_behind(
    grid_of_six: list[sweep.Run], swept: Path
) -> None:
    late = folder.Folder(swept, grid_of_six, resume=True)
    path = swept / "checkpoints" / "00009999"
    path.mkdir()
    with pytest.raises(ConfigError, match="changed"), late.owned():
        pass
    path.rmdir()
    with late.owned():
        pass


def test_a_finished_run_without_its_last_point_ends_in_an_error(
    grid_of_six: list[sweep.Run], swept: Path, tmp_path: Path
) -> None:
    shutil.copytree(swept, tmp_path / "copy")
    path = tmp_path / "copy" / "metrics.csv"
    path.write_text(path.read_text().replace("\n4,12,96", "\n4,11,88"))
    with pytest.raises(
        results.ResultsError, match=r"metrics.csv: NOT WHOLE: run 4 lacks iteration 12"
    ):
        sweep.run(grid_of_six, tmp_path / "copy", QUIET, resume=True)


def test_an_objective_called_null_keeps_its_name_in_tables(tmp_path: Path) -> None:
    config = {"format": results.FORMAT, "command": "", "options": {}, "metrics": [], "groups": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "runs.csv").write_text("run,objective,sigma\n0,null,0.5\n1,NA,\n2,gipo,1.0\n")
    table = results.read_runs(tmp_path)
    assert table.objective.tolist() == ["null", "NA", "gipo"]
    assert np.isnan(table.sigma[1]) and table.sigma[2] == 1.0


def test_a_file_that_cannot_be_read_is_not_reported_as_written(
    grid_of_six: list[sweep.Run], swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "newest", unreadable)
    with pytest.raises(results.ResultsError, match=r"^cannot read .*: Permission denied"):
        sweep.run(grid_of_six, swept, QUIET, resume=True)


def test_a_copy_of_a_checkpoint_beside_it_is_no_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"n": 1}, None)
    for name in ("00000001.bak", "00000002 (copy)"):
        shutil.copytree(path, tmp_path / name)
    (tmp_path / "00000009").write_text("a file")
    (tmp_path / "7").mkdir()
    assert checkpoint.newest(tmp_path, pytest.fail) == 1
    for number in (2, 3, 4):
        checkpoint.save(tmp_path, number, {}, None)
    assert checkpoint.newest(tmp_path, pytest.fail) == 4
    assert (tmp_path / "00000001.bak").exists()


@pytest.mark.slow
def test_a_group_cut_into_slices_gives_the_same_bits(
    grid_of_six: list[sweep.Run], swept: Path, tmp_path: Path
) -> None:
    group = plan.group_runs(grid_of_six)[0]
    room_for_two = int(2.1 * (group.memory.state + group.memory.work) / plan.USABLE)
    options = dataclasses.replace(QUIET, memory_limit=str(room_for_two))
    cut = plan.slices(group, "map", None, jax.devices()[:1], room_for_two)
    assert [len(part) for part in cut.parts] == [2, 2, 2]
    sweep.run(grid_of_six, tmp_path, options)
    for name in (results.RUNS, results.METRICS):
        assert (tmp_path / name).read_bytes() == (swept / name).read_bytes()


def test_a_run_that_does_not_fit_in_memory_is_refused_with_a_buffer_size_that_fits(
    grid_of_six: list[sweep.Run],
) -> None:
    group = plan.group_runs(grid_of_six)[0]
    limit = group.memory.state - group.memory.replay + group.memory.work + group.memory.replay // 2
    with pytest.raises(ConfigError, match="buffer_size up to 32 would fit"):
        plan.slices(group, "map", None, jax.devices()[:1], int(limit / plan.USABLE) + 1)


def test_a_sweep_with_a_wrong_option_writes_nothing(
    grid_of_six: list[sweep.Run], tmp_path: Path
) -> None:
    for options in (
        sweep.Options(batch_mode="vmpa"),
        sweep.Options(devices=999),
        sweep.Options(memory_limit="lots"),
        sweep.Options(memory_limit="1KB"),
        sweep.Options(map_lanes=2, batch_mode="loop"),
    ):
        with pytest.raises(ConfigError):
            sweep.run(grid_of_six, tmp_path / "new", options)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_holds_every_array_of_the_state(
    grid_of_six: list[sweep.Run], tmp_path: Path
) -> None:
    state = train.init(train.make(grid_of_six[0].config), grid_of_six[0].hparams)
    path = checkpoint.save(tmp_path, 1, {}, state)
    assert checkpoint.newest(tmp_path, pytest.fail) == 1
    restored = checkpoint.read_arrays(path / checkpoint.ARRAYS, state)
    assert isinstance(restored, train.TrainState)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert one.dtype == other.dtype
        if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(restored.key))
