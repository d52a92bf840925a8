"""How wide the trust weight should be."""

from experiments import ablations
from experiments.store import Store
from experiments.training import Method

QUESTION = "How does GIPO's return depend on sigma, on fresh and on stale data?"

SIGMAS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
NEGATIVE_RATIOS = (0.5, 2.0)


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Trains one sweep that the experiment ``asymmetry`` shares: one program serves both."""
    if part[0] > 1:
        return
    scale = ablations.SCALES[preset]
    methods = [Method("gipo", {"sigma": s}) for s in SIGMAS]
    methods += [Method("gipo", {"sigma": 1.0, "sigma_neg_ratio": r}) for r in NEGATIVE_RATIOS]
    ablations.run(store, "sigma", scale.tasks, methods, scale)


def draw(store: Store) -> None:
    """Final return against sigma, symmetric width."""
    runs = store.read("sigma_runs", ["sigma_neg_ratio"])
    where = runs.sigma_neg_ratio == 1
    ablations.draw_lines(store, "sigma", "sigma", "σ (nats, log scale)", "sigma", where)
