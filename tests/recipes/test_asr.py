"""The speech recognition recipe as a user runs it: every YAML, any encoder, resumed, on two ranks, with bad input."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from speechbrain.augment.time_domain import DropFreq, SpeedPerturb

from speechbrain_bestrq.augmentation import DropChunks
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.ngram import train_ngram
from speechbrain_bestrq.results import read_results
from speechbrain_bestrq.task_brain import TaskBrain
from speechbrain_bestrq.text import CharacterTokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "ASR"
WORDS = "SO IT IS NOT THE CAT'S HAT".split()
TOY = "--num_workers=0 --max_batch_seconds=8 --number_of_epochs=2 --noprogressbar --device=cpu".split()


@pytest.fixture(scope="module")
def train(load_script):
    """The recipe's train.py as a module."""
    return load_script(RECIPE / "train.py")


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory):
    """Noise with transcripts in LibriSpeech's layout."""
    folder = tmp_path_factory.mktemp("corpus") / "LibriSpeech"
    generator = np.random.default_rng(0)
    for speaker, split in enumerate(("train-clean-100", "dev-clean", "test-clean", "test-other"), start=100):
        chapter = folder / split / str(speaker) / "1"
        chapter.mkdir(parents=True)
        lines = []
        for number in range(5):
            name = f"{speaker}-1-{number:04d}"
            soundfile.write(chapter / f"{name}.flac", 0.1 * generator.standard_normal(24000 + 8000 * number), 16000)
            words = generator.choice(WORDS, 2) if number else WORDS  # the first has all characters
            lines.append(f"{name} {' '.join(words)}\n")
        (chapter / f"{speaker}-1.trans.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def small_yamls(tmp_path_factory):
    """The recipe's YAMLs with small heads, which options cannot reach, and an encoder that rests for a while."""
    folder = tmp_path_factory.mktemp("hparams")
    for path in (RECIPE / "hparams").glob("*.yaml"):
        text = path.read_text()
        for size in ("1024", "1280", "256"):
            text = text.replace(f"    hidden_size: {size}\n", "    hidden_size: 8\n")
        text = text.replace("encoder_rest: 0.0", "encoder_rest: 0.3")
        (folder / path.name).write_text(text.replace("vocabulary_size: 1000", "vocabulary_size: 14"))
    return folder


def arguments(yamls, name, librispeech, encoder, output, *more):
    """A command line."""
    given = [f"--data_folder={librispeech}", f"--encoder={encoder}", f"--output_folder={output}"]
    options = {option.split("=")[0]: option for option in (*given, *TOY, *more)}
    return [str(yamls / f"{name}.yaml"), *options.values()]


def names():
    """The recipe's YAMLs."""
    return sorted(path.stem for path in (RECIPE / "hparams").glob("*.yaml"))


@pytest.mark.parametrize("name", names())
def test_every_yaml_trains_tests_and_tells(name, train, small_yamls, librispeech, encoder, tmp_path, monkeypatch):
    changed = set()
    for kind in (SpeedPerturb, DropFreq, DropChunks):

        def noting(module, *arguments, kind=kind, forward=kind.forward):
            changed.add(kind)
            return forward(module, *arguments)

        monkeypatch.setattr(kind, "forward", noting)
    header = (RECIPE / "hparams" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"train.py hparams/{name}.yaml --data_folder" in header, "the header lacks its launch command"
    train.main(arguments(small_yamls, name, librispeech, encoder, tmp_path / "run"))
    results = read_results(tmp_path / "run")
    assert results["task"] == "speech recognition" and results["corpus"] == "LibriSpeech"
    assert results["encoder"]["method"] == "BestRQ" and results["encoder"]["frozen"] == ("finetune" not in name)
    assert results["label_hours"] == pytest.approx(sum(1.5 + 0.5 * n for n in range(5)) / 3600)
    assert results["epochs"] == 2 and results["seconds"]["train"] > 0 and results["trained_parameters"] > 0
    for split in ("test-clean", "test-other"):
        wer = results["sets"][split]["wer"]
        assert 0 <= wer["low"] <= wer["value"] <= wer["high"]
        assert results["sets"][split]["evaluation_seconds"] > 0
        assert "ALIGNMENTS" in (tmp_path / "run" / f"wer_{split}.txt").read_text()
    assert (tmp_path / "run" / "layer_weights.png").exists() == (name != "bestrq_finetune")
    assert changed == ({SpeedPerturb, DropFreq, DropChunks} if name == "bestrq_finetune" else set())


@pytest.mark.parametrize("name", names())
def test_a_step_of_every_yaml_can_be_done_on_a_gpu(
    name, train, small_yamls, librispeech, encoder, tmp_path, absent_gpu
):
    more = ["--encoder_rest=0"] if "finetune" in name else []
    with absent_gpu.first_step_there(TaskBrain):
        train.main(arguments(small_yamls, name, librispeech, encoder, tmp_path / "run", *more))


def test_error_rates_of_a_run_are_jiwers(train, small_yamls, librispeech, tmp_path, monkeypatch):
    heard = {}
    append = train.ErrorRates.append

    def recorded(self, names, texts, references, speakers=None):
        texts = [" ".join(np.random.default_rng(len(name) + int(name[-1])).choice(WORDS, 3)) for name in names]
        heard.setdefault(id(self), []).extend(zip(names, texts, references, strict=True))
        append(self, names, texts, references, speakers)

    monkeypatch.setattr(train.ErrorRates, "append", recorded)
    train.main(arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path, "--number_of_epochs=1"))
    results = read_results(tmp_path)
    for split, speaker in (("test-clean", "102"), ("test-other", "103")):
        (told,) = [one for one in heard.values() if one[0][0].startswith(speaker)]
        _, texts, references = zip(*told, strict=True)
        assert results["sets"][split]["wer"]["value"] == pytest.approx(jiwer.wer(list(references), list(texts)))
        assert results["sets"][split]["cer"]["value"] == pytest.approx(jiwer.cer(list(references), list(texts)))
        with open(tmp_path / f"errors_{split}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        errors, total = (sum(int(row[column]) for row in rows) for column in ("wer_errors", "wer_total"))
        assert errors / total == pytest.approx(jiwer.wer(list(references), list(texts)))


def test_it_learns_what_it_is_told(train, small_yamls, librispeech, tmp_path):
    more = ["--number_of_epochs=30", "--learning_rate=0.01", "--valid_metric=loss"]
    train.main(arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path, *more))
    lines = (tmp_path / "train_log.txt").read_text().splitlines()
    losses = [float(line.split("train loss: ")[1].split()[0]) for line in lines if "train loss: " in line]
    assert len(losses) == 30 and 0 < losses[-1] < 0.8 * losses[0]


def test_another_seed_of_the_labels_is_another_draw(train, small_yamls, librispeech, tmp_path, after_forward):
    heard, draws = set(), set()
    after_forward(train.ASRBrain, lambda batch, stage, _: heard.update(batch.id if stage == "TRAIN" else ()))
    for seed in range(6):
        heard.clear()
        more = ["--number_of_epochs=1", "--label_hours=0.0015", f"--label_seed={seed}"]
        train.main(arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path / str(seed), *more))
        draws.add(frozenset(heard))
    assert len(draws) > 1 and all(0 < len(one) < 5 for one in draws)


@pytest.mark.parametrize("source", ["fbank", "random"])
def test_baselines_are_encoders_like_any_other(source, train, small_yamls, librispeech, encoder, tmp_path):
    given = source if source == "fbank" else f"random:{encoder}"
    train.main(arguments(small_yamls, "probe_small", librispeech, given, tmp_path / "run"))
    assert read_results(tmp_path / "run")["encoder"]["method"] == ("fbank" if source == "fbank" else "random BestRQ")


def test_a_frozen_encoder_keeps_its_digest_and_a_fine_tuned_one_does_not(
    train, small_yamls, librispeech, encoder, tmp_path
):
    digests = {}
    for name, more in (("bestrq", []), ("probe_small", []), ("bestrq_finetune", ["--encoder_rest=0"])):
        train.main(arguments(small_yamls, name, librispeech, encoder, tmp_path / name, *more))
        digests[name] = read_results(tmp_path / name)["encoder"]["digest"]
    assert digests["bestrq"] == digests["probe_small"] != digests["bestrq_finetune"]


def test_without_options_it_trains_on_the_device_there_is_and_shows_a_bar(
    train, small_yamls, librispeech, tmp_path, capfd
):
    given = arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path)
    given.remove("--device=cpu")
    given.remove("--noprogressbar")
    train.main(given)
    assert read_results(tmp_path)["epochs"] == 2
    assert "train_loss" in capfd.readouterr().err


def test_a_run_goes_on_from_its_last_epoch_and_can_be_tested_again(train, small_yamls, librispeech, encoder, tmp_path):
    def run(output, *more):
        train.main(arguments(small_yamls, "bestrq", librispeech, encoder, tmp_path / output, *more))
        return read_results(tmp_path / output)

    unbroken = run("unbroken", "--number_of_epochs=3")
    run("broken", "--number_of_epochs=1")
    resumed = run("broken", "--number_of_epochs=3")
    again = run("broken", "--number_of_epochs=3", "--test_only")
    assert resumed["epochs"] == again["epochs"] == 3
    assert resumed["updates"] == unbroken["updates"]
    for split in ("test-clean", "test-other"):
        assert again["sets"][split]["wer"] == resumed["sets"][split]["wer"]
        assert again["sets"][split]["loss"] == resumed["sets"][split]["loss"]


@pytest.mark.parametrize(("utterances", "taken"), [(3, [0, 3, 6]), (9, list(range(9))), (200, list(range(9)))])
def test_what_is_tuned_on_is_spread_over_the_validation_set(train, utterances, taken):
    texts = [f"TEXT {number}" for number in range(9)]
    heard = [(["id"] * 5, texts[:5], ["s"] * 5), (["id"] * 4, texts[5:], ["s"] * 4)]
    brain = SimpleNamespace(log_probs=list(range(9)), heard=heard)
    assert train.tuning_set(brain, utterances) == (taken, [texts[place] for place in taken])


def test_a_language_model_is_tuned_on_the_validation_set_and_counted_apart(
    train, small_yamls, librispeech, tmp_path, monkeypatch
):
    tuned_on = []

    def recorded(decoder, log_probs, references, *more):
        tuned_on.extend(references)
        return tune(decoder, log_probs, references, *more)

    tune = train.tune
    monkeypatch.setattr(train, "tune", recorded)
    path = tmp_path / "lm.arpa"
    path.write_text(train_ngram(["SO IT IS", "IS IT NOT THE CAT'S HAT"], order=2))
    more = ["--alphas=[0.0, 0.5]", "--betas=[0.0, 1.0]", "--beam_size=4"]
    train.main(arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path / "run"))
    plain = read_results(tmp_path / "run")["sets"]
    train.main(
        arguments(
            small_yamls,
            "probe_small",
            librispeech,
            "fbank",
            tmp_path / "run",
            "--test_only",
            f"--language_model={path}",
            *more,
        )
    )
    told = (librispeech / "dev-clean" / "101" / "1" / "101-1.trans.txt").read_text().splitlines()
    assert sorted(tuned_on) == sorted(line.split(maxsplit=1)[1] for line in told)
    results = read_results(tmp_path / "run")["sets"]
    for split, found in results.items():
        assert found["wer"] == plain[split]["wer"] and found["loss"] == plain[split]["loss"]
        assert found["alpha"] in (0.0, 0.5) and found["beta"] in (0.0, 1.0) and found["decoding_seconds"] > 0
        assert 0 <= found["wer_lm"]["low"] <= found["wer_lm"]["value"]
        with open(tmp_path / "run" / f"errors_{split}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        errors, total = (sum(int(row[f"wer_lm_{kind}"]) for row in rows) for kind in ("errors", "total"))
        assert errors / total == pytest.approx(found["wer_lm"]["value"])
        assert (tmp_path / "run" / f"wer_{split}_lm.txt").exists()
    errors = (tmp_path / "run" / f"errors_{split}.csv").read_text()
    # the command that trained, given again, takes nothing away
    train.main(arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path / "run"))
    again = read_results(tmp_path / "run")["sets"]
    assert {split: found["wer_lm"] for split, found in again.items()} == {
        split: found["wer_lm"] for split, found in results.items()
    }
    assert (tmp_path / "run" / f"errors_{split}.csv").read_text() == errors


def test_beam_search_goes_without_a_language_model(train, small_yamls, librispeech, tmp_path):
    train.main(
        arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path, "--beam_search=True", "--beam_size=3")
    )
    assert "wer_beam" in read_results(tmp_path)["sets"]["test-clean"]


def test_few_labels_are_drawn_by_the_hour(train, small_yamls, librispeech, tmp_path):
    train.main(arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path, "--label_hours=0.0012"))
    assert 0 < read_results(tmp_path)["label_hours"] <= 0.0012


def test_an_utterance_too_short_for_its_transcript_is_named_and_left_out(
    train, small_yamls, librispeech, tmp_path, caplog
):

    corpus = tmp_path / "LibriSpeech"
    shutil.copytree(librispeech, corpus)
    transcripts = corpus / "train-clean-100" / "100" / "1" / "100-1.trans.txt"
    transcripts.write_text(transcripts.read_text().replace("100-1-0000 ", f"100-1-0000 {'A' * 30} "))
    train.main(arguments(small_yamls, "probe_small", corpus, "fbank", tmp_path / "run"))
    assert any("1 of 5 training utterances" in message and "100-1-0000" in message for message in caplog.messages)


def test_torchrun_on_two_devices_trains_and_tells_once(torchrun, small_yamls, librispeech, encoder, tmp_path):
    more = ("--precision=bf16", "--max_batch_size=1")  # more updates, for the encoder rests in some of them
    torchrun(
        RECIPE / "train.py",
        arguments(small_yamls, "bestrq_finetune", librispeech, encoder, tmp_path / "run", *more),
    )
    results = read_results(tmp_path / "run")
    assert results["world_size"] == 2 and results["epochs"] == 2
    assert 0 < results["encoder_updates"] < results["updates"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["sets"].keys() == {"test-clean", "test-other"}


def test_transcripts_in_lower_case_are_compared_as_the_units_spell_them(train, small_yamls, librispeech, tmp_path):
    corpus = tmp_path / "LibriSpeech"
    shutil.copytree(librispeech, corpus)
    yamls = "probe_small", corpus, "fbank"
    train.main(arguments(small_yamls, *yamls, tmp_path / "upper"))
    for transcripts in corpus.rglob("*.trans.txt"):
        lines = (line.split(" ", 1) for line in transcripts.read_text().splitlines())
        transcripts.write_text("".join(f"{name} {text.lower()}\n" for name, text in lines))
    train.main(arguments(small_yamls, *yamls, tmp_path / "lower"))
    upper, lower = (read_results(tmp_path / case)["sets"]["test-clean"] for case in ("upper", "lower"))
    assert lower["cer"] == upper["cer"] and lower["wer"] == upper["wer"]


def test_the_loss_of_a_set_is_that_of_its_utterances_whatever_the_batches(train, small_yamls, librispeech, tmp_path):
    given = small_yamls, "probe_small", librispeech, "fbank"
    train.main(arguments(*given, tmp_path / "one"))
    train.main(arguments(*given, tmp_path / "other", "--max_eval_batch_seconds=1"))
    one, other = (read_results(tmp_path / case) for case in ("one", "other"))
    assert other["validation"]["loss"] == pytest.approx(one["validation"]["loss"], rel=1e-5)
    for name, scores in one["sets"].items():
        assert other["sets"][name]["loss"] == pytest.approx(scores["loss"], rel=1e-5)


def test_each_utterances_loss_is_divided_by_its_units(train):
    log_probs = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    lengths, units = torch.tensor([20, 12, 9]), [[1, 2, 3, 4, 5, 1, 2, 3], [4], [2, 5, 2]]
    batch = SimpleNamespace(units=units)
    brain = SimpleNamespace(device="cpu")
    found = train.ASRBrain.compute_objectives(brain, (log_probs, lengths), batch, sb.Stage.TRAIN)
    total = 0.0
    for row, target, frames in zip(log_probs, units, lengths, strict=True):
        given = row[:frames, None], torch.tensor([target]), frames[None], torch.tensor([len(target)])
        total += float(torch.nn.functional.ctc_loss(*given, reduction="none")) / len(target)
    assert float(found) == pytest.approx(total / 3, rel=1e-5)


def test_an_utterance_has_to_fit_its_transcript_at_the_highest_speed_of_training(train):
    encoder = SimpleNamespace(num_frames=lambda samples: samples // 640)
    row = {"wrd": "AB" * 10, "duration": 20 * 640 / 16000}  # as many frames as units
    settings = {"tokenizer": CharacterTokenizer(), "speech_encoder": encoder, "sample_rate": 16000}
    for speeds, kept in (({}, ["just", "long"]), ({"speeds": [95, 100, 105]}, ["long"])):
        rows = {"train": {"just": row, "long": {**row, "duration": 2.0}}, "valid": {"just": row}}
        train.prepare_texts({**settings, "language_model": None, **speeds}, rows)
        assert list(rows["train"]) == kept and list(rows["valid"]) == ["just"]


def test_the_checkpoint_is_chosen_by_the_metric_of_the_yaml(train, small_yamls, librispeech, tmp_path, monkeypatch):
    told = {"cer": iter([0.1, 0.2]), "wer": iter([0.9, 0.8]), "loss": iter([9.0, 8.0])}
    stage_metrics = train.ASRBrain.stage_metrics

    def disagreeing(brain, stage):
        metrics = stage_metrics(brain, stage)
        return {name: next(values) for name, values in told.items()} if stage == sb.Stage.VALID else metrics

    monkeypatch.setattr(train.ASRBrain, "stage_metrics", disagreeing)
    train.main(arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path))
    results = read_results(tmp_path)
    assert results["best_epoch"] == 1 and results["validation"]["cer"] == 0.1


BAD_INPUT = {
    "no such encoder": (["--encoder=/nowhere"], "/nowhere is no folder"),
    "fine-tuned filter banks": (["--encoder=fbank"], "no weights to fine-tune"),
    "an unknown split": (["--test_splits=[test-dirty]"], "lacks the split.* test-dirty"),
    "too many hours": (["--label_hours=100"], "100 hours of training were asked for"),
    "nothing to test": (["--test_only"], "no checkpoint to test"),
    "a language model that is none": (["--language_model=/etc/hostname"], "/etc/hostname"),
    "cached and perturbed": (["--cache_features=True"], "--cache_features is no key"),
    "an unknown metric": (["--valid_metric=per"], "valid_metric is one of wer, cer, loss, not 'per'"),
    "one weight for a list": (["--alphas=0.5"], r"alphas is a list of numbers, none below 0, such as .*, not 0\.5"),
    "a weight below 0": (["--alphas=[0.5, -1]"], "alphas has -1: give numbers, none below 0"),
    "no beam": (["--beam_size=0"], "beam_size is 0: give a whole number, 1 at least"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(case, train, small_yamls, librispeech, encoder, tmp_path):
    more, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message) as error:
        train.main(arguments(small_yamls, "bestrq_finetune", librispeech, encoder, tmp_path / "run", *more))
    assert "\n" not in str(error.value)


def test_a_run_does_not_go_on_with_other_options_within_the_yaml_or_of_the_run(
    train, small_yamls, librispeech, tmp_path
):
    given = arguments(small_yamls, "probe_small", librispeech, "fbank", tmp_path / "run")
    train.main(given)
    with pytest.raises(InputError, match="was trained with grad_accumulation_factor 1, not 2: give another"):
        train.main([*given, "--grad_accumulation_factor=2"])
    text = Path(given[0]).read_text()
    edited = tmp_path / "edited.yaml"
    edited.write_text(text.replace("improvement_threshold: 0.0025", "improvement_threshold: 0.1", 1))
    with pytest.raises(InputError, match=r"was trained with mix_annealing.improvement_threshold 0.0025, not 0.1"):
        train.main([str(edited), *given[1:]])


def test_a_recording_without_a_frame_is_named_before_any_training(train, small_yamls, librispeech, tmp_path):
    """In a batch of its own it would end the run, with its test, after hours."""
    corpus = tmp_path / "LibriSpeech"
    shutil.copytree(librispeech, corpus)
    recording = next((corpus / "test-other").rglob("*.flac"))
    soundfile.write(recording, np.zeros(448), 16000)
    with pytest.raises(InputError, match=f"1 recordings are shorter than a frame of the encoder, such as {recording}"):
        train.main(arguments(small_yamls, "probe_small", corpus, "fbank", tmp_path / "run"))


def test_missing_transcripts_are_named(train, small_yamls, librispeech, tmp_path):

    corpus = tmp_path / "LibriSpeech"
    shutil.copytree(librispeech, corpus)
    transcripts = corpus / "test-other" / "103" / "1" / "103-1.trans.txt"
    lines = transcripts.read_text().splitlines(keepends=True)
    transcripts.write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match="1 utterances of 'test-other' have no transcript, such as 103-1-0004"):
        train.main(arguments(small_yamls, "probe_small", corpus, "fbank", tmp_path / "run"))
    transcripts.unlink()
    with pytest.raises(InputError, match="103-1.trans.txt' is missing, but transcripts are needed"):
        train.main(arguments(small_yamls, "probe_small", corpus, "fbank", tmp_path / "run"))
