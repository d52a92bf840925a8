"""Compiles one program of training for a device that need not be there, and counts it.

    python benchmarks/compiled_worker.py JSON [PACKAGES]

``scripts/benchmark.py compiled`` runs this in an environment that has the compiler of the device.
It prints one line of JSON. The package comes from the checkout that the JSON names, not from where
this file lies. PACKAGES is a folder with the compiler, for an interpreter that has none.
"""

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The device is only described: arrays live on the CPU, and no cloud is asked for its TPUs.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    # A program for a described device cannot be stored.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    sys.path += sys.argv[2:]

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import hlo

Work = dict[str, Any]

_GPUS = {
    "h100": """
        gpu_device_info {
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: 232448
          shared_memory_per_core: 233472
          threads_per_core_limit: 2048
          core_count: 132
          fpus_per_core: 128
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          memory_bandwidth: 3352320000000
          l2_cache_size: 52428800
          clock_rate_ghz: 1.98
          device_memory_size: 84929347584
          cuda_compute_capability { major: 9 }
        }
        platform_name: "CUDA"
        runtime_version { major: 12 minor: 8 }
        dnn_version_info { major: 9 minor: 7 }
        device_description_str: "NVIDIA H100 80GB HBM3"
        """
}
"""Facts that XLA wants to know of a GPU, here the SXM model, as its GpuTargetConfigProto."""


def describe(name: str) -> tuple[list[Any], str]:
    """Described devices and their platform, for ``h100``, ``h100:1x1x8`` or ``v5e:16x16``."""
    kind, _, shape = name.partition(":")
    if kind in _GPUS:
        topology = topologies.get_topology_desc(
            kind, platform="cuda", target_config=_GPUS[kind], topology=shape or "1x1x1"
        )
        return list(topology.devices), "cuda"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices), "tpu"


def over_runs(mesh: Mesh, tree: Any) -> Any:
    """The same shapes with the first axis, that of the runs, spread over the mesh."""
    sharding = NamedSharding(mesh, P("runs"))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def trace_own(work: Work, mesh: Mesh) -> tuple[Any, Work]:
    """This project's program for ``runs`` runs, and the bytes that a sweep plans for a device."""
    checkout = Path(work["checkout"])
    sys.path.insert(0, str(checkout))
    import gipo_jax
    from gipo_jax import train
    from gipo_jax.config import Config
    from gipo_jax.sweep import plan, program

    if checkout not in Path(gipo_jax.__file__).parents:
        raise SystemExit(f"gipo_jax is that of {gipo_jax.__file__}, not of {checkout}")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in work["config"].items()}
    settings |= {"max_buffer_size": work["buffer_size"], "num_logs": 2}
    block = Config(**settings).block_size
    config = Config(**settings, total_steps=4 * block)
    hparams = [
        train.make_hparams(config, seed=seed, buffer_size=work["buffer_size"])
        for seed in range(work["runs"])
    ]
    algorithm = train.make(config)
    layout = program.layout("vmap", None, tuple(mesh.devices.flat), len(hparams))
    planned = plan.needed(plan.measure(algorithm, hparams[0]), layout) / mesh.size
    if work["kind"] == "sweep":
        function, arguments = program.Program(algorithm, layout, hparams[0]).train_and_log_function
        return function.trace(*arguments), {"planned": planned}
    function = jax.vmap(train.make_train(config))
    if mesh.size > 1:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=P("runs"), out_specs=P("runs"), check_vma=False
        )
    stacked = jax.tree.map(lambda *values: jnp.asarray(values), *hparams)
    return jax.jit(function).trace(over_runs(mesh, stacked)), {"planned": planned}


def trace_peer(work: Work, mesh: Mesh) -> tuple[Any, Work]:
    """A peer's program as benchmarks/peers.py makes it."""
    from benchmarks import peers

    if work["by"] == "purejaxrl":
        checkout = Path(work["peer_checkout"])
        # Its modules import each other by bare names.
        sys.path[:0] = [str(checkout), str(checkout / "purejaxrl")]
        # Its wrappers import the packages of environments that this work does not use.
        for unused in ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training"):
            sys.modules[unused] = types.ModuleType(unused)
        sys.modules["navix"] = types.ModuleType("navix")
        sys.modules["brax"].envs = sys.modules["brax.envs"]
        for wrapper in ("EpisodeWrapper", "AutoResetWrapper"):
            setattr(sys.modules["brax.envs.wrappers.training"], wrapper, None)
        start, run = peers.purejaxrl_ppo(work["peer"])
    else:
        start, run = peers.rejax_ppo(work["peer"])
    shapes = over_runs(mesh, jax.eval_shape(start))
    return jax.jit(run, donate_argnums=0).trace(shapes), {}


def compile_and_count(work: Work) -> Work:
    """Compiles a program and returns what the table says of it."""
    described, platform = describe(work["device"])
    mesh = Mesh(np.array(described), ("runs",))
    own = work["by"] == "gipo_jax"
    traced, about = (trace_own if own else trace_peer)(work, mesh)
    lowered = traced.lower(lowering_platforms=(platform,))
    begin = time.perf_counter()
    compiled = lowered.compile()
    about["compile_s"] = time.perf_counter() - begin
    text = compiled.as_text()
    if work.get("keep"):
        Path(work["keep"]).write_text(text)
    return about | memory(compiled) | counted(text, work)


def memory(compiled: Any) -> Work:
    """Bytes on one device: temporaries, results, and all that is held at once."""
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {
        "temporaries": stats.temp_size_in_bytes,
        "results": stats.output_size_in_bytes,
        "held": held + stats.temp_size_in_bytes,
    }


def counted(text: str, work: Work) -> Work:
    """Counts of one iteration."""
    program = hlo.count(text)
    found = hlo.regions(program.main, work["env_steps"], work["updates"], work["gae_steps"])
    values = dataclasses.asdict(found)
    inside = values.pop("inside")
    read_backs = [dataclasses.asdict(read_back) for read_back in program.read_backs]
    for read_back in read_backs:
        # The end of the loop of iterations is read between them.
        read_back["in_iteration"] = bool(inside & set(read_back.pop("loops")))
    return values | {
        "collectives": program.collectives,
        "read_backs": read_backs,
        "outline": list(hlo.outline(program.main)),
    }


def main() -> None:
    work = json.loads(sys.argv[1])
    result = compile_and_count(work)
    names = ("jax", "jaxlib", "jax-cuda12-plugin", "libtpu", "gymnax", "rejax", "flax", "optax")
    packages = {}
    for name in names:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    print(json.dumps(result | {"packages": packages}))


if __name__ == "__main__":
    main()
