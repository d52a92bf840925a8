#!/usr/bin/env python
"""Trains a small Qwen3 model with tunix on stale responses, with losses of ours and tunix's own.

    bash scripts/tunix_run.sh [--quick] [--seeds N] [--steps N] [--out FOLDER] [--table]

The model has two layers and random weights, the tokenizer five methods; nothing is downloaded. Each
prompt is a letter, and the reward is the share of the answer's places that repeat it. A buffer in
this script holds responses back by a number of steps. ``runs.csv`` gets a row for each finished
run, which is not run again; ``table.csv`` and ``curves.png`` show means with 95 % intervals.
"""

import argparse
import collections
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

# Scripts are part of the checkout, not of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_jax import runtime

runtime.set_cpu_defaults()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pandas as pd  # noqa: E402
from flax import nnx  # noqa: E402
from tunix.models.qwen3 import model as qwen3  # noqa: E402
from tunix.rl import rl_cluster  # noqa: E402
from tunix.rl.grpo import grpo_learner  # noqa: E402
from tunix.rl.rollout import base_rollout  # noqa: E402

from gipo_jax.analysis import plots, stats  # noqa: E402
from gipo_jax.integrations import tunix  # noqa: E402

METHODS = ("gipo", "ppo_clip", "gspo", "grpo")
"""Objectives of ours, then tunix's own loss, which is PPO-Clip's."""

STALENESS = (0, 4, 16)
LETTERS = "abcdefgh"
ANSWER = 6
PROMPTS, GENERATIONS = 8, 8
LEARNING_RATE = 1e-2


class Tokenizer:
    """A token for each letter, behind those of padding, beginning and end."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [3 + LETTERS.index(letter) for letter in text]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(LETTERS[token - 3] for token in map(int, ids) if token >= 3)

    def pad_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2


class HeldBack(grpo_learner.GRPOLearner):
    """GRPO on responses that the policy gave a number of updates ago, all from it at the start.

    tunix's agentic learner bounds the age of responses by off_policy_steps, and its threads decide
    what it is. Here it is exact. ``rewards`` has those of the policy in training, at each step.
    """

    def __init__(self, held_back: int, seed: int, **given: Any) -> None:
        super().__init__(reward_fns=self._reward, **given)
        self.rewards: list[float] = []
        self._held_back, self._seed = held_back, seed
        self._held: collections.deque[Any] = collections.deque()

    def _reward(self, prompts: Any, completions: Any, **_: Any) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        found = [answer[:ANSWER].count(prompt) / ANSWER for prompt, answer in pairs]
        self.rewards.append(float(np.mean(found)))
        return found

    def _generate_and_compute_advantage(self, training_input: Any, mode: Any = None) -> Any:
        while len(self._held) <= self._held_back:
            # Without a seed of its own, tunix's sampler has the same noise at each step.
            config = self.rl_cluster.cluster_config.rollout_config
            config.seed = self._seed * 100_000 + len(self.rewards)
            example = super()._generate_and_compute_advantage(
                dict(training_input), mode or rl_cluster.Mode.TRAIN
            )
            old = self.rl_cluster.get_old_per_token_logps(
                example.prompt_ids, example.completion_ids
            )
            self._held.append(dataclasses.replace(example, old_per_token_logps=old))
        return self._held.popleft()


def rewards(method: str, held_back: int, seed: int, steps: int) -> list[float]:
    """Mean reward of the policy before each update."""
    model = qwen3.Qwen3(
        qwen3.ModelConfig(
            num_layers=2,
            vocab_size=3 + len(LETTERS),
            embed_dim=32,
            hidden_dim=64,
            num_heads=2,
            head_dim=16,
            num_kv_heads=1,
            rope_theta=10_000,
            norm_eps=1e-6,
            use_tied_embedding=True,
        ),
        rngs=nnx.Rngs(seed),
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=Tokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(LEARNING_RATE),
                eval_every_n_steps=steps + 1,
                max_steps=steps,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=ANSWER,
                max_prompt_length=4,
                kv_cache_size=16,
                temperature=1.0,
            ),
        ),
    )
    config = grpo_learner.GRPOConfig(num_generations=GENERATIONS, beta=0.0)
    if method != "grpo":
        name = f"gipo_jax.{method}"
        tunix.register(name, method, loss_agg_mode="seq-mean-token-mean")
        config.policy_loss_fn = name
    learner = HeldBack(held_back, seed, rl_cluster=cluster, algo_config=config)
    generator = np.random.default_rng(seed)
    learner.train([{"prompts": generator.choice([*LETTERS], PROMPTS)} for _ in range(steps)])
    return learner.rewards[held_back:]


def finished(path: Path) -> pd.DataFrame:
    """A row for each run: method, held_back, seed, cpu_seconds, then the reward at each step."""
    if path.is_file():
        return pd.read_csv(path)
    return pd.DataFrame(columns=["method", "held_back", "seed", "cpu_seconds"])


def train(path: Path, wanted: list[tuple[str, int, int]], steps: int) -> None:
    done = finished(path)
    keys = set(zip(done["method"], done["held_back"], done["seed"], strict=True))
    for method, held_back, seed in wanted:
        if (method, held_back, seed) in keys:
            continue
        start = time.process_time()
        curve = rewards(method, held_back, seed, steps)
        row: dict[str, Any] = {"method": method, "held_back": held_back, "seed": seed}
        row["cpu_seconds"] = round(time.process_time() - start, 1)
        row |= {str(step): reward for step, reward in enumerate(curve)}
        done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
        part = path.with_suffix(".partial")
        done.to_csv(part, index=False, float_format="%.5g")
        os.replace(part, path)
        print(f"{method}, {held_back} steps old, seed {seed}: {curve[-1]:.3f}", flush=True)


def report(runs: pd.DataFrame, out: Path) -> pd.DataFrame:
    """The table, which is returned, and the figure of all finished runs.

    The table has the mean reward over the last quarter of the steps, with its 95 % interval over
    seeds, and the same of each method minus tunix's own loss on the same seeds.
    """
    steps = [column for column in map(str, runs) if column.isdigit()]
    runs = runs.assign(final=runs[steps[-max(1, len(steps) // 4) :]].mean(axis=1))
    table = plots.summarize(runs, ["held_back", "method"], "final")
    finals = runs.pivot(index="seed", columns=["held_back", "method"], values="final")
    differences = []
    for key in zip(table["held_back"], table["method"], strict=True):
        rival = (key[0], "grpo")
        difference = stats.Interval(np.nan, np.nan, np.nan)
        if key != rival and rival in finals:
            both = finals[[key, rival]].dropna().to_numpy()
            if len(both):
                difference = stats.paired_difference(both[:, 0], both[:, 1], stats.mean)
        differences.append(difference)
    table[["minus_grpo", "minus_low", "minus_high"]] = differences
    table.to_csv(out / "table.csv", index=False, float_format="%.4g")
    curves = runs.melt(["method", "held_back", "seed"], steps, "step", "reward")
    curves = plots.summarize(
        curves.astype({"step": int}), ["held_back", "method", "step"], "reward"
    )
    ages = sorted(runs["held_back"].unique())
    looks = {method: plots.look(method) for method in METHODS if method in set(runs["method"])}
    if "grpo" in looks:
        looks["grpo"] = dataclasses.replace(looks["grpo"], label="tunix's GRPO")
    with plots.style():
        figure, axes = plots.panels(1, len(ages), sharey=True)
        for axis, age in zip(axes[0], ages, strict=True):
            for method, look in looks.items():
                line = curves[(curves["held_back"] == age) & (curves["method"] == method)]
                plots.band(axis, line["step"], line, look)
            axis.set(title=f"responses {age} steps old", xlabel="step")
        axes[0, 0].set_ylabel("reward")
        caption = "Mean reward of fresh responses under tunix; seeds of a method: "
        counts = sorted(set(table["seeds"]))
        caption += f"{' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))}, "
        caption += f"{plots.INTERVAL_CAPTION}."
        plots.finish(figure, caption, plots.legend(looks.values(), False))
        plots.save(figure, out / "curves")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 methods, 2 ages, 1 seed, 6 steps")
    parser.add_argument("--seeds", type=int, help="0 to N - 1, 9000 on with --quick (default: 5)")
    parser.add_argument("--steps", type=int, help="updates of a run (default: 100)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--staleness", type=int, nargs="+", help="in updates (default: 0 4 16)")
    parser.add_argument("--out", type=Path, default=Path("runs/tunix"), help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="only report what --out holds")
    options = parser.parse_args(arguments)
    quick = options.quick
    seeds = options.seeds or (1 if quick else 5)
    steps = options.steps or (6 if quick else 100)
    methods = options.methods or (("gipo", "grpo") if quick else METHODS)
    staleness = options.staleness or ((0, 2) if quick else STALENESS)
    if seeds < 1 or steps < 1 or min(staleness) < 0:
        parser.error("--seeds and --steps must be at least 1, --staleness at least 0")
    path = options.out / "runs.csv"
    held = [column for column in map(str, finished(path)) if column.isdigit()]
    if held and len(held) != steps and not options.table:
        parser.error(f"--out: {str(path)!r} has runs of {len(held)} steps, not {steps}")
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        # A seed over all methods and ages before the next: what is finished is balanced.
        # Those of a look are not those of a result.
        first = 9000 if quick else 0
        drawn = range(first, first + seeds)
        wanted = [(m, age, seed) for seed in drawn for age in staleness for m in methods]
        train(path, wanted, steps)
    if finished(path).empty:
        parser.error(f"--out: no finished run in {str(path)!r}; run without --table first")
    print(report(finished(path), options.out).to_string(index=False, float_format="%.3f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
