"""Other projects' programs on the work of scripts/benchmark.py, which runs this file.

It runs in an environment of its own (the peers need an older gymnax) and imports nothing of this
project. Protocol: one line of JSON once compiled and warmed up; then for each line on stdin one
timed repeat, answered by a line with its seconds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def serve(start: Callable[[], Any], run: Callable[[Any], Any], arguments: dict[str, Any]) -> None:
    """Compiles ``run`` for the state that ``start`` makes, then times it once for each line."""
    state = jax.block_until_ready(start())
    begin = time.perf_counter()
    compiled = jax.jit(run, donate_argnums=0).lower(state).compile()
    compile_s = time.perf_counter() - begin
    state = jax.block_until_ready(compiled(state))
    print(json.dumps({"compile_s": compile_s, "jax": jax.__version__, **arguments}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        state = jax.block_until_ready(compiled(state))
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


def rejax_ppo(work: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """rejax's PPO without its evaluation, ``runs`` of it under vmap."""
    from rejax import PPO

    algorithm = PPO.create(
        env="CartPole-v1",
        agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)},
        num_envs=work["num_envs"],
        num_steps=work["rollout_length"],
        num_epochs=work["epochs"],
        num_minibatches=work["minibatches"],
        total_timesteps=work["total_steps"],
        eval_freq=work["total_steps"],
        skip_initial_evaluation=True,
        max_grad_norm=0.5,
        learning_rate=1e-3,
    ).replace(eval_callback=lambda algorithm, state, key: ())
    keys = jax.random.split(jax.random.key(0), work["runs"])
    if work["runs"] == 1:
        return jax.jit(lambda: algorithm.init_state(keys[0])), lambda state: algorithm.train(
            train_state=state
        )[0]
    return jax.jit(lambda: jax.vmap(algorithm.init_state)(keys)), jax.vmap(
        lambda state: algorithm.train(train_state=state)[0]
    )


def purejaxrl_ppo(work: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """PureJaxRL's PPO, ``runs`` of it under vmap; its first states are part of the work."""
    from purejaxrl.ppo import make_train

    train = make_train(
        {
            "ENV_NAME": "CartPole-v1",
            "NUM_ENVS": work["num_envs"],
            "NUM_STEPS": work["rollout_length"],
            "UPDATE_EPOCHS": work["epochs"],
            "NUM_MINIBATCHES": work["minibatches"],
            "TOTAL_TIMESTEPS": work["total_steps"],
            "LR": 1e-3,
            "ANNEAL_LR": True,
            "GAMMA": 0.99,
            "GAE_LAMBDA": 0.95,
            "CLIP_EPS": 0.2,
            "ENT_COEF": 0.01,
            "VF_COEF": 0.5,
            "MAX_GRAD_NORM": 0.5,
            "ACTIVATION": "tanh",
        }
    )

    def run(keys: Any) -> Any:
        # Its metrics of every step are not asked for, so XLA need not store them.
        final = jax.vmap(lambda key: train(key)["runner_state"])(keys)
        seen = sum(jnp.sum(x) for x in jax.tree.leaves(final[0].params))
        return jax.vmap(jax.random.fold_in, (0, None))(keys, seen.astype(jnp.int32))

    return lambda: jax.random.split(jax.random.key(0), work["runs"]), run


def flashbax_replay(work: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """flashbax's item buffer: ``iterations`` times one block added and ``batches`` sampled."""
    import flashbax

    replay = flashbax.make_item_buffer(
        max_length=work["capacity"],
        min_length=work["batch_size"],
        sample_batch_size=work["batch_size"],
        add_sequences=True,
        add_batches=True,
    )
    lead = (work["num_envs"], work["rollout_length"])
    row = {
        "obs": jnp.zeros(work["obs_size"]),
        "action": jnp.zeros(1, jnp.int32),
        "behavior_log_prob": jnp.zeros(1),
        "advantage": jnp.zeros(()),
        "value_target": jnp.zeros(()),
    }
    block = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), row)

    def iteration(carry: Any, key: jax.Array) -> tuple[Any, None]:
        state, total = carry
        state = replay.add(state, jax.tree.map(lambda x: x + total.astype(x.dtype), block))
        for key_batch in jax.random.split(key, work["batches"]):
            batch = replay.sample(state, key_batch).experience
            total += sum(jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(batch))
        return (state, total), None

    def run(carry: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), work["iterations"])
        return jax.lax.scan(iteration, carry, keys)[0]

    return jax.jit(lambda: (replay.init(row), jnp.zeros(()))), run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=("rejax", "purejaxrl", "flashbax"))
    parser.add_argument("work", type=json.loads, help="JSON")
    options = parser.parse_args()
    make = {"rejax": rejax_ppo, "purejaxrl": purejaxrl_ppo, "flashbax": flashbax_replay}[
        options.peer
    ]
    serve(*make(options.work), {"peer": options.peer})
