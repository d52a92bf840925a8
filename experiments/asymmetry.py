"""Whether samples with a negative advantage should be trusted less, or more."""

from experiments import ablations, sigma
from experiments.store import Store

QUESTION = "Does another width for negative advantages (sigma_neg_ratio) help?"


def run(store: Store, preset: str, part: tuple[int, int] = (1, 1)) -> None:
    """Uses the sweep of sigma."""
    sigma.run(store.of("sigma"), preset, part)


def draw(store: Store) -> None:
    """Final return against the ratio of the widths, at sigma 1."""
    runs = store.read("sigma_runs", ["sigma"])
    label = "width for A ≤ 0 / width for A > 0"
    where = runs.sigma == 1
    ablations.draw_lines(store, "sigma", "sigma_neg_ratio", label, "asymmetry", where)
