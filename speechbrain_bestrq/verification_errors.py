"""Errors of speaker verification: their rates with intervals by resampling speakers, comparisons of runs, a picture."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from speechbrain_bestrq.corpora._trials import Trial, speaker_of
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.metrics import (
    RESAMPLES,
    Interval,
    by_speaker,
    crossing,
    draw_counts,
    equal_error_rate,
    least_cost,
    minimum_detection_cost,
)
from speechbrain_bestrq.verification import read_scores
from speechbrain_bestrq.writing import replacing

#: Probability of a target trial in minDCF.
PRIOR = 0.01


class VerificationRates(NamedTuple):
    """Error rates of a list of trials."""

    eer: Interval
    """Equal error rate."""
    mindcf: Interval
    """Minimum detection cost for a prior of 0.01."""
    by_speaker: bool
    """Whether the intervals are by resampling speakers; else trials were."""


class _Errors:
    """Error rates of trials, all or resampled.

    The speakers are resampled, not the trials: one voice is in many of them. A resample draws as many speakers as
    there are, with replacement. A target trial counts as often as its speaker was drawn; an
    impostor trial as often as the first speaker was drawn times as often as the second was (the
    bootstrap of the vertices of a graph: Snijders and Borgatti, 1999). Of fewer than five speakers the trials are
    resampled: so few do not show how speakers differ. Resamples without trials of both kinds are left out.
    """

    def __init__(self, scores: NDArray, trials: Sequence[Trial]):
        self.scores = scores
        self.targets = np.array([label for label, _, _ in trials], dtype=bool)
        speakers = [[speaker_of(trial[side]) for trial in trials] for side in (1, 2)]
        self.speakers, places = np.unique(speakers, return_inverse=True)
        self.by_speaker = by_speaker(self.speakers.tolist())
        order = np.argsort(-scores, kind="stable")
        self._order = order
        self._first, self._second = places.reshape(2, -1)[:, order]
        self._targets = self.targets[order]
        # equal scores are accepted together: only the last of them is a threshold
        self._last = np.append(np.diff(scores[order]) != 0, True)

    @cached_property
    def rates(self) -> tuple[float, float]:
        """EER and minDCF of all trials."""
        try:
            return equal_error_rate(self.scores, self.targets), minimum_detection_cost(self.scores, self.targets, PRIOR)
        except ValueError as error:
            raise InputError(f"the trials cannot be evaluated: {error}") from error

    @cached_property
    def threshold(self) -> float:
        """The score from which on trials are accepted, where both kinds of errors are as equally frequent as can be."""
        missed, accepted = self._curve(np.ones(len(self.scores)))
        return float(np.unique(self.scores)[::-1][np.argmin(np.abs(missed - accepted)[1:])])

    def _curve(self, weights: NDArray) -> tuple[NDArray, NDArray]:
        """Shares of missed targets and accepted impostors as the threshold falls; weights are in the scores' order."""
        shares = []
        for counted in (weights * self._targets, weights * ~self._targets):
            sums = np.append(0.0, np.cumsum(counted)[self._last])
            shares.append(sums / sums[-1])
        return 1 - shares[0], shares[1]

    def resampled(self, drawn: NDArray) -> tuple[float, float] | None:
        """EER and minDCF where each speaker, or trial, was drawn so often; None if trials of a kind are left out."""
        if self.by_speaker:
            weights = np.where(self._first == self._second, 1, drawn[self._second]) * drawn[self._first]
        else:
            weights = drawn[self._order]
        if not (weights * self._targets).any() or not (weights * ~self._targets).any():
            return None
        curve = self._curve(weights)
        return crossing(*curve), least_cost(*curve, PRIOR)

    def draws(self, seed: int, resamples: int) -> NDArray:
        """How often each speaker, or trial, is drawn in each resample, shape (resamples, speakers or trials)."""
        return draw_counts(len(self.speakers if self.by_speaker else self.scores), seed, resamples)


def verification_rates(
    scores: NDArray, trials: Sequence[Trial], seed: int = 0, resamples: int = RESAMPLES
) -> VerificationRates:
    """EER and minDCF of trials, with 95 % percentile intervals by resampling the speakers of both sides.

    In a resample, a target trial counts as often as its speaker was drawn, an impostor trial as often as
    its first speaker was drawn, times as often as its second was. Of fewer than five speakers the trials are
    resampled. Resamples without trials of both kinds are left out. The intervals are too wide where a speaker has few
    trials, since what is left to chance in a trial is counted more than once. The least cost over all thresholds is
    lower in resamples than in truth: its interval lies a little low.

    Arguments
    ---------
    scores : numpy.ndarray
        Of the trials, shape (N,); higher means more alike.
    trials : sequence of tuple
        Label and two IDs.
    seed : int
        Of the resamples.
    resamples : int
        Their number.

    Returns
    -------
    VerificationRates

    Raises
    ------
    InputError
        If a score is not finite, or all trials are of one kind.

    Example
    -------
    >>> trials = [(1, "id1/a/1", "id1/b/1"), (1, "id2/a/1", "id2/b/1"), (0, "id1/a/1", "id2/a/1")]
    >>> verification_rates(np.array([0.9, 0.4, 0.5]), trials).eer.value
    0.5
    """
    errors = _Errors(scores, trials)
    values = errors.rates
    outcomes = [outcome for drawn in errors.draws(seed, resamples) if (outcome := errors.resampled(drawn))]
    low, high = np.quantile(outcomes, [0.025, 0.975], axis=0)
    eer, mindcf = (Interval(*map(float, one)) for one in zip(values, low, high, strict=True))
    return VerificationRates(eer, mindcf, errors.by_speaker)


def cosine_embedding_loss(scores: NDArray, trials: Sequence[Trial]) -> float:
    """Mean over the trials of 1 - cosine for targets, and of the cosine, if above 0, for impostors.

    As ``torch.nn.CosineEmbeddingLoss``. Speakers that no classifier knows have no other loss.

    Example
    -------
    >>> cosine_embedding_loss(np.array([0.75, 0.5, -1.0]), [(1, "a", "a"), (0, "a", "b"), (0, "a", "c")])
    0.25
    """
    targets = np.array([label for label, _, _ in trials], dtype=bool)
    return float(np.where(targets, 1 - scores, scores.clip(min=0)).mean())


def trial_errors(scores: Mapping[str, NDArray], trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Give the error of each trial at the threshold of the equal error rate, for comparing two runs.

    Trials are weighted so that targets and impostors count half each: the errors over the total are the mean of
    the two error rates. :func:`speechbrain_bestrq.results.compare_runs` resamples the
    speakers of the first side only, :func:`compare_scores` those of both.

    Arguments
    ---------
    scores : mapping
        For each metric ("eer", "eer_snorm") the scores of the trials, shape (N,).
    trials : sequence of tuple
        Label and two IDs.

    Returns
    -------
    list of dict
        With "ID" (both utterances), "group" (the first's speaker), and for each metric
        "eer_errors", "eer_total".

    Example
    -------
    >>> trials = [(1, "id1/a/1", "id1/b/1"), (1, "id2/a/1", "id2/b/1"), (0, "id1/a/1", "id2/a/1")]
    >>> trial_errors({"eer": np.array([0.9, 0.4, 0.5])}, trials)[0]
    {'ID': 'id1/a/1 id1/b/1', 'group': 'id1', 'eer_errors': 0.0, 'eer_total': 0.75}
    """
    rows: list[dict[str, Any]] = [
        {"ID": f"{first} {second}", "group": speaker_of(first)} for _, first, second in trials
    ]
    for metric, values in scores.items():
        errors = _Errors(values, trials)
        share = errors.targets.mean()
        weights = np.where(errors.targets, 0.5 / share, 0.5 / (1 - share))
        wrong = weights * ((values >= errors.threshold) != errors.targets)
        for row, error, weight in zip(rows, wrong.tolist(), weights.tolist(), strict=True):
            row |= {f"{metric}_errors": error, f"{metric}_total": weight}
    return rows


def compare_scores(
    folder: str | os.PathLike,
    other: str | os.PathLike,
    name: str,
    kind: str = "cosine",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[Interval, float]:
    """Compare the EER of two runs on the same trials, by a paired bootstrap over the speakers of both sides.

    Over the trials where there are fewer than five speakers.

    Arguments
    ---------
    folder, other : str or Path
        Output folders of two runs.
    name : str
        Of the list.
    kind : str
        "cosine" or "snorm".
    seed, resamples
        As for :func:`verification_rates`.

    Returns
    -------
    difference : Interval
        The first's EER minus the other's.
    not_better : float
        Share of the resamples in which the first's is not lower: small when the first is better.

    Raises
    ------
    InputError
        If a file is missing, or the trials are not the same.
    """
    return compare_scores_over_seeds([folder], [other], name, kind, seed, resamples)


def compare_scores_over_seeds(
    folders: Sequence[str | os.PathLike],
    others: Sequence[str | os.PathLike],
    name: str,
    kind: str = "cosine",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[Interval, float]:
    """Compare the EER of two systems, each with a run of every seed: :func:`compare_scores` of their means.

    The speakers are resampled and the seeds are not: the interval tells what other speakers would give,
    not other seeds.

    Arguments
    ---------
    folders, others : sequence of str or Path
        Output folders of the runs of both.
    name, kind, seed, resamples
        As for :func:`compare_scores`.

    Returns
    -------
    difference : Interval
        The mean EER of the first's runs minus that of the other's.
    not_better : float
        Share of the resamples in which the first's is not lower.

    Raises
    ------
    InputError
        If a file is missing, or the trials are not the same.
    """
    read = [read_scores(one, name, kind) for one in (*folders, *others)]
    trials = read[0][0]
    for folder, (found, _) in zip((*folders, *others), read, strict=True):
        if found != trials:
            raise InputError(
                f"{folders[0]} and {folder} were not tested on the same trials of {name}: test both again."
            )
    errors = [_Errors(scores, trials) for _, scores in read]
    weights = np.repeat([1 / len(folders), -1 / len(others)], [len(folders), len(others)])
    differences = []
    for drawn in errors[0].draws(seed, resamples):
        outcomes = [one.resampled(drawn) for one in errors]
        if all(outcomes):
            differences.append(weights @ [outcome[0] for outcome in outcomes])
    low, high = np.quantile(differences, [0.025, 0.975])
    difference = Interval(float(weights @ [one.rates[0] for one in errors]), float(low), float(high))
    return difference, float(np.mean(np.array(differences) >= 0))


def draw_scores(scores: NDArray, trials: Sequence[Trial], path: str | os.PathLike, title: str) -> Path:
    """Draw how the scores of targets and impostors are spread, and the threshold of the equal error rate.

    Arguments
    ---------
    scores : numpy.ndarray
        Of the trials, shape (N,).
    trials : sequence of tuple
        Label and two IDs.
    path : str or Path
        The PNG.
    title : str
        Stands above, before the EER.

    Returns
    -------
    Path
        The PNG.

    Example
    -------
    >>> trials = [(1, "id1/a/1", "id1/b/1"), (0, "id1/a/1", "id2/a/1")]
    >>> path = draw_scores(np.array([0.9, 0.4]), trials, getfixture("tmp_path") / "scores.png", "veri_test")
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    errors = _Errors(scores, trials)
    eer, mindcf = errors.rates
    bins = np.histogram_bin_edges(scores, bins=60)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    kinds = ((errors.targets, "the same speaker", "tab:blue"), (~errors.targets, "different speakers", "tab:orange"))
    for kind, label, color in kinds:
        axes.hist(scores[kind], bins, density=True, alpha=0.6, color=color, label=f"{label}: {kind.sum()} trials")
    axes.axvline(errors.threshold, color="black", linestyle="--", linewidth=1, label=f"EER at {errors.threshold:.3f}")
    axes.set(xlabel="score", ylabel="density")
    # a folder may be called anything: a dollar sign in it is no formula
    axes.set_title(f"{title}: EER {100 * eer:.2f} %, minDCF({PRIOR:g}) {mindcf:.3f}", parse_math=False)
    axes.legend()
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
    return Path(path)
