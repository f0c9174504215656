"""Classes of utterances: scores against scikit-learn, intervals, the loss, labels training never saw, the Brain."""

import csv
import json
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger

from speechbrain_bestrq.artefact import save_encoder
from speechbrain_bestrq.checkpointing import AtomicCheckpointer
from speechbrain_bestrq.classification import (
    UNSEEN,
    ClassificationBrain,
    balanced_weights,
    check_options,
    check_rows,
    make_classification_loaders,
    run_classification,
)
from speechbrain_bestrq.classification_scores import Answers, over_folds
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_cache import cache_features
from speechbrain_bestrq.heads import MeanPoolClassifier
from speechbrain_bestrq.metrics import bootstrap_rate
from speechbrain_bestrq.results import compare_runs, read_results
from speechbrain_bestrq.task_encoders import TaskEncoder

LABELS = ["angry", "calm", "happy", "sad"]
#: Each class is a band of tones, from here on up to the next, Hz.
BANDS = (200, 500, 1200, 2800, 6000)


def make_answers(count=200, speakers=10, unseen=0, right=0.6, seed=0):
    """Random answers, more right than by chance."""
    generator = np.random.default_rng(seed)
    targets = generator.choice(LABELS, count, p=[0.4, 0.3, 0.2, 0.1])
    answers = np.where(generator.random(count) < right, targets, generator.choice(LABELS[:3], count))
    targets[:unseen] = "bored"
    names = [f"u{number}" for number in range(count)]
    owners = [f"s{number % speakers}" if speakers else "" for number in range(count)]
    collected = Answers(LABELS)
    collected.append(names, targets.tolist(), answers.tolist(), owners)
    return collected, targets.tolist(), answers.tolist(), owners


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("unseen", [0, 15])
def test_scores_are_scikit_learns_and_a_class_that_training_lacked_is_always_wrong(unseen, tmp_path):
    collected, targets, answers, _ = make_answers(unseen=unseen)
    scores, classes = collected.classification, LABELS + ["bored"] * bool(unseen)
    assert collected.classes == classes
    assert (scores.confusion == confusion_matrix(targets, answers, labels=classes)).all()
    assert scores.accuracy == pytest.approx(accuracy_score(targets, answers))
    with np.errstate(all="ignore"):
        assert scores.unweighted_accuracy == pytest.approx(balanced_accuracy_score(targets, answers))
    assert scores.macro_f1 == pytest.approx(f1_score(targets, answers, average="macro", zero_division=0))
    collected.write(tmp_path, "test")
    with open(tmp_path / "classes_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    told = precision_recall_fscore_support(targets, answers, labels=classes, zero_division=0)
    for column, expected in zip(("precision", "recall", "f1", "utterances"), told, strict=True):
        assert [float(row[column]) for row in rows] == pytest.approx(list(expected))
    assert [row["class"] for row in rows] == classes
    if unseen:
        assert float(rows[-1]["recall"]) == 0


def test_an_interval_over_speakers_is_that_of_the_error_rate_turned_around():
    collected, targets, answers, owners = make_answers()
    assert collected.describe()["resampled"] == "speakers"
    errors = [target != answer for target, answer in zip(targets, answers, strict=True)]
    rate, accuracy = bootstrap_rate(errors, np.ones(len(errors)), owners), collected.intervals["accuracy"]
    expected = (1 - rate.value, 1 - rate.high, 1 - rate.low)
    assert (accuracy.value, accuracy.low, accuracy.high) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("speakers", [0, 4])
def test_few_or_unknown_speakers_are_no_groups_and_utterances_are_resampled(speakers):
    collected, targets, answers, _ = make_answers(count=400, speakers=speakers)
    assert collected.describe()["resampled"] == "utterances"
    errors = [target != answer for target, answer in zip(targets, answers, strict=True)]
    rate, accuracy = bootstrap_rate(errors, np.ones(len(errors))), collected.intervals["accuracy"]
    assert (accuracy.low, accuracy.high) == pytest.approx((1 - rate.high, 1 - rate.low), abs=0.01)
    assert accuracy.high - accuracy.low > 0.05


def test_resampled_scores_are_those_of_the_resampled_answers():
    collected, targets, answers, owners = make_answers(unseen=5)
    generator = np.random.default_rng(0)
    names = sorted(set(owners))
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=1000)
    outcomes = []
    for counts in drawn[:200]:
        times = dict(zip(names, counts, strict=True))
        picked = [place for place, owner in enumerate(owners) for _ in range(times[owner])]
        one, other = ([values[place] for place in picked] for values in (targets, answers))
        outcomes.append(f1_score(one, other, average="macro", zero_division=0))
    low, high = np.quantile(outcomes, [0.025, 0.975])
    found = collected.intervals["macro_f1"]
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)  # of 200 resamples and of 1000


def test_what_is_written_is_read_again_and_parts_add_up(tmp_path):
    whole, targets, answers, owners = make_answers()
    parts = [Answers(LABELS) for _ in range(2)]
    for number, part in enumerate(parts):
        chosen = range(number, 200, 2)
        part.append(
            [f"u{place}" for place in chosen], *([values[place] for place in chosen] for values in (targets, answers))
        )
    assert (sum(part.classification.confusion for part in parts) == whole.classification.confusion).all()
    whole.write(tmp_path, "test")
    again = Answers.read(tmp_path, "test", LABELS)
    assert again.describe() == whole.describe()
    parts[0].extend(parts[1])
    assert (parts[0].classification.confusion == whole.classification.confusion).all()
    with pytest.raises(ValueError, match="u0 was added before"):
        again.extend(parts[0])
    with pytest.raises(ValueError, match="'bored', which is no label"):
        again.append(["new"], ["sad"], ["bored"])
    with open(tmp_path / "confusion_test.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == LABELS
    assert [[int(value) for value in row[1:]] for row in rows[1:]] == whole.classification.confusion.tolist()
    assert (tmp_path / "confusion_test.png").read_bytes().startswith(b"\x89PNG")


def test_answers_that_are_missing_or_of_another_task_are_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="errors_test.csv is missing"):
        Answers.read(tmp_path, "test", LABELS)
    (tmp_path / "errors_test.csv").write_text("ID,group,wer_errors,wer_total\na,,1,2\n")
    with pytest.raises(InputError, match="no answers of this task"):
        Answers.read(tmp_path, "test", LABELS)


@pytest.mark.parametrize("speakers", [10, 2])
def test_two_runs_are_compared_by_their_answers(speakers, tmp_path):
    folders = []
    for right in (0.8, 0.5):
        folders.append(tmp_path / str(right))
        folders[-1].mkdir()
        make_answers(speakers=speakers, right=right)[0].write(folders[-1], "test")
    difference, not_better = compare_runs(*folders, "test", "error")
    assert difference.value < 0 and not_better < 0.05 and difference.low < difference.high


def test_the_picture_of_many_classes_is_drawn(tmp_path):
    labels = [f"class {number}" for number in range(60)]
    answers = Answers(labels)
    answers.append(labels, labels, labels[1:] + labels[:1])
    answers.write(tmp_path, "test")
    assert (tmp_path / "confusion_test.png").stat().st_size > 10000


def test_mean_and_deviation_over_folds_are_those_of_numpy():
    values = [0.5, 0.6, 0.8]
    folds = {
        str(value): {score: {"value": value} for score in ("accuracy", "unweighted_accuracy", "macro_f1")}
        for value in values
    }
    told = over_folds(folds)["macro_f1"]
    assert told == {"mean": pytest.approx(np.mean(values)), "deviation": pytest.approx(np.std(values, ddof=1))}


# ---------------------------------------------------------------- the loss and the labels


def test_balanced_weights_make_classes_count_alike_and_leave_the_mean_at_one():
    targets = ["angry"] * 30 + ["calm"] * 10 + ["sad"] * 5
    weights = dict(zip(LABELS, balanced_weights(targets, LABELS).tolist(), strict=True))
    shares = {label: weights[label] * targets.count(label) for label in LABELS}
    assert shares == {label: pytest.approx(0.0 if label == "happy" else 15.0, rel=1e-6) for label in LABELS}


def test_options_out_of_range_are_one_clear_line():
    options = {"class_weights": None, "examples_per_class": None, "valid_metric": "error"}
    check_options(options)
    for key, value in (("class_weights", "some"), ("examples_per_class", 0), ("valid_metric", "wer")):
        with pytest.raises(InputError, match=f"{value}"):
            check_options({**options, key: value})


def test_sets_that_cannot_be_trained_or_tested_on_are_refused():
    rows = {"a": {"emo": "angry"}, "b": {"emo": "sad"}}
    check_rows({"train": rows, "test": {**rows, "c": {"emo": "bored"}}}, "emo", LABELS)
    with pytest.raises(InputError, match=r"fewer than two classes to tell apart \(angry\)"):
        check_rows({"train": rows}, "emo", ["angry"])
    with pytest.raises(InputError, match="'test' has none of the classes of training"):
        check_rows({"train": rows, "test": {"c": {"emo": "bored"}}}, "emo", LABELS)
    with pytest.raises(InputError, match="'train' has the classes bored"):
        check_rows({"train": {"c": {"emo": "bored"}}}, "emo", LABELS)


# ---------------------------------------------------------------- the Brain


def make_rows(folder, count=48, seed=0):
    """Rows of tones in noise, a class each, of six speakers."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for number in range(count):
        label, samples = LABELS[number % 4], int(generator.integers(6000, 16000))
        low, high = BANDS[number % 4], BANDS[number % 4 + 1]
        tone = np.sin(2 * np.pi * generator.uniform(1.1 * low, high / 1.1) * np.arange(samples) / 16000)
        path = folder / f"{seed}-{number}.wav"
        soundfile.write(path, 0.1 * tone + 0.02 * generator.standard_normal(samples), 16000)
        facts = {"emo": label, "spk_id": f"s{number % 6}"}
        rows[path.stem] = {"wav": str(path), "duration": samples / 16000, **facts}
    return rows


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Rows of training, validation and test."""
    folder = tmp_path_factory.mktemp("audio")
    sizes = {"train": 48, "valid": 16, "test": 40}
    return {name: make_rows(folder, size, seed) for seed, (name, size) in enumerate(sizes.items())}


@pytest.fixture
def encoder(make_speech_encoder, tmp_path):
    """An encoder folder whose features keep what is constant over an utterance."""
    return save_encoder(make_speech_encoder(normalize="global"), tmp_path / "encoder", "# Card")


def make_hparams(output, encoder, epochs=4, freeze=True, **options):
    """What a YAML makes."""
    torch.manual_seed(3)
    Path(output).mkdir(parents=True, exist_ok=True)
    counter = EpochCounter(epochs)
    speech_encoder = TaskEncoder(encoder, all_states=False, freeze=freeze)
    return {
        "output_folder": str(output),
        "seed": 3,
        "sample_rate": 16000,
        "num_workers": 0,
        "max_batch_seconds": 20.0,
        "max_batch_size": 8,
        "max_eval_batch_seconds": 20.0,
        "examples_per_class": None,
        "label_seed": 0,
        "class_weights": None,
        "valid_metric": "error",
        "test_only": False,
        "speech_encoder": speech_encoder,
        "head": partial(MeanPoolClassifier, speech_encoder.output_dim),
        "head_optimizer": partial(torch.optim.Adam, lr=0.05),
        "encoder_optimizer": partial(torch.optim.Adam, lr=1e-3),
        "epoch_counter": counter,
        "train_logger": FileTrainLogger(save_file=str(Path(output) / "train_log.txt")),
        "checkpointer": AtomicCheckpointer(
            checkpoints_dir=str(Path(output) / "save"), recoverables={"counter": counter}
        ),
        **options,
    }


def run(output, encoder, sets, labels=LABELS, hidden=None, **options):
    """Train and test; give the Brain."""
    hparams = make_hparams(output, encoder, **options)
    run_opts = {"device": "cpu", "noprogressbar": True, "distributed_backend": "gloo"}
    return run_classification(hparams, run_opts, sets, "emo", labels, hidden, corpus="Toy", task="emotion recognition")


@pytest.fixture
def hidden(encoder, sets, tmp_path):
    """The hidden states of all utterances, by name."""
    rows = {name: row for part in sets.values() for name, row in part.items()}
    cache = cache_features(tmp_path / "cache", TaskEncoder(encoder, all_states=False), rows)
    return {name: cache[name] for name in rows}


def shuffle(rows, seed):
    """Deal out the classes anew."""
    labels = np.random.default_rng(seed).permutation([row["emo"] for row in rows.values()]).tolist()
    return {name: {**row, "emo": label} for (name, row), label in zip(rows.items(), labels, strict=True)}


def test_it_learns_what_is_to_be_learned_and_with_shuffled_labels_falls_to_chance(sets, encoder, hidden, tmp_path):
    def accuracy(train, valid, name):
        run(
            tmp_path / name,
            encoder,
            {**sets, "train": train, "valid": valid},
            epochs=5,
            hidden=hidden,
            max_batch_size=1,
        )
        return read_results(tmp_path / name)["sets"]["test"]["accuracy"]["value"]

    assert accuracy(sets["train"], sets["valid"], "true") > 0.6
    shuffled = [
        accuracy(shuffle(sets["train"], seed), shuffle(sets["valid"], 10 + seed), str(seed)) for seed in range(4)
    ]
    assert np.mean(shuffled) < 0.4  # chance is 0.25


def test_each_stage_hears_its_own_set_and_the_seed_of_the_labels_draws_the_few(sets, encoder, tmp_path, after_forward):
    heard, drawn = {}, {}
    after_forward(ClassificationBrain, lambda batch, stage, _: heard.setdefault(stage, set()).update(batch.id))
    for seed in (1, 2):
        heard.clear()
        run(tmp_path / str(seed), encoder, sets, epochs=1, examples_per_class=3, label_seed=seed)
        assert heard["VALID"] == sets["valid"].keys() and heard["TEST"] == sets["test"].keys()
        assert len(heard["TRAIN"]) == 3 * len(LABELS) and heard["TRAIN"] < sets["train"].keys()
        drawn[seed] = heard["TRAIN"]
    assert drawn[1] != drawn[2]


def test_classes_count_alike_where_that_is_asked_for(sets, encoder, tmp_path):
    rare = list(sets["train"])[:-5]
    few = {**sets, "train": {name: sets["train"][name] for name in rare}}
    assert run(tmp_path / "plain", encoder, few, epochs=1).weights.tolist() == [1.0] * 4
    weights = run(tmp_path / "balanced", encoder, few, epochs=1, class_weights="balanced").weights
    assert torch.equal(weights, balanced_weights((row["emo"] for row in few["train"].values()), LABELS))
    assert weights.unique().numel() > 1


def test_results_say_what_was_done(sets, encoder, tmp_path):
    run(tmp_path, encoder, sets, examples_per_class=3)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["task"] == "emotion recognition" and results["labels"] == LABELS
    assert results["settings"]["examples_per_class"] == 3 and results["settings"]["class_weights"] is None
    assert 0 < results["label_hours"] < sum(row["duration"] for row in sets["train"].values()) / 3600
    told = results["sets"]["test"]
    assert told["utterances"] == 40 and told["resampled"] == "speakers" and told["evaluation_seconds"] > 0
    with open(tmp_path / "errors_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    targets, answers = ([row[column] for row in rows] for column in ("target", "answer"))
    assert told["accuracy"]["value"] == pytest.approx(accuracy_score(targets, answers))
    assert told["unweighted_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(targets, answers))
    assert told["macro_f1"]["value"] == pytest.approx(f1_score(targets, answers, average="macro", zero_division=0))
    assert {row["ID"]: row["target"] for row in rows} == {name: row["emo"] for name, row in sets["test"].items()}


def test_an_unseen_class_has_no_loss_and_no_right_answer(sets, encoder, tmp_path):
    strange = dict.fromkeys(list(sets["test"])[:10], "bored")
    test = {name: {**row, "emo": strange.get(name, row["emo"])} for name, row in sets["test"].items()}
    known = {name: row for name, row in sets["test"].items() if name not in strange}
    run(tmp_path, encoder, {**sets, "test": test}, epochs=2)
    mixed = read_results(tmp_path)["sets"]["test"]
    run(tmp_path, encoder, {**sets, "test": known}, epochs=2, test_only=True)
    alone = read_results(tmp_path)["sets"]["test"]
    assert mixed["utterances"] == 40 and alone["utterances"] == 30
    assert mixed["accuracy"]["value"] == pytest.approx(0.75 * alone["accuracy"]["value"])
    assert mixed["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_the_loss_of_a_set_does_not_depend_on_its_batches(sets, encoder, tmp_path):
    run(tmp_path, encoder, sets, epochs=1)
    one = read_results(tmp_path)["sets"]["test"]["loss"]
    run(tmp_path, encoder, sets, epochs=1, test_only=True, max_eval_batch_seconds=1.0)
    assert read_results(tmp_path)["sets"]["test"]["loss"] == pytest.approx(one, rel=1e-5)


def test_weights_reach_the_loss_as_a_mean_over_utterances(sets, encoder, tmp_path):
    hparams = make_hparams(tmp_path, encoder)
    weights = torch.tensor([2.0, 1.0, 0.5, 0.5])
    modules = {"encoder": hparams["speech_encoder"], "head": hparams["head"](num_labels=4)}
    brain = ClassificationBrain(modules, hparams, {"device": "cpu"}, labels=LABELS, weights=weights)
    loader = make_classification_loaders(hparams, {"valid": sets["valid"]}, "emo", LABELS)["valid"]
    batch = next(iter(loader))
    brain.start_metrics(stage="VALID")
    logits = brain.compute_forward(batch, "VALID").detach()
    places = [LABELS.index(sets["valid"][name]["emo"]) for name in batch.id]
    terms = [
        -float(weights[place]) * float(row.log_softmax(0)[place]) for row, place in zip(logits, places, strict=True)
    ]
    assert float(brain.compute_objectives(logits, batch, "VALID")) == pytest.approx(np.mean(terms), rel=1e-5)
    assert batch.label.tolist() == places and UNSEEN not in places


def test_the_metric_that_chooses_is_the_one_asked_for(sets, encoder, hidden, tmp_path, monkeypatch):
    """Of two epochs, one is better by one metric and the other by the others."""
    found = ({"error": 0.2, "unweighted_error": 0.4, "loss": 0.9}, {"error": 0.4, "unweighted_error": 0.2, "loss": 0.5})
    stage_metrics, validated = ClassificationBrain.stage_metrics, []

    def by_hand(brain, stage):
        metrics = stage_metrics(brain, stage)
        if stage.name == "VALID":
            metrics |= found[len(validated)]
            validated.append(stage)
        return metrics

    monkeypatch.setattr(ClassificationBrain, "stage_metrics", by_hand)
    for metric, best in (("error", 1), ("unweighted_error", 2), ("loss", 2)):
        validated.clear()
        options = {"valid_metric": metric, "class_weights": "balanced", "epochs": 2}
        run(tmp_path / metric, encoder, sets, hidden=hidden, **options)
        results = read_results(tmp_path / metric)
        assert results["best_epoch"] == best and results["validation"].items() >= found[best - 1].items()
    with pytest.raises(InputError, match="valid_metric is one of error, unweighted_error, loss, not 'wer'"):
        run(tmp_path / "wer", encoder, sets, valid_metric="wer")


def test_labels_are_saved_with_the_model_and_others_are_refused(sets, encoder, tmp_path):
    brain = run(tmp_path, encoder, sets, epochs=1)
    (checkpoint,) = brain.checkpointer.list_checkpoints()
    assert json.loads((checkpoint.path / "labels.ckpt").read_text()) == LABELS
    for labels in ([*LABELS, "tired"], LABELS[::-1]):
        with pytest.raises(InputError, match="is of the classes angry, calm, happy, sad, not of") as error:
            run(tmp_path, encoder, sets, labels=labels, epochs=2)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_stopped_after_an_epoch_goes_on_as_if_unbroken(sets, encoder, tmp_path, freeze):
    unbroken = run(tmp_path / "unbroken", encoder, sets, epochs=3, freeze=freeze)
    run(tmp_path / "broken", encoder, sets, epochs=1, freeze=freeze)
    resumed = run(tmp_path / "broken", encoder, sets, epochs=3, freeze=freeze)
    assert resumed.optimizer_step == unbroken.optimizer_step
    one, other = (read_results(tmp_path / name)["sets"]["test"] for name in ("unbroken", "broken"))
    assert one["accuracy"] == other["accuracy"] and one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def train_on_a_rank(output, encoder, sets):
    """What a rank is left with."""
    brain = run(output, encoder, sets, epochs=2, freeze=False)
    weights = {name: value.clone() for name, value in brain.modules.state_dict().items()}
    return {"weights": weights, "utterances": len(brain.answers), "updates": brain.optimizer_step}


def test_two_ranks_share_the_training_and_each_tests_on_all(sets, encoder, tmp_path):
    path = Path(__file__).parents[1] / "helpers" / "ranks.py"
    call = ("train_on_a_rank", {"output": str(tmp_path / "run"), "encoder": encoder, "sets": sets})
    one, other = runpy.run_path(str(path))["train_ranks"](__file__, tmp_path / "ranks", call)
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    assert one["utterances"] == other["utterances"] == 40
    alone = train_on_a_rank(str(tmp_path / "alone"), encoder, sets)
    assert one["updates"] == other["updates"] == alone["updates"] / 2
    assert read_results(tmp_path / "run")["world_size"] == 2
