"""Process-wide settings of XLA that must be made before JAX starts; entry points call these."""

import hashlib
import os
import platform
from pathlib import Path

SCHEDULER_FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"
DEVICES_FLAG = "xla_force_host_platform_device_count"


def set_cpu_defaults() -> None:
    """Makes XLA safe and parallel on CPU; call before the first JAX computation.

    - ``--xla_cpu_enable_concurrency_optimized_scheduler=false``: jaxlib 0.10 can hang for ever in
      vmapped training programs on hosts with few cores when this scheduler is on.
    - one host device per core: a sweep's runs are spread over devices, and XLA runs small programs
      on one core per device.
    - a persistent compilation cache in the user's cache folder.

    Whatever the user has set, in ``XLA_FLAGS``, ``JAX_NUM_CPU_DEVICES``,
    ``JAX_COMPILATION_CACHE_DIR`` or ``jax.config``, is kept.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if SCHEDULER_FLAG not in flags:
        flags += f" --{SCHEDULER_FLAG}=false"
    if DEVICES_FLAG not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        flags += f" --{DEVICES_FLAG}={available_cores()}"
    os.environ["XLA_FLAGS"] = flags.strip()

    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory()))


def available_cores() -> int:
    """Cores that this process may use, >= 1."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def cache_directory() -> Path:
    """Folder for compiled programs, one per kind of processor, whose instructions they use."""
    try:
        features = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line
        )
    except (OSError, StopIteration):
        features = platform.processor()
    kind = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gipo_jax" / f"xla-{kind}"
