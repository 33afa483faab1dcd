"""Which settings keep a tolerance: tests whose chance of one wrong claim is bounded over all settings together.

Each setting has a null hypothesis, "it does not keep the tolerance", with a p-value from requests that had no part in
choosing the settings or their order. Rejecting null hypotheses with the family-wise error controlled makes every
setting that passes safe at once, so that the cheapest may be taken: Learn then Test (Angelopoulos, Bates, Candès,
Jordan and Lei, "Learn then test: calibrating predictive algorithms to achieve risk control", arXiv:2110.01052).

p-values are exact for every number of requests: for a *share* the binomial test, which Clopper and Pearson (Biometrika
1934) invert to a bound; for a *mean* of losses in [0, 1] a betting test with predictable bets (Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", JRSS B 2024), which is valid whenever it is looked at if the
bets depend on no number of losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = [
    "fewest_for_mean",
    "fewest_for_share",
    "fixed_sequence",
    "holm",
    "mean_p_value",
    "mean_upper_bound",
    "most_failures",
    "share_lower_bound",
    "share_p_value",
]

BISECTIONS = 60
BOLDEST = 0.99  # of the largest bet that cannot lose everything


def share_p_value(within: int, requests: int, share: float) -> float:
    """Chance of `within` or more successes among `requests` if each succeeds with probability `share`.

    Small if the true share is larger than `share`.
    """
    if not 0 < share < 1 or not 0 <= within <= requests:
        raise ValueError(f"a share between 0 and 1 and {within} of {requests} requests make no test")
    failures = requests - within
    # The tail of few failures, each term from the one before: no factorial of thousands.
    terms = [requests * math.log(share)]
    for k in range(1, failures + 1):
        terms.append(terms[-1] + math.log((requests - k + 1) / k) + math.log((1 - share) / share))
    largest = max(terms)
    return min(1.0, math.exp(largest) * math.fsum(math.exp(term - largest) for term in terms))


def share_lower_bound(within: int, requests: int, confidence: float) -> float:
    """The Clopper-Pearson bound: with this confidence, the true share is at least so large."""
    if within == 0:
        return 0.0
    return _bisect(lambda share: share_p_value(within, requests, share) <= 1 - confidence)


def most_failures(requests: int, share: float, level: float) -> int:
    """The most failures with which the share passes at a level; -1 if there are too few requests for any."""
    failures = -1
    while failures + 1 <= requests and share_p_value(requests - failures - 1, requests, share) <= level:
        failures += 1
    return failures


def fewest_for_share(share: float, level: float) -> int:
    """The fewest requests with which a share can pass, if none fails."""
    return math.ceil(math.log(level) / math.log(share) - 1e-9)


def mean_p_value(losses: Sequence[float], bound: float, level: float = 0.1, *, always: bool = False) -> float:
    """How surprising losses are if their mean is `bound` or more; small if the true mean is smaller.

    Args:
        losses: in [0, 1], in the order in which they were drawn.
        bound: between 0 and 1.
        level: that the bets are made for; the p-value is valid at every level.
        always: whether it is looked at while losses come in. The bets are made for their number otherwise, which has to
            be known beforehand; looked at earlier, other bets would be looked at each time.
    """
    if not 0 < bound < 1 or not all(0 <= loss <= 1 for loss in losses):
        raise ValueError("a mean is tested with losses from 0 to 1 and a bound between them")
    wealth = richest = 0.0  # logarithms
    total, squares = 0.5, 0.25  # a prior observation, so that the first bet is no wild one
    for count, loss in enumerate(losses, 1):
        horizon = count * math.log1p(count) if always else len(losses)
        scale = 2 * math.log(1 / level) / horizon
        bet = min(BOLDEST / (1 - bound), math.sqrt(scale / max(squares / count, 1e-12)))
        wealth += math.log1p(bet * (bound - loss))
        richest = max(richest, wealth)
        total += loss
        squares += (loss - total / (count + 1)) ** 2
    return math.exp(-richest)


def mean_upper_bound(losses: Sequence[float], confidence: float) -> float:
    """With this confidence, the true mean of losses in [0, 1] is at most so large."""
    rejected = _bisect(lambda margin: mean_p_value(losses, 1 - margin, 1 - confidence) <= 1 - confidence)
    return 1 - rejected


def fewest_for_mean(bound: float, level: float) -> int:
    """Fewer requests cannot show that a mean is below a bound, even if all losses are 0."""
    return math.ceil(math.log(1 / level) / math.log1p(BOLDEST / (1 - bound) * bound))


def _bisect(holds: Callable[[float], bool]) -> float:
    """The largest number of (0, 1) up to which something holds; 0 if it holds nowhere."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high) or not 0 < middle < 1:
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def fixed_sequence(p_values: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses are rejected: each at the full level, in the order given, until one is not.

    The order must not depend on the requests that the p-values come from. The chance of one wrong rejection or more is
    at most `level`, for any dependence between p-values (Maurer, Hothorn and Lehmacher, 1995).
    """
    passed: list[bool] = []
    for p_value in p_values:
        passed.append(p_value <= level and all(passed))
    return passed


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses are rejected by Holm's step-down test (Scandinavian Journal of Statistics, 1979).

    It needs no order, and every p-value; the guarantee is that of `fixed_sequence`.
    """
    passed = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > level / (len(p_values) - rank):
            break
        passed[index] = True
    return passed
