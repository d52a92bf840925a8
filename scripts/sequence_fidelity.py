#!/usr/bin/env python
"""Checks training on token sequences against an independent trainer, benchmarks/sequence_loop.py.

    python scripts/sequence_fidelity.py [--seeds N] [--steps N] [--points N] [--out FILE]
    python scripts/sequence_fidelity.py --table

Both learn to reverse ten tokens by REINFORCE (one update on each step's answers) and by PPO-Clip
(four). A table holds the share of sampled answers that are all right, by seed and step. Compared
are, with 95 % intervals over seeds (Welch), the mean of that curve and each of its points.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Scripts are part of the checkout, not of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_jax import runtime

runtime.set_cpu_defaults()

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from scipy import stats  # noqa: E402

from benchmarks import sequence_loop as loop  # noqa: E402
from gipo_jax import sweep  # noqa: E402
from gipo_jax.config import ConfigError  # noqa: E402
from gipo_jax.sweep import results  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = {"reinforce": "no_clip", "ppo": "ppo_clip"}
"""This project's, by the loop's methods."""

BLOCK = loop.PROMPTS * loop.ANSWERS
PROMPTS = 512
"""Fresh prompts that each point of a curve is measured on."""


def settings(method: str, steps: int) -> dict[str, Any]:
    """This project's settings for what the loop does."""
    return {
        "env": "tokens/reverse",
        "objective": OBJECTIVES[method],
        "num_envs": loop.PROMPTS,
        "rollout_length": loop.ANSWERS,
        "batch_size": BLOCK,
        "buffer_size": BLOCK,
        "max_buffer_size": BLOCK,
        "updates_per_iteration": loop.PASSES[method],
        "learning_rate": 3e-4,
        "schedule": "constant",
        "max_grad_norm": 1e9,
        "entropy_coef": 0.0,
        "total_steps": BLOCK * steps,
        "eval_episodes": PROMPTS,
    }


def ours(method: str, seeds: int, steps: int, points: int) -> pd.DataFrame:
    runs = sweep.expand(**settings(method, steps), num_logs=points, seeds=seeds)
    with tempfile.TemporaryDirectory() as folder:
        sweep.run(runs, folder, sweep.Options(batch_mode="loop"))
        seed = results.read_runs(folder).set_index("run")["seed"]
        metrics = results.read_metrics(folder)
    return pd.DataFrame(
        {
            "by": "gipo_jax",
            "method": method,
            "seed": metrics["run"].map(seed),
            "step": metrics["env_steps"] // BLOCK,
            "exact": metrics["eval_return_sampled"],
        }
    )


def theirs(method: str, seeds: int, steps: int, points: int) -> pd.DataFrame:
    work = {"method": method, "seeds": [*range(seeds)], "steps": steps, "points": points}
    command = [sys.executable, loop.__file__, "curves", json.dumps(work | {"prompts": PROMPTS})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    frame = pd.DataFrame(json.loads(done.stdout), columns=["seed", "step", "reward", "exact"])
    return frame.drop(columns="reward").assign(by="loop", method=method)


def compare(curves: pd.DataFrame) -> pd.DataFrame:
    """A row for each method: mean of the curves, the difference, and points that agree.

    Returns:
        columns ``method``, ``gipo_jax`` and ``loop`` (mean over points and seeds), ``difference``
        with ``low`` and ``high``, ``points``, and ``agree``, at how many of them the interval of
        the difference holds 0 or the means differ by less than one answer.
    """
    rows = []
    for method, part in curves.groupby("method", sort=False):
        table = part.pivot(index=["by", "seed"], columns="step", values="exact")
        a, b = (table.loc[by].to_numpy() for by in ("gipo_jax", "loop"))
        areas = a.mean(axis=1), b.mean(axis=1)
        area = stats.ttest_ind(*areas, equal_var=False).confidence_interval()
        # Where all have learnt there is no variance to divide by.
        near = np.abs(a.mean(axis=0) - b.mean(axis=0)) < 1 / PROMPTS
        at = stats.ttest_ind(a[:, ~near], b[:, ~near], equal_var=False).confidence_interval()
        agree = near.sum() + np.sum((at.low <= 0) & (at.high >= 0))
        rows.append(
            {
                "method": method,
                "gipo_jax": areas[0].mean(),
                "loop": areas[1].mean(),
                "difference": areas[0].mean() - areas[1].mean(),
                "low": area.low,
                "high": area.high,
                "points": table.shape[1],
                "agree": agree,
            }
        )
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500, help="of 10 prompts x 10 answers")
    parser.add_argument("--points", type=int, default=20, help="measured on a curve")
    stored = ROOT / "benchmarks" / "sequence-fidelity.csv"
    parser.add_argument("--out", type=Path, default=stored, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="only compare what --out holds")
    options = parser.parse_args(arguments)
    if options.table:
        if not options.out.is_file():
            parser.error(f"--out: {str(options.out)!r} is no file; run without --table first")
        curves = pd.read_csv(options.out)
    else:
        if options.seeds < 2 or not 1 <= options.points <= options.steps:
            parser.error("--seeds must be at least 2, --points of 1 to --steps")
        if options.steps % options.points:
            parser.error("--steps must be a multiple of --points")
        asked = options.seeds, options.steps, options.points
        try:
            found = [make(method, *asked) for method in OBJECTIVES for make in (ours, theirs)]
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        curves = pd.concat(found, ignore_index=True)
        curves.to_csv(options.out, index=False, float_format="%.5g")
    table = compare(curves)
    print(table.to_string(index=False, float_format="%.3f"))
    return 0 if ((table["low"] <= 0) & (table["high"] >= 0)).all() else 1


if __name__ == "__main__":
    sys.exit(main())
