"""Policy objectives: one plain function each, from log-ratio and advantage to surrogate.

Throughout, ``log_ratio`` is x = log pi(a|s) - log mu(a|s), with mu the policy that collected the
data, r = e^x, ``advantage`` is A, sg stops the gradient, and the surrogate, of their shape, is
maximised. Differentiated with respect to the policy it gives u * A * grad log pi, where u is the
objective's *effective weight* (``gradient_weight``). As grad x = grad log pi, sg(c) A x stands
wherever a paper writes sg(c) A log pi.

An objective is any function ``f(log_ratio, advantage, **parameters) -> surrogate`` over arrays of
one shape, ``[batch, tokens]`` in training, where each token counts as a sample. Its signature says
what it needs:

- numeric parameters with defaults become traced settings, so a sweep can vary them;
- a parameter called ``kernel`` takes the static setting of that name;
- parameters named in ``signatures.INPUTS``, of the same shape, are filled in by the training step
  where an objective asks for them, and ``mask`` is true for the samples that count, or None;
- a parameter called ``state`` makes the objective stateful: it returns ``(surrogate, new_state)``.

What a signature cannot say goes into ``declare``. Four helpers serve objectives of your own as they
serve those here: ``ratio``, ``weighted_score``, ``clipped_surrogate``, ``clamp_straight_through``.

Every objective here has a finite value and gradient in float32 for log-ratios up to 1e30 either
way: the ratio is clamped to e^80, beyond which float32 would overflow, and the objectives that
square it take a lower ``max_log_ratio``. A clamped ratio still passes its gradient on, so the
effective weight beyond the bound is the one at the bound.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from gipo_jax import signatures
from gipo_jax.config import KERNELS, ConfigError
from gipo_jax.gradients import straight_through
from gipo_jax.signatures import Objective, Spec, declare

KNOWN: dict[str, Objective] = {}  # Built-in objectives by name


def _built_in(**declared: Any) -> Callable[[Objective], Objective]:
    """``declare`` for an objective that is known by name."""

    def register(function: Objective) -> Objective:
        KNOWN[function.__name__] = declare(**declared)(function)
        return KNOWN[function.__name__]

    return register


def _preset(
    name: str, function: Objective, source: str, ratio_level: str = "token", **parameters: float
) -> Objective:
    """A method that is the formula of another objective at a ratio level, with its own defaults."""
    preset = functools.partial(function, **parameters)
    preset.__name__ = name  # type: ignore[attr-defined]
    own = {"source": source, "ratio_level": ratio_level}
    return _built_in(**signatures.declared(function) | own)(preset)


# Helpers, for the objectives here and for your own.


def clamp_straight_through(x: Array, maximum: ArrayLike) -> Array:
    """min(x, maximum) in value, but with gradient 1 everywhere, where a minimum would stop it."""
    return straight_through(jnp.minimum(x, maximum), x)


def ratio(log_ratio: Array, max_log_ratio: ArrayLike = 80.0) -> Array:
    """r = e^x, clamped to e^max_log_ratio so that float32 does not overflow; gradient r with it.

    e^88 overflows. The default leaves room for a factor of 6000, such as the advantage; a formula
    that squares r needs 40 or less.
    """
    return jnp.exp(clamp_straight_through(log_ratio, max_log_ratio))


def weighted_score(weight: ArrayLike, log_ratio: Array, advantage: Array) -> Array:
    """Surrogate sg(weight) A log pi, whose effective weight is ``weight`` itself."""
    _check_shapes(log_ratio, advantage)
    return stop_gradient(jnp.multiply(weight, advantage)) * log_ratio


def clipped_surrogate(
    ratio: Array, advantage: Array, center: ArrayLike = 1.0, clip_eps: ArrayLike = 0.2
) -> Array:
    """PPO's clip around any center: min(r A, clip(r, center - eps, center + eps) A).

    Effective weight u = r inside the interval, its ends included, and 0 where r has left it in the
    direction of A. (``jnp.clip`` would halve the gradient at the ends, and an interval too narrow
    for float32 is nothing but ends.) ``center``, a constant, and ``clip_eps`` > 0, half the width,
    broadcast against ``ratio`` r > 0.
    """
    _check_shapes(ratio, advantage)
    high, low = center + jnp.asarray(clip_eps), center - jnp.asarray(clip_eps)
    ratio = jnp.where((advantage > 0) & (ratio > high), high, ratio)
    return jnp.where((advantage < 0) & (ratio < low), low, ratio) * advantage


def _check_shapes(log_ratio: Array, *others: Array) -> None:
    """Refuses to broadcast: each of ``others`` has the shape of ``log_ratio`` or is one number."""
    for other in others:
        if jnp.ndim(other):
            chex.assert_shape(other, jnp.shape(log_ratio))


def _moves_away(log_ratio: Array, advantage: Array) -> Array:
    """Where an update leads away from mu: A > 0 and r > 1, or A < 0 and r < 1."""
    return advantage * log_ratio > 0


# Per sample: log-ratio and advantage only.


@_built_in(source="arXiv:2603.03955", positive=("sigma", "sigma_neg_ratio", "weight_clamp"))
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
        sigma: width of the trust weight in nats, > 0.
        sigma_neg_ratio: width for A <= 0 relative to sigma, > 0; 1 is the symmetric form.
        kernel: ``gaussian``; ``laplacian``, exp(-|x| / sigma); ``cauchy``, 1 / (1 + (x / sigma)^2).
        weight_clamp: bound on |x| inside the weight only, > 0; infinity leaves it free.
    """
    log_weight = log_trust_weight(
        log_ratio, advantage, sigma, sigma_neg_ratio, kernel, weight_clamp
    )
    # One exponential of the sum: the product of the two overflows long before the weight is small.
    return ratio(stop_gradient(log_weight) + log_ratio) * advantage


def log_trust_weight(
    log_ratio: Array,
    advantage: Array,
    sigma: ArrayLike = 1.0,
    sigma_neg_ratio: ArrayLike = 1.0,
    kernel: str = "gaussian",
    weight_clamp: ArrayLike = jnp.inf,
) -> Array:
    """log w(x) of GIPO, <= 0, same shape as ``log_ratio``; arguments as in ``gipo``."""
    _check_shapes(log_ratio, advantage)
    width = jnp.multiply(sigma, jnp.where(advantage > 0, 1.0, sigma_neg_ratio))
    scaled = jnp.clip(log_ratio, -jnp.asarray(weight_clamp), weight_clamp) / width
    if kernel == "gaussian":
        return -0.5 * scaled**2
    if kernel == "laplacian":
        return -jnp.abs(scaled)
    if kernel == "cauchy":
        return -jnp.log1p(scaled**2)
    raise ConfigError("kernel", kernel, f"one of {', '.join(KERNELS)}")


@_built_in(source="arXiv:1707.06347", positive=("clip_eps",))
def ppo_clip(log_ratio: Array, advantage: Array, clip_eps: ArrayLike = 0.2) -> Array:
    """PPO's clipped surrogate, min(r A, clip(r, 1 - eps, 1 + eps) A) (arXiv:1707.06347).

    Effective weight u = r, and 0 where the sample is clipped: r > 1 + eps with A > 0, or
    r < 1 - eps with A < 0.
    """
    return clipped_surrogate(ratio(log_ratio), advantage, 1.0, clip_eps)


@declare(positive=("eps_low", "eps_high"))
def _clip_each_side(
    log_ratio: Array, advantage: Array, eps_low: ArrayLike, eps_high: ArrayLike
) -> Array:
    """PPO's clip with a width for each side: min(r A, clip(r, 1 - eps_low, 1 + eps_high) A).

    Effective weight that of ``ppo_clip``.
    """
    eps = jnp.where(advantage > 0, eps_high, eps_low)
    return clipped_surrogate(ratio(log_ratio), advantage, 1.0, eps)


@_built_in(source="arXiv:2511.20347", positive=("tau_pos", "tau_neg"))
def sapo(
    log_ratio: Array, advantage: Array, tau_pos: ArrayLike = 1.0, tau_neg: ArrayLike = 1.05
) -> Array:
    """Soft adaptive gate: surrogate (4 / tau) sigmoid(tau (r - 1)) A (SAPO, arXiv:2511.20347).

    Effective weight u = 4 r p (1 - p), p = sigmoid(tau (r - 1)). tau is ``tau_pos`` for A > 0 and
    ``tau_neg`` otherwise; the defaults are SAPO's own, GIPO's comparison takes 1 and 2.
    """
    _check_shapes(log_ratio, advantage)
    return _soft_gate(log_ratio, jnp.where(advantage > 0, tau_pos, tau_neg)) * advantage


@_built_in()
def no_clip(log_ratio: Array, advantage: Array) -> Array:
    """Plain importance sampling: surrogate r A, effective weight u = r."""
    _check_shapes(log_ratio, advantage)
    return ratio(log_ratio) * advantage


@_built_in(source="arXiv:1912.09729", positive=("clip_eps", "dual_clip"))
def dual_clip(
    log_ratio: Array, advantage: Array, clip_eps: ArrayLike = 0.2, dual_clip: ArrayLike = 3.0
) -> Array:
    """PPO with a second bound, max(c A, PPO's surrogate), for A < 0 (arXiv:1912.09729).

    Effective weight that of ``ppo_clip``, and 0 for A < 0 with r > c; c is ``dual_clip``, > 1.
    """
    bounded = (advantage < 0) & (log_ratio > jnp.log(dual_clip))
    return jnp.where(bounded, dual_clip * advantage, ppo_clip(log_ratio, advantage, clip_eps))


@_built_in(source="arXiv:2205.10047", positive=("tau",))
def p3o_soft(log_ratio: Array, advantage: Array, tau: ArrayLike = 4.0) -> Array:
    """P3O's soft clipping: surrogate (4 / tau) sigmoid(tau (r - 1)) A (arXiv:2205.10047).

    Effective weight u = 4 r p (1 - p), p = sigmoid(tau (r - 1)). The paper adds a KL penalty of
    coefficient 0.1, which is the setting ``kl_coef`` of every run here.
    """
    _check_shapes(log_ratio, advantage)
    return _soft_gate(log_ratio, tau) * advantage


def _soft_gate(log_ratio: Array, tau: ArrayLike) -> Array:
    # The slope underflows long before r = 1e6, where GIPO's comparison clamps the ratio too.
    z = jnp.multiply(tau, ratio(log_ratio, math.log(1e6)) - 1)
    # Its slope is p (1 - p), and float32 loses 1 - p for large z unless it comes as sigmoid(-z).
    return jnp.divide(4, tau) * jnp.where(z > 0, 1 - jax.nn.sigmoid(-z), jax.nn.sigmoid(z))


@_built_in(source="arXiv:2506.13585", positive=("eps_high",))
def cispo(
    log_ratio: Array, advantage: Array, eps_low: ArrayLike = 1.0, eps_high: ArrayLike = 0.2
) -> Array:
    """Clipped, detached ratio: sg(clip(r, 1 - eps_low, 1 + eps_high)) A log pi (arXiv:2506.13585).

    Effective weight u = clip(r, 1 - eps_low, 1 + eps_high): every sample keeps a gradient. From
    ``eps_low`` 1 on there is no lower bound, which is the paper's setting.
    """
    low, high = 1 - jnp.asarray(eps_low), 1 + jnp.asarray(eps_high)
    return weighted_score(jnp.clip(ratio(log_ratio), low, high), log_ratio, advantage)


@_built_in(source="arXiv:1802.01561", positive=("max_ratio",))
def tis(log_ratio: Array, advantage: Array, max_ratio: ArrayLike = 2.0) -> Array:
    """Truncated importance sampling: surrogate sg(min(r, C)) A log pi, u = min(r, C).

    C is ``max_ratio``; 2 is the default of the verl library, 1 gives the weight of V-trace's policy
    gradient (arXiv:1802.01561).
    """
    return weighted_score(jnp.minimum(ratio(log_ratio), max_ratio), log_ratio, advantage)


@_built_in(source="arXiv:2503.14286")
def topr(log_ratio: Array, advantage: Array) -> Array:
    """Tapered off-policy REINFORCE: A log pi for A >= 0, sg(min(r, 1)) A log pi for A < 0.

    Effective weight u = 1 for A >= 0, min(r, 1) for A < 0. Unverified: arXiv:2503.14286 weights
    whole trajectories; this per-sample form is derived from it.
    """
    weight = jnp.where(advantage >= 0, 1.0, jnp.minimum(ratio(log_ratio), 1))
    return weighted_score(weight, log_ratio, advantage)


@_built_in(source="arXiv:2401.16025", positive=("eps", "max_log_ratio"))
def spo(
    log_ratio: Array, advantage: Array, eps: ArrayLike = 0.2, max_log_ratio: ArrayLike = 3.0
) -> Array:
    """Simple policy optimization: surrogate r A - |A| (r - 1)^2 / (2 eps) (arXiv:2401.16025).

    Effective weight u = r (1 - sign(A) (r - 1) / eps), which passes 0 at r = 1 + sign(A) eps and
    grows like r^2. That is harmless near r = 1 but not on stale data, so r is clamped to
    e^max_log_ratio: beyond it u stays what it is there. The default, e^3 = 20, allows |u| up to
    about 1900; the paper has no such bound. A smaller one tames the objective on stale data.
    """
    _check_shapes(log_ratio, advantage)
    r = ratio(log_ratio, max_log_ratio)
    return r * advantage - jnp.abs(advantage) * (r - 1) ** 2 / (2 * jnp.asarray(eps))


@_built_in(source="arXiv:2602.10693")
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
    # Where the ratio is clamped, so is its logarithm: k x would outgrow the ratio otherwise.
    log_phi = k * jnp.minimum(log_ratio, 80) - rate * (ratio(log_ratio) - 1)
    return weighted_score(jnp.exp(log_phi), log_ratio, advantage)


@_built_in(source="arXiv:2602.17550", positive=("sigma",))
def maspo(log_ratio: Array, advantage: Array, sigma: ArrayLike = 1.0) -> Array:
    """One-sided Gaussian gate on the ratio: surrogate sg(w) r A (MASPO, arXiv:2602.17550).

    Effective weight u = w r, with w = exp(-(r - 1)^2 / (2 sigma^2)) where the update leads away
    from the behavior policy (A > 0 and r > 1, or A < 0 and r < 1), else 1: for A < 0 it grows like
    r. This is the paper's form at alpha = beta = 0.
    """
    _check_shapes(log_ratio, advantage)
    r = ratio(log_ratio)
    gate = jnp.exp(-0.5 * ((r - 1) / sigma) ** 2)
    return stop_gradient(jnp.where(_moves_away(log_ratio, advantage), gate, 1.0)) * r * advantage


@_built_in(source="arXiv:2209.07074")
def biris(log_ratio: Array, advantage: Array, alpha: ArrayLike = 0.1) -> Array:
    """Penalty on the distance of r from 1 against reuse bias (BIRIS, arXiv:2209.07074).

    Surrogate r A - alpha abs(r - 1). The update direction is r (A - alpha sign(r - 1)) grad log pi,
    so u = r (1 - alpha sign(r - 1) / A), and a sample with A = 0 is drawn back to r = 1.
    ``alpha`` >= 0 is in units of the advantage.

    Reuse bias: a policy that is optimised on a buffer looks better on that same buffer than it is.
    Unverified: the paper penalises the ratio of whole trajectories; this per-sample form is derived
    from it.
    """
    _check_shapes(log_ratio, advantage)
    r = ratio(log_ratio)
    # Not jnp.abs, whose gradient at r = 1 is 1: fresh data would be pushed away from mu.
    return r * advantage - alpha * stop_gradient(jnp.sign(r - 1)) * (r - 1)


@_built_in(source="arXiv:1910.00177", positive=("beta", "max_weight"))
def awr(
    log_ratio: Array, advantage: Array, beta: ArrayLike = 0.05, max_weight: ArrayLike = 20.0
) -> Array:
    """Advantage-weighted regression: surrogate sg(min(e^(A / beta), max_weight)) log pi.

    The update direction is min(e^(A / beta), 20) grad log pi whatever the ratio, so u is that over
    A, and a sample with A = 0 is imitated with weight 1 (arXiv:1910.00177). beta is in units of the
    advantage: 0.05 is the paper's; standardised advantages saturate it.
    """
    _check_shapes(log_ratio, advantage)
    return stop_gradient(jnp.minimum(jnp.exp(advantage / beta), max_weight)) * log_ratio


# With a statistic of the batch.


@_built_in(kind="batch", source="arXiv:1905.01756")
def p3o_ess(log_ratio: Array, advantage: Array, mask: Array | None = None) -> Array:
    """Weight and KL penalty set by the effective sample size (P3O, arXiv:1905.01756).

    Surrogate sg(min(r, c)) A log pi - (1 - c) KL(mu || pi) with c = ESS / n = (sum r)^2 / (n sum
    r^2) over the batch, in (0, 1]. The KL is estimated by its samples -x, so the update direction
    is (min(r, c) A + 1 - c) grad log pi: u = min(r, c) + (1 - c) / A, and a sample with A = 0 is
    still drawn towards mu.
    """
    mask = jnp.ones_like(log_ratio, bool) if mask is None else mask
    largest = jnp.max(log_ratio, where=mask, initial=-jnp.inf)
    relative = jnp.where(mask, jnp.exp(log_ratio - largest), 0)
    c = jnp.sum(relative) ** 2 / (jnp.sum(mask) * jnp.sum(relative**2))
    c = stop_gradient(jnp.where(jnp.any(mask), c, 1.0))
    return (
        weighted_score(jnp.minimum(ratio(log_ratio), c), log_ratio, advantage) + (1 - c) * log_ratio
    )


@_built_in(
    kind="batch",
    source="arXiv:2510.01161",
    positive=("max_second_moment", "min_eps_high", "min_eps_low"),
)
def m2po(
    log_ratio: Array,
    advantage: Array,
    max_second_moment: ArrayLike = 0.04,
    min_eps_high: ArrayLike = 0.5,
    min_eps_low: ArrayLike = 0.3,
    mask: Array | None = None,
) -> Array:
    """Clip set by a second moment: M2PO as its authors' code has it (arXiv:2510.01161).

    Of the samples whose update leads away from mu (A > 0 and r > 1, or A < 0 and r < 1), tau is the
    cap for which the mean of min(x^2, tau^2) is ``max_second_moment``, infinite if their mean of
    x^2 is no larger. Then PPO's clip, above 1 + max(e^tau - 1, min_eps_high) and below 1 - max(1 -
    e^-tau, min_eps_low). Effective weight u = r, and 0 where clipped.

    The code (github.com/Infini-AI-Lab/M2PO) rounds tau down to the nearest abs(x) of a sample that
    counts, where the same samples are clipped, but for that one. ``m2po_mask`` is the rule as
    published.
    """
    square, counted = _squares_moving_away(log_ratio, advantage, mask)
    square = jnp.sort(square)
    budget = max_second_moment * jnp.sum(counted)
    # The sum of all squares capped at each one in turn never falls, so those that fit come first.
    larger = jnp.arange(square.size)[::-1]
    fits = jnp.cumsum(square) + square * larger <= budget
    rest = budget - jnp.sum(square, where=fits)
    capped = jnp.sum(~fits)
    tau = jnp.where(capped > 0, jnp.sqrt(jnp.maximum(rest, 0) / jnp.maximum(capped, 1)), jnp.inf)
    eps_high = jnp.maximum(jnp.exp(tau) - 1, min_eps_high)
    eps_low = jnp.maximum(1 - jnp.exp(-tau), min_eps_low)
    clip_eps = jnp.where(advantage > 0, eps_high, eps_low)
    return clipped_surrogate(ratio(log_ratio), advantage, 1.0, clip_eps)


@_built_in(kind="batch", source="arXiv:2510.01161", positive=("max_second_moment",))
def m2po_mask(
    log_ratio: Array,
    advantage: Array,
    max_second_moment: ArrayLike = 0.04,
    mask: Array | None = None,
) -> Array:
    """Mask set by a second moment: M2PO as published (arXiv:2510.01161), surrogate M r A.

    Of the samples whose update leads away from mu, as in ``m2po``, the mask M drops those of
    largest x^2, until the sum of x^2 over the rest of them, divided by the number of all samples in
    the batch, is <= ``max_second_moment``; of equal ones the last goes first. Effective weight u =
    r where kept, else 0.

    Unverified: the rule and its full denominator are taken from descriptions of the final paper.
    """
    square, _ = _squares_moving_away(log_ratio, advantage, mask)
    order = jnp.argsort(square)
    size = square.size if mask is None else jnp.sum(mask)
    fits = jnp.cumsum(square[order]) <= max_second_moment * size
    keep = jnp.zeros(square.shape, bool).at[order].set(fits).reshape(log_ratio.shape)
    return jnp.where(keep, ratio(log_ratio), 0) * advantage


def _squares_moving_away(
    log_ratio: Array, advantage: Array, mask: Array | None
) -> tuple[Array, Array]:
    """x^2, 0 for samples that do not move away or are padding, and which ones count; flat."""
    _check_shapes(log_ratio, advantage)
    log_ratio = stop_gradient(log_ratio)
    counted = _moves_away(log_ratio, advantage)
    counted = (counted if mask is None else counted & mask).reshape(-1)
    # The bound keeps the sum of a batch finite.
    square = jnp.minimum(jnp.abs(log_ratio), 1e15).reshape(-1) ** 2
    return jnp.where(counted, square, 0.0), counted


@_built_in(
    kind="batch",
    source="arXiv:2601.03320",
    positive=("delta", "max_dual_step", "max_log_ratio"),
    initial_state=lambda params: jnp.asarray(params["dual_init"], jnp.float32),
)
def r2vpo(
    log_ratio: Array,
    advantage: Array,
    state: Array,
    dual_init: ArrayLike = 0.04,
    dual_rate: ArrayLike = 0.01,
    delta: ArrayLike = 0.04,
    max_dual_step: ArrayLike = 0.01,
    max_log_ratio: ArrayLike = 3.0,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    """Ratio-variance constraint with a dual variable (R2VPO, arXiv:2601.03320).

    Surrogate r A - lambda ((r - 1)^2 - delta), update direction (r A - 2 lambda r (r - 1)) grad log
    pi, so u = r - 2 lambda r (r - 1) / A. As in ``spo``, r is clamped to e^max_log_ratio.

    Unverified: the official lambda and delta are unknown. ``state`` is lambda >= 0, which starts at
    ``dual_init`` (0.04 in one port); ``delta`` = 0.04, the bound on the batch mean of (r - 1)^2, is
    PPO's 0.2 squared. The dual step is this project's own: projected gradient ascent, lambda <-
    max(lambda + step, 0) with step = dual_rate (mean (r - 1)^2 - delta), held in +-max_dual_step.
    Without the bound one batch of stale data could raise lambda by 3.6.
    """
    _check_shapes(log_ratio, advantage)
    r = ratio(log_ratio, max_log_ratio)
    excess = (r - 1) ** 2 - delta
    mean = jnp.mean(excess) if mask is None else jnp.mean(excess, where=mask)
    step = jnp.clip(dual_rate * stop_gradient(mean), -jnp.asarray(max_dual_step), max_dual_step)
    return r * advantage - state * excess, jnp.maximum(state + step, 0.0)


@_built_in(kind="batch", positive=("mean_weight", "sigma_prox"))
def adaptive_gipo(
    log_ratio: Array,
    advantage: Array,
    log_ratio_start: Array,
    mean_weight: ArrayLike = 0.7,
    sigma_prox: ArrayLike = 0.5,
    mask: Array | None = None,
) -> Array:
    """``proximal_gipo`` whose width for staleness adapts to the batch, so that it fits any replay.

    This project's own proposal; no paper has it. With x_k = log_ratio_start and s^2 the batch mean
    of x_k^2, effective weight u = w_stale w_prox r as in ``proximal_gipo`` at

        sigma_stale = s mean_weight / sqrt(1 - mean_weight^2),

    where the mean of w_stale is ``mean_weight``, in (0, 1), if x_k ~ N(0, s^2): E exp(-x_k^2 /
    (2 sigma^2)) = sigma / sqrt(sigma^2 + s^2). So data as stale as the rest of its batch is always
    trusted alike. From ``mean_weight`` 1 on w_stale is 1.
    """
    second_moment = jnp.mean(log_ratio_start**2, where=True if mask is None else mask)
    below_one = jnp.maximum(1 - jnp.square(mean_weight), jnp.finfo(jnp.float32).tiny)
    followed = jnp.sqrt(second_moment) * mean_weight / jnp.sqrt(below_one)
    # On fresh data the mean is 0 / 0: no width is too narrow for x_k = 0.
    sigma_stale = stop_gradient(jnp.maximum(followed, 1e-3))
    return proximal_gipo(log_ratio, advantage, log_ratio_start, sigma_stale, sigma_prox)


# With another input.


@_built_in(kind="other-input", source="arXiv:2111.00072", positive=("clip_eps",))
def geppo(
    log_ratio: Array, advantage: Array, log_ratio_start: Array, clip_eps: ArrayLike = 0.2
) -> Array:
    """PPO's clip moved to where the update phase starts (GePPO, arXiv:2111.00072).

    Surrogate min(r A, clip(r, r_k - eps, r_k + eps) A), r_k = e^log_ratio_start the ratio of the
    policy at the start of the update phase; effective weight u = r, and 0 where r has left that
    interval in the direction of A. At the first update r = r_k: nothing is clipped, however stale.
    """
    _check_shapes(log_ratio, log_ratio_start)
    start = stop_gradient(ratio(log_ratio_start))
    return clipped_surrogate(ratio(log_ratio), advantage, start, clip_eps)


@_built_in(kind="other-input", source="arXiv:2110.00641", positive=("clip_eps",))
def decoupled_ppo(
    log_ratio: Array, advantage: Array, log_ratio_start: Array, clip_eps: ArrayLike = 0.2
) -> Array:
    """PPO's clip on the change since the update phase began (decoupled PPO, arXiv:2110.00641).

    With r_k = e^log_ratio_start the ratio of the proximal policy, here the one at the start of the
    update phase, and r / r_k the change since: surrogate r_k min(r / r_k A, clip(r / r_k, 1 - eps,
    1 + eps) A). Effective weight u = r, and 0 where r / r_k has left the interval in the direction
    of A. It is ``geppo`` with an interval that is relative to r_k.
    """
    _check_shapes(log_ratio, log_ratio_start)
    start = stop_gradient(ratio(log_ratio_start))
    return clipped_surrogate(ratio(log_ratio), advantage, start, clip_eps * start)


@_built_in(kind="other-input", positive=("sigma_stale", "sigma_prox"))
def proximal_gipo(
    log_ratio: Array,
    advantage: Array,
    log_ratio_start: Array,
    sigma_stale: ArrayLike = 1.0,
    sigma_prox: ArrayLike = 0.5,
) -> Array:
    """GIPO's weight for how stale the data is, times one for how far this update phase has moved.

    This project's own proposal; no paper has it. With x_k = log_ratio_start, r_k = e^x_k:
    surrogate sg(w_stale w_prox) r A, effective weight u = w_stale w_prox r, where

        w_stale = exp(-x_k^2 / (2 sigma_stale^2))
        w_prox  = exp(-(r - r_k)^2 / (2 sigma_prox^2))  where A (r - r_k) > 0, else 1.

    w_stale is constant within an update phase, so reuse does not change how much a sample is
    trusted. w_prox damps only what moves further away from the start of the phase. Where A > 0 or
    r <= r_k, 0 <= u <= exp(sigma_stale^2 / 2) + sigma_prox e^(-1/2). Where A < 0 and r > r_k the
    update leads back, and u = w_stale r grows with r. docs/objectives.md derives this.

    At r = r_k it is GIPO; with x_k = 0 (fresh data) MASPO; with both widths infinite No-Clip.
    """
    _check_shapes(log_ratio, advantage, log_ratio_start)
    moved = ratio(log_ratio) - ratio(log_ratio_start)
    log_prox = jnp.where(advantage * moved > 0, -0.5 * (moved / sigma_prox) ** 2, 0.0)
    log_weight = stop_gradient(log_prox - 0.5 * (log_ratio_start / sigma_stale) ** 2)
    return ratio(log_weight + log_ratio) * advantage


_DPPO: dict[str, Any] = {
    "kind": "other-input",
    "source": "arXiv:2602.04879",
    "positive": ("delta_low", "delta_high", "max_ratio"),
    "discrete_only": True,
}


@_built_in(**_DPPO)
def dppo_tv(
    log_ratio: Array,
    advantage: Array,
    behavior_log_prob: Array,
    delta_low: ArrayLike = 0.15,
    delta_high: ArrayLike = 0.15,
    max_ratio: ArrayLike = 20.0,
) -> Array:
    """Divergence mask by binary total variation (DPPO, arXiv:2602.04879); discrete heads only.

    Surrogate sg(m min(r, c)) A log pi, effective weight u = m min(r, c); m = 0 where the update
    leads away from mu and the divergence D = |pi - mu|, of the action taken against all others, is
    too large: A > 0, r > 1 and D > delta_high, or A < 0, r < 1 and D > delta_low. c is
    ``max_ratio``.
    """
    _check_shapes(log_ratio, advantage, behavior_log_prob)
    mu, pi = (jnp.exp(p) for p in _log_probabilities(log_ratio, behavior_log_prob))
    return _dppo(jnp.abs(pi - mu), log_ratio, advantage, delta_low, delta_high, max_ratio)


@_built_in(**_DPPO)
def dppo_kl(
    log_ratio: Array,
    advantage: Array,
    behavior_log_prob: Array,
    delta_low: ArrayLike = 0.05,
    delta_high: ArrayLike = 0.05,
    max_ratio: ArrayLike = 20.0,
) -> Array:
    """Divergence mask by binary KL (DPPO, arXiv:2602.04879); discrete heads only.

    As ``dppo_tv`` with the divergence D = mu ln(mu / pi) + (1 - mu) ln((1 - mu) / (1 - pi)).
    """
    _check_shapes(log_ratio, advantage, behavior_log_prob)
    log_mu, log_pi = _log_probabilities(log_ratio, behavior_log_prob)
    mu, pi = jnp.exp(log_mu), jnp.exp(log_pi)
    divergence = mu * (log_mu - log_pi) + (1 - mu) * (jnp.log1p(-mu) - jnp.log1p(-pi))
    return _dppo(divergence, log_ratio, advantage, delta_low, delta_high, max_ratio)


@_built_in(**_DPPO)
def dppo_topk_tv(
    log_ratio: Array,
    advantage: Array,
    behavior_distribution: Array,
    policy_distribution: Array,
    top_k: ArrayLike = 20.0,
    delta_low: ArrayLike = 0.15,
    delta_high: ArrayLike = 0.15,
    max_ratio: ArrayLike = 20.0,
) -> Array:
    """Divergence mask by top-k total variation (DPPO, arXiv:2602.04879); token tasks only.

    As ``dppo_tv`` with D = 1/2 sum |pi - mu| over the ``top_k`` tokens that are most likely under
    mu and one bucket for the rest. Once ``top_k`` reaches the size of the vocabulary D is exact. Of
    equally likely tokens the first count. Unverified: whether the authors' code adds the token that
    was sampled to the top k.
    """
    log_mu, log_pi = _buckets(log_ratio, behavior_distribution, policy_distribution, top_k)
    divergence = jnp.sum(jnp.abs(jnp.exp(log_pi) - jnp.exp(log_mu)), axis=-1) / 2
    return _dppo(divergence, log_ratio, advantage, delta_low, delta_high, max_ratio)


@_built_in(**_DPPO)
def dppo_topk_kl(
    log_ratio: Array,
    advantage: Array,
    behavior_distribution: Array,
    policy_distribution: Array,
    top_k: ArrayLike = 20.0,
    delta_low: ArrayLike = 0.05,
    delta_high: ArrayLike = 0.05,
    max_ratio: ArrayLike = 20.0,
) -> Array:
    """Divergence mask by top-k KL (DPPO, arXiv:2602.04879); token tasks only.

    As ``dppo_topk_tv`` with D = sum mu ln(mu / pi) over the same tokens and the bucket.
    """
    log_mu, log_pi = _buckets(log_ratio, behavior_distribution, policy_distribution, top_k)
    terms = jnp.where(jnp.isneginf(log_mu), 0, jnp.exp(log_mu) * (log_mu - log_pi))
    return _dppo(jnp.sum(terms, axis=-1), log_ratio, advantage, delta_low, delta_high, max_ratio)


def _buckets(
    log_ratio: Array, log_mu: Array, log_pi: Array, top_k: ArrayLike
) -> tuple[Array, Array]:
    """Log-probabilities of the k tokens likeliest under mu (-inf for others) and of the rest."""
    chex.assert_shape((log_mu, log_pi), (*jnp.shape(log_ratio), log_mu.shape[-1]))
    # Ranks, not the k largest: k may be traced.
    rank = jnp.argsort(jnp.argsort(-log_mu, axis=-1, stable=True), axis=-1)
    in_top = rank < top_k

    def join(log_prob: Array) -> Array:
        rest = jax.nn.logsumexp(log_prob, axis=-1, keepdims=True, where=~in_top)
        return jnp.concatenate([jnp.where(in_top, log_prob, -jnp.inf), rest], axis=-1)

    return join(stop_gradient(log_mu)), join(stop_gradient(log_pi))


def _log_probabilities(log_ratio: Array, behavior_log_prob: Array) -> tuple[Array, Array]:
    """log mu and log pi of the action taken, short of 0 so that log(1 - p) is finite in float32."""
    below_zero = -(2.0**-23)
    return (
        jnp.minimum(behavior_log_prob, below_zero),
        jnp.minimum(behavior_log_prob + log_ratio, below_zero),
    )


def _dppo(
    divergence: Array,
    log_ratio: Array,
    advantage: Array,
    delta_low: ArrayLike,
    delta_high: ArrayLike,
    max_ratio: ArrayLike,
) -> Array:
    far = divergence > jnp.where(advantage > 0, delta_high, delta_low)
    masked = far & _moves_away(log_ratio, advantage)
    weight = jnp.minimum(ratio(log_ratio), max_ratio)
    return weighted_score(jnp.where(masked, 0.0, weight), log_ratio, advantage)


# On answers of several tokens: with a ratio level of their own, or the place of a token.


@_built_in(
    kind="other-input",
    source="arXiv:2605.07331",
    positive=("clip_low", "clip_high", "clip_dual"),
    ratio_level="prefix_product",
)
def ctpo(
    log_ratio: Array,
    advantage: Array,
    position: Array,
    clip_low: ArrayLike = 0.025,
    clip_high: ArrayLike = 0.05,
    clip_dual: ArrayLike = 0.05,
    power: ArrayLike = 0.5,
) -> Array:
    """Dual clip on the ratio of the prefix, wider for later tokens (CTPO, arXiv:2605.07331).

    Surrogate min(r A, e^clip(x, -low, high) A), and for A < 0 at least e^dual A, with the bounds
    clip_low t^power, clip_high t^power and clip_dual t^power in nats at token t, its ``position``;
    x is of level ``prefix_product``, whose standard deviation grows with power 0.5. Effective
    weight u = r, and 0 where clipped. Verified from the authors' code
    (github.com/horizon-llm/CTPO), which also clamps x of a token to 20 and the sum to 10.
    """
    _check_shapes(log_ratio, advantage, position)
    scale = jnp.maximum(position, 1).astype(log_ratio.dtype) ** power
    up, down = advantage > 0, advantage < 0
    low, high, dual = (bound * scale for bound in (clip_low, clip_high, clip_dual))
    log_ratio = jnp.where(up & (log_ratio > high), high, log_ratio)
    log_ratio = jnp.where(down & (log_ratio < -low), -low, log_ratio)
    log_ratio = jnp.where(down & (log_ratio > dual), dual, log_ratio)
    return ratio(log_ratio) * advantage


@_built_in(
    kind="other-input",
    source="arXiv:2606.10968",
    positive=("delta", "min_weight", "budget"),
    discrete_only=True,
    whole_rows=True,
)
def cppo(
    log_ratio: Array,
    advantage: Array,
    behavior_log_prob: Array,
    position: Array,
    delta: ArrayLike = 0.15,
    min_weight: ArrayLike = 0.8,
    budget: ArrayLike = 0.02,
) -> Array:
    """Divergence mask with a budget for each prefix (CPPO, arXiv:2606.10968).

    Surrogate M r A, effective weight u = M r. With D_t = abs(pi - mu) of token t and the weight
    w_t = 1 - (1 - min_weight) (t - 1) / (T - 1), a token is kept, M = 1, if A (r - 1) <= 0 or
    w_t D_t <= min(delta, delta + b W - S), W the sum of w and S of w D over the tokens before it. b
    is the 90th percentile of D in the answer, held in [budget, 2 budget]. Verified from code of the
    authors' group (github.com/Tencent-Hunyuan/UniRL), which clamps x to 20; delta is the paper's
    for dense models. The rule compares probabilities of tokens: ratio level ``token``.
    """
    _check_shapes(log_ratio, advantage, behavior_log_prob, position)
    log_mu, log_pi = _log_probabilities(stop_gradient(log_ratio), behavior_log_prob)
    counted = position > 0
    divergence = jnp.where(counted, jnp.abs(jnp.exp(log_pi) - jnp.exp(log_mu)), 0)
    length = jnp.max(position, axis=-1, keepdims=True)
    place = (position - 1) / jnp.maximum(length - 1, 1)
    weight = jnp.where(counted, 1 - (1 - jnp.asarray(min_weight)) * place, 0)
    spent, allowed = (jnp.cumsum(x, axis=-1) - x for x in (weight * divergence, weight))
    # An answer of nothing but padding has no percentile.
    seen = jnp.where(counted | (length == 0), divergence, jnp.nan)
    tail = jnp.nanquantile(seen, 0.9, axis=-1, keepdims=True)
    tail = jnp.clip(tail, budget, 2 * jnp.asarray(budget))
    threshold = jnp.minimum(delta, delta + tail * allowed - spent)
    keep = ~_moves_away(log_ratio, advantage) | (weight * divergence <= threshold)
    return jnp.where(keep, ratio(log_ratio), 0) * advantage


# Presets: an objective, a ratio level and parameters.

# The defaults are the settings of the verl library. The paper averages over the tokens of an
# answer, then over answers: loss_agg_mode seq-mean-token-mean
gspo = _preset("gspo", _clip_each_side, "arXiv:2507.18071", "sequence", eps_low=3e-4, eps_high=4e-4)

# Unverified: the formula is second-hand. One port clips from below too, eps_low 0.2
minpro = _preset("minpro", cispo, "arXiv:2601.22718", "prefix_min")

# The divergence of the whole distributions, which is cheap where the vocabulary is small
dppo_exact_tv = _preset("dppo_exact_tv", dppo_topk_tv, "arXiv:2602.04879", top_k=math.inf)
dppo_exact_kl = _preset("dppo_exact_kl", dppo_topk_kl, "arXiv:2602.04879", top_k=math.inf)

# Their own forms, on whole answers. Unverified against the authors' code
topr_joint = _preset("topr_joint", topr, "arXiv:2503.14286", "joint")
vespo_joint = _preset("vespo_joint", vespo, "arXiv:2602.10693", "joint")


# On pairs of answers.


@_built_in(
    kind="pair", source="arXiv:2305.18290", positive=("beta", "pair_sigma"), ratio_level="joint"
)
def dpo(
    log_ratio: Array,
    advantage: Array,
    margin: Array,
    other_log_ratio: Array,
    beta: ArrayLike = 0.1,
    pair_sigma: ArrayLike = jnp.inf,
) -> Array:
    """Direct preference optimisation (DPO, arXiv:2305.18290), with GIPO's weight on stale pairs.

    Surrogate A sg(w) log s(beta m), s the logistic function and m the margin: log pi(right) - log
    pi(wrong), less the same under the reference policy; A is 1 for a pair and 0 where there is
    none. The policy moves by A w beta s(-beta m) (grad log pi(right) - grad log pi(wrong)).

    w = exp(-(x^2 + y^2) / (2 pair_sigma^2)) is the product of GIPO's trust weights of both whole
    answers, x of the right and y of the wrong one; with an infinite width it is DPO as published,
    to which the policy that gave the answers does not matter. The weight is this project's own.
    """
    _check_shapes(log_ratio, advantage, margin, other_log_ratio)
    squares = log_ratio**2 + other_log_ratio**2
    trust_weight = stop_gradient(jnp.exp(-0.5 * squares / jnp.square(pair_sigma)))
    return advantage * trust_weight * jax.nn.log_sigmoid(beta * margin)


# Their names.

# Objectives of single answers or actions; the others are of pairs
ALL = {name: f for name, f in KNOWN.items() if signatures.spec(f).kind != "pair"}

# Those for every task
REGISTRY = {name: f for name, f in ALL.items() if not signatures.spec(f).of_answers}

SEQUENCE = {name: f for name, f in ALL.items() if name not in REGISTRY}  # for responses of tokens

RENAMED = {"following_gipo": "adaptive_gipo"}  # names of today by the old ones


def spec(objective: str | Objective) -> Spec:
    """What an objective's signature says; see ``signatures.spec``.

    It is a name in ``KNOWN``, several joined by ``+`` (see ``switch``), or a function. Raises
    ConfigError for an unknown name, or a signature that training could not call.
    """
    if not isinstance(objective, str):
        return signatures.spec(objective)
    if "+" in objective:
        return _switch(objective)
    if objective in RENAMED:
        message = f"objective {objective} is called {RENAMED[objective]} now"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        objective = RENAMED[objective]
    if objective not in KNOWN:
        raise ConfigError("objective", objective, f"one of {', '.join(KNOWN)}")
    return signatures.spec(KNOWN[objective])


def switch(names: Sequence[str]) -> str:
    """Name of the objective that is one of several by the traced parameter ``which``.

    An objective is part of a compiled program. Where a study compares many, compiling takes longer
    than training; here the choice is a number, so that they share one program::

        sweep.expand(objective=objectives.switch(["gipo", "ppo_clip"]), which=[0, 1])

    A parameter, input or state is that of all objectives that take it; a parameter for which they
    have different defaults is no setting, and each keeps its own. Under ``vmap`` all of them are
    computed for every run. Raises ConfigError for an unknown name, objectives of different ratio
    levels, or one of pairs.
    """
    return _switch("+".join(names)).name


@functools.cache
def _switch(name: str) -> Spec:
    specs = [spec(one) for one in name.split("+")]
    return signatures.spec(signatures.switch(specs))


if TYPE_CHECKING:
    following_gipo = adaptive_gipo
else:

    def __getattr__(name: str) -> Objective:
        """Functions by their old names."""
        if name in RENAMED:
            return spec(name).function
        raise AttributeError(f"module {__name__} has no attribute {name}")


def gradient_weight(
    objective: str | Objective, log_ratio: ArrayLike, advantage: ArrayLike, **params: Any
) -> Array:
    """Effective weight u = (d surrogate / d log_ratio) / A of an objective.

    Args:
        objective: name or function.
        log_ratio: x, any shape; the whole array is the batch of an objective of kind ``batch``.
        advantage: A, broadcast against ``log_ratio``. Where it is 0, u is that of A = -1.
        params: the objective's own parameters and inputs, and its state unless it is the first.
    """
    signature = spec(objective)
    log_ratio, advantage = jnp.broadcast_arrays(
        jnp.asarray(log_ratio, float), jnp.asarray(advantage, float)
    )
    advantage = jnp.where(advantage == 0, -1.0, advantage)
    if signature.initial_state is not None:
        first = signatures.first_state(signature, signature.params | params)
        params["state"] = jax.tree.map(jnp.asarray, params.get("state", first))

    def total(x: Array) -> Array:
        return jnp.sum(signatures.evaluate(signature, x, advantage, **params)[0])

    return jax.grad(total)(log_ratio) / advantage
