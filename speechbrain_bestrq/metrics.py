"""Scores of the downstream tasks, and how far they can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student
from scipy.stats import ttest_ind

#: Resamples of a bootstrap.
RESAMPLES = 1000
#: Fewer speakers do not show how speakers differ: resampled, they would make a score look more certain than it is.
LEAST_SPEAKERS = 5


# ---------------------------------------------------------------- verification


def _error_rates(scores: ArrayLike, targets: ArrayLike) -> tuple[NDArray, NDArray]:
    """Shares of missed targets and of accepted impostors as the threshold falls from above all scores to below all."""
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets).astype(bool)
    if scores.shape != targets.shape or scores.ndim != 1:
        raise ValueError(f"scores and targets must be two lists of one length, not {scores.shape} and {targets.shape}.")
    if targets.all() or not targets.any():
        raise ValueError("all trials are of one kind: target and impostor trials are needed.")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} scores are not finite.")
    order = np.argsort(-scores, kind="stable")
    # equal scores are accepted together: only the last of them is a threshold
    last = np.append(np.diff(scores[order]) != 0, True)
    accepted_targets = np.append(0, np.cumsum(targets[order])[last])
    accepted_impostors = np.append(0, np.cumsum(~targets[order])[last])
    return 1 - accepted_targets / targets.sum(), accepted_impostors / (~targets).sum()


def equal_error_rate(scores: ArrayLike, targets: ArrayLike) -> float:
    """Rate at which as many targets are missed as impostors are accepted.

    Between two thresholds both rates are taken to change linearly, as on the ROC curve.

    Arguments
    ---------
    scores : array of float, shape (N,)
        Of trials; higher means more alike.
    targets : array of bool, shape (N,)
        Whether a trial is of one speaker.

    Returns
    -------
    float
        0 to 1.

    Raises
    ------
    ValueError
        If a score is not finite, or all trials are of one kind.

    Example
    -------
    >>> equal_error_rate([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0])
    0.5
    """
    return crossing(*_error_rates(scores, targets))


def crossing(missed: NDArray, accepted: NDArray) -> float:
    """Find the rate at which as many targets are missed as impostors are accepted.

    Arguments
    ---------
    missed, accepted : array, shape (T,)
        Shares at falling thresholds: the first misses all and accepts none, the last the other way round.

    Returns
    -------
    float
        Between two thresholds, by the straight line.

    Example
    -------
    >>> crossing(np.array([1.0, 0.5, 0.0]), np.array([0.0, 0.0, 1.0]))
    0.3333333333333333
    """
    after = int(np.argmax(accepted >= missed))
    before = after - 1
    gap, change = missed[before] - accepted[before], accepted[after] - accepted[before] + missed[before] - missed[after]
    return float(accepted[before] + (accepted[after] - accepted[before]) * gap / change)


def minimum_detection_cost(scores: ArrayLike, targets: ArrayLike, prior: float = 0.01) -> float:
    """Least detection cost over all thresholds, with misses and false alarms equally bad (NIST SRE's minDCF).

    Arguments
    ---------
    scores, targets : array, shape (N,)
        As for :func:`equal_error_rate`.
    prior : float
        Probability of a target trial.

    Returns
    -------
    float
        As a share of the cost of a system that always gives the better of the two answers.

    Example
    -------
    >>> minimum_detection_cost([0.9, 0.6, 0.7, 0.1], [1, 1, 0, 0])
    0.5
    """
    if not 0 < prior < 1:
        raise ValueError(f"prior must be between 0 and 1, not {prior}.")
    return least_cost(*_error_rates(scores, targets), prior)


def least_cost(missed: NDArray, accepted: NDArray, prior: float) -> float:
    """Find the least detection cost over all thresholds.

    Arguments
    ---------
    missed, accepted : array, shape (T,)
        Shares at each threshold.
    prior : float
        Probability of a target trial.

    Returns
    -------
    float
        As :func:`minimum_detection_cost` gives it.

    Example
    -------
    >>> least_cost(np.array([1.0, 0.5, 0.0]), np.array([0.0, 0.0, 1.0]), 0.01)
    0.5
    """
    cost = prior * missed + (1 - prior) * accepted
    return float(cost.min() / min(prior, 1 - prior))


# ---------------------------------------------------------------- classification


@dataclass(frozen=True)
class Classification:
    """Scores of a classifier."""

    confusion: NDArray
    """Counts, shape (C, C): rows are targets, columns predictions."""

    @property
    def accuracy(self) -> float:
        """Share of right answers ("weighted accuracy" in the emotion literature)."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def recalls(self) -> NDArray:
        """Share of each class that was recognised, shape (C,); NaN for a class without targets."""
        counts = self.confusion.sum(1)
        return np.divide(np.diag(self.confusion), counts, out=np.full(len(counts), np.nan), where=counts > 0)

    @property
    def precisions(self) -> NDArray:
        """Share of the answers of each class that were right, shape (C,); 0 for a class never answered."""
        counts = self.confusion.sum(0)
        return np.divide(np.diag(self.confusion), counts, out=np.zeros(len(counts)), where=counts > 0)

    @property
    def f1(self) -> NDArray:
        """Harmonic mean of precision and recall of each class, shape (C,); NaN for a class that never occurs."""
        counts = self.confusion.sum(0) + self.confusion.sum(1)
        return np.divide(2 * np.diag(self.confusion), counts, out=np.full(len(counts), np.nan), where=counts > 0)

    @property
    def unweighted_accuracy(self) -> float:
        """Mean recall of the classes that have targets."""
        return float(np.nanmean(self.recalls))

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that were targets or answers."""
        return float(np.nanmean(self.f1))


def classify(targets: Sequence[int], predictions: Sequence[int], num_classes: int) -> Classification:
    """Count what was taken for what.

    Arguments
    ---------
    targets, predictions : sequence of int, length N
        Classes, 0 to num_classes - 1.
    num_classes : int
        Classes.

    Returns
    -------
    Classification

    Raises
    ------
    ValueError
        If there is nothing to count, or a class is out of range.

    Example
    -------
    >>> scores = classify([0, 0, 1, 2], [0, 1, 1, 2], num_classes=3)
    >>> scores.accuracy, scores.recalls.tolist()
    (0.75, [0.5, 1.0, 1.0])
    """
    pairs = np.array([targets, predictions], dtype=np.int64)
    if not pairs.size:
        raise ValueError("there is nothing to score: the lists of targets and predictions are empty.")
    if pairs.min() < 0 or pairs.max() >= num_classes:
        raise ValueError(f"classes must be 0 to {num_classes - 1}, not {pairs.min()} to {pairs.max()}.")
    counts = np.bincount(pairs[0] * num_classes + pairs[1], minlength=num_classes**2)
    return Classification(counts.reshape(num_classes, num_classes))


# ---------------------------------------------------------------- confidence


@dataclass(frozen=True)
class Interval:
    """A rate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % ({100 * self.low:.2f} to {100 * self.high:.2f})"


def by_speaker(speakers: Sequence[str]) -> bool:
    """Tell whether an interval is by resampling speakers: all are known, and there are five at least.

    Arguments
    ---------
    speakers : sequence of str
        Of each utterance; empty where it is unknown.

    Returns
    -------
    bool

    Example
    -------
    >>> by_speaker(["a", "b", "c", "d", "e", "a"]), by_speaker(["a", "b"]), by_speaker(["a", "b", "c", "d", "e", ""])
    (True, False, False)
    """
    return all(speakers) and len(set(speakers)) >= LEAST_SPEAKERS


def draw_counts(groups: int, seed: int, resamples: int) -> NDArray:
    """Draw resamples of a bootstrap.

    Arguments
    ---------
    groups : int
        What is drawn from, with replacement, as often as there are.
    seed, resamples : int

    Returns
    -------
    array, shape (resamples, groups)
        How often each was drawn.

    Example
    -------
    >>> draw_counts(4, seed=0, resamples=2).sum(1).tolist()
    [4, 4]
    """
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples)


def _sums(values: ArrayLike, groups: ArrayLike | None) -> NDArray:
    """Sum the values of each group; each value is a group of its own without groups."""
    values = np.asarray(values, dtype=np.float64)
    if groups is None:
        return values
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values)


def bootstrap_rate(
    errors: ArrayLike,
    totals: ArrayLike,
    groups: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Errors over totals, with a 95 % percentile interval by resampling utterances or speakers.

    Arguments
    ---------
    errors, totals : array, shape (N,)
        Of each utterance: wrong words and words, or 0 / 1 and 1.
    groups : array, shape (N,), optional
        What is resampled as a whole, such as the speaker: utterances of one speaker are
        not independent, and intervals that pretend so are too narrow.
    seed : int
        Of the resamples.
    resamples : int
        Their number.

    Returns
    -------
    Interval

    Example
    -------
    >>> bootstrap_rate([1, 0, 0, 1], [1, 1, 1, 1]).value
    0.5
    """
    errors, totals = _sums(errors, groups), _sums(totals, groups)
    drawn = draw_counts(len(errors), seed, resamples)
    rates = _rates(drawn @ errors, drawn @ totals)
    low, high = np.quantile(rates, [0.025, 0.975])
    return Interval(float(errors.sum() / totals.sum()), float(low), float(high))


def paired_bootstrap(
    errors: ArrayLike,
    other_errors: ArrayLike,
    totals: ArrayLike,
    groups: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[Interval, float]:
    """Difference of two systems' rates on the same utterances.

    Arguments
    ---------
    errors, other_errors, totals : array, shape (N,)
        As for :func:`bootstrap_rate`, of both systems on the same utterances in the same order.
    groups, seed, resamples
        As for :func:`bootstrap_rate`.

    Returns
    -------
    difference : Interval
        The first's rate minus the other's.
    not_better : float
        Share of the resamples in which the first has no fewer errors than the other: small
        when the first is better.

    Example
    -------
    >>> difference, not_better = paired_bootstrap([0, 0, 1], [1, 1, 1], [1, 1, 1])
    >>> round(difference.value, 3)
    -0.667
    """
    change = _sums(errors, groups) - _sums(other_errors, groups)
    totals = _sums(totals, groups)
    drawn = draw_counts(len(change), seed, resamples)
    differences = _rates(drawn @ change, drawn @ totals)
    low, high = np.quantile(differences, [0.025, 0.975])
    interval = Interval(float(change.sum() / totals.sum()), float(low), float(high))
    return interval, float(np.mean(differences >= 0))


def _rates(errors: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Of each resample; one without a word has none, unless all have none."""
    if not totals.any():
        return np.zeros(1)
    return errors[totals > 0] / totals[totals > 0]


# ---------------------------------------------------------------- seeds


def difference_over_seeds(scores: Sequence[float], others: Sequence[float]) -> Interval:
    """Difference of two means over seeds, with Welch's 95 % interval.

    Arguments
    ---------
    scores, others : sequence of float
        Of two and more seeds each; how many, and how much they vary, need not be alike.

    Returns
    -------
    Interval
        Of the mean of ``scores`` less that of ``others``. It holds for the test set that they were measured on.

    Raises
    ------
    ValueError
        If one of them is a single score.

    Example
    -------
    >>> found = difference_over_seeds([0.71, 0.73, 0.72], [0.64, 0.66, 0.65])
    >>> f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
    '0.070 (0.047 to 0.093)'
    """
    if min(len(scores), len(others)) < 2:
        raise ValueError(f"two seeds and more are needed on each side, not {len(scores)} and {len(others)}.")
    difference = float(np.mean(scores) - np.mean(others))
    if np.ptp(scores) == 0 and np.ptp(others) == 0:
        return Interval(difference, difference, difference)
    found = ttest_ind(scores, others, equal_var=False).confidence_interval()
    return Interval(difference, float(found.low), float(found.high))


def paired_difference_over_seeds(scores: Sequence[float], others: Sequence[float]) -> Interval:
    """Difference of two means over the same seeds, with the 95 % interval of Student's paired t.

    For seeds that share what makes scores differ, such as their draw of few labels: what a lucky draw gives to
    both is not held against either.

    Arguments
    ---------
    scores, others : sequence of float
        Of two and more seeds, the same in both and in the same order.

    Returns
    -------
    Interval
        Of the mean of ``scores`` less that of ``others``. It holds for the test set that they were measured on.

    Raises
    ------
    ValueError
        If there is a single seed, or one side has more of them.

    Example
    -------
    >>> found = paired_difference_over_seeds([0.71, 0.53, 0.62], [0.64, 0.46, 0.54])
    >>> f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
    '0.073 (0.059 to 0.088)'
    """
    if len(scores) != len(others) or len(scores) < 2:
        raise ValueError(f"the same seeds are needed on each side, two and more, not {len(scores)} and {len(others)}.")
    differences = np.subtract(scores, others)
    difference, degrees = float(differences.mean()), len(differences) - 1
    half = float(student.ppf(0.975, degrees) * differences.std(ddof=1) / (degrees + 1) ** 0.5)
    return Interval(difference, difference - half, difference + half)
