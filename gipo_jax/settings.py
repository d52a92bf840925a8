"""Settings of runs, complete and checked, and their grids."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from gipo_jax import domains, loss_terms, objectives, signatures
from gipo_jax.config import Config, ConfigError, HParams, check_fields, check_sizes, stack


def make_hparams(
    config: Config, *, objective_params: Mapping[str, float] | None = None, **overrides: Any
) -> HParams:
    """Traced settings of a run, complete and checked.

    Args:
        config: the static settings they go with.
        objective_params: the objective's own parameters; those not given take their defaults.
        overrides: fields of ``HParams``; a parameter of the objective may be given here too.

    Raises:
        ConfigError: unknown, out of range, or at odds with ``config``.
    """
    spec = objectives.spec(config.objective)
    own = {name: overrides.pop(name) for name in spec.params if name in overrides}
    own |= objective_params or {}
    fields = {field.name for field in dataclasses.fields(HParams)}
    for name in (set(own) - set(spec.params)) | (set(overrides) - fields):
        valid = sorted(spec.params) + sorted(fields - {"objective_params"})
        raise ConfigError(name, own.get(name, overrides.get(name)), f"one of {', '.join(valid)}")
    overrides = {"buffer_size": config.default_buffer_size} | overrides
    hparams = HParams(**overrides, objective_params=own)
    check_fields(hparams)
    domains.check_hparams(config, hparams)
    hparams = fill_defaults(config, hparams)
    signatures.check_params(spec, hparams.objective_params)
    if hparams.ess_lr_power and not _weighs_alike(config, spec, hparams):
        reason = f"{spec.name} weighs fresh samples by their advantages too"
        raise ConfigError("ess_lr_power", hparams.ess_lr_power, f"0, because {reason}")
    check_sizes(config, hparams)
    return hparams


def fill_defaults(config: Config, hparams: HParams) -> HParams:
    """The same settings with what was left open filled in."""
    value_rate = hparams.value_learning_rate
    defaults = objectives.spec(config.objective).params
    return dataclasses.replace(
        hparams,
        value_learning_rate=hparams.learning_rate if value_rate is None else value_rate,
        objective_params={**defaults, **hparams.objective_params},
    )


def _weighs_alike(config: Config, spec: signatures.Spec, hparams: HParams) -> bool:
    """Whether samples of ratio 1 have one effective weight: else ESS is not 1 on fresh data."""
    if "margin" in spec.inputs:
        return True
    given: dict[str, Any] = dict(hparams.objective_params)
    given |= {"kernel": config.kernel} if spec.takes_kernel else {}
    if spec.initial_state is not None:
        given["state"] = signatures.first_state(spec, given)
    advantage = jnp.array([[-2.0], [-0.5], [0.5], [2.0]])
    fresh = jnp.zeros_like(advantage)
    certain = fresh[..., None]  # log-probabilities of a vocabulary of one token
    bound = loss_terms.bind(
        spec,
        "token",
        given,
        jnp.full_like(fresh, -1.0),
        lambda: fresh,
        distributions=(certain, certain),
    )
    weight = loss_terms.objective_weight(bound, fresh, advantage)
    return bool(jnp.allclose(weight, weight[0], rtol=1e-3))


def grid(config: Config, **settings: Any) -> tuple[HParams, list[dict[str, Any]]]:
    """All combinations of traced settings, stacked for ``jax.vmap(make_train(config))``.

    Args:
        config: the static settings; ``max_buffer_size`` bounds the buffer sizes.
        settings: fields of ``HParams`` and parameters of the objective, each a value or a sequence
            of values; ``env_params`` is a dict of such.

    Returns:
        settings as arrays ``[runs]``, and what each row is; the last name varies fastest.

    Raises:
        ConfigError: a combination is not usable.

    >>> hparams, rows = grid(Config(), seed=range(2), sigma=[0.5, 1.0])
    >>> rows[1]
    {'seed': 0, 'sigma': 1.0}
    """
    columns = {name: _values(name, value) for name, value in settings.items()}
    rows = list(product(columns))
    allocated = dataclasses.replace(config, max_buffer_size=config.allocated_size)
    return stack([make_hparams(allocated, **row) for row in rows]), rows


def product(settings: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """All combinations of one value of each setting; the last name varies fastest."""
    for values in itertools.product(*settings.values()):
        yield dict(zip(settings, values, strict=True))


def _values(name: str, value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(product({key: _values(f"{name}: {key}", v) for key, v in value.items()}))
    values = list(value) if isinstance(value, Iterable) else [value]
    if not values:
        raise ConfigError(name, value, "at least one value")
    return [v.item() if isinstance(v, np.generic | Array) else v for v in values]


def log_boundaries(config: Config) -> list[int]:
    """Iterations after which a point is logged: ``num_logs`` evenly spaced, every one if fewer."""
    points = min(config.num_logs, config.num_iterations)
    return [config.num_iterations * (i + 1) // points for i in range(points)]
