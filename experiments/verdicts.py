"""The rule by which intervals of differences become a verdict on a claim; see PLAN.md."""

REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced here"
OPEN = "open"
"""While what a verdict needs has not finished."""


def signs(intervals: list[tuple[float, float]], better: int) -> str:
    """Verdict on intervals of differences: all on the better side, some and none worse, or not.

    Args:
        intervals: (low, high).
        better: 1 where above zero is better, -1 where below.
    """
    good = [low > 0 if better > 0 else high < 0 for low, high in intervals]
    bad = [high < 0 if better > 0 else low > 0 for low, high in intervals]
    if all(good):
        return REPRODUCED
    return PARTLY if any(good) and not any(bad) else NOT
