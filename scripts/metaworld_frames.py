#!/usr/bin/env python
"""Draws an episode of a policy trained on Meta-World, as a row of pictures.

python scripts/metaworld_frames.py SWEEP [--run N] [--seed N] [--frames N] [--out FILE.png]

SWEEP is a folder of `gipo-jax sweep`, or one in OUT/sweeps of scripts/reproduce.py. Needs the extra
envpool, whose simulator renders, and OpenGL without a display: on Debian the packages libegl1 and
libgl1 (Mesa, in software where there is no GPU).
"""

import argparse
import ctypes
import sys
from pathlib import Path

import numpy as np

# Scripts are part of the checkout, not of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gipo_jax import runtime

runtime.set_cpu_defaults()

import jax  # noqa: E402

import gipo_jax  # noqa: E402
from gipo_jax.agents import Agent  # noqa: E402
from gipo_jax.analysis import plots  # noqa: E402
from gipo_jax.config import ConfigError  # noqa: E402
from gipo_jax.environments import envpool_env  # noqa: E402
from gipo_jax.environments.options import base_name  # noqa: E402
from gipo_jax.sweep.results import ResultsError  # noqa: E402

LIBRARIES = ("libEGL.so.1", "libGL.so.1")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, metavar="SWEEP")
    parser.add_argument("--run", type=int, default=0, help="as in runs.csv (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of goal and actions (default: 0)")
    parser.add_argument("--frames", type=int, default=6, help="pictures (default: 6)")
    parser.add_argument("--out", type=Path, default=Path("runs/episode.png"), metavar="FILE.png")
    options = parser.parse_args(arguments)
    if options.frames < 2:
        parser.error(f"--frames: {options.frames} is not valid; expected an integer >= 2")
    if options.out.suffix != ".png":
        parser.error(f"--out: {str(options.out)!r} is not valid; expected FILE.png")
    return options


def load_opengl() -> None:
    """Loads OpenGL where MuJoCo looks for it, which ends the process where it finds none.

    It looks when EnvPool is imported, so this comes before.

    Raises:
        ConfigError: a library is missing.
    """
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError as error:
            valid = f"{' and '.join(LIBRARIES)}, on Debian of libegl1 and libgl1"
            raise ConfigError("OpenGL", str(error), valid) from error


def episode(agent: Agent, seed: int, frames: int) -> tuple[list[np.ndarray], list[str]]:
    """Pictures ``[height, width, 3]`` at even distances, first and last included, and titles."""
    import envpool

    steps = agent.env.max_episode_steps
    pool = envpool.make(
        base_name(agent.env.name), env_type="gymnasium", num_envs=1, seed=seed,
        render_mode="rgb_array", **envpool_env.read_task(agent.config).options,
    )  # fmt: skip
    act = jax.jit(agent.policy)
    obs, _ = pool.reset()
    shown = np.linspace(0, steps, frames).round().astype(int).tolist()
    pictures, titles, total, solved = [], [], 0.0, False
    for step in range(steps + 1):
        if step in shown:
            pictures.append(np.asarray(pool.render())[0])
            state = ", solved" if solved else ""
            titles.append(f"step {step}\nreturn {total:.0f}{state}")
        if step < steps:
            key = jax.random.fold_in(jax.random.key(seed), step)
            action = act(obs[0].astype(np.float32), key)
            obs, reward, _, _, info = pool.step(np.asarray(action)[None])
            total += float(reward[0])
            solved |= bool(info["success"][0])
    return pictures, titles


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        load_opengl()
        agent = gipo_jax.load(options.sweep, options.run)
        if not agent.env.name.startswith("MetaWorld/"):
            raise ConfigError(
                "sweep", str(options.sweep), f"one of Meta-World, not {agent.env.name}"
            )
    except (ConfigError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pictures, titles = episode(agent, options.seed, options.frames)
    with plots.style():
        figure, axes = plots.panels(1, len(pictures), width=1.45 * len(pictures), height=1.45)
        for axis, picture, title in zip(axes[0], pictures, titles, strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
            axis.set_title(title, fontsize=7)
        iterations = agent.config.num_iterations
        plots.finish(
            figure,
            f"{agent.env.name}: an episode of {plots.look(agent.config.objective).label} after"
            f" {iterations:,} iterations, actions sampled, seed {options.seed}.",
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, metadata={"Software": None})
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
