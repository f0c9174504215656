"""Naming a class of a whole utterance: what the recipes for emotions and intents share."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from speechbrain_bestrq.classification_scores import Answers
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.results import describe_data, write_results
from speechbrain_bestrq.task_brain import TaskBrain, check_metrics
from speechbrain_bestrq.task_data import Rows, make_task_loaders, take_examples

logger = logging.getLogger(__name__)

#: Place of a target that training had none of. It has no loss, and whatever is answered is wrong.
UNSEEN = -1

#: What can choose the checkpoint and drive the learning rates: the lower the better.
METRICS = ("error", "unweighted_error", "loss")

#: The set that a run is tested on.
TEST_SET = "test"


class ClassificationBrain(TaskBrain):
    """Cross-entropy over the classes, on the mixed hidden states.

    Batches have "label" (int, :data:`UNSEEN` where training had none of the class), "target" (its name) and
    "spk_id". Of hparams it reads what :class:`~speechbrain_bestrq.task_brain.TaskBrain`
    reads, and ``valid_metric``, one of :data:`METRICS`: "error" is 1 - accuracy, "unweighted_error" 1 - the
    mean recall of the classes.

    The labels are saved with the model. A checkpoint of other labels is refused.

    Arguments
    ---------
    modules, hparams, run_opts, checkpointer
        As for :class:`~speechbrain_bestrq.task_brain.TaskBrain`. The module "head" maps
        features (B, T, D) and their lengths to logits (B, number of labels).
    labels : sequence of str
        The classes, in the order of the logits.
    weights : Tensor, optional
        Of the classes in the loss, as :func:`balanced_weights` gives them.

    Raises
    ------
    InputError
        If a metric is unknown, or there is nothing to train something with.
    """

    free_settings = TaskBrain.free_settings | {"fold"}

    def __init__(
        self,
        modules: dict[str, nn.Module],
        hparams: dict[str, Any],
        run_opts: Any = None,
        checkpointer: Any = None,
        *,
        labels: Sequence[str],
        weights: Tensor | None = None,
    ):
        check_metrics(hparams, METRICS)
        self.labels, self.metric = list(labels), hparams["valid_metric"]
        if checkpointer is not None:  # before the head: of other labels it has another size
            checkpointer.add_recoverable("labels", self, self._load_labels, self._save_labels)
        super().__init__(modules, hparams, run_opts, checkpointer)
        self.weights = (torch.ones(len(self.labels)) if weights is None else weights).to(self.device)

    def compute_forward(self, batch: Any, stage: sb.Stage) -> Tensor:
        """Give logits (B, number of labels)."""
        features, lengths, _ = self.listen(batch, stage)
        return self.modules.head(features, lengths).float()

    def compute_objectives(self, logits: Tensor, batch: Any, stage: sb.Stage) -> Tensor:
        """Weighted cross-entropy, a mean over the utterances; collect what was answered."""
        labels = batch.label.to(self.device, non_blocking=True)
        losses = cross_entropy(logits, labels, reduction="none", ignore_index=UNSEEN)
        losses = losses * self.weights[labels.clamp(min=0)]
        if stage != sb.Stage.TRAIN:
            self._told += zip(batch.id, batch.target, batch.spk_id, strict=True)
            self._answered.append(logits.argmax(-1))
            self._losses.append(losses)
        return losses.mean()

    def start_metrics(self, stage: sb.Stage) -> None:
        """Start collecting."""
        self._told: list[tuple[str, str, str]] = []
        self._answered: list[Tensor] = []
        self._losses: list[Tensor] = []

    def stage_metrics(self, stage: sb.Stage) -> dict[str, float]:
        """Loss of the utterances whose class training had, errors and macro-F1."""
        names, targets, speakers = zip(*self._told, strict=True)
        answers = [self.labels[place] for place in torch.cat(self._answered).tolist()]
        self.answers = Answers(self.labels)
        self.answers.append(names, targets, answers, speakers)
        known = sum(target in self.labels for target in targets)
        scores = self.answers.classification
        return {
            "loss": float(torch.cat(self._losses).double().sum()) / max(known, 1),
            "error": 1 - scores.accuracy,
            "unweighted_error": 1 - scores.unweighted_accuracy,
            "macro_f1": scores.macro_f1,
        }

    def _save_labels(self, _brain: Any, path: Path) -> None:
        if if_main_process():
            Path(path).write_text(json.dumps(self.labels, ensure_ascii=False), encoding="utf-8")

    def _load_labels(self, _brain: Any, path: Path, end_of_epoch: bool) -> None:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if saved != self.labels:
            raise InputError(
                f"the checkpoint in {Path(path).parent} is of the classes {_listed(saved)}, not of "
                f"{_listed(self.labels)}: give another --output_folder, or the classes it was trained on."
            )


def balanced_weights(targets: Iterable[str], labels: Sequence[str]) -> Tensor:
    """Weigh the classes so that all count alike in the loss, and an utterance counts 1 on average.

    Arguments
    ---------
    targets : iterable of str
        Of the training set.
    labels : sequence of str
        The classes.

    Returns
    -------
    Tensor
        Shape (number of labels,); 0 for a class without targets.

    Example
    -------
    >>> balanced_weights(["sad", "sad", "sad", "angry"], ["angry", "sad"])
    tensor([2.0000, 0.6667])
    """
    counts = Counter(targets)
    present = [label for label in labels if counts[label]]
    total = sum(counts[label] for label in present)
    return torch.tensor([total / (len(present) * counts[label]) if counts[label] else 0.0 for label in labels])


def check_rows(sets: Mapping[str, Rows], column: str, labels: Sequence[str]) -> None:
    """Refuse sets that cannot be trained or tested on.

    Arguments
    ---------
    sets : mapping
        The rows of "train" and of other sets.
    column : str
        Of the class.
    labels : sequence of str
        The classes.

    Raises
    ------
    InputError
        If there are fewer than two classes, training has something else, or another set has none of them.
    """
    if len(labels) < 2:
        raise InputError(f"there are fewer than two classes to tell apart ({_listed(labels) or 'none'}): give more.")
    for name, rows in sets.items():
        unknown = {row[column] for row in rows.values()} - set(labels)
        if name == "train" and unknown:
            raise InputError(f"'{name}' has the classes {_listed(sorted(unknown))}, which are none of the labels.")
        if all(row[column] in unknown for row in rows.values()):
            raise InputError(f"'{name}' has none of the classes of training, {_listed(labels)}: check the manifests.")


def make_classification_loaders(
    hparams: Mapping[str, Any],
    sets: Mapping[str, Rows],
    column: str,
    labels: Sequence[str],
    hidden: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, torch.utils.data.DataLoader]:
    """Make the loaders whose batches a :class:`ClassificationBrain` takes.

    Arguments
    ---------
    hparams, sets, hidden, device
        As for :func:`speechbrain_bestrq.task_data.make_task_loaders`; the rows have "spk_id".
    column : str
        Of the class.
    labels : sequence of str
        The classes.

    Returns
    -------
    dict
        A loader for each set.
    """
    places = {label: place for place, label in enumerate(labels)}

    @sb.utils.data_pipeline.takes(column)
    @sb.utils.data_pipeline.provides("label", "target")
    def targets(name):
        yield places.get(name, UNSEEN)
        yield name

    return make_task_loaders(hparams, sets, [targets], ["label", "target", "spk_id"], hidden, device)


def run_classification(
    hparams: dict[str, Any],
    run_opts: Any,
    sets: Mapping[str, Rows],
    column: str,
    labels: Sequence[str],
    hidden: Mapping[str, Tensor] | None = None,
    *,
    corpus: str,
    **facts: Any,
) -> ClassificationBrain:
    """Train on "train", choose by "valid", test on "test", and write what came of it into ``output_folder``.

    Arguments
    ---------
    hparams : dict
        Of the YAML: what :class:`ClassificationBrain` and :func:`make_classification_loaders` read,
        "speech_encoder", "mix" (if several hidden states are given), "head" (takes ``num_labels``),
        "class_weights" (None or "balanced"), "examples_per_class", "label_seed", "checkpointer" and "test_only".
    run_opts : RunOptions
        SpeechBrain's.
    sets : mapping
        The rows of "train", "valid" and "test".
    column : str
        Of the class.
    labels : sequence of str
        The classes.
    hidden : mapping, optional
        Cached hidden states of all utterances.
    corpus : str
        Its name.
    **facts
        What else ``results.json`` is to say; plain JSON values.

    Returns
    -------
    ClassificationBrain
        Tested.

    Raises
    ------
    InputError
        If an option is out of range, or there is nothing to test.
    """
    train = take_examples(sets["train"], column, hparams["examples_per_class"], hparams["label_seed"])
    sets = {**sets, "train": train}
    loaders = make_classification_loaders(hparams, sets, column, labels, hidden, run_opts["device"])
    modules = {"encoder": hparams["speech_encoder"], "head": hparams["head"](num_labels=len(labels))}
    if "mix" in hparams:
        modules["mix"] = hparams["mix"]
    weights = None
    if hparams["class_weights"] is not None:
        weights = balanced_weights((row[column] for row in train.values()), labels)
    brain = ClassificationBrain(modules, hparams, run_opts, hparams["checkpointer"], labels=labels, weights=weights)
    brain.data = describe_data(corpus, train)
    if not hparams["test_only"]:
        brain.fit(hparams["epoch_counter"], loaders["train"], loaders["valid"])
    metrics = brain.test(loaders[TEST_SET])
    for name, score in brain.answers.intervals.items():
        logger.info("%s, %s: %s", TEST_SET, name, score)
    if if_main_process():
        output_folder = Path(hparams["output_folder"])
        brain.answers.write(output_folder, TEST_SET)
        told = {**brain.answers.describe(), "loss": metrics["loss"], "evaluation_seconds": metrics["seconds"]}
        write_results(
            output_folder,
            {
                "corpus": corpus,
                **facts,
                "labels": list(labels),
                **brain.records(getattr(hidden, "seconds", None)),
                "sets": {TEST_SET: told},
            },
        )
    return brain


def check_options(hparams: Mapping[str, Any]) -> None:
    """Refuse options that are out of range, before anything is prepared.

    Arguments
    ---------
    hparams : mapping
        Of the YAML.

    Raises
    ------
    InputError
        If one is.

    Example
    -------
    >>> check_options({"class_weights": "balanced", "examples_per_class": 5})
    """
    if hparams["class_weights"] not in (None, "balanced"):
        raise InputError(f"class_weights is null or balanced, not {hparams['class_weights']!r}.")
    take_examples({}, "", hparams["examples_per_class"])
    check_metrics(hparams, METRICS)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
