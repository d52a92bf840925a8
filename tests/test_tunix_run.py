"""The script that trains under tunix; bash scripts/tunix_run.sh makes an environment with it."""

import collections
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("tunix")

from scripts import tunix_run


class Example(NamedTuple):
    """Responses by the number of updates of the policy that gave them."""

    updates: int
    prompt_ids: None = None
    completion_ids: None = None


@pytest.mark.parametrize("held_back", [0, 3])
def test_each_update_takes_responses_of_the_age_that_was_asked_for(
    held_back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates, seeds = 0, []
    config = types.SimpleNamespace(seed=None)
    learner: Any = object.__new__(tunix_run.HeldBack)
    learner.__dict__.update(rewards=[], _held_back=held_back, _seed=2, _held=collections.deque())
    learner.rl_cluster = types.SimpleNamespace(
        cluster_config=types.SimpleNamespace(rollout_config=config),
        get_old_per_token_logps=lambda prompts, completions: updates,
    )

    def generate(self: Any, training_input: Any, mode: Any) -> Example:
        self.rewards.append(0.0)
        seeds.append(config.seed)
        return Example(updates)

    monkeypatch.setattr(
        tunix_run.grpo_learner.GRPOLearner, "_generate_and_compute_advantage", generate
    )
    monkeypatch.setattr(
        tunix_run.dataclasses,
        "replace",
        lambda example, old_per_token_logps: (example.updates, old_per_token_logps),
    )
    for updates in range(6):
        made, old = learner._generate_and_compute_advantage({})
        assert made == old == max(0, updates - held_back)
    assert len(seeds) == len(set(seeds)) == 6 + held_back


def test_a_letter_repeated_has_a_reward_of_one_and_no_token_of_zero() -> None:
    learner: Any = object.__new__(tunix_run.HeldBack)
    learner.rewards = []
    assert learner._reward(["a", "b", "c"], ["aaaaaa", "", "cab"]) == [1.0, 0.0, 1 / 6]
    assert learner.rewards == [pytest.approx(7 / 18)]


def test_finished_runs_are_not_run_again_and_the_report_compares_with_tunix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def rewards(method: str, held_back: int, seed: int, steps: int) -> list[float]:
        made.append((method, held_back, seed))
        return [seed + (0.5 if method == "gipo" else 0.0)] * steps

    monkeypatch.setattr(tunix_run, "rewards", rewards)
    given = ["--methods", "gipo", "grpo", "--staleness", "4", "--steps", "4", "--out"]
    assert tunix_run.main([*given, str(tmp_path), "--seeds", "1"]) == 0
    assert tunix_run.main([*given, str(tmp_path), "--seeds", "2"]) == 0
    assert made == [("gipo", 4, 0), ("grpo", 4, 0), ("gipo", 4, 1), ("grpo", 4, 1)]
    table = tunix_run.report(tunix_run.finished(tmp_path / "runs.csv"), tmp_path)
    assert [*table["mean"]] == [1.0, 0.5] and [*table["seeds"]] == [2, 2]
    assert [*table[["minus_grpo", "minus_low", "minus_high"]].iloc[0]] == [0.5] * 3
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "table.csv").is_file()
    with pytest.raises(SystemExit):
        tunix_run.main([*given, str(tmp_path), "--steps", "5"])
