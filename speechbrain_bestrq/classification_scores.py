"""What a classifier answered: its scores with intervals, tables and a picture of what it took for what."""

import csv
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.metrics import RESAMPLES, Classification, Interval, by_speaker, classify, draw_counts
from speechbrain_bestrq.results import ERRORS_FILE, interval, write_errors
from speechbrain_bestrq.writing import replacing

#: Up to so many classes the picture has the counts in it.
MOST_WRITTEN = 20

COLUMNS = ("ID", "group", "speaker", "target", "answer", "error_errors", "error_total")

SCORES = ("accuracy", "unweighted_accuracy", "macro_f1")


class Answers:
    """Collects what each utterance was and what it was taken for, and scores it.

    A target that is none of the labels, since training had none of it, is a class of its own that is never
    answered: it counts as wrong in every score.

    Intervals are 95 % percentile intervals, by resampling the speakers; the utterances where some speaker is
    unknown or there are fewer than five, since so few do not show how speakers differ.

    Arguments
    ---------
    labels : sequence of str
        What can be answered.

    Example
    -------
    >>> answers = Answers(["angry", "sad"])
    >>> answers.append(["a", "b", "c"], ["sad", "sad", "bored"], ["sad", "angry", "sad"])
    >>> answers.classes, answers.classification.confusion.tolist()
    (['angry', 'sad', 'bored'], [[0, 0, 0], [1, 1, 0], [0, 1, 0]])
    >>> round(answers.classification.accuracy, 3)
    0.333
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        self._rows: dict[str, tuple[str, str, str]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def append(
        self,
        names: Sequence[str],
        targets: Sequence[str],
        answers: Sequence[str],
        speakers: Sequence[str] | None = None,
    ) -> None:
        """Add utterances.

        Arguments
        ---------
        names : sequence of str
            Of the utterances.
        targets : sequence of str
            What they are.
        answers : sequence of str
            What they were taken for: labels.
        speakers : sequence of str, optional
            Who said them.

        Raises
        ------
        ValueError
            If the sequences differ in length, an utterance was added before, or an answer is no label.
        """
        speakers = [""] * len(names) if speakers is None else speakers
        for name, target, answer, speaker in zip(names, targets, answers, speakers, strict=True):
            if name in self._rows:
                raise ValueError(f"utterance {name} was added before: each counts once.")
            if answer not in self.labels:
                raise ValueError(f"utterance {name} was taken for {answer!r}, which is no label.")
            self._rows[name] = (target, answer, speaker)
        for cached in ("classes", "_cells", "classification", "intervals", "by_speaker"):
            self.__dict__.pop(cached, None)

    def extend(self, other: "Answers") -> None:
        """Add the utterances of another, such as of the next fold of a cross-validation."""
        targets, answers, speakers = zip(*other._rows.values(), strict=True) if other._rows else ((), (), ())
        self.append(list(other._rows), targets, answers, speakers)

    @cached_property
    def classes(self) -> list[str]:
        """The labels, then the targets that are none, sorted."""
        return [*self.labels, *sorted({target for target, _, _ in self._rows.values()} - set(self.labels))]

    @cached_property
    def _cells(self) -> NDArray:
        """Place of each utterance's target and answer, shape (N, 2)."""
        places = {name: place for place, name in enumerate(self.classes)}
        pairs = [(places[target], places[answer]) for target, answer, _ in self._rows.values()]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    @cached_property
    def classification(self) -> Classification:
        """Counts and scores, over :attr:`classes`."""
        return classify(self._cells[:, 0], self._cells[:, 1], len(self.classes))

    @cached_property
    def by_speaker(self) -> bool:
        """Whether intervals are by resampling speakers."""
        return by_speaker([speaker for _, _, speaker in self._rows.values()])

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Accuracy, unweighted accuracy and macro-F1 with their intervals."""
        scores, size = self.classification, len(self.classes)
        cells = self._cells[:, 0] * size + self._cells[:, 1]
        if self.by_speaker:
            _, groups = np.unique([speaker for _, _, speaker in self._rows.values()], return_inverse=True)
            count = groups.max() + 1
            of_each = np.bincount(groups * size**2 + cells, minlength=count * size**2).reshape(count, size**2)
            resampled = draw_counts(count, 0, RESAMPLES) @ of_each
        else:  # utterances drawn with replacement, counted
            counts = scores.confusion.ravel()
            resampled = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
        outcomes = _score(resampled.reshape(RESAMPLES, size, size))
        lows, highs = np.quantile(outcomes, [0.025, 0.975], axis=1)
        values = [getattr(scores, name) for name in SCORES]
        found = zip(SCORES, values, lows.tolist(), highs.tolist(), strict=True)
        return {name: Interval(value, low, high) for name, value, low, high in found}

    def describe(self) -> dict[str, Any]:
        """Give the scores for ``results.json``.

        Returns
        -------
        dict
            "utterances", "resampled" ("speakers" or "utterances"), and for "accuracy",
            "unweighted_accuracy" and "macro_f1" value, low and high.
        """
        return {
            "utterances": len(self),
            "resampled": "speakers" if self.by_speaker else "utterances",
            **{name: interval(value) for name, value in self.intervals.items()},
        }

    # ---------------------------------------------------------------- files

    def write(self, folder: str | os.PathLike, name: str) -> None:
        """Write ``errors_<name>.csv``, ``confusion_<name>.csv``, ``classes_<name>.csv`` and ``confusion_<name>.png``.

        They hold each utterance's answer; how often each class was taken for each; recall, precision and F1 of each
        class; the second as a picture.

        Arguments
        ---------
        folder : str or Path
            Of the run.
        name : str
            Of the set.
        """
        folder = Path(folder)
        rows = [
            (key, speaker if self.by_speaker else "", speaker, target, answer, int(target != answer), 1)
            for key, (target, answer, speaker) in self._rows.items()
        ]
        write_errors(folder, name, (dict(zip(COLUMNS, row, strict=True)) for row in rows), COLUMNS)
        scores = self.classification
        counts = [[label, *row] for label, row in zip(self.classes, scores.confusion.tolist(), strict=True)]
        _write_table(folder / f"confusion_{name}.csv", ["target \\ answer", *self.classes], counts)
        columns = (scores.confusion.sum(1), scores.confusion.sum(0), scores.recalls, scores.precisions, scores.f1)
        each = zip(self.classes, *(column.tolist() for column in columns), strict=True)
        # a share of nothing is left empty
        table = [["" if value != value else value for value in row] for row in each]
        _write_table(
            folder / f"classes_{name}.csv", ["class", "utterances", "answers", "recall", "precision", "f1"], table
        )
        draw_confusion(scores, self.classes, folder / f"confusion_{name}.png", f"{name}: {len(self)} utterances")

    @classmethod
    def read(cls, folder: str | os.PathLike, name: str, labels: Sequence[str]) -> "Answers":
        """Read what :meth:`write` wrote.

        Arguments
        ---------
        folder : str or Path
            Of the run.
        name : str
            Of the set.
        labels : sequence of str
            What could be answered.

        Returns
        -------
        Answers

        Raises
        ------
        InputError
            If the file is missing or of something else.
        """
        path = Path(folder) / ERRORS_FILE.format(name)
        answers = cls(labels)
        try:
            with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = list(csv.DictReader(file))
            columns = ([row[column] for row in rows] for column in ("ID", "target", "answer", "speaker"))
            answers.append(*columns)
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing: test the run on that set, with --test_only.") from error
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} has no answers of this task ({error}): test the run again.") from error
        return answers


def _score(confusions: NDArray) -> NDArray:
    """Accuracy, unweighted accuracy and macro-F1 of counts (R, C, C), shape (3, R)."""
    right = np.diagonal(confusions, axis1=1, axis2=2)
    targets, answers = confusions.sum(2), confusions.sum(1)
    return np.stack(
        [
            right.sum(1) / targets.sum(1),
            _mean_share(right, targets),
            _mean_share(2 * right, targets + answers),
        ]
    )


def _mean_share(parts: NDArray, wholes: NDArray) -> NDArray:
    """Mean over the classes (R, C) of parts / wholes, without those whose whole is 0; shape (R,)."""
    shares = np.divide(parts, wholes, out=np.zeros(parts.shape), where=wholes > 0)
    return shares.sum(1) / (wholes > 0).sum(1)


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    # utterances may have names that are no UTF-8, as their files may
    with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([columns, *rows])


def draw_confusion(scores: Classification, classes: Sequence[str], path: str | os.PathLike, title: str) -> Path:
    """Draw what was taken for what, as shares of each class.

    Arguments
    ---------
    scores : Classification
        The counts.
    classes : sequence of str
        Names of the classes.
    path : str or Path
        The PNG.
    title : str
        Above it.

    Returns
    -------
    Path
        The PNG.

    Example
    -------
    >>> path = draw_confusion(classify([0, 1], [0, 0], 2), ["a", "b"], getfixture("tmp_path") / "c.png", "test")
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    counts = scores.confusion
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = 3.0 + 0.45 * len(classes) if len(classes) <= MOST_WRITTEN else 4.0 + 0.18 * len(classes)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    font = "medium" if len(classes) <= MOST_WRITTEN else "xx-small"
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=font)
    axes.set_yticks(range(len(classes)), classes, fontsize=font)
    axes.set(title=title, xlabel="taken for", ylabel="was")
    if len(classes) <= MOST_WRITTEN:
        for row, column in np.ndindex(counts.shape):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize="small")
    figure.colorbar(image, ax=axes, label="share of the class")
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
    return Path(path)


def over_folds(folds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (of n - 1 degrees of freedom) of the scores of the folds of a cross-validation.

    Arguments
    ---------
    folds : mapping
        What :meth:`Answers.describe` gave of each, by its name.

    Returns
    -------
    dict
        "mean" and "deviation" of each score; the deviation of a single fold is 0.

    Example
    -------
    >>> def fold(value):
    ...     return {score: {"value": value} for score in SCORES}
    >>> over_folds({"one": fold(0.5), "other": fold(0.7)})["accuracy"]["mean"]
    0.6
    """
    told = {}
    for score in SCORES:
        values = [fold[score]["value"] for fold in folds.values()]
        told[score] = {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=min(1, len(values) - 1)))}
    return told
