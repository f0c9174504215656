"""Scores of speaker verification: cosines of embeddings, normalised by a cohort, and their files.

A trial is a label (1: the same speaker, 0: different ones) and two utterances by their IDs,
SPEAKER/VIDEO/UTTERANCE, as :func:`speechbrain_bestrq.corpora.read_trials` gives it.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from speechbrain_bestrq.corpora._trials import Trial, speaker_of
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.writing import replacing

#: Of the scores of each trial of a list.
SCORES_FILE = "scores_{}.csv"
#: Its first columns; the scores follow.
TRIAL_FIELDS = ("label", "first", "second")
#: Trials whose vectors are in memory at a time, and utterances whose scores against a cohort are.
TRIAL_CHUNK, COHORT_CHUNK = 65536, 4096
#: The least deviation of cohort scores, where all are alike.
LEAST_DEVIATION = 1e-6


class SpeakerEmbeddings:
    """Embeddings of utterances, brought to unit length.

    Arguments
    ---------
    names : sequence of str
        IDs of the utterances.
    vectors : Tensor
        Their embeddings, shape (U, E).

    Raises
    ------
    InputError
        If an embedding is not finite.

    Example
    -------
    >>> embeddings = SpeakerEmbeddings(["id1/a/1", "id1/b/1", "id2/c/1"], torch.tensor([[2.0, 0], [3, 0], [0, 1]]))
    >>> embeddings.score([(1, "id1/a/1", "id1/b/1"), (0, "id1/a/1", "id2/c/1")]).tolist()
    [1.0, 0.0]
    """

    def __init__(self, names: Sequence[str], vectors: Tensor):
        vectors = vectors.detach().float().cpu()
        finite = vectors.isfinite().all(1)
        if not finite.all():
            first = names[int((~finite).nonzero()[0])]
            raise InputError(
                f"{int((~finite).sum())} of {len(names)} embeddings are not finite, such as that of {first}: the model "
                "or the audio is broken; train with a lower rate, or look at the file."
            )
        self.vectors = normalize(vectors, dim=1)
        self._places = {name: place for place, name in enumerate(names)}

    @property
    def names(self) -> list[str]:
        """IDs, in the order of the vectors."""
        return list(self._places)

    def select(self, names: Sequence[str]) -> Tensor:
        """Give the unit vectors of utterances, shape (len(names), E).

        Raises
        ------
        InputError
            If one has no embedding.
        """
        absent = [name for name in names if name not in self._places]
        if absent:
            raise InputError(
                f"{len(absent)} utterances of the trials have no embedding, first {absent[0]}: prepare the corpus "
                "again, or give the list that belongs to it."
            )
        return self.vectors[torch.tensor([self._places[name] for name in names], dtype=torch.int64)]

    def score(self, trials: Sequence[Trial]) -> NDArray:
        """Give the cosine of each trial.

        Arguments
        ---------
        trials : sequence of tuple
            Label and two IDs.

        Returns
        -------
        numpy.ndarray
            float64, shape (len(trials),), -1 to 1.
        """
        cosines = []
        for start in range(0, len(trials), TRIAL_CHUNK):
            part = trials[start : start + TRIAL_CHUNK]
            first, second = (self.select([trial[side] for trial in part]) for side in (1, 2))
            cosines.append((first * second).sum(1).double())
        return torch.cat(cosines).numpy()


def speaker_means(embeddings: SpeakerEmbeddings, names: Sequence[str]) -> Tensor:
    """Make a cohort: a unit vector for each speaker, the mean of the unit vectors of their utterances.

    Arguments
    ---------
    embeddings : SpeakerEmbeddings
        At least of these utterances.
    names : sequence of str
        Utterances of the cohort's speakers.

    Returns
    -------
    Tensor
        Shape (speakers, E).

    Example
    -------
    >>> embeddings = SpeakerEmbeddings(["id1/a/1", "id1/b/1", "id2/c/1"], torch.eye(3))
    >>> speaker_means(embeddings, ["id1/a/1", "id1/b/1", "id2/c/1"])
    tensor([[0.7071, 0.7071, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """
    _, speakers = np.unique([speaker_of(name) for name in names], return_inverse=True)
    sums = torch.zeros(speakers.max() + 1, embeddings.vectors.shape[1])
    return normalize(sums.index_add_(0, torch.from_numpy(speakers), embeddings.select(names)), dim=1)


def normalize_scores(
    scores: NDArray, trials: Sequence[Trial], embeddings: SpeakerEmbeddings, cohort: Tensor, top: int = 300
) -> NDArray:
    """Normalise scores by those against a cohort: adaptive s-norm (AS-norm1 of Matejka et al., Interspeech 2017).

    Each utterance of a trial is scored against strangers; the mean and the deviation of its ``top`` highest
    scores say what a score of this utterance is worth. The two normalised scores are averaged.

    Arguments
    ---------
    scores : numpy.ndarray
        Cosines of the trials, shape (N,).
    trials : sequence of tuple
        Label and two IDs.
    embeddings : SpeakerEmbeddings
        Of the utterances of the trials.
    cohort : Tensor
        Unit vectors of speakers that are in no trial, shape (C, E).
    top : int
        Highest scores that count; all, where there are fewer.

    Returns
    -------
    numpy.ndarray
        float64, shape (N,).

    Raises
    ------
    InputError
        If the cohort, or what counts of it, is smaller than 2.

    Example
    -------
    >>> embeddings = SpeakerEmbeddings(["id1/a/1", "id1/b/1"], torch.eye(3)[[0, 0]])
    >>> trials = [(1, "id1/a/1", "id1/b/1")]
    >>> normalize_scores(embeddings.score(trials), trials, embeddings, torch.eye(3)).round(3).tolist()
    [1.414]
    """
    top = min(top, len(cohort))
    if top < 2:
        raise InputError(f"score normalisation by {top} of {len(cohort)} speakers: give at least 2, or leave it out.")
    names = list(dict.fromkeys(name for _, *pair in trials for name in pair))
    places = {name: place for place, name in enumerate(names)}
    highest = [
        (embeddings.select(names[start : start + COHORT_CHUNK]) @ cohort.T).topk(top).values.double()
        for start in range(0, len(names), COHORT_CHUNK)
    ]
    deviations, means = (part.numpy() for part in torch.std_mean(torch.cat(highest), dim=1, correction=0))
    deviations = deviations.clip(min=LEAST_DEVIATION)
    first, second = (np.array([places[trial[side]] for trial in trials]) for side in (1, 2))
    return sum((scores - means[side]) / deviations[side] for side in (first, second)) / 2


def write_scores(folder: str | os.PathLike, name: str, trials: Sequence[Trial], scores: Mapping[str, NDArray]) -> Path:
    """Write the scores of a list of trials, all or nothing.

    Arguments
    ---------
    folder : str or Path
        The run's output folder.
    name : str
        Of the list.
    trials : sequence of tuple
        Label and two IDs.
    scores : mapping
        For each kind ("cosine", "snorm") those of the trials, shape (N,).

    Returns
    -------
    Path
        ``scores_<name>.csv``, with the columns label, first, second, and one for each kind.
    """
    path = Path(folder) / SCORES_FILE.format(name)
    with (
        replacing(path) as beside,
        open(beside, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([*TRIAL_FIELDS, *scores])
        for trial, *values in zip(trials, *(column.tolist() for column in scores.values()), strict=True):
            writer.writerow([*trial, *(f"{value:.9g}" for value in values)])
    return path


def read_scores(folder: str | os.PathLike, name: str, kind: str = "cosine") -> tuple[list[Trial], NDArray]:
    """Read the scores of a list of trials.

    Arguments
    ---------
    folder : str or Path
        A run's output folder.
    name : str
        Of the list.
    kind : str
        "cosine" or "snorm".

    Returns
    -------
    trials : list of tuple
        Label and two IDs.
    scores : numpy.ndarray
        Shape (N,).

    Raises
    ------
    InputError
        If the file is missing, or not what :func:`write_scores` wrote.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = write_scores(folder, "veri_test", [(1, "id1/a/1", "id1/b/1")], {"cosine": np.array([0.5])})
    >>> read_scores(folder, "veri_test")
    ([(1, 'id1/a/1', 'id1/b/1')], array([0.5]))
    """
    path = Path(folder) / SCORES_FILE.format(name)
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        trials = [(int(row["label"]), row["first"], row["second"]) for row in rows]
        return trials, np.array([float(row[kind]) for row in rows])
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: test the run on that list, with --test_only.") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path} has no scores '{kind}' ({error}): test the run again.") from error
