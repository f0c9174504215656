"""The intent recipe as a user runs it: every YAML, any target and microphone, resumed, on two ranks, with bad input."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sklearn.metrics import accuracy_score, f1_score

from speechbrain_bestrq.corpora.synthetic import make_synthetic
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.results import read_results
from speechbrain_bestrq.task_brain import TaskBrain

RECIPE = Path(__file__).parents[2] / "recipes" / "SLURP" / "intent"
TOY = "--num_workers=0 --number_of_epochs=2 --max_batch_size=8 --noprogressbar --device=cpu".split()


@pytest.fixture(scope="module")
def train(load_script):
    """The recipe's train.py as a module."""
    return load_script(RECIPE / "train.py")


@pytest.fixture(scope="module")
def slurp(tmp_path_factory):
    """Two minutes of synthetic speech in SLURP's layout."""
    folder = tmp_path_factory.mktemp("corpus") / "SLURP"
    make_synthetic(folder, "slurp", hours=0.005, speakers=12)
    return folder


def arguments(name, slurp, encoder, output, *more):
    """A command line."""
    given = [f"--data_folder={slurp}", f"--encoder={encoder}", f"--output_folder={output}"]
    sizes = [] if name == "bestrq_linear" else ["--hidden_size=8"]
    options = {option.split("=")[0]: option for option in (*given, *TOY, *sizes, *more)}
    return [str(RECIPE / "hparams" / f"{name}.yaml"), *options.values()]


def names():
    """The recipe's YAMLs."""
    return sorted(path.stem for path in (RECIPE / "hparams").glob("*.yaml"))


def read_rows(path):
    """The rows of a table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def said(slurp, part, target="scenario"):
    """What each recording of a part is, as the release's own file says."""
    found = {}
    for line in (slurp / "dataset" / "slurp" / f"{part}.jsonl").read_text().splitlines():
        facts = json.loads(line)
        name = f"{facts['scenario']}_{facts['action']}" if target == "intent" else facts[target]
        found |= {os.path.splitext(recording["file"])[0]: name for recording in facts["recordings"]}
    return found


@pytest.mark.parametrize("name", names())
def test_every_yaml_trains_tests_and_tells(name, train, slurp, encoder, tmp_path):
    header = (RECIPE / "hparams" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"train.py hparams/{name}.yaml --data_folder" in header, "the header lacks its launch command"
    run = tmp_path / "run"
    more = ["--encoder_rest=0"] if name == "bestrq_finetune" else []
    train.main(arguments(name, slurp, encoder, run, *more))
    results = read_results(run)
    assert results["task"] == "intent classification" and results["target"] == "scenario"
    assert results["corpus"] == "synthetic speech by espeak-ng in the layout of SLURP"
    assert results["encoder"]["method"] == "BestRQ" and results["encoder"]["frozen"] == (name != "bestrq_finetune")
    assert results["epochs"] == 2 and results["trained_parameters"] > 0
    assert results["labels"] == sorted(set(said(slurp, "train").values()))
    tested = read_rows(run / "errors_test.csv")
    assert {row["ID"]: row["target"] for row in tested} == said(slurp, "test")
    targets, answers = ([row[column] for row in tested] for column in ("target", "answer"))
    told = results["sets"]["test"]
    assert told["accuracy"]["value"] == pytest.approx(accuracy_score(targets, answers))
    assert told["macro_f1"]["value"] == pytest.approx(f1_score(targets, answers, average="macro", zero_division=0))
    assert [row["class"] for row in read_rows(run / "classes_test.csv")][: len(results["labels"])] == results["labels"]
    for picture in ("layer_weights.png", "confusion_test.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", names())
def test_a_step_of_every_yaml_can_be_done_on_a_gpu(name, train, slurp, encoder, tmp_path, absent_gpu):
    more = ["--encoder_rest=0"] if name == "bestrq_finetune" else []
    with absent_gpu.first_step_there(TaskBrain):
        train.main(arguments(name, slurp, encoder, tmp_path / "run", *more))


@pytest.mark.parametrize("target", ["action", "intent"])
def test_other_targets_and_microphones_are_a_matter_of_options(target, train, slurp, tmp_path):
    more = [f"--target={target}", "--microphones=[headset]", "--number_of_epochs=1", "--examples_per_class=1"]
    train.main(arguments("probe_small", slurp, "fbank", tmp_path, *more))
    results = read_results(tmp_path)
    expected = {
        part: {name: label for name, label in said(slurp, part, target).items() if name.endswith("-headset")}
        for part in ("train", "test")
    }
    assert results["labels"] == sorted(set(expected["train"].values())) and results["microphones"] == ["headset"]
    tested = read_rows(tmp_path / "errors_test.csv")
    assert {row["ID"]: row["target"] for row in tested} == expected["test"]
    # what training has none of is there, and wrong
    unseen = set(expected["test"].values()) - set(results["labels"])
    assert unseen and all(row["error_errors"] == "1" for row in tested if row["target"] in unseen)


def test_a_run_goes_on_from_its_last_epoch_and_can_be_tested_again(train, slurp, encoder, tmp_path):
    def run(output, *more):
        train.main(arguments("probe_small", slurp, encoder, tmp_path / output, *more))
        return read_results(tmp_path / output)["sets"]["test"]

    unbroken = run("unbroken", "--number_of_epochs=3")
    run("broken", "--number_of_epochs=1")
    resumed = run("broken", "--number_of_epochs=3")
    again = run("broken", "--number_of_epochs=3", "--test_only")
    for told in (resumed, again):
        assert {**told, "evaluation_seconds": 0} == {**unbroken, "evaluation_seconds": 0}


def test_another_target_in_the_same_folder_is_refused(train, slurp, tmp_path):
    train.main(arguments("probe_small", slurp, "fbank", tmp_path, "--number_of_epochs=1"))
    with pytest.raises(InputError, match="was trained with target 'scenario', not 'action'") as error:
        train.main(arguments("probe_small", slurp, "fbank", tmp_path, "--number_of_epochs=1", "--target=action"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_torchrun_on_two_devices_trains_and_tells_once(torchrun, slurp, encoder, tmp_path):
    on_two = ("--precision=bf16", "--encoder_rest=0.4")
    torchrun(RECIPE / "train.py", arguments("bestrq_finetune", slurp, encoder, tmp_path / "run", *on_two))
    results = read_results(tmp_path / "run")
    assert 0 < results["encoder_updates"] < results["updates"]
    assert results["world_size"] == 2 and results["sets"]["test"]["utterances"] == len(said(slurp, "test"))
    assert len((tmp_path / "run" / "train_log.txt").read_text().splitlines()) == 2


BAD_INPUT = {
    "no such encoder": ("bestrq", ["--encoder=/nowhere"], "/nowhere is no folder"),
    "fine-tuned filter banks": ("bestrq_finetune", ["--encoder=fbank"], "no weights to fine-tune"),
    "an unknown target": ("bestrq", ["--target=mood"], "target is one of scenario, action, intent, not 'mood'"),
    "an unknown microphone": ("bestrq", ["--microphones=[desk]"], "microphones is a list of headset and distant"),
    "no synthetic part": ("bestrq", ["--synthetic=True"], "train_synthetic.jsonl' does not exist"),
    "nothing to test": ("bestrq", ["--test_only"], "no checkpoint to test"),
    "an unknown metric": ("bestrq", ["--valid_metric=wer"], "valid_metric is one of error"),
    "unknown weights": ("bestrq", ["--class_weights=inverse"], "class_weights is null or balanced"),
    "no examples": ("bestrq", ["--examples_per_class=0"], "a whole number above 0, not 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(case, train, slurp, encoder, tmp_path):
    name, more, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message) as error:
        train.main(arguments(name, slurp, encoder, tmp_path / "run", *more))
    assert "\n" not in str(error.value)


def spoil(case, folder):
    """Damage a corpus; return what the message must hold."""
    path = folder / "dataset" / "slurp" / "test.jsonl"
    lines = path.read_text().splitlines()
    recording = folder / "audio" / "slurp_real" / json.loads(lines[1])["recordings"][0]["file"]
    if case == "a line that breaks off":
        path.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
        return "test.jsonl', line 2 is no JSON"
    if case == "a line without its scenario":
        path.write_text("\n".join([*lines[:2], lines[2].replace('"scenario"', '"scene"')]))
        return "test.jsonl', line 3 lacks the key 'scenario'"
    if case == "a missing recording":
        recording.unlink()
        return f"recordings are not in slurp_real, first '{recording.name}' (line 2)"
    if case == "an empty recording":
        recording.write_bytes(b"")
        return "audio files cannot be read"
    if case == "a recording without a frame":
        soundfile.write(recording, np.zeros(440), 16000)
        return f"1 recordings are shorter than a frame of the encoder, such as {recording}"
    path.write_text("\n".join(re.sub(r'"scenario": "\w+"', '"scenario": "weddings"', line) for line in lines))
    return "'test' has none of the classes of training"


SPOILT = [
    "a line that breaks off",
    "a line without its scenario",
    "a missing recording",
    "an empty recording",
    "a recording without a frame",
    "a test of other classes",
]


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_corpus_is_one_clear_line(case, train, slurp, tmp_path):
    corpus = tmp_path / "SLURP"
    shutil.copytree(slurp, corpus)
    message = spoil(case, corpus)
    with pytest.raises(InputError) as error:
        train.main(arguments("probe_small", corpus, "fbank", tmp_path / "run", "--max_unreadable=0"))
    assert message in str(error.value) and "\n" not in str(error.value)
