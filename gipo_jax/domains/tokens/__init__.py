"""Tasks whose responses have many tokens.

- ``tasks``: what a prompt is and what a response is worth. ``decoder``: the policy.
- ``selection``: what is answered and learned from. ``preference``: pairs of responses.
- ``domain``: what the training loop asks of them.
"""

from gipo_jax.domains.tokens import tasks
from gipo_jax.domains.tokens.domain import check_hparams, make

__all__ = ["check_hparams", "make", "tasks"]
