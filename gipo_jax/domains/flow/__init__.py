"""Flow-matching policies on 2-D densities, trained by policy gradients on their denoising steps.

- ``tasks``: densities, rewards on the end point, and how diverse a set of points is.
- ``sampler``: the flow, its pre-training, and the SDE sampler whose every step is a Gaussian.
- ``domain``: what the training loop asks of them.
"""

from gipo_jax.domains.flow import sampler, tasks
from gipo_jax.domains.flow.domain import make

__all__ = ["make", "sampler", "tasks"]
