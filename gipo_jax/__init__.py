"""GIPO (arXiv:2603.03955) in JAX: policy objectives for stale replay data, in compiled sweeps."""

__version__ = "0.1.0"
