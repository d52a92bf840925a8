"""The objectives compared on answers of several tokens, as one; see ``compared``.

A sweep's folder remembers the checksum of this file, so nothing else is in it.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gipo_jax import objectives

NAMES = ("gipo", "ppo_clip", "sapo", "cispo", "tis", "vespo", "no_clip")


@objectives.declare(positive=("sigma", "clip_eps", "tau_pos", "tau_neg"))
def sequence_methods(
    log_ratio: Array,
    advantage: Array,
    which: ArrayLike = 0.0,
    sigma: ArrayLike = 1.0,
    clip_eps: ArrayLike = 0.2,
    tau_pos: ArrayLike = 1.0,
    tau_neg: ArrayLike = 1.05,
) -> Array:
    """The objective of index ``which`` in ``NAMES``; parameters that it lacks are not used."""
    branches = [
        lambda x, a: objectives.gipo(x, a, sigma=sigma),
        lambda x, a: objectives.ppo_clip(x, a, clip_eps=clip_eps),
        lambda x, a: objectives.sapo(x, a, tau_pos=tau_pos, tau_neg=tau_neg),
        objectives.cispo,
        objectives.tis,
        objectives.vespo,
        objectives.no_clip,
    ]
    return jax.lax.switch(jnp.asarray(which, jnp.int32), branches, log_ratio, advantage)
