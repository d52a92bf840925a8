"""What is studied. One module an experiment: its question, its grid, and how to draw it.

A module has ``QUESTION`` (one line), ``run(store, preset, part)``, which measures and stores
tables (``part`` is (i, n): the i-th of n shares of the work), and ``draw(store)``, which makes
figures from stored tables only. One that needs more than the core packages has ``check()``, which
raises ConfigError where it cannot run. Mechanics live in ``gipo_jax``.
"""

from types import ModuleType

from experiments import (
    age_and_size,
    asymmetry,
    bounds,
    evidence,
    flow,
    gridworld,
    kernel,
    metaworld,
    objective_family,
    proposal,
    proposal_development,
    replay_sizes,
    reuse_bias,
    sample_efficiency,
    selection,
    sequence_bias,
    sequence_learning,
    sequence_staleness,
    sigma,
    stability,
    staleness,
    token_vs_joint,
    trust_weights,
    tuned_sizes,
    utilization,
)

PRESETS = ("quick", "committed", "full")
"""Scales: a check in minutes, the results in this repository, and what a GPU should run."""

REGISTRY: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        trust_weights,
        gridworld,
        bounds,
        staleness,
        replay_sizes,
        tuned_sizes,
        age_and_size,
        utilization,
        sample_efficiency,
        stability,
        sigma,
        asymmetry,
        kernel,
        token_vs_joint,
        objective_family,
        metaworld,
        proposal_development,
        proposal,
        reuse_bias,
        flow,
        selection,
        sequence_bias,
        sequence_staleness,
        sequence_learning,
        evidence,
    )
}
"""Experiments by name, in the order in which they run."""
