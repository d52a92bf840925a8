"""Policy objectives: one plain function each, from log-ratio and advantage to surrogate.

Throughout, ``log_ratio`` is x = log pi(a|s) - log mu(a|s), with mu the policy that acted, r = e^x,
A is the advantage, sg stops the gradient, and the surrogate is maximised. Differentiated with
respect to the policy it gives u * A * grad log pi, where u is the objective's *effective weight*
(``gradient_weight``). As grad x = grad log pi, sg(c) A x stands wherever a paper writes sg(c) A log
pi.

An objective is any function ``f(log_ratio, advantage, **parameters) -> surrogate`` over arrays of
one shape, ``[batch, tokens]`` in training, where each token counts as a sample. Its signature says
what it needs:

- numeric parameters with defaults become traced settings, so a sweep can vary them;
- a parameter called ``kernel`` takes the static setting of that name;
- parameters named in ``INPUTS`` are filled in by the training step, and computed only if asked for;
- a parameter called ``state`` makes the objective stateful: it returns ``(surrogate, new_state)``.

What a signature cannot say goes into ``declare``. Every objective here has a finite value and
gradient in float32 at any finite log-ratio: the ratio is held at e^80, beyond which float32 would
overflow, and the two objectives that square it take a lower ``max_log_ratio``. A held ratio still
passes its gradient on, so the effective weight beyond the bound is the one at the bound.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from gipo_jax.config import KERNELS, ConfigError

Objective = Callable[..., Any]
InitialState = Callable[[Mapping[str, ArrayLike]], Any]

INPUTS = {
    "behavior_log_prob": "log mu(a|s), same shape as log_ratio",
    "log_ratio_start": "log-ratio under the policy at the start of the update phase, same shape",
}
"""What an objective may ask for by naming it in its signature, beside log_ratio and advantage."""

KINDS = {
    "per-sample": "log-ratio and advantage of the sample",
    "batch": "a statistic of the whole batch",
    "other-input": "another input of the sample",
}
"""What an objective's weight depends on."""


class Declaration(NamedTuple):
    """What ``declare`` attaches to an objective; its arguments are described there."""

    kind: str = "per-sample"
    source: str = ""
    positive: tuple[str, ...] = ()
    discrete_only: bool = False
    initial_state: InitialState | None = None


class Spec(NamedTuple):
    """What an objective's signature and declaration say about it.

    Attributes:
        name: name in tables and file columns.
        function: the objective itself.
        kind: one of ``KINDS``.
        params: traced parameters and their defaults.
        inputs: names out of ``INPUTS`` that the function takes.
        takes_kernel: whether it takes the static setting ``kernel``.
        initial_state: for a stateful objective, parameters -> first state; else None.
        source: paper, as an arXiv number, or empty.
        positive: parameters that must be > 0.
        discrete_only: whether it reads probabilities, which a Gaussian head does not have.
    """

    name: str
    function: Objective
    kind: str
    params: dict[str, float]
    inputs: tuple[str, ...]
    takes_kernel: bool
    initial_state: InitialState | None
    source: str
    positive: tuple[str, ...]
    discrete_only: bool


def declare(
    *,
    kind: str = "per-sample",
    source: str = "",
    positive: tuple[str, ...] = (),
    discrete_only: bool = False,
    initial_state: InitialState | None = None,
) -> Callable[[Objective], Objective]:
    """Attaches to an objective what its signature cannot say; a plain function needs none of it.

    Args:
        kind: one of ``KINDS``.
        source: paper, as an arXiv number.
        positive: names of parameters that must be > 0, checked before anything compiles.
        discrete_only: true if it reads ``behavior_log_prob`` as the log of a probability, not of a
            density; training then refuses a Gaussian head.
        initial_state: parameters -> first value of ``state``, an array or a pytree of arrays.

    Raises:
        ConfigError: the kind has no such name.
    """
    if kind not in KINDS:
        raise ConfigError("kind", kind, f"one of {', '.join(KINDS)}")

    def attach(function: Objective) -> Objective:
        function.declaration = Declaration(  # type: ignore[attr-defined]
            kind, source, positive, discrete_only, initial_state
        )
        return function

    return attach


def clamp_straight_through(log_ratio: Array, maximum: ArrayLike) -> Array:
    """``log_ratio``, at most ``maximum`` in value, with gradient 1 on both sides of it."""
    return log_ratio - stop_gradient(jnp.maximum(log_ratio - maximum, 0))


def _ratio(log_ratio: Array, max_log_ratio: ArrayLike = 80.0) -> Array:
    """r = e^x, finite in float32; the default leaves room for a factor of 6000 on top."""
    return jnp.exp(clamp_straight_through(log_ratio, max_log_ratio))


def _weighted_score(weight: ArrayLike, log_ratio: Array, advantage: Array) -> Array:
    """Surrogate sg(weight) A log pi, whose effective weight is ``weight`` itself."""
    return stop_gradient(jnp.multiply(weight, advantage)) * log_ratio


# Per sample: log-ratio and advantage only.


@declare(source="arXiv:2603.03955", positive=("sigma", "sigma_neg_ratio", "weight_clamp"))
def gipo(
    log_ratio: Array,
    advantage: Array,
    sigma: ArrayLike = 1.0,
    sigma_neg_ratio: ArrayLike = 1.0,
    kernel: str = "gaussian",
    weight_clamp: ArrayLike = jnp.inf,
) -> Array:
    """Importance sampling damped by a detached trust weight (GIPO, arXiv:2603.03955).

    Surrogate sg(w(x)) e^x A, effective weight u = w(x) e^x. With the Gaussian kernel
    w(x) = exp(-x^2 / (2 sigma^2)), so 0 < u <= exp(sigma^2 / 2), reached at x = sigma^2.

    Args:
        log_ratio: x, any shape.
        advantage: A, same shape.
        sigma: width of the trust weight in nats, > 0.
        sigma_neg_ratio: width for A <= 0 relative to sigma, > 0; 1 is the symmetric form.
        kernel: ``gaussian``; ``laplacian``, exp(-|x| / sigma); ``cauchy``, 1 / (1 + (x / sigma)^2).
        weight_clamp: bound on |x| inside the weight only, > 0; infinity leaves it free.

    Returns:
        surrogate, same shape.
    """
    log_weight = log_trust_weight(
        log_ratio, advantage, sigma, sigma_neg_ratio, kernel, weight_clamp
    )
    # One exponential of the sum: the product of the two overflows long before the weight is small.
    return _ratio(stop_gradient(log_weight) + log_ratio) * advantage


def log_trust_weight(
    log_ratio: Array,
    advantage: Array,
    sigma: ArrayLike = 1.0,
    sigma_neg_ratio: ArrayLike = 1.0,
    kernel: str = "gaussian",
    weight_clamp: ArrayLike = jnp.inf,
) -> Array:
    """log w(x) of GIPO, <= 0, same shape as ``log_ratio``; arguments as in ``gipo``.

    Raises:
        ConfigError: the kernel has no such name.
    """
    width = jnp.multiply(sigma, jnp.where(advantage > 0, 1.0, sigma_neg_ratio))
    scaled = jnp.clip(log_ratio, -jnp.asarray(weight_clamp), weight_clamp) / width
    if kernel == "gaussian":
        return -0.5 * scaled**2
    if kernel == "laplacian":
        return -jnp.abs(scaled)
    if kernel == "cauchy":
        return -jnp.log1p(scaled**2)
    raise ConfigError("kernel", kernel, f"one of {', '.join(KERNELS)}")


@declare()
def no_clip(log_ratio: Array, advantage: Array) -> Array:
    """Plain importance sampling: surrogate r A, effective weight u = r."""
    return _ratio(log_ratio) * advantage


@declare(source="arXiv:1707.06347", positive=("clip_eps",))
def ppo_clip(log_ratio: Array, advantage: Array, clip_eps: ArrayLike = 0.2) -> Array:
    """PPO's clipped surrogate, min(r A, clip(r, 1 - eps, 1 + eps) A) (arXiv:1707.06347).

    Effective weight u = r, and 0 where the sample is clipped: r > 1 + eps with A > 0, or
    r < 1 - eps with A < 0.
    """
    return _clipped(_ratio(log_ratio), advantage, 1.0, clip_eps)


def _clipped(ratio: Array, advantage: Array, center: ArrayLike, clip_eps: ArrayLike) -> Array:
    """min(r A, clip(r, center - eps, center + eps) A), with the whole gradient on the interval.

    ``jnp.clip`` would share the gradient between its arguments at the ends of the interval, which
    are the interval itself where float32 cannot tell center - eps from center + eps.
    """
    above = (ratio > center + jnp.asarray(clip_eps)) & (advantage > 0)
    below = (ratio < center - jnp.asarray(clip_eps)) & (advantage < 0)
    ratio = jnp.where(above, center + jnp.asarray(clip_eps), ratio)
    return jnp.where(below, center - jnp.asarray(clip_eps), ratio) * advantage


@declare(source="arXiv:1912.09729", positive=("clip_eps", "dual_clip"))
def dual_clip(
    log_ratio: Array, advantage: Array, clip_eps: ArrayLike = 0.2, dual_clip: ArrayLike = 3.0
) -> Array:
    """PPO with a second bound, max(c A, PPO's surrogate), for A < 0 (arXiv:1912.09729).

    Effective weight that of ``ppo_clip``, and 0 for A < 0 with r > c; c is ``dual_clip``, > 1.
    """
    bounded = (advantage < 0) & (log_ratio > jnp.log(dual_clip))
    return jnp.where(bounded, dual_clip * advantage, ppo_clip(log_ratio, advantage, clip_eps))


@declare(source="arXiv:2511.20347", positive=("tau_pos", "tau_neg"))
def sapo(
    log_ratio: Array, advantage: Array, tau_pos: ArrayLike = 1.0, tau_neg: ArrayLike = 1.05
) -> Array:
    """Soft adaptive gate: surrogate (4 / tau) sigmoid(tau (r - 1)) A (SAPO, arXiv:2511.20347).

    Effective weight u = 4 r p (1 - p), p = sigmoid(tau (r - 1)). tau is ``tau_pos`` for A > 0 and
    ``tau_neg`` otherwise; the defaults are SAPO's own, GIPO's comparison takes 1 and 2.
    """
    return _soft_gate(log_ratio, jnp.where(advantage > 0, tau_pos, tau_neg)) * advantage


@declare(source="arXiv:2205.10047", positive=("tau",))
def p3o_soft(log_ratio: Array, advantage: Array, tau: ArrayLike = 4.0) -> Array:
    """P3O's soft clipping: surrogate (4 / tau) sigmoid(tau (r - 1)) A (arXiv:2205.10047).

    Effective weight u = 4 r p (1 - p), p = sigmoid(tau (r - 1)). The paper adds a KL penalty of
    coefficient 0.1, which is the setting ``kl_coef`` of every run here.
    """
    return _soft_gate(log_ratio, tau) * advantage


def _soft_gate(log_ratio: Array, tau: ArrayLike) -> Array:
    # The slope underflows long before r = 1e6, where GIPO's comparison clamps the ratio too.
    z = jnp.multiply(tau, _ratio(log_ratio, math.log(1e6)) - 1)
    # Its slope is p (1 - p), and float32 loses 1 - p for large z unless it comes as sigmoid(-z).
    return jnp.divide(4, tau) * jnp.where(z > 0, 1 - jax.nn.sigmoid(-z), jax.nn.sigmoid(z))


@declare(source="arXiv:2506.13585", positive=("eps_high",))
def cispo(log_ratio: Array, advantage: Array, eps_high: ArrayLike = 0.2) -> Array:
    """Clipped, detached ratio: surrogate sg(min(r, 1 + eps_high)) A log pi (arXiv:2506.13585).

    Effective weight u = min(r, 1 + eps_high): every sample keeps a gradient.
    """
    return _weighted_score(
        jnp.minimum(_ratio(log_ratio), 1 + jnp.asarray(eps_high)), log_ratio, advantage
    )


@declare(source="arXiv:1802.01561", positive=("max_ratio",))
def tis(log_ratio: Array, advantage: Array, max_ratio: ArrayLike = 2.0) -> Array:
    """Truncated importance sampling: surrogate sg(min(r, C)) A log pi, u = min(r, C).

    C is ``max_ratio``; 2 is the default of the verl library, 1 gives the weight of V-trace's policy
    gradient (arXiv:1802.01561).
    """
    return _weighted_score(jnp.minimum(_ratio(log_ratio), max_ratio), log_ratio, advantage)


@declare(source="arXiv:2503.14286")
def topr(log_ratio: Array, advantage: Array) -> Array:
    """Tapered off-policy REINFORCE: A log pi for A >= 0, sg(min(r, 1)) A log pi for A < 0.

    Effective weight u = 1 for A >= 0, min(r, 1) for A < 0. Unverified: arXiv:2503.14286 weights
    whole trajectories; this per-sample form is derived from it.
    """
    weight = jnp.where(advantage >= 0, 1.0, jnp.minimum(_ratio(log_ratio), 1))
    return _weighted_score(weight, log_ratio, advantage)


@declare(source="arXiv:2401.16025", positive=("eps", "max_log_ratio"))
def spo(
    log_ratio: Array, advantage: Array, eps: ArrayLike = 0.2, max_log_ratio: ArrayLike = 3.0
) -> Array:
    """Simple policy optimization: surrogate r A - |A| (r - 1)^2 / (2 eps) (arXiv:2401.16025).

    Effective weight u = r (1 - sign(A) (r - 1) / eps), which passes 0 at r = 1 + sign(A) eps and
    grows like r^2. That is harmless near r = 1 but not on stale data, so r is held at
    e^max_log_ratio: beyond it u stays what it is there. The default, e^3 = 20, allows |u| up to
    about 1900; the paper has no such bound. A smaller one tames the objective on stale data.
    """
    ratio = _ratio(log_ratio, max_log_ratio)
    return ratio * advantage - jnp.abs(advantage) * (ratio - 1) ** 2 / (2 * jnp.asarray(eps))


@declare(source="arXiv:2602.10693")
def vespo(
    log_ratio: Array,
    advantage: Array,
    k_pos: ArrayLike = 2.0,
    lambda_pos: ArrayLike = 3.0,
    k_neg: ArrayLike = 3.0,
    lambda_neg: ArrayLike = 2.0,
) -> Array:
    """Gamma-shaped detached weight: surrogate sg(phi(r)) A log pi (VESPO, arXiv:2602.10693).

    Effective weight u = phi(r) = e^lambda r^k e^(-lambda r), 1 at r = 1, largest at r = k / lambda;
    ``k_pos`` and ``lambda_pos`` for A >= 0, ``k_neg`` and ``lambda_neg`` for A < 0, all >= 0.
    Unverified: the paper weights sequences; the per-sample form with W = r is derived from it.
    """
    k = jnp.where(advantage >= 0, k_pos, k_neg)
    rate = jnp.where(advantage >= 0, lambda_pos, lambda_neg)
    log_phi = k * log_ratio - rate * (_ratio(log_ratio) - 1)
    return _weighted_score(jnp.exp(log_phi), log_ratio, advantage)


@declare(source="arXiv:2602.17550", positive=("sigma",))
def maspo(log_ratio: Array, advantage: Array, sigma: ArrayLike = 1.0) -> Array:
    """One-sided Gaussian gate on the ratio: surrogate sg(w) r A (MASPO, arXiv:2602.17550).

    Effective weight u = w r, with w = exp(-(r - 1)^2 / (2 sigma^2)) where the update leads away
    from the behavior policy (A > 0 and r > 1, or A < 0 and r < 1), else 1: for A < 0 it grows like
    r. This is the paper's form at alpha = beta = 0.
    """
    ratio = _ratio(log_ratio)
    gate = jnp.exp(-0.5 * ((ratio - 1) / sigma) ** 2)
    return stop_gradient(jnp.where(advantage * log_ratio > 0, gate, 1.0)) * ratio * advantage


@declare(source="arXiv:1910.00177", positive=("beta", "max_weight"))
def awr(
    log_ratio: Array, advantage: Array, beta: ArrayLike = 0.05, max_weight: ArrayLike = 20.0
) -> Array:
    """Advantage-weighted regression: surrogate sg(min(e^(A / beta), max_weight)) log pi.

    The update direction is min(e^(A / beta), 20) grad log pi whatever the ratio, so u is that over
    A, and a sample with A = 0 is imitated with weight 1 (arXiv:1910.00177). beta is in units of the
    advantage: 0.05 is the paper's; standardised advantages saturate it.
    """
    return stop_gradient(jnp.minimum(jnp.exp(advantage / beta), max_weight)) * log_ratio


# With a statistic of the batch.


@declare(kind="batch", source="arXiv:1905.01756")
def p3o_ess(log_ratio: Array, advantage: Array) -> Array:
    """Weight and KL penalty set by the effective sample size (P3O, arXiv:1905.01756).

    Surrogate sg(min(r, c)) A log pi - (1 - c) KL(mu || pi) with c = ESS / n = (sum r)^2 / (n sum
    r^2) over the batch, in (0, 1]. The KL is estimated by its samples -x, so the update direction
    is (min(r, c) A + 1 - c) grad log pi: u = min(r, c) + (1 - c) / A, and a sample with A = 0 is
    still drawn towards mu.
    """
    relative = jnp.exp(log_ratio - jnp.max(log_ratio))
    c = stop_gradient(jnp.sum(relative) ** 2 / (relative.size * jnp.sum(relative**2)))
    return (
        _weighted_score(jnp.minimum(_ratio(log_ratio), c), log_ratio, advantage)
        + (1 - c) * log_ratio
    )


@declare(kind="batch", source="arXiv:2510.01161", positive=("tau",))
def m2po(log_ratio: Array, advantage: Array, tau: ArrayLike = 0.04) -> Array:
    """Second-moment trust region (M2PO, arXiv:2510.01161): surrogate M r A.

    The mask M drops the samples of largest x^2 until the mean of x^2 over the rest is <= tau;
    effective weight u = r where kept, else 0. All are dropped if even the smallest x^2 is > tau.
    """
    square = stop_gradient(log_ratio**2).reshape(-1)
    order = jnp.argsort(square)
    # In ascending order the running mean never falls, so those to keep come first.
    running_mean = jnp.cumsum(square[order]) / jnp.arange(1, square.size + 1)
    keep = jnp.zeros(square.shape, bool).at[order].set(running_mean <= tau)
    return jnp.where(keep.reshape(log_ratio.shape), _ratio(log_ratio), 0) * advantage


@declare(
    kind="batch",
    source="arXiv:2601.03320",
    positive=("delta", "max_log_ratio"),
    initial_state=lambda params: jnp.asarray(params["dual_init"], jnp.float32),
)
def r2vpo(
    log_ratio: Array,
    advantage: Array,
    state: Array,
    dual_init: ArrayLike = 0.04,
    dual_rate: ArrayLike = 0.01,
    delta: ArrayLike = 0.04,
    max_log_ratio: ArrayLike = 3.0,
) -> tuple[Array, Array]:
    """Ratio-variance constraint with a dual variable (R2VPO, arXiv:2601.03320).

    Surrogate r A - lambda ((r - 1)^2 - delta), update direction (r A - 2 lambda r (r - 1)) grad log
    pi, so u = r - 2 lambda r (r - 1) / A. As in ``spo``, r is held at e^max_log_ratio.

    Unverified: the official lambda and delta are unknown. lambda starts at ``dual_init`` (0.04 in
    one port), delta = 0.04 is PPO's 0.2 squared, and the dual step is projected gradient ascent,
    lambda <- max(lambda + dual_rate (mean (r - 1)^2 - delta), 0), chosen here.

    Args:
        log_ratio: x, any shape.
        advantage: A, same shape.
        state: lambda, a scalar >= 0.
        dual_init: the first lambda, >= 0; ``initial_state`` reads it.
        dual_rate: step size of lambda, >= 0.
        delta: bound on the batch mean of (r - 1)^2, > 0.
        max_log_ratio: bound on x, > 0.

    Returns:
        surrogate, same shape, and the next lambda.
    """
    ratio = _ratio(log_ratio, max_log_ratio)
    excess = (ratio - 1) ** 2 - delta
    step = dual_rate * jnp.mean(stop_gradient(excess))
    return ratio * advantage - state * excess, jnp.maximum(state + step, 0.0)


# With another input.


@declare(kind="other-input", source="arXiv:2111.00072", positive=("clip_eps",))
def geppo(
    log_ratio: Array, advantage: Array, log_ratio_start: Array, clip_eps: ArrayLike = 0.2
) -> Array:
    """PPO's clip moved to where the update phase starts (GePPO, arXiv:2111.00072).

    Surrogate min(r A, clip(r, r_k - eps, r_k + eps) A), r_k = e^log_ratio_start the ratio of the
    policy at the start of the update phase; effective weight u = r, and 0 where r has left that
    interval in the direction of A. At the first update r = r_k: nothing is clipped, however stale.
    """
    start = stop_gradient(_ratio(log_ratio_start))
    return _clipped(_ratio(log_ratio), advantage, start, clip_eps)


@declare(
    kind="other-input",
    source="arXiv:2602.04879",
    positive=("delta", "max_ratio"),
    discrete_only=True,
)
def dppo_tv(
    log_ratio: Array,
    advantage: Array,
    behavior_log_prob: Array,
    delta: ArrayLike = 0.15,
    max_ratio: ArrayLike = 20.0,
) -> Array:
    """Divergence mask by total variation (DPPO, arXiv:2602.04879); discrete heads only.

    Surrogate sg(m min(r, c)) A log pi, effective weight u = m min(r, c); m = 0 where A (r - 1) > 0
    and |pi - mu| > delta for the probabilities of the action taken, else 1. c is ``max_ratio``.
    """
    mu, pi = (jnp.exp(p) for p in _log_probabilities(log_ratio, behavior_log_prob))
    return _masked_score(jnp.abs(pi - mu) > delta, log_ratio, advantage, max_ratio)


@declare(
    kind="other-input",
    source="arXiv:2602.04879",
    positive=("delta", "max_ratio"),
    discrete_only=True,
)
def dppo_kl(
    log_ratio: Array,
    advantage: Array,
    behavior_log_prob: Array,
    delta: ArrayLike = 0.05,
    max_ratio: ArrayLike = 20.0,
) -> Array:
    """Divergence mask by binary KL (DPPO, arXiv:2602.04879); discrete heads only.

    As ``dppo_tv`` with the divergence mu ln(mu / pi) + (1 - mu) ln((1 - mu) / (1 - pi)) > delta.
    """
    log_mu, log_pi = _log_probabilities(log_ratio, behavior_log_prob)
    mu, pi = jnp.exp(log_mu), jnp.exp(log_pi)
    divergence = mu * (log_mu - log_pi) + (1 - mu) * (jnp.log1p(-mu) - jnp.log1p(-pi))
    return _masked_score(divergence > delta, log_ratio, advantage, max_ratio)


def _log_probabilities(log_ratio: Array, behavior_log_prob: Array) -> tuple[Array, Array]:
    """log mu and log pi of the action taken, short of 0 so that log(1 - p) is finite in float32."""
    below_zero = -(2.0**-23)
    return (
        jnp.minimum(behavior_log_prob, below_zero),
        jnp.minimum(behavior_log_prob + log_ratio, below_zero),
    )


def _masked_score(far: Array, log_ratio: Array, advantage: Array, max_ratio: ArrayLike) -> Array:
    weight = jnp.minimum(_ratio(log_ratio), max_ratio)
    leaving = advantage * log_ratio > 0
    return _weighted_score(jnp.where(leaving & far, 0.0, weight), log_ratio, advantage)


REGISTRY: dict[str, Objective] = {
    function.__name__: function
    for function in (
        gipo,
        ppo_clip,
        sapo,
        no_clip,
        dual_clip,
        p3o_soft,
        cispo,
        tis,
        topr,
        spo,
        vespo,
        maspo,
        awr,
        p3o_ess,
        m2po,
        r2vpo,
        geppo,
        dppo_tv,
        dppo_kl,
    )
}


def spec(objective: str | Objective) -> Spec:
    """Reads an objective's name, parameters and needs off its signature.

    Args:
        objective: a name in ``REGISTRY`` or a function.

    Raises:
        ConfigError: unknown name, or a signature that training could not call.
    """
    if isinstance(objective, str):
        if objective not in REGISTRY:
            raise ConfigError("objective", objective, f"one of {', '.join(REGISTRY)}")
        objective = REGISTRY[objective]
    inner = objective
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    declared: Declaration = getattr(inner, "declaration", Declaration())
    try:
        parameters = dict(inspect.signature(objective).parameters)
    except (TypeError, ValueError):
        parameters = {}
    if list(parameters)[:2] != ["log_ratio", "advantage"]:
        valid = "a function whose first two parameters are log_ratio and advantage"
        raise ConfigError("objective", name, valid)
    params: dict[str, float] = {}
    inputs: list[str] = []
    for key, parameter in list(parameters.items())[2:]:
        if key in INPUTS:
            inputs.append(key)
        elif key in ("kernel", "state"):
            continue
        elif isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool):
            params[key] = float(parameter.default)
        else:
            valid = f"a parameter with a numeric default, or one of {', '.join(INPUTS)}"
            raise ConfigError(f"objective {name}", key, valid)
    if ("state" in parameters) != (declared.initial_state is not None):
        valid = "a parameter 'state' together with declare(initial_state=...)"
        raise ConfigError(f"objective {name}", "state", valid)
    for key in declared.positive:
        if key not in params:
            valid = f"declare(positive=...) to name its own parameters ({', '.join(params)})"
            raise ConfigError(f"objective {name}", key, valid)
    return Spec(
        name=name,
        function=objective,
        kind=declared.kind,
        params=params,
        inputs=tuple(inputs),
        takes_kernel="kernel" in parameters,
        initial_state=declared.initial_state,
        source=declared.source,
        positive=declared.positive,
        discrete_only=declared.discrete_only,
    )


def check_params(objective: str | Objective, params: Mapping[str, Any]) -> None:
    """Checks values for an objective's own parameters, Python numbers, before anything compiles.

    Args:
        objective: a name in ``REGISTRY`` or a function.
        params: any of its parameters and their values.

    Raises:
        ConfigError: an unknown parameter, or a value that is not finite (unless it is the default)
            or not > 0 where the objective declares that it must be.
    """
    described = spec(objective)
    for key, value in params.items():
        if key not in described.params:
            known = ", ".join(described.params) or "no parameters"
            raise ConfigError(f"parameter of {described.name}", key, known)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        usable = number and (math.isfinite(value) or value == described.params[key])
        positive = key in described.positive
        if not usable or (positive and value <= 0):
            raise ConfigError(key, value, "a finite number > 0" if positive else "a finite number")


def first_state(described: Spec, params: Mapping[str, ArrayLike]) -> Any:
    """First state of a stateful objective, arrays of definite types; ``()`` for any other.

    Raises:
        ConfigError: ``initial_state`` fails.
    """
    if described.initial_state is None:
        return ()
    try:
        state = jax.tree.map(jnp.asarray, described.initial_state(params))
    except Exception as error:
        valid = f"a function of the parameters that gives arrays; {type(error).__name__}: {error}"
        raise ConfigError(f"objective {described.name}", "initial_state", valid) from error
    # A weak type, as of jnp.asarray(1.0), would change in the first update.
    return jax.tree.map(lambda x: x.astype(x.dtype), state)


def evaluate(
    described: Spec, log_ratio: Array, advantage: Array, **given: Any
) -> tuple[Array, Any]:
    """Calls an objective and checks what it returns, for it may be anyone's.

    Args:
        described: the objective.
        log_ratio: x, any shape.
        advantage: A, same shape.
        given: all that the objective takes beside these.

    Returns:
        surrogate, same shape, and the next state, ``()`` where there is none.

    Raises:
        ConfigError: the surrogate or the state is not what it has to be.
    """
    name = f"objective {described.name}"
    result, state = described.function(log_ratio, advantage, **given), ()
    if described.initial_state is not None:
        if not isinstance(result, tuple) or len(result) != 2:
            raise ConfigError(name, _described(result), "a pair (surrogate, new state)")
        result, state = result
        before, after = (jax.tree.map(_described, tree) for tree in (given["state"], state))
        if before != after:
            raise ConfigError(name, after, f"a new state like the one before, {before}")
    surrogate, wanted = _described(result), f"{log_ratio.dtype}{list(log_ratio.shape)}"
    if surrogate != wanted:
        valid = f"a surrogate {wanted}, one number for each log-ratio"
        raise ConfigError(name, surrogate, valid)
    return result, state


def _described(value: Any) -> str:
    """An array's type and shape, or the type of anything else."""
    if isinstance(value, Array):
        return f"{value.dtype}{list(value.shape)}"
    return "None" if value is None else type(value).__name__


def gradient_weight(
    objective: str | Objective, log_ratio: ArrayLike, advantage: ArrayLike, **params: Any
) -> Array:
    """Effective weight u = (d surrogate / d log_ratio) / A of an objective.

    Args:
        objective: name or function.
        log_ratio: x, any shape; the whole array is the batch of an objective of kind ``batch``.
        advantage: A, broadcast against ``log_ratio``. Where it is 0, u is that of A = -1.
        params: the objective's own parameters and inputs, and its state unless it is the first.

    Returns:
        u, the broadcast shape.
    """
    described = spec(objective)
    log_ratio, advantage = jnp.broadcast_arrays(
        jnp.asarray(log_ratio, float), jnp.asarray(advantage, float)
    )
    advantage = jnp.where(advantage == 0, -1.0, advantage)
    if described.initial_state is not None:
        first = first_state(described, described.params | params)
        params["state"] = jax.tree.map(jnp.asarray, params.get("state", first))

    def total(x: Array) -> Array:
        return jnp.sum(evaluate(described, x, advantage, **params)[0])

    return jax.grad(total)(log_ratio) / advantage
