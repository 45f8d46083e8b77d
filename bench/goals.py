"""A goal and whether it was met, in one sentence."""


def goal(what: str, value: float, met: bool) -> str:
    """Such as "Goal, at least 1.05 times prompt lookup: 1.06, met."."""
    return f"{what}: {value:.2f}, {'met' if met else 'missed'}."


def least(what: str, value: float, bound: float) -> str:
    """A goal that is met by `bound` and more."""
    return goal(what, value, value >= bound)
