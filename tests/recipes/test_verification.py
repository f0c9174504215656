"""The speaker verification recipe as a user runs it: every YAML, any encoder, resumed, on two ranks, with bad input."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speechbrain as sb
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from speechbrain_bestrq.corpora.manifest import read_manifest
from speechbrain_bestrq.corpora.synthetic import make_synthetic
from speechbrain_bestrq.digests import tensor_digest
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.results import read_results
from speechbrain_bestrq.task_brain import TaskBrain
from speechbrain_bestrq.task_encoders import TaskEncoder

RECIPE = Path(__file__).parents[2] / "recipes" / "VoxCeleb" / "verification"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "pooled_verification.py"
TOY = "--num_workers=0 --number_of_epochs=2 --valid_trials=20 --noprogressbar --device=cpu".split()


@pytest.fixture(scope="module")
def train(load_script):
    """The recipe's train.py as a module."""
    return load_script(RECIPE / "train.py")


@pytest.fixture(scope="module")
def voxceleb(tmp_path_factory):
    """Four minutes of synthetic speech in VoxCeleb's layout: six speakers to train and validate on, four on trial."""
    folder = tmp_path_factory.mktemp("corpus") / "VoxCeleb1"
    make_synthetic(folder, "voxceleb", hours=0.01, speakers=6)
    return folder


@pytest.fixture(scope="module")
def small_yamls(tmp_path_factory):
    """The recipe's YAMLs with small heads, which options cannot reach."""
    folder = tmp_path_factory.mktemp("hparams")
    for path in (RECIPE / "hparams").glob("*.yaml"):
        text = re.sub(r"(\n    (?:pooled_|attention_)?channels): \d+", r"\1: 16", path.read_text())
        (folder / path.name).write_text(text)
    return folder


def arguments(yamls, name, voxceleb, encoder, output, *more):
    """A command line."""
    given = [f"--data_folder={voxceleb}", f"--encoder={encoder}", f"--output_folder={output}", "--embedding_size=8"]
    options = {option.split("=")[0]: option for option in (*given, *TOY, *more)}
    return [str(yamls / f"{name}.yaml"), *options.values()]


def names():
    """The recipe's YAMLs."""
    return sorted(path.stem for path in (RECIPE / "hparams").glob("*.yaml"))


def scores_of(folder):
    """Labels and scores of each kind, of a run's file."""
    with open(folder / "scores_veri_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [int(row["label"]) for row in rows], {
        kind: [float(row[kind]) for row in rows] for kind in ("cosine", "snorm") if kind in rows[0]
    }


@pytest.mark.parametrize("name", names())
def test_every_yaml_trains_tests_and_tells(name, train, small_yamls, voxceleb, encoder, tmp_path):
    header = (RECIPE / "hparams" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"train.py hparams/{name}.yaml --data_folder" in header, "the header lacks its launch command"
    run = tmp_path / "run"
    more = ["--encoder_rest=0"] if name == "bestrq_finetune" else []
    train.main(arguments(small_yamls, name, voxceleb, encoder, run, *more))
    results = read_results(run)
    assert results["task"] == "speaker verification"
    assert results["corpus"] == "synthetic speech by espeak-ng in the layout of VoxCeleb"
    assert results["speakers"] == 4 and results["label_hours"] > 0
    assert results["encoder"]["method"] == "BestRQ" and results["encoder"]["frozen"] == (name != "bestrq_finetune")
    before = tensor_digest(TaskEncoder(encoder).state_dict())
    assert (results["encoder"]["digest"] == before) == (name != "bestrq_finetune")
    assert results["seconds"]["train"] > 0 and results["trained_parameters"] > 0
    assert results["validation"].keys() == {"loss", "eer", "mindcf"} and 0 <= results["validation"]["eer"] <= 1
    (told,) = results["sets"].values()
    labels, scores = scores_of(run)
    assert (told["trials"], told["targets"]) == (len(labels), sum(labels)) and told["evaluation_seconds"] > 0
    assert len(labels) == len((voxceleb / "meta" / "veri_test.txt").read_text().splitlines())
    for kind, ending in (("cosine", ""), ("snorm", "_snorm")):
        accepted, found, _ = roc_curve(labels, scores[kind], drop_intermediate=False)
        curve = interp1d(accepted, found)
        expected = brentq(lambda rate, curve=curve: 1 - rate - curve(rate), 0, 1)
        assert told[f"eer{ending}"]["value"] == pytest.approx(expected, abs=1e-6)
        expected = (0.01 * (1 - found) + 0.99 * accepted).min() / 0.01
        assert told[f"mindcf{ending}"]["value"] == pytest.approx(expected, abs=1e-6)
        assert 0 <= told[f"eer{ending}"]["low"] <= told[f"eer{ending}"]["high"] <= 1
    assert len((run / "errors_veri_test.csv").read_text().splitlines()) == 1 + len(labels)
    for picture in ("layer_weights.png", "scores_veri_test.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert sum("valid eer" in line for line in (run / "train_log.txt").read_text().splitlines()) == 2


def test_each_speaker_of_training_is_a_class_and_few_are_drawn_by_the_seed_of_the_labels(
    train, small_yamls, voxceleb, tmp_path, after_forward
):
    heard, draws = {}, set()

    def note(batch, stage, _):
        if stage == "TRAIN":
            heard.update(zip(batch.id, batch.label.tolist(), strict=True))

    after_forward(train.VerificationBrain, note)
    for seed in range(6):
        heard.clear()
        more = ["--number_of_epochs=1", "--train_speakers=2", f"--label_seed={seed}"]
        train.main(arguments(small_yamls, "probe_small", voxceleb, "fbank", tmp_path / str(seed), *more))
        rows = read_manifest(tmp_path / str(seed) / "manifests" / "train.csv")
        classes = sorted({(rows[name]["spk_id"], label) for name, label in heard.items()})
        assert [label for _, label in classes] == [0, 1]  # of two speakers, in their order
        draws.add(tuple(classes))
    assert len(draws) > 1


@pytest.mark.parametrize("name", names())
def test_a_step_of_every_yaml_can_be_done_on_a_gpu(name, train, small_yamls, voxceleb, encoder, tmp_path, absent_gpu):
    more = ["--encoder_rest=0"] if name == "bestrq_finetune" else []
    with absent_gpu.first_step_there(TaskBrain):
        train.main(arguments(small_yamls, name, voxceleb, encoder, tmp_path / "run", *more))


@pytest.mark.parametrize("source", ["fbank", "random"])
def test_baselines_are_encoders_like_any_other(source, train, small_yamls, voxceleb, encoder, tmp_path):
    given = source if source == "fbank" else f"random:{encoder}"
    train.main(arguments(small_yamls, "probe_small", voxceleb, given, tmp_path / "run"))
    assert read_results(tmp_path / "run")["encoder"]["method"] == ("fbank" if source == "fbank" else "random BestRQ")


class Stopped(Exception):  # noqa: N818 - not an error
    """What ends a run early, as a kill would."""


def test_a_run_goes_on_from_its_last_epoch_and_can_be_tested_again(
    train, small_yamls, voxceleb, encoder, tmp_path, monkeypatch
):
    def run(output, *more):
        train.main(arguments(small_yamls, "bestrq", voxceleb, encoder, tmp_path / output, *more))
        return scores_of(tmp_path / output), (tmp_path / output / "train_log.txt").read_text().splitlines()

    def stop(self, stage, loss, epoch=None):
        end(self, stage, loss, epoch)
        if stage.name == "VALID":
            raise Stopped

    unbroken, log = run("unbroken")
    end = train.VerificationBrain.on_stage_end
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(train.VerificationBrain, "on_stage_end", stop)
        run("broken")
    resumed, resumed_log = run("broken")
    assert len(resumed_log) == len(log) == 2
    assert resumed == unbroken
    (tmp_path / "broken" / "scores_veri_test.csv").unlink()
    again, again_log = run("broken", "--test_only")
    assert again == unbroken and again_log == resumed_log


def test_the_checkpoint_is_chosen_by_the_equal_error_rate(train, small_yamls, voxceleb, tmp_path, monkeypatch):
    told = {"eer": iter([0.1, 0.2]), "mindcf": iter([0.9, 0.8]), "loss": iter([0.9, 0.8])}
    stage_metrics = train.VerificationBrain.stage_metrics

    def disagreeing(brain, stage):
        metrics = stage_metrics(brain, stage)
        return {name: next(values) for name, values in told.items()} if stage == sb.Stage.VALID else metrics

    monkeypatch.setattr(train.VerificationBrain, "stage_metrics", disagreeing)
    train.main(arguments(small_yamls, "probe_small", voxceleb, "fbank", tmp_path))
    results = read_results(tmp_path)
    assert results["best_epoch"] == 1 and results["validation"]["eer"] == 0.1


def test_another_seed_of_the_validation_is_other_speakers(train, small_yamls, voxceleb, tmp_path, monkeypatch):
    draws = []

    def stop(_, manifests):
        draws.append({row["spk_id"] for row in read_manifest(manifests["valid"]).values()})
        raise Stopped

    monkeypatch.setattr(train, "read_rows", stop)
    for seed in (0, 1):
        more = [f"--valid_seed={seed}"]
        with pytest.raises(Stopped):
            train.main(arguments(small_yamls, "probe_small", voxceleb, "fbank", tmp_path / str(seed), *more))
    assert len(draws[0]) == len(draws[1]) == 2 and draws[0] != draws[1]


def test_a_corpus_may_have_moved_before_a_run_goes_on(train):
    places = {"data_folder": "/old", "extra_folders": ["/old/VoxCeleb2"]}
    assert train.VerificationBrain.settings_of({**places, "train_speakers": 20}) == {"train_speakers": 20}


def test_each_file_of_several_lists_is_embedded_once(train, small_yamls, voxceleb, tmp_path, monkeypatch):
    lines = (voxceleb / "meta" / "veri_test.txt").read_text().splitlines()
    short = tmp_path / "easy.txt"
    short.write_text("\n".join([*lines[:6], *lines[-6:]]))
    embedded = []
    test = train.VerificationBrain.test

    def remembered(self, loader):
        outcome = test(self, loader)
        embedded.append(self.embeddings.names)
        return outcome

    monkeypatch.setattr(train.VerificationBrain, "test", remembered)
    more = [f"--trials=[veri_test.txt, {short}]", "--cohort_utterances=null", "--number_of_epochs=1"]
    train.main(arguments(small_yamls, "probe_small", voxceleb, "fbank", tmp_path / "run", *more))
    sets = read_results(tmp_path / "run")["sets"]
    assert {name: told["trials"] for name, told in sets.items()} == {"veri_test": len(lines), "easy": 12}
    assert not any("snorm" in key for told in sets.values() for key in told)
    (once,) = embedded
    named = {path.removesuffix(".wav") for line in lines for path in line.split()[1:]}
    assert sorted(once) == sorted(named)


def test_the_cohort_is_of_speakers_of_training_only(train, small_yamls, voxceleb, tmp_path, monkeypatch):
    cohorts = []
    means = train.speaker_means
    monkeypatch.setattr(train, "speaker_means", lambda embeddings, of: cohorts.append(of) or means(embeddings, of))
    more = ["--cohort_utterances=1", "--number_of_epochs=1"]
    train.main(arguments(small_yamls, "probe_small", voxceleb, "fbank", tmp_path / "run", *more))
    with open(tmp_path / "run" / "manifests" / "train.csv", newline="") as file:
        rows = {row["ID"]: row["spk_id"] for row in csv.DictReader(file)}
    (cohort,) = cohorts
    assert sorted(rows[name] for name in cohort) == sorted(set(rows.values()))


def test_few_speakers_are_all_that_a_run_learns_from(train, small_yamls, voxceleb, tmp_path, monkeypatch):
    cohorts = []
    means = train.speaker_means
    monkeypatch.setattr(train, "speaker_means", lambda embeddings, of: cohorts.append(of) or means(embeddings, of))
    more = ["--cohort_utterances=1", "--number_of_epochs=1", "--train_speakers=2"]
    train.main(arguments(small_yamls, "probe_small", voxceleb, "fbank", tmp_path / "run", *more))
    with open(tmp_path / "run" / "manifests" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    results = read_results(tmp_path / "run")
    assert len({row["spk_id"] for row in rows}) > results["speakers"] == 2
    (cohort,) = cohorts
    speakers = {row["spk_id"] for row in rows if row["ID"] in cohort}
    assert len(cohort) == len(speakers) == 2
    hours = sum(float(row["duration"]) for row in rows if row["spk_id"] in speakers) / 3600
    assert results["label_hours"] == pytest.approx(hours)


def test_a_run_is_not_tested_on_those_it_was_trained_on(train, small_yamls, voxceleb, tmp_path):
    def run(*more):
        given = arguments(
            small_yamls, "probe_small", voxceleb, "fbank", tmp_path / "run", "--number_of_epochs=1", *more
        )
        train.main(given)
        return read_results(tmp_path / "run")["sets"]

    run()
    with open(tmp_path / "run" / "manifests" / "train.csv", newline="") as file:
        trained = next(csv.DictReader(file))["ID"]
    lines = (voxceleb / "meta" / "veri_test.txt").read_text().splitlines()
    named = lines[0].split()[1]
    other, seen = tmp_path / "other.txt", tmp_path / "seen.txt"
    other.write_text("\n".join(lines[:-1]))
    seen.write_text("\n".join([*lines, f"0 {named} {trained}.wav"]))
    assert run("--test_only", f"--trials=[{other}]")["other"]["trials"] == len(lines) - 1
    for again in (["--test_only"], []):
        with pytest.raises(InputError, match="was trained on 4 speakers, and these data and trials leave") as error:
            run(*again, f"--trials=[{seen}]")
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_torchrun_on_two_devices_trains_and_tells_once(torchrun, small_yamls, voxceleb, encoder, tmp_path):
    on_two = ("--precision=bf16", "--encoder_rest=0")
    torchrun(
        RECIPE / "train.py",
        arguments(small_yamls, "bestrq_finetune", voxceleb, encoder, tmp_path / "run", *on_two),
    )
    results = read_results(tmp_path / "run")
    assert results["world_size"] == 2 and results["sets"].keys() == {"veri_test"}
    assert len((tmp_path / "run" / "train_log.txt").read_text().splitlines()) == 2


def test_the_benchmark_without_training_has_a_row_for_each_source(voxceleb, encoder, load_script, capsys):
    module = load_script(BENCHMARK)
    for pooling in ("mean", "statistics"):
        options = [str(encoder), f"random:{encoder}", "fbank", f"--pooling={pooling}"]
        module.main([f"--data_folder={voxceleb}", *options])
        lines = capsys.readouterr().out.splitlines()
        rows = [[field.strip() for field in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
        assert [row[0] for row in rows] == ["source", str(encoder), f"random:{encoder}", "fbank"]
        assert [len([cell for cell in row[1:] if cell]) for row in rows] == [3, 3, 3, 1]
        for cell in (cell for row in rows[1:] for cell in row[1:] if cell):
            value, low, high = map(float, re.fullmatch(r"([\d.]+) \(([\d.]+)-([\d.]+)\)", cell).groups())
            assert 0 <= value <= 100 and 0 <= low <= high <= 100
        assert lines[-1].startswith(f"{encoder} below random:{encoder}: ") and lines[-1].count("%") == 3
    with pytest.raises(SystemExit):
        module.main([f"--data_folder={voxceleb}", "/nowhere"])
    assert "/nowhere is no folder" in capsys.readouterr().err


BAD_INPUT = {
    "no such encoder": ("bestrq", ["--encoder=/nowhere"], "/nowhere is no folder"),
    "fine-tuned filter banks": ("bestrq_finetune", ["--encoder=fbank"], "no weights to fine-tune"),
    "no such list": ("bestrq", ["--trials=[veri_best.txt]"], "veri_best.txt"),
    "nothing to test": ("bestrq", ["--test_only"], "no checkpoint to test"),
    "cached and cut": ("bestrq", ["--cache_features=True"], "give --chunk_seconds null too"),
    "chunks of nothing": ("bestrq", ["--chunk_seconds=0.01"], "less than a frame"),
    "a cohort of one": ("bestrq", ["--cohort_top=1"], "give a number of at least 2"),
    "a cohort of nobody knows how many": ("bestrq", ["--cohort_top=null"], "give a number of at least 2"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(case, train, small_yamls, voxceleb, encoder, tmp_path, monkeypatch):
    name, more, message = BAD_INPUT[case]
    monkeypatch.setattr(train.VerificationBrain, "fit", lambda *arguments: pytest.fail("time was spent on training"))
    with pytest.raises(InputError, match=message) as error:
        train.main(arguments(small_yamls, name, voxceleb, encoder, tmp_path / "run", *more))
    assert "\n" not in str(error.value)


def spoil(case, folder):
    """Damage a corpus; return what the message must hold."""
    path = folder / "meta" / "veri_test.txt"
    lines = path.read_text().splitlines()
    recording = folder / "wav" / lines[0].split()[1]
    if case == "a trial names a missing file":
        recording.unlink()
        return f"name 1 utterances that are not there, first '{recording.parent.parent.name}/"
    if case == "a list in another format":
        path.write_text("\n".join([lines[0].replace(" ", ","), *lines[1:]]))
        return "line 1"
    if case == "an empty recording":
        recording.write_bytes(b"")
        return "1 utterances that trials name cannot be read"
    if case == "a recording shorter than a frame":
        soundfile.write(recording, np.zeros(440), 16000)
        return "1 utterances that trials name are shorter than a frame of the encoder"
    tried = {part.split("/")[0] for line in lines for part in line.split()[1:]}
    for speaker in (folder / "wav").iterdir():
        for other in sorted(speaker.rglob("*.wav"))[1:] if speaker.name not in tried else []:
            other.unlink()
    return "0 of them with more than one utterance"


SPOILT = [
    "a trial names a missing file",
    "a list in another format",
    "an empty recording",
    "a recording shorter than a frame",
    "speakers with one utterance",
]


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_corpus_is_one_clear_line(case, train, small_yamls, voxceleb, tmp_path):
    corpus = tmp_path / "VoxCeleb1"
    shutil.copytree(voxceleb, corpus)
    message = spoil(case, corpus)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        train.main(arguments(small_yamls, "probe_small", corpus, "fbank", tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_what_is_too_short_to_train_on_is_left_out_and_a_single_utterance_is_trained_on(
    train, small_yamls, voxceleb, tmp_path, caplog
):
    corpus = tmp_path / "VoxCeleb1"
    shutil.copytree(voxceleb, corpus)
    for number, seconds in enumerate((1.0, 0.0275)):
        video = corpus / "wav" / f"id2000{number}" / "abcdefghijk"
        video.mkdir(parents=True)
        soundfile.write(video / "00001.wav", np.full(round(16000 * seconds), 0.1), 16000)
    train.main(arguments(small_yamls, "probe_small", corpus, "fbank", tmp_path / "run", "--number_of_epochs=1"))
    assert any("training utterances are shorter than a frame" in text and "id20001" in text for text in caplog.messages)
    assert read_results(tmp_path / "run")["speakers"] == 5
