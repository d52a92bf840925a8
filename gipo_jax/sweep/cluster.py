"""Several processes, on one host or many, as one: JAX's cluster, joined once and never left."""

import os
import re
import sys
import time
import zlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gipo_jax.config import ConfigError

START_SECONDS = 120  # Time that processes may need to find each other
HEARTBEAT_SECONDS = 30  # Silence after which a process counts as dead; JAX then ends the others
SHUTDOWN_SECONDS = 30  # Time that a process which ends well waits for the others
LOST_CODE = 75  # Exit code where another process is gone: try again later

T = TypeVar("T")


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the cluster; call before any computation. ``jax.devices()`` are those of all after.

    Where JAX knows the cluster (Slurm, Open MPI, TPU pods, Kubernetes) it finds out the arguments:
    ``host:port`` of process 0, the number of processes and the index of this one.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM, which is the sweep's.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        valid = (
            "--coordinator-address, --num-processes and --process-id that fit each other,"
            f" or a cluster that tells them; {reason}"
        )
        raise ConfigError("distributed", coordinator_address, valid) from error


def is_main_process() -> bool:
    """Whether this is process 0, which writes tables and speaks for all."""
    return jax.process_index() == 0


def gather(*values: float) -> np.ndarray:
    """Numbers of every process, float64 ``[processes, values]``. All processes must call it."""
    # JAX has 32-bit numbers, and sizes in bytes need more.
    words = np.asarray(values, np.float64).view(np.uint32)
    return multihost_utils.process_allgather(words).view(np.float64)


def run_on_all_processes(function: Callable[[], T]) -> T:
    """Calls a function in every process; where it raises in one, ConfigError in all others."""
    error, result = None, None
    try:
        result = function()
    except Exception as caught:
        error = caught
    failed = np.flatnonzero(gather(error is not None))
    if error is not None:
        raise error
    if failed.size:
        valid = f"what all processes take, but process {failed[0]} does not: see what it says"
        raise ConfigError("distributed", True, valid)
    return result  # type: ignore[return-value]


def check_same(what: str, text: str) -> None:
    """Raises ConfigError where a text, which describes ``what``, differs between processes."""
    if np.ptp(gather(zlib.crc32(text.encode()))):
        raise ConfigError("distributed", True, f"the same {what} in all processes")


def is_lost(error: BaseException | None) -> bool:
    """Whether an error comes from another process that is gone."""
    while error is not None and jax.process_count() > 1:
        if re.search("gloo|nccl|barrier|heartbeat|coordination", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(code: int) -> int:
    """An exit code, where a process may end with it; else ends the process.

    JAX waits at exit for all processes, which those that failed or are gone do not reach.
    """
    if code == 0 or not jax.distributed.is_initialized():
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        # The others hang on it, and may still have something to say.
        time.sleep(2)
    os._exit(code)
