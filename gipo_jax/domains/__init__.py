"""What the loop trains on: control, responses of tokens, and the denoising steps of flows."""

from typing import Any

from gipo_jax import objectives
from gipo_jax.config import CONTROL, FLOW, TOKENS, Config, HParams, check_applies
from gipo_jax.domains import control, flow, tokens
from gipo_jax.domains.control import open_env
from gipo_jax.domains.interface import Batch, Collected, Domain, Scores

__all__ = ["Batch", "Collected", "Domain", "Scores", "check_hparams", "kind", "make", "open_env"]

_MODULES = {CONTROL: control, TOKENS: tokens, FLOW: flow}


def kind(config: Config) -> str:
    """The domain that a configuration's ``env`` belongs to."""
    if tokens.tasks.is_task(config.env):
        return TOKENS
    return FLOW if flow.tasks.is_task(config.env) else CONTROL


def make(config: Config, env: Any = None) -> Domain:
    """What a configuration trains on, in ``env`` if given. Raises ConfigError."""
    return _MODULES[kind(config)].make(config, env)


def check_hparams(config: Config, hparams: HParams) -> None:
    """Refuses traced settings that would do nothing. Raises ConfigError."""
    domain, objective = kind(config), objectives.spec(config.objective)
    check_applies(config, hparams, domain=domain, objective=objective)
    if domain != FLOW:
        (tokens if domain == TOKENS else control).check_hparams(config, hparams)
