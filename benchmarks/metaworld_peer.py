"""The official Meta-World and its scripted experts; scripts/metaworld_fidelity.py runs this file.

It runs in an environment of its own (metaworld pins an older MuJoCo) and imports nothing of this
project.

    metaworld_peer.py episodes TASK COUNT SEED   one line of JSON: returns and successes
    metaworld_peer.py expert TASK                for each line [n observations], [n actions]
"""

import json
import random
import sys
import warnings

import metaworld
import numpy as np
from metaworld.policies import ENV_POLICY_MAP

STEPS = 500


def act(expert: object, obs: np.ndarray) -> np.ndarray:
    return np.clip(expert.get_action(obs), -1, 1)


def episodes(task: str, count: int, seed: int) -> dict[str, list[float]]:
    """Returns of the expert, each episode with another of the benchmark's 50 goals."""
    benchmark = metaworld.MT1(task, seed=seed)
    goals = list(benchmark.train_tasks)
    random.Random(seed).shuffle(goals)
    env = benchmark.train_classes[task]()
    expert = ENV_POLICY_MAP[task]()
    returns, successes = [], []
    for episode in range(count):
        env.set_task(goals[episode % len(goals)])
        obs, _ = env.reset()
        total, solved = 0.0, False
        for _ in range(STEPS):
            obs, reward, _, _, info = env.step(act(expert, obs))
            total += float(reward)
            solved |= bool(info["success"])
        returns.append(total)
        successes.append(float(solved))
    return {"returns": returns, "successes": successes}


if __name__ == "__main__":
    # The experts warn that their actions are clipped, as they should be.
    warnings.simplefilter("ignore")
    what, task, *rest = sys.argv[1:]
    if what == "episodes":
        print(json.dumps(episodes(task, *map(int, rest))))
    else:
        expert = ENV_POLICY_MAP[task]()
        for line in sys.stdin:
            actions = [act(expert, np.asarray(obs)).tolist() for obs in json.loads(line)]
            print(json.dumps(actions), flush=True)
