"""Former name of ``gipo_jax.domains.flow``, for this release."""

from typing import Any

from gipo_jax import domains
from gipo_jax.renamed import submodule


def __getattr__(name: str) -> Any:
    return submodule(__name__, domains.flow.__name__, name)
