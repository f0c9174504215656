"""The emotion recipe as a user runs it: every YAML, all folds of a cross-validation, resumed, with bad input."""

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

from speechbrain_bestrq.corpora.iemocap import SESSIONS, SPEAKERS
from speechbrain_bestrq.corpora.synthetic import make_synthetic
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.results import read_results
from speechbrain_bestrq.task_brain import TaskBrain

RECIPE = Path(__file__).parents[2] / "recipes" / "IEMOCAP" / "emotion"
TOY = "--num_workers=0 --number_of_epochs=1 --max_batch_size=8 --noprogressbar --device=cpu".split()
#: For the YAMLs whose head has a size.
SMALL = "--embedding_size=4 --channels=8 --pooled_channels=8 --attention_channels=4".split()
LABELS = ["ang", "hap", "neu", "sad"]


@pytest.fixture(scope="module")
def train(load_script):
    """The recipe's train.py as a module."""
    return load_script(RECIPE / "train.py")


@pytest.fixture(scope="module")
def iemocap(tmp_path_factory):
    """Three minutes of synthetic speech in IEMOCAP's layout."""
    folder = tmp_path_factory.mktemp("corpus") / "IEMOCAP"
    make_synthetic(folder, "iemocap", hours=0.05)
    return folder


def arguments(name, iemocap, encoder, output, *more):
    """A command line."""
    given = [f"--data_folder={iemocap}", f"--encoder={encoder}", f"--output_folder={output}"]
    sizes = [] if name == "bestrq_linear" else SMALL
    options = {option.split("=")[0]: option for option in (*given, *TOY, *sizes, *more)}
    return [str(RECIPE / "hparams" / f"{name}.yaml"), *options.values()]


def names():
    """The recipe's YAMLs."""
    return sorted(path.stem for path in (RECIPE / "hparams").glob("*.yaml"))


def read_rows(path):
    """The rows of a table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", names())
def test_every_yaml_trains_tests_and_tells(name, train, iemocap, encoder, tmp_path):
    header = (RECIPE / "hparams" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"train.py hparams/{name}.yaml --data_folder" in header, "the header lacks its launch command"
    more = ["--fold=Ses02M", "--number_of_epochs=2"]
    more += ["--encoder_rest=0"] if name == "bestrq_finetune" else []
    train.main(arguments(name, iemocap, encoder, tmp_path / "run", *more))
    fold = tmp_path / "run" / "Ses02M"
    results = read_results(fold)
    assert results["task"] == "emotion recognition" and results["fold"] == "Ses02M" and results["folds"] == "speaker"
    assert results["corpus"] == "synthetic speech by espeak-ng in the layout of IEMOCAP"
    assert results["encoder"]["method"] == "BestRQ" and results["encoder"]["frozen"] == (name != "bestrq_finetune")
    assert results["labels"] == LABELS and results["epochs"] == 2 and results["trained_parameters"] > 0
    tested = read_rows(fold / "errors_test.csv")
    assert {row["speaker"] for row in tested} == {"Ses02M"}
    told = results["sets"]["test"]
    assert told["utterances"] == len(tested) and told["resampled"] == "utterances"
    right = [row["target"] == row["answer"] for row in tested]
    assert told["accuracy"]["value"] == pytest.approx(np.mean(right))
    for picture in ("layer_weights.png", "confusion_test.png"):
        assert (fold / picture).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "all" / "results.json").exists()


@pytest.mark.parametrize("name", names())
def test_a_step_of_every_yaml_can_be_done_on_a_gpu(name, train, iemocap, encoder, tmp_path, absent_gpu):
    more = ["--encoder_rest=0"] if name == "bestrq_finetune" else []
    with absent_gpu.first_step_there(TaskBrain):
        train.main(arguments(name, iemocap, encoder, tmp_path / "run", *more))


def test_all_folds_in_one_command_are_those_run_one_by_one_and_are_put_together(
    train, iemocap, encoder, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", "trains"])
    train.main(arguments("probe_small", iemocap, encoder, run, "--folds=session"))
    whole = read_results(run / "all")
    each = {fold: read_results(run / fold) for fold in SESSIONS}
    rows = {fold: read_rows(run / fold / "errors_test.csv") for fold in SESSIONS}
    # every turn of the classes is tested once, by its own session
    tested = [row for fold in SESSIONS for row in rows[fold]]
    assert sorted(row["ID"] for row in tested) == sorted(row["ID"] for row in read_rows(run / "manifests" / "all.csv"))
    assert all({row["ID"][4] for row in rows[fold]} == {fold[-1]} for fold in SESSIONS)
    targets, answers = ([row[column] for row in tested] for column in ("target", "answer"))
    told = whole["sets"]["test"]
    assert told["utterances"] == len(tested) and told["resampled"] == "speakers"
    assert told["accuracy"]["value"] == pytest.approx(np.mean(np.equal(targets, answers)))
    assert told["unweighted_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(targets, answers))
    assert told["macro_f1"]["value"] == pytest.approx(f1_score(targets, answers, average="macro", zero_division=0))
    for score in ("accuracy", "unweighted_accuracy", "macro_f1"):
        values = [each[fold]["sets"]["test"][score]["value"] for fold in SESSIONS]
        assert [whole["each_fold"][fold][score] for fold in SESSIONS] == values
        assert told["over_folds"][score]["mean"] == pytest.approx(np.mean(values))
        assert told["over_folds"][score]["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert told[score]["low"] <= told[score]["value"] <= told[score]["high"]
    table = [list(row.values())[1:] for row in read_rows(run / "all" / "confusion_test.csv")]
    assert np.array(table, dtype=int).tolist() == confusion_matrix(targets, answers, labels=LABELS).tolist()
    assert whole["device_hours"] == pytest.approx(sum(one["device_hours"] for one in each.values()))
    assert whole["encoder"] == each["Session1"]["encoder"] and whole["epochs"] == 1
    # the cache is one for all, and nothing of the first fold reaches the fourth
    assert [path.parent for path in run.rglob("states-*.f32")] == [run / "cache"]
    train.main(arguments("probe_small", iemocap, encoder, tmp_path / "one", "--folds=session", "--fold=Session4"))
    alone = read_results(tmp_path / "one" / "Session4")
    assert alone["sets"]["test"]["loss"] == each["Session4"]["sets"]["test"]["loss"]
    assert read_rows(tmp_path / "one" / "Session4" / "errors_test.csv") == rows["Session4"]
    # tested later, it is still told by the command that trained it
    monkeypatch.setattr(sys, "argv", ["train.py", "tests"])
    train.main(arguments("probe_small", iemocap, encoder, run, "--folds=session", "--test_only"))
    later = read_results(run / "all")
    assert later["command"] == whole["command"] and later["command"].endswith("trains")
    assert later["test_command"].endswith("tests") and "test_command" not in whole


def test_finished_folds_are_passed_over_until_something_changes(train, iemocap, encoder, tmp_path, monkeypatch):
    trained = []
    run_fold = train.run_fold

    def counted(hparams, *others, **facts):
        trained.append(hparams["fold"])
        if len(trained) == 3:
            raise KeyboardInterrupt
        run_fold(hparams, *others, **facts)

    def run(*more):
        trained.clear()
        train.main(arguments("probe_small", iemocap, encoder, tmp_path / "run", "--folds=session", *more))
        return list(trained)

    monkeypatch.setattr(train, "run_fold", counted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert trained == ["Session1", "Session2", "Session3"]
    assert not (tmp_path / "run" / "all" / "results.json").exists()

    def remembered(hparams, *others, **facts):
        trained.append(hparams["fold"])
        run_fold(hparams, *others, **facts)

    monkeypatch.setattr(train, "run_fold", remembered)
    assert run("--fold=Session3") == ["Session3"]
    assert run() == ["Session4", "Session5"]
    before = read_results(tmp_path / "run" / "all")["sets"]["test"]["accuracy"]
    assert run() == []
    assert run("--test_only") == list(SESSIONS) and run() == []
    assert run("--test_only") == list(SESSIONS), "tests are not passed over"
    assert read_results(tmp_path / "run" / "all")["sets"]["test"]["accuracy"] == before
    with pytest.raises(
        InputError, match=r"Session1/save/CKPT.* was trained with examples_per_class None, not 1"
    ) as error:
        run("--examples_per_class=1")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="Session1 is a fold of --folds session: give those"):
        run("--folds=speaker")
    with pytest.raises(InputError, match="would be that of all folds: leave it out"):
        run(f"--save_folder={tmp_path / 'elsewhere'}")


def test_a_look_at_a_fold_that_is_half_trained_does_not_finish_it(train, iemocap, tmp_path, monkeypatch):
    given = arguments("probe_small", iemocap, "fbank", tmp_path, "--fold=Session1", "--folds=session")
    with monkeypatch.context() as patch:
        patch.setattr(train.ClassificationBrain, "on_evaluate_start", refuse := RefusedTest())
        with pytest.raises(KeyboardInterrupt):
            train.main(given)
    assert refuse.asked and not (tmp_path / "Session1" / "results.json").exists()
    train.main([*given, "--test_only"])
    assert read_results(tmp_path / "Session1")["mark"] is None
    trained = []
    run_fold = train.run_fold
    monkeypatch.setattr(train, "run_fold", lambda *all, **facts: trained.append(1) or run_fold(*all, **facts))
    train.main(given)
    assert trained and read_results(tmp_path / "Session1")["mark"]
    train.main([*given, "--test_only"])
    assert read_results(tmp_path / "Session1")["mark"] and len(trained) == 2
    train.main(given)
    assert len(trained) == 2


class RefusedTest:
    """Stands for a stop before the test."""

    asked = False

    def __call__(self, *_, **__):
        """Stop."""
        self.asked = True
        raise KeyboardInterrupt


def test_another_encoder_in_the_same_folder_is_refused(train, iemocap, encoder, tmp_path):
    given = ["--fold=Ses01F", "--cache_features=False"]
    train.main(arguments("probe_small", iemocap, encoder, tmp_path / "run", *given))
    for again in ([], ["--test_only"]):
        with pytest.raises(InputError, match="was trained on another encoder than random:") as error:
            train.main(arguments("probe_small", iemocap, f"random:{encoder}", tmp_path / "run", *given, *again))
        assert "\n" not in str(error.value)


def test_classes_may_have_numbers_for_names(train, iemocap, tmp_path):
    more = ["--classes={ang: 1, hap: 1, exc: 1, neu: 0, sad: 0}", "--fold=Session1", "--folds=session"]
    train.main(arguments("probe_small", iemocap, "fbank", tmp_path, *more))
    results = read_results(tmp_path / "Session1")
    assert results["labels"] == ["0", "1"] and results["sets"]["test"]["accuracy"]["value"] > 0


def test_the_classes_of_the_yaml_are_those_that_are_learned(train, iemocap, tmp_path):
    more = ["--classes={ang: loud, hap: loud, exc: loud, neu: quiet, sad: quiet}", "--fold=Session1", "--folds=session"]
    more += ["--class_weights=balanced", "--valid_metric=unweighted_error", "--examples_per_class=3"]
    train.main(arguments("probe_small", iemocap, "fbank", tmp_path, *more))
    results = read_results(tmp_path / "Session1")
    assert results["labels"] == ["loud", "quiet"] and results["encoder"]["method"] == "fbank"
    assert results["settings"]["examples_per_class"] == 3 and results["settings"]["class_weights"] == "balanced"
    rows = read_rows(tmp_path / "manifests" / "Session1" / "train.csv")
    assert len(rows) > 6 and 0 < results["label_hours"] < sum(float(row["duration"]) for row in rows) / 3600


@pytest.mark.slow
def test_torchrun_on_two_devices_runs_all_folds_and_tells_once(torchrun, iemocap, encoder, tmp_path):
    on_two = ("--folds=session", "--encoder_rest=0")
    torchrun(
        RECIPE / "train.py", arguments("bestrq_finetune", iemocap, encoder, tmp_path / "run", *on_two), timeout=400
    )
    whole = read_results(tmp_path / "run" / "all")
    assert whole["world_size"] == 2 and whole["each_fold"].keys() == set(SESSIONS)
    assert whole["sets"]["test"]["utterances"] == len(read_rows(tmp_path / "run" / "manifests" / "all.csv"))
    assert "digest" not in whole["encoder"]  # each fold has fine-tuned its own


BAD_INPUT = {
    "no such encoder": ("bestrq", ["--encoder=/nowhere"], "/nowhere is no folder"),
    "fine-tuned filter banks": ("bestrq_finetune", ["--encoder=fbank"], "no weights to fine-tune"),
    "a fold that does not exist": ("bestrq", ["--fold=Ses06F"], "fold 'Ses06F' does not exist: give one of Ses01F"),
    "a fold of the other kind": ("bestrq", ["--fold=Session1"], "fold 'Session1' does not exist"),
    "another cross-validation": ("bestrq", ["--folds=dialog"], "folds is 'speaker' or 'session'"),
    "an unknown label": ("bestrq", ["--classes={joy: happy}"], "'joy' is no label of the release"),
    "classes that are none": ("bestrq", ["--classes=[ang, hap]"], "classes says what each label becomes"),
    "a list of folds": ("bestrq", ["--folds=[speaker]"], "folds is 'speaker' or 'session'"),
    "a number of examples that is none": ("bestrq", ["--examples_per_class=few"], "a whole number above 0, not 'few'"),
    "a single class": (
        "bestrq",
        ["--classes={ang: null, exc: null, hap: null, sad: null}"],
        r"fewer than two classes to tell apart \(neu\)",
    ),
    "no class": (
        "bestrq",
        ["--classes={ang: null, exc: null, hap: null, sad: null, neu: null}"],
        r"fewer than two classes to tell apart \(none\)",
    ),
    "nothing to test": ("bestrq", ["--test_only"], "no checkpoint to test"),
    "an unknown metric": ("bestrq", ["--valid_metric=wer"], "valid_metric is one of error"),
    "unknown weights": ("bestrq", ["--class_weights=inverse"], "class_weights is null or balanced"),
    "no examples": ("bestrq", ["--examples_per_class=0"], "a whole number above 0, not 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(case, train, iemocap, encoder, tmp_path):
    name, more, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message) as error:
        train.main(arguments(name, iemocap, encoder, tmp_path / "run", *more))
    assert "\n" not in str(error.value)


def spoil(case, folder):
    """Damage a corpus; return what the message must hold."""
    labels = sorted((folder / "Session3" / "dialog" / "EmoEvaluation").glob("*.txt"))[0]
    turn = next(line.split()[3] for line in labels.read_text().splitlines() if "\tneu\t" in line)
    recording = folder / "Session3" / "sentences" / "wav" / labels.stem / f"{turn}.wav"
    if case == "a missing session":
        shutil.rmtree(folder / "Session4")
        return "lacks Session4"
    if case == "a label that the release has not":
        lines = labels.read_text().splitlines()
        number = next(number for number, line in enumerate(lines) if "\tneu\t" in line)
        lines[number] = lines[number].replace("\tneu\t", "\tbor\t")
        labels.write_text("\n".join(lines))
        return f"line {number + 1}: 'bor' is no label of the release"
    if case == "an empty recording":
        recording.write_bytes(b"")
        return "1 of 47 audio files cannot be read"
    soundfile.write(recording, np.zeros(440), 16000)
    return f"1 recordings are shorter than a frame of the encoder, such as {recording}"


SPOILT = ["a missing session", "a label that the release has not", "an empty recording", "a recording without a frame"]


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_corpus_is_one_clear_line(case, train, iemocap, tmp_path):
    corpus = tmp_path / "IEMOCAP"
    shutil.copytree(iemocap, corpus)
    message = spoil(case, corpus)
    with pytest.raises(InputError) as error:
        train.main(arguments("probe_small", corpus, "fbank", tmp_path / "run", "--max_unreadable=0"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_there_is_a_fold_for_each_speaker(train):
    assert train.choose_folds({"folds": "speaker", "fold": "all"}) == list(SPEAKERS) and len(SPEAKERS) == 10
