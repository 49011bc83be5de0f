"""Summaries and paired differences, against SciPy's own tests and by hand."""

import numpy as np
import pytest
from scipy import stats

from gompertz_jax.statistics import Difference, holm, paired_difference, summary

RNG = np.random.default_rng(0)


def test_a_paired_difference_is_the_t_test_of_its_pairs():
    ours, theirs = RNG.normal(0.9, 0.02, 7), RNG.normal(0.88, 0.02, 7)
    found, expected = paired_difference(list(ours), list(theirs)), stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found[:4], [np.mean(ours - theirs), low, high, expected.pvalue], rtol=1e-10)
    assert found.n == 7


def test_pairs_with_a_missing_number_are_left_out():
    assert paired_difference([1.0, None, 3.0, 5.0], [0.0, 1.0, None, 2.0]) == paired_difference([1.0, 5.0], [0.0, 2.0])


@pytest.mark.parametrize(
    ("values", "baseline", "expected"),
    [
        ([], [], Difference(None, None, None, None, 0)),
        ([1.0], [0.5], Difference(0.5, None, None, None, 1)),
        ([1.0, 2.0], [0.5, 1.5], Difference(0.5, None, None, None, 2)),
    ],
)
def test_what_has_no_spread_has_no_interval(values, baseline, expected):
    assert paired_difference(values, baseline) == expected


def test_equal_differences_of_accuracies_have_no_spread_whatever_their_rounding():
    """Fractions of 359 images that differ by the same count: their differences differ in the last bit."""
    for _ in range(200):
        ours = RNG.integers(200, 350, 3)
        found = paired_difference(list((ours + 2) / 359), list(ours / 359))
        assert found[1:] == (None, None, None, 3)
        assert found.mean == pytest.approx(2 / 359)
    almost = paired_difference([301 / 359, 302 / 359, 303 / 359], [300 / 359, 300 / 359, 301 / 359])
    assert almost.p == pytest.approx(stats.ttest_1samp([1.0, 2.0, 2.0], 0.0).pvalue)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_holm_rejects_as_its_step_down_procedure_does():
    for _ in range(20):
        p = RNG.uniform(size=6) ** 3
        corrected = np.array(holm(list(p)))
        for alpha in (0.01, 0.05, 0.2):
            rejected = set()
            for rank, index in enumerate(np.argsort(p)):
                if p[index] > alpha / (6 - rank):
                    break
                rejected.add(index)
            assert set(np.flatnonzero(corrected <= alpha)) == rejected


def test_what_has_no_p_value_does_not_count():
    assert holm([None, 0.02, None, 0.5]) == [None, 0.04, None, 0.5]


def test_a_summary_is_mean_and_deviation():
    values = list(RNG.normal(size=5))
    np.testing.assert_allclose(summary(values), [np.mean(values), np.std(values, ddof=1), 5])
    assert summary([2.0]) == (2.0, None, 1) and summary([]) == (None, None, 0)
