"""The objectives that the project's proposal is compared with, as one; see ``compared``.

A sweep's folder remembers the checksum of this file, so nothing else is in it.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gipo_jax import objectives

NAMES = (
    *("gipo", "ppo_clip", "sapo", "no_clip", "geppo", "decoupled_ppo", "maspo", "p3o_ess", "m2po"),
    *("proximal_gipo", "following_gipo"),
)


@objectives.declare(
    kind="other-input",
    positive=(
        "sigma",
        "clip_eps",
        "tau_pos",
        "tau_neg",
        "sigma_stale",
        "sigma_prox",
        "mean_weight",
    ),
)
def contenders(
    log_ratio: Array,
    advantage: Array,
    log_ratio_start: Array,
    which: ArrayLike = 0.0,
    sigma: ArrayLike = 1.0,
    clip_eps: ArrayLike = 0.2,
    tau_pos: ArrayLike = 1.0,
    tau_neg: ArrayLike = 2.0,
    sigma_stale: ArrayLike = 1.0,
    sigma_prox: ArrayLike = 0.5,
    mean_weight: ArrayLike = 0.7,
) -> Array:
    """The objective of index ``which`` in ``NAMES``; parameters that it lacks are not used."""
    start = jax.lax.stop_gradient(log_ratio_start)
    branches = [
        lambda x, a, s: objectives.gipo(x, a, sigma=sigma),
        lambda x, a, s: objectives.ppo_clip(x, a, clip_eps=clip_eps),
        lambda x, a, s: objectives.sapo(x, a, tau_pos=tau_pos, tau_neg=tau_neg),
        lambda x, a, s: objectives.no_clip(x, a),
        lambda x, a, s: objectives.geppo(x, a, s, clip_eps=clip_eps),
        lambda x, a, s: objectives.decoupled_ppo(x, a, s, clip_eps=clip_eps),
        lambda x, a, s: objectives.maspo(x, a, sigma=sigma),
        lambda x, a, s: objectives.p3o_ess(x, a),
        lambda x, a, s: objectives.m2po(x, a),
        lambda x, a, s: objectives.proximal_gipo(x, a, s, sigma_stale, sigma_prox),
        lambda x, a, s: objectives.following_gipo(x, a, s, mean_weight, sigma_prox),
    ]
    return jax.lax.switch(jnp.asarray(which, jnp.int32), branches, log_ratio, advantage, start)
