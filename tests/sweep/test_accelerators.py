"""Programs of a sweep lower for CUDA and TPU. Nothing here runs on them."""

import re

import jax
import pytest
from jax import export

from gipo_jax import train
from gipo_jax.config import Config
from gipo_jax.sweep import program

RUNS = 3


@pytest.mark.slow
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Breakout-MinAtar"])
def test_init_and_train_and_log_lower_for_cuda_and_tpu_with_all_runs_side_by_side(
    env: str,
) -> None:
    config = Config(
        env=env,
        num_envs=2,
        rollout_length=4,
        batch_size=8,
        total_steps=16,
        hidden_sizes=(8,),
        num_logs=1,
        eval_episodes=1,
        max_buffer_size=16,
    )
    hparams = train.make_hparams(config, buffer_size=16)
    # As on an accelerator: one block of all runs.
    layout = program.Layout(tuple(jax.devices()[:1]), blocks=1, lanes=RUNS)
    compiled = program.Program(train.make(config), layout, hparams)

    init, train_and_log = (
        export.export(function, platforms=["cuda", "tpu"])(*arguments)
        for function, arguments in (compiled.init_function, compiled.train_and_log_function)
    )
    assert init.platforms == train_and_log.platforms == ("cuda", "tpu")
    # Orthogonal weights of all runs come from one decomposition, not from one run after the other.
    decompositions = re.findall(
        r"custom_call @cusolver_geqrf_ffi\(.*?: \(tensor<(\d+)x\d+x\d+xf32>", init.mlir_module()
    )
    assert decompositions and {int(batch) for batch in decompositions} == {RUNS}
