"""Scores against scikit-learn's and scipy's, and intervals against what they promise."""

import numpy as np
import pytest
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn import metrics as sklearn_metrics

from speechbrain_bestrq.metrics import (
    bootstrap_rate,
    classify,
    difference_over_seeds,
    equal_error_rate,
    minimum_detection_cost,
    paired_bootstrap,
    paired_difference_over_seeds,
)


def trials(kind, seed):
    """Scores and targets: well mixed, with many ties, or with few targets."""
    generator = np.random.default_rng(seed)
    count = 400
    targets = generator.random(count) < (0.02 if kind == "unbalanced" else 0.5)
    targets[:2] = True, False
    scores = generator.standard_normal(count) + 1.5 * targets
    if kind == "tied":
        scores = np.round(scores)
    return scores, targets


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["random", "tied", "unbalanced"])
def test_equal_error_rate_is_that_of_an_independent_roc_curve(kind, seed):
    scores, targets = trials(kind, seed)
    accepted, found, _ = sklearn_metrics.roc_curve(targets, scores, drop_intermediate=False)
    expected = brentq(lambda rate: 1 - rate - interp1d(accepted, found)(rate), 0, 1)
    assert equal_error_rate(scores, targets) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["random", "tied", "unbalanced"])
@pytest.mark.parametrize("prior", [0.01, 0.5, 0.9])
def test_detection_cost_is_that_of_an_independent_roc_curve(kind, seed, prior):
    scores, targets = trials(kind, seed)
    accepted, found, _ = sklearn_metrics.roc_curve(targets, scores, drop_intermediate=False)
    expected = (prior * (1 - found) + (1 - prior) * accepted).min() / min(prior, 1 - prior)
    assert minimum_detection_cost(scores, targets, prior) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "rate"),
    [([2.0, 3.0, 0.0, 1.0], 0.0), ([0.0, 1.0, 2.0, 3.0], 1.0), ([1.0, 1.0, 1.0, 1.0], 0.5)],
    ids=["separated", "upside down", "all alike"],
)
def test_equal_error_rate_of_extremes(scores, rate):
    assert equal_error_rate(scores, [1, 1, 0, 0]) == rate


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        ([1.0, 2.0], [1, 1], "one kind"),
        ([1.0, 2.0], [0, 0], "one kind"),
        ([1.0, np.nan], [0, 1], "1 scores are not finite"),
        ([1.0], [0, 1], "one length"),
    ],
)
def test_trials_that_cannot_be_scored_are_refused(scores, targets, message):
    for score in (equal_error_rate, minimum_detection_cost):
        with pytest.raises(ValueError, match=message):
            score(scores, targets)
    with pytest.raises(ValueError, match="prior"):
        minimum_detection_cost([0.0, 1.0], [0, 1], prior=1.0)


@pytest.mark.parametrize("seed", range(5))
def test_classification_scores_are_those_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    targets = generator.choice(5, size=200, p=[0.5, 0.3, 0.1, 0.07, 0.03])
    predictions = np.where(generator.random(200) < 0.6, targets, generator.integers(5, size=200))
    scores = classify(targets, predictions, 5)
    assert (scores.confusion == sklearn_metrics.confusion_matrix(targets, predictions, labels=range(5))).all()
    assert scores.accuracy == pytest.approx(sklearn_metrics.accuracy_score(targets, predictions))
    assert scores.unweighted_accuracy == pytest.approx(sklearn_metrics.balanced_accuracy_score(targets, predictions))
    assert scores.macro_f1 == pytest.approx(sklearn_metrics.f1_score(targets, predictions, average="macro"))
    precisions, recalls, f1, _ = sklearn_metrics.precision_recall_fscore_support(targets, predictions, zero_division=0)
    np.testing.assert_allclose(scores.precisions, precisions)
    np.testing.assert_allclose(scores.recalls, recalls)
    np.testing.assert_allclose(scores.f1, f1)


def test_a_class_that_does_not_occur_does_not_count_in_the_means():
    scores = classify([0, 0, 2], [0, 2, 2], num_classes=4)
    assert scores.unweighted_accuracy == pytest.approx((0.5 + 1.0) / 2)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 3) / 2)


@pytest.mark.parametrize(("targets", "predictions"), [([], []), ([0], [3]), ([-1], [0])])
def test_classes_that_cannot_be_counted_are_refused(targets, predictions):
    with pytest.raises(ValueError, match="there is nothing to score|classes must be"):
        classify(targets, predictions, num_classes=3)


def test_the_interval_covers_the_true_rate_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = 0
    for number in range(200):
        totals = generator.integers(1, 20, size=150)
        interval = bootstrap_rate(generator.binomial(totals, 0.3), totals, seed=number, resamples=400)
        inside += interval.low <= 0.3 <= interval.high
    assert 0.90 <= inside / 200 <= 0.985


def test_the_interval_of_a_paired_difference_covers_the_true_one_about_as_often_as_it_says():
    """Of two systems that share most of their errors, of rates of 0.3 and 0.24."""
    generator = np.random.default_rng(0)
    inside = 0
    for number in range(200):
        totals = generator.integers(1, 20, size=100)
        shared = generator.binomial(totals, 0.2)
        errors, others = (shared + generator.binomial(totals - shared, rate) for rate in (0.125, 0.05))
        interval, _ = paired_bootstrap(errors, others, totals, seed=number, resamples=300)
        inside += interval.low <= 0.06 <= interval.high
    assert 0.90 <= inside / 200 <= 0.985


def test_a_resample_without_a_word_has_no_rate():
    """Of one utterance without words and with one: a quarter of the resamples have the first alone."""
    assert bootstrap_rate([1, 0], [0, 1]).high == pytest.approx(1.0)
    assert paired_bootstrap([1, 0], [0, 0], [0, 1])[0].high == pytest.approx(1.0)


def test_resampling_whole_speakers_widens_the_interval_where_they_differ():
    generator = np.random.default_rng(0)
    speakers = np.repeat(np.arange(20), 50)
    rates = generator.uniform(0, 1, size=20)
    errors = generator.random(1000) < rates[speakers]
    alone = bootstrap_rate(errors, np.ones(1000))
    together = bootstrap_rate(errors, np.ones(1000), groups=speakers)
    assert together.value == alone.value == pytest.approx(errors.mean())
    assert together.high - together.low > 2.5 * (alone.high - alone.low)


def test_a_paired_difference_is_narrower_than_two_intervals():
    generator = np.random.default_rng(0)
    difficulty = generator.random(500)
    errors = generator.random(500) < 0.9 * difficulty
    other = errors | (generator.random(500) < 0.05)
    difference, not_better = paired_bootstrap(errors, other, np.ones(500))
    assert difference.value == pytest.approx(errors.mean() - other.mean())
    assert difference.low <= difference.value <= difference.high < 0
    assert not_better < 0.01
    one = bootstrap_rate(errors, np.ones(500))
    assert difference.high - difference.low < 0.5 * (one.high - one.low)


def test_intervals_are_a_function_of_the_seed():
    arguments = ([1, 0, 3, 2, 0], [4, 5, 6, 7, 8])
    assert bootstrap_rate(*arguments, seed=1) == bootstrap_rate(*arguments, seed=1)
    assert bootstrap_rate(*arguments, seed=1) != bootstrap_rate(*arguments, seed=2)


def test_a_difference_over_seeds_holds_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        few, many = generator.normal(0.7, 0.02, size=3), generator.normal(0.6, 0.005, size=9)
        found = difference_over_seeds(few, many)
        assert found.value == pytest.approx(few.mean() - many.mean())
        held += found.low <= 0.1 <= found.high
    assert 0.92 * 500 < held < 0.98 * 500


def test_a_difference_over_seeds_takes_no_single_score_and_no_harm_from_equal_ones():
    with pytest.raises(ValueError, match="two seeds and more are needed on each side, not 3 and 1"):
        difference_over_seeds([0.1, 0.2, 0.3], [0.2])
    found = difference_over_seeds([0.5, 0.5], [0.25, 0.25])
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


def test_a_paired_difference_holds_as_often_as_it_says_whatever_the_seeds_share():
    generator = np.random.default_rng(0)
    held, narrower = 0, 0
    for _ in range(500):
        shared = generator.normal(0.5, 0.05, size=3)
        scores, others = shared + generator.normal(0.1, 0.01, size=3), shared + generator.normal(0.0, 0.01, size=3)
        found = paired_difference_over_seeds(scores, others)
        assert found.value == pytest.approx(scores.mean() - others.mean())
        held += found.low <= 0.1 <= found.high
        apart = difference_over_seeds(scores, others)
        narrower += found.high - found.low < apart.high - apart.low
    assert 0.92 * 500 < held < 0.98 * 500
    assert narrower > 0.9 * 500


def test_a_paired_difference_takes_the_same_seeds_only():
    for scores, others in (([0.1, 0.2], [0.1]), ([0.1], [0.2])):
        with pytest.raises(ValueError, match="the same seeds are needed on each side, two and more"):
            paired_difference_over_seeds(scores, others)
    found = paired_difference_over_seeds([0.5, 0.75], [0.25, 0.5])
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)
