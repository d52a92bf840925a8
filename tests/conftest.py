"""Settings that must stand before JAX is imported."""

import os

# XLA's scheduler on CPU can deadlock in vmapped training programs; entry points set this themselves,
# tests import the modules below them.
_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=false".strip()
