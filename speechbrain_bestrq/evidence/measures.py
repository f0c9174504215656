"""What is measured of an encoder on each corpus, hidden state by hidden state."""

import hashlib
import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechbrain_bestrq.corpora import (
    fold_manifests,
    prepare_iemocap,
    prepare_librispeech,
    prepare_slurp,
    prepare_voxceleb,
    read_manifest,
    read_trials,
)
from speechbrain_bestrq.corpora._trials import Trial
from speechbrain_bestrq.corpora.iemocap import FOLDS
from speechbrain_bestrq.corpora.manifest import corpus_name, summary_path
from speechbrain_bestrq.digests import file_digest
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.evidence.alignment import ALIGNER_SETTINGS, cached_alignment
from speechbrain_bestrq.evidence.hidden import encode_frames, encode_parts
from speechbrain_bestrq.evidence.linear import (
    Examples,
    Score,
    effective_rank,
    linear_probe,
    standardisation,
    within_class_whitening,
)
from speechbrain_bestrq.metrics import equal_error_rate
from speechbrain_bestrq.task_data import Rows, take_classes, take_examples, take_hours
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.verification import SpeakerEmbeddings

SAMPLE_RATE = 16000
#: Draws of few labelled examples of a class, whose mean counts; of characters there is one.
DRAWS = 5
#: Examples of each class, where labels are few.
FEW_EXAMPLES = (5, 20)
#: Examples of each class that the draws are of: more would take their time to be encoded.
POOL_EXAMPLES = 40
#: Examples of each emotion, where labels are few: that of which the trained heads learn, too.
FEW_TURNS = 20
#: Speakers to train on, where labels are few.
FEW_SPEAKERS = 20
#: Utterances of a speaker at most: of one alone nothing is seen of what varies within speakers; of many, the hours hold
#: few speakers.
UTTERANCES_OF_SPEAKER = 5
#: Hours of aligned speech, where labels are few.
FEW_HOURS = 0.05
#: Hours of transcribed speech that the aligner is trained on, at most.
ALIGNER_HOURS = 3.0
#: Of LibriSpeech.
SPLITS = {"train": "train-clean-100", "valid": "dev-clean", "test": "test-clean"}
#: Frames of which the rank is told, at most.
RANK_FRAMES = 20000


@dataclass(frozen=True)
class Measure:
    """Something that is measured."""

    title: str
    """With "LABELS" or "FEW" where it depends on the hours that are used; see :meth:`title_with`."""
    lower_is_better: bool = False
    is_share: bool = True
    """Shown in per cent."""
    is_score: bool = True
    """Whether one can be better at it than another; else it describes."""
    is_of_states: bool = True
    """Whether each hidden state has its own; else there is one score."""

    def title_with(self, hours: float) -> str:
        """Tell what it is, if so many hours of a set are used.

        Example
        -------
        >>> MEASURES["intents_all"].title_with(0.5)
        'intents, up to 30 minutes of labels'
        """
        most = f"{60 * hours:g} minutes" if hours < 1 else f"{hours:g} hours"
        few = f"{60 * few_hours(hours):g} minutes"
        return self.title.replace("LABELS", f"up to {most} of labels").replace("FEW", f"{few} of labels")


def few_hours(hours: float) -> float:
    """Hours of aligned speech where labels are few, if so many are used.

    Example
    -------
    >>> few_hours(0.5), few_hours(0.02)
    (0.05, 0.01)
    """
    return min(FEW_HOURS, hours / 2)


MEASURES = {
    "speakers": Measure("speaker EER, nothing trained", lower_is_better=True),
    "speakers_standardised": Measure("speaker EER, standardised without labels", lower_is_better=True),
    "speakers_whitened_few": Measure(f"speaker EER, whitened within {FEW_SPEAKERS} speakers", lower_is_better=True),
    "speakers_whitened": Measure("speaker EER, whitened within speakers", lower_is_better=True),
    "intents_5": Measure("intents, 5 examples a class"),
    "intents_20": Measure("intents, 20 examples a class"),
    "intents_all": Measure("intents, LABELS"),
    "emotions_few": Measure(f"emotions, {FEW_TURNS} examples a class", is_of_states=False),
    "emotions": Measure("emotions, all labels", is_of_states=False),
    "emotions_of_states": Measure("emotions, of each hidden state", is_score=False),
    "characters_few": Measure("characters of frames, FEW"),
    "characters_all": Measure("characters of frames, LABELS"),
    "rank": Measure("effective rank of frames", is_share=False, is_score=False),
    "scale": Measure("root mean square of frames", is_share=False, is_score=False),
    "between": Measure("share of variance between utterances", is_score=False),
}

Found = dict[str, list[Score]]
"""Of each measure, a score for each hidden state."""


class Corpus(ABC):
    """A corpus with what is measured on it.

    Arguments
    ---------
    data_folder : Path
        In its official layout.
    folder : Path
        Where manifests and alignments are kept.
    hours : float
        Most of the training, the validation and the test set that is used; sets are taken whole where
        trials name their utterances, or each speaker is left out in turn. Few examples of intents are drawn of all.
    device : torch.device
    """

    official = ""
    version = 5
    """Raised when what a measure means changes, or one is added: older figures are measured anew."""

    def __init__(self, data_folder: Path, folder: Path, hours: float, device: torch.device):
        self.name = corpus_name(data_folder, self.official)
        self.hours = hours
        self.manifests = self.prepare(data_folder, folder)
        # a summary tells sizes and times of the audio, which a manifest does not
        pairs = ((self.manifests[name], summary_path(self.manifests[name])) for name in sorted(self.manifests))
        self.mark = [hours, *(file_digest(file) for pair in pairs for file in pair if file.is_file())]

    @abstractmethod
    def prepare(self, data_folder: Path, folder: Path) -> dict[str, Path]:
        """Write the manifests."""

    @abstractmethod
    def measure(self, encoder: TaskEncoder, device: torch.device) -> Found:
        """Of each measure, a score for each hidden state."""

    @abstractmethod
    def chances(self) -> dict[str, float]:
        """What a guess comes to: the share of the commonest class in the test set."""

    def rows(self, name: str) -> dict[str, Any]:
        """A set, of which no more than ``hours`` are taken."""
        return _at_most(read_manifest(self.manifests[name]), self.hours)


class Speakers(Corpus):
    """Trials between means of utterances."""

    official = "VoxCeleb"
    version = 6

    def prepare(self, data_folder: Path, folder: Path) -> dict[str, Path]:
        """Write the manifests."""
        # as many held out as make their trials mean something, of however few there are
        return prepare_voxceleb(data_folder, folder, valid_share=0.15, sample_rate=SAMPLE_RATE)

    def measure(self, encoder: TaskEncoder, device: torch.device) -> Found:
        """EER of cosines: plain, standardised, and whitened within the training speakers, few and all.

        Standardised is each dimension, by its mean and deviation over the utterances of training: what all utterances
        share, which says nothing of speakers, hides what they differ in from a plain cosine.
        """
        rows = {name: read_manifest(self.manifests[name]) for name in ("valid", "test")} | {"train": self._trained_on()}
        parts = {name: encode_parts(encoder, one, SAMPLE_RATE, device) for name, one in rows.items()}
        trials = {"valid": read_trials(self.manifests["valid_trials"]), "test": read_trials(self.manifests["trials"])}
        trials = {name: next(iter(lists.values())) for name, lists in trials.items()}
        speakers = sorted({row["spk_id"] for row in rows["train"].values()})
        numbers = {speaker: number for number, speaker in enumerate(speakers)}
        draws = self._draws(rows["train"], len(speakers))
        found: Found = {name: [] for name in ("speakers", "speakers_standardised", *draws)}
        for state in range(encoder.num_states):
            means = {name: _stack(parts[name], one, state).mean(1) for name, one in rows.items()}
            vectors = {"speakers": [means]}
            mean, scale = standardisation(means["train"])
            vectors["speakers_standardised"] = [{side: (one - mean) * scale for side, one in means.items()}]
            for name, several in draws.items():
                vectors[name] = []
                for drawn in several:
                    trained = _examples(parts["train"], drawn, state, "spk_id", numbers, whole=True)
                    mapping, mean = within_class_whitening(trained), trained.vectors.mean(0)
                    vectors[name].append({side: (one - mean) @ mapping for side, one in means.items()})
            for name, several in vectors.items():
                scores = [
                    Score(*(_error_rate(rows[side], one[side], trials[side]) for side in trials)) for one in several
                ]
                found[name].append(_mean(scores))
        return found

    @staticmethod
    def _draws(rows: Rows, speakers: int) -> dict[str, list[Rows]]:
        """Utterances to even out how speakers vary with, by the measure."""
        if len(rows) < 2 * speakers:  # there is little within speakers to be evened out
            return {}
        every = {"speakers_whitened": [rows]}
        if speakers <= FEW_SPEAKERS:
            return every
        few = [take_classes(rows, "spk_id", FEW_SPEAKERS, seed) for seed in range(DRAWS)]
        return {"speakers_whitened_few": few, **every}

    def _trained_on(self) -> Rows:
        """Speakers with several utterances each, as many as the hours hold."""
        rows = take_examples(read_manifest(self.manifests["train"]), "spk_id", UTTERANCES_OF_SPEAKER)
        number, share = len({row["spk_id"] for row in rows.values()}), 3600 * self.hours / _seconds(rows)
        count = number if share >= 1 else max(int(number * share), 2)
        while _seconds(taken := take_classes(rows, "spk_id", count)) > 3600 * self.hours and count > 2:
            count -= 1  # those drawn say more than others
        return taken

    def chances(self) -> dict[str, float]:
        """Half of the trials are wrong."""
        return {name: 0.5 for name in MEASURES if name.startswith("speakers")}


class Intents(Corpus):
    """Scenarios, told by the means of an utterance's parts."""

    official = "SLURP"
    column = "scenario"

    def prepare(self, data_folder: Path, folder: Path) -> dict[str, Path]:
        """Write the manifests."""
        return prepare_slurp(data_folder, folder, sample_rate=SAMPLE_RATE)

    def _sets(self) -> tuple[dict[str, Rows], dict[str, int]]:
        rows = {name: self.rows(name) for name in ("train", "valid", "test")}
        labels = sorted({row[self.column] for row in read_manifest(self.manifests["train"]).values()})
        return rows, {label: number for number, label in enumerate(labels)}

    def measure(self, encoder: TaskEncoder, device: torch.device) -> Found:
        """Accuracy of linear probes with few labels and with all of the hours that are used."""
        sets, labels = self._sets()
        # of all labels: the hours may have too few of a rare class
        pool = take_examples(read_manifest(self.manifests["train"]), self.column, POOL_EXAMPLES)
        draws = {f"intents_{count}": [take_examples(pool, self.column, count, seed) for seed in range(1, DRAWS + 1)]
                 for count in FEW_EXAMPLES}  # fmt: skip
        draws["intents_all"] = [sets["train"]]
        heard = {name: row for several in draws.values() for drawn in several for name, row in drawn.items()}
        parts = {
            name: encode_parts(encoder, one, SAMPLE_RATE, device) for name, one in (sets | {"train": heard}).items()
        }
        found: Found = {name: [] for name in draws}
        for state in range(encoder.num_states):
            valid, test = (_examples(parts[name], sets[name], state, self.column, labels) for name in ("valid", "test"))
            for name, several in draws.items():
                scores = [
                    linear_probe(_examples(parts["train"], drawn, state, self.column, labels), valid, test, len(labels))
                    for drawn in several
                ]
                found[name].append(_mean(scores))
        return found

    def chances(self) -> dict[str, float]:
        """Of the commonest scenario."""
        chance = _commonest([row[self.column] for row in self._sets()[0]["test"].values()])
        return {name: chance for name in MEASURES if name.startswith("intents_")}


class Emotions(Corpus):
    """Emotions of speakers of whom nothing is in training."""

    official = "IEMOCAP"

    def prepare(self, data_folder: Path, folder: Path) -> dict[str, Path]:
        """Write the manifests."""
        return prepare_iemocap(data_folder, folder, sample_rate=SAMPLE_RATE)

    def measure(self, encoder: TaskEncoder, device: torch.device) -> Found:
        """Accuracy of linear probes over the folds, each weighing as many turns as it has, with few labels and all.

        Taken together, the validation turns of all folds are the test turns. So the hidden state of a fold's
        speakers is chosen on those of the other folds alone.
        """
        turns = read_manifest(self.manifests["all"])
        numbers = {label: number for number, label in enumerate(sorted({row["emo"] for row in turns.values()}))}
        parts = encode_parts(encoder, turns, SAMPLE_RATE, device)
        sides = [
            {name: read_manifest(path) for name, path in fold_manifests(self.manifests, fold).items()}
            for fold in FOLDS["speaker"]
        ]
        sizes = torch.tensor([[len(rows["valid"]), len(rows["test"])] for rows in sides], dtype=torch.double)
        speakers = [{row["spk_id"] for name in ("valid", "test") for row in rows[name].values()} for rows in sides]
        totals = sizes.sum(0)
        found: Found = {}
        for name, count, seeds in (("emotions_few", FEW_TURNS, range(DRAWS)), ("emotions", None, range(1))):
            hits = torch.zeros(encoder.num_states, len(sides), 2, dtype=torch.double)
            for fold, rows in enumerate(sides):
                draws = [take_examples(rows["train"], "emo", count, seed) for seed in seeds]
                for state in range(encoder.num_states):
                    trained, (valid, test) = (
                        [_examples(parts, one, state, "emo", numbers, whole=True) for one in several]
                        for several in (draws, (rows["valid"], rows["test"]))
                    )
                    score = _mean([linear_probe(one, valid, test, len(numbers)) for one in trained])
                    hits[state, fold] = torch.tensor(score, dtype=torch.double) * sizes[fold]
            found[name] = [Score(*(chosen_apart(hits, speakers) / totals).tolist())]
        found["emotions_of_states"] = [Score(*one) for one in (hits.sum(1) / totals).tolist()]  # with all labels
        return found

    def chances(self) -> dict[str, float]:
        """Of the commonest emotion."""
        chance = _commonest([row["emo"] for row in read_manifest(self.manifests["all"]).values()])
        return {"emotions_few": chance, "emotions": chance}


def chosen_apart(hits: Tensor, speakers: Sequence[set[str]]) -> Tensor:
    """Sum what is right over folds, each of the hidden state that is best on the folds of other speakers.

    Arguments
    ---------
    hits : Tensor
        Right answers on the validation and the test set, of shape (states, folds, 2).
    speakers : sequence of set of str
        Of both sets of each fold.

    Returns
    -------
    Tensor
        Shape (2,).

    Example
    -------
    >>> hits = torch.tensor([[[9.0, 9.0], [1.0, 1.0]], [[1.0, 1.0], [2.0, 2.0]]])
    >>> chosen_apart(hits, [{"a"}, {"b"}])  # state 1 is best on the second fold, 0 on the first
    tensor([2., 2.])
    """
    total = torch.zeros(2, dtype=hits.dtype)
    for fold, own in enumerate(speakers):
        others = [number for number, one in enumerate(speakers) if not own & one]
        total += hits[int(hits[:, others, 0].sum(1).argmax()), fold]
    return total


def _check_few(rows: Mapping[str, Mapping[str, Any]], hours: float, what: str) -> None:
    """Refuse a training set that has no few labels to draw."""
    there = sum(float(row["duration"]) for row in rows.values()) / 3600
    if there < few_hours(hours):
        most = math.floor(2000 * there) / 1000
        less = f"--hours {most:g}, or " if most else ""
        raise InputError(
            f"{what} has {3600 * there:.0f} s to train on, and {3600 * few_hours(hours):.0f} s are drawn where labels "
            f"are few: give {less}more speech."
        )


class Characters(Corpus):
    """Which character is being said, of each frame by itself; and what the frames are like."""

    official = "LibriSpeech"

    def __init__(self, data_folder: Path, folder: Path, hours: float, device: torch.device):
        super().__init__(data_folder, folder, hours, device)
        sets = {name: self.rows(name) for name in ("train", "valid", "test")}
        _check_few(sets["train"], hours, f"--librispeech {data_folder}")
        trained_on = _at_most(read_manifest(self.manifests["train"]), ALIGNER_HOURS)
        made_by = [self.mark, ALIGNER_HOURS, ALIGNER_SETTINGS]
        key = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]
        alignment = folder / f"alignment-{key}.pt"
        self.times = cached_alignment(alignment, trained_on, sets, SAMPLE_RATE, device)
        # made once more, on another device or by other code, it may be another
        self.mark = [*self.mark, file_digest(alignment)]
        self.sets = {name: {key: rows[key] for key in self.times[name]} for name, rows in sets.items()}
        for name, rows in self.sets.items():
            if not rows:
                raise InputError(f"--librispeech {data_folder}: nothing of its {name} set could be aligned: too short?")
        _check_few(self.sets["train"], hours, f"--librispeech {data_folder}, as far as it could be aligned,")

    def prepare(self, data_folder: Path, folder: Path) -> dict[str, Path]:
        """Write the manifests."""
        if missing := [split for split in SPLITS.values() if not (data_folder / split).is_dir()]:
            raise InputError(f"--librispeech {data_folder} has no {missing[0]}: {', '.join(SPLITS.values())} are used.")
        splits = [[split] for split in SPLITS.values()]
        manifests = prepare_librispeech(data_folder, folder, *splits, sample_rate=SAMPLE_RATE, transcripts=True)
        return {name: manifests[split] for name, split in SPLITS.items()}

    def measure(self, encoder: TaskEncoder, device: torch.device) -> Found:
        """Accuracy of linear probes on frames; rank, scale and share of variance of the test set's frames."""
        few = take_hours(self.sets["train"], few_hours(self.hours))
        rest = {name: row for name, row in self.sets["train"].items() if name not in few}
        parts = {"few": few, "rest": rest, "valid": self.sets["valid"], "test": self.sets["test"]}
        times = {name: self.times["train" if name in ("few", "rest") else name] for name in parts}
        frames = {
            name: encode_frames(encoder, rows, times[name], SAMPLE_RATE, device, keep_states=name == "test")
            for name, rows in parts.items()
            if rows
        }
        number = 1 + max(int(one.classes.max()) for one in frames.values())
        found: Found = {name: [] for name in ("characters_few", "characters_all", "rank", "scale", "between")}
        for state in range(encoder.num_states):
            sets = {name: Examples(one.centred[state], one.classes) for name, one in frames.items()}
            both = [sets[name] for name in ("few", "rest") if name in sets]
            every = Examples(*(torch.cat(pair) for pair in zip(*both, strict=True)))
            found["characters_few"].append(linear_probe(sets["few"], sets["valid"], sets["test"], number))
            found["characters_all"].append(linear_probe(every, sets["valid"], sets["test"], number))
            tested = frames["test"].states[state]
            some = tested[:: max(-(-len(tested) // RANK_FRAMES), 1)]
            for name, value in (
                ("rank", effective_rank(some)),
                ("scale", float(some.square().mean().sqrt())),
                ("between", frames["test"].between[state]),
            ):
                found[name].append(Score(value, value))
        return found

    def chances(self) -> dict[str, float]:
        """Of the commonest character."""
        units = torch.cat([units for _, units in self.times["test"].values()])
        chance = float(torch.bincount(units).max() / len(units))
        return {"characters_few": chance, "characters_all": chance}


def _stack(parts: Mapping[str, Tensor], rows: Rows, state: int) -> Tensor:
    """Means of parts of utterances, shape (N, PARTS, D)."""
    return torch.stack([parts[name][state] for name in rows])


def _examples(
    parts: Mapping[str, Tensor], rows: Rows, state: int, column: str, numbers: Mapping[str, int], whole: bool = False
) -> Examples:
    vectors = _stack(parts, rows, state)
    # what no example was drawn of cannot be told: no probe gives -1
    classes = torch.tensor([numbers.get(row[column], -1) for row in rows.values()])
    return Examples(vectors.mean(1) if whole else vectors.flatten(1), classes)


def _seconds(rows: Rows) -> float:
    return sum(float(row["duration"]) for row in rows.values())


def _at_most(rows: Rows, hours: float) -> Rows:
    return take_hours(rows, hours) if _seconds(rows) > 3600 * hours else rows


def _error_rate(rows: Rows, vectors: Tensor, trials: Sequence[Trial]) -> float:
    """Of cosines, shape (N, D) of as many rows."""
    scores = SpeakerEmbeddings(list(rows), vectors).score(trials)
    return equal_error_rate(scores, [trial[0] for trial in trials])


def _mean(scores: Sequence[Score]) -> Score:
    return Score(*(statistics.fmean(one[side] for one in scores) for side in (0, 1)))


def _commonest(labels: Sequence[Any]) -> float:
    return max(labels.count(label) for label in set(labels)) / len(labels)


#: By the option that names the folder.
CORPORA: dict[str, type[Corpus]] = {
    "librispeech": Characters,
    "voxceleb": Speakers,
    "iemocap": Emotions,
    "slurp": Intents,
}
