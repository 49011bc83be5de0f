"""The statistics of a comparison: means, paired differences, and p-values corrected for their number."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special  # not scipy.stats, whose import takes a second, for two functions of the t-distribution


class Summary(NamedTuple):
    """Mean and standard deviation (n - 1) of n numbers; the deviation is None for n = 1, both for none."""

    mean: float | None
    sd: float | None
    n: int


def summary(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and number.

    Examples:
      >>> from gompertz_jax.statistics import summary
      >>> summary([1.0, 2.0, 3.0])
      Summary(mean=2.0, sd=1.0, n=3)
    """
    n = len(values)
    return Summary(float(np.mean(values)) if n else None, float(np.std(values, ddof=1)) if n > 1 else None, n)


class Difference(NamedTuple):
    """A paired difference.

    Attributes:
      mean: the mean of the differences, pair by pair.
      low: the lower end of its interval.
      high: the upper end.
      p: two-sided p-value of the paired t-test that the mean is 0. None, like the interval, for fewer than two pairs or
        if all differences are equal.
      n: pairs.
    """

    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int


def paired_difference(
    values: Sequence[float | None], baseline: Sequence[float | None], *, confidence: float = 0.95
) -> Difference:
    r"""The mean of :math:`d_i = v_i - b_i` with its interval :math:`\bar d \pm t_{n-1} \, s / \sqrt n`.

    The numbers of one seed are a pair: what they share (initial weights, data order) cancels. The t-distribution takes
    the differences to be normal (Student, 1908, https://doi.org/10.1093/biomet/6.1.1).

    Args:
      values: one number per seed; None for a missing one, whose pair is left out.
      baseline: the same for the arm to compare with.
      confidence: the interval's, as a fraction.

    Returns:
      The difference.

    Raises:
      ValueError: the two are not equally long.

    Examples:
      >>> from gompertz_jax.statistics import paired_difference
      >>> [round(number, 3) for number in paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])[:4]]
      [2.0, -0.484, 4.484, 0.074]
    """
    if len(values) != len(baseline):
        raise ValueError(f"values and baseline must be of one length, got {len(values)} and {len(baseline)}")
    pairs = [(a, b) for a, b in zip(values, baseline, strict=True) if a is not None and b is not None]
    differences = np.array([a - b for a, b in pairs], np.float64)
    mean, spread, n = summary(list(differences))
    # Differences that are equal may differ by the rounding of the fractions that they are differences of.
    rounding = 4 * np.finfo(np.float64).eps * max((abs(number) for pair in pairs for number in pair), default=0.0)
    if mean is None or spread is None or np.ptp(differences) <= rounding:
        return Difference(mean, None, None, None, n)
    error = spread / np.sqrt(n)
    reach = float(special.stdtrit(n - 1, 0.5 + confidence / 2) * error)
    return Difference(mean, mean - reach, mean + reach, float(2 * special.stdtr(n - 1, -abs(mean) / error)), n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    r"""p-values corrected for their number m, in ascending order: :math:`\max_{j \le i} \min(1, (m - j + 1) p_{(j)})`.

    At level alpha it rejects any of the true hypotheses with probability at most alpha, whatever their dependence
    (Holm, 1979, https://www.jstor.org/stable/4615733). None stays None and does not count.

    Examples:
      >>> from gompertz_jax.statistics import holm
      >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
      [0.03, 0.06, 0.06]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected
