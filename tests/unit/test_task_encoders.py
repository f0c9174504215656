"""Encoders of any source under one interface, and what is kept of their states and results."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_bestrq.artefact import save_encoder
from speechbrain_bestrq.digests import tensor_digest
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_cache import FeatureCache, cache_features, open_cache
from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor, FeatureProjection
from speechbrain_bestrq.metrics import Interval
from speechbrain_bestrq.results import compare_runs, interval, read_results, write_errors, write_results
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.transformer import TransformerEncoder


@pytest.fixture
def folder(make_speech_encoder, tmp_path):
    """An encoder folder that tells nothing of its training."""
    return save_encoder(make_speech_encoder(), tmp_path / "encoder", "# Card")


@pytest.fixture
def rows(tmp_path):
    """Rows of five utterances of noise."""
    rows = {}
    for number in range(5):
        path, seconds = tmp_path / f"{number}.wav", 0.5 + 0.2 * number
        soundfile.write(path, 0.1 * np.random.default_rng(number).standard_normal(round(16000 * seconds)), 16000)
        rows[f"u{number}"] = {"wav": str(path), "duration": seconds}
    return rows


def sources(folder):
    """Each kind of source."""
    return ["fbank", str(folder), f"random:{folder}"]


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("all_states", [True, False])
def test_no_utterance_depends_on_its_padding(folder, padded_with_junk, relative_difference, kind, all_states):
    encoder = TaskEncoder(sources(folder)[kind], all_states=all_states).eval()
    utterances, batch, lengths = padded_with_junk([16000, 9000, 4321])
    padded, frames = encoder(batch, lengths)
    assert len(padded) == encoder.num_states and padded.shape[-1] == encoder.output_dim
    for number, utterance in enumerate(utterances):
        alone, (count,) = encoder(utterance[None])
        assert frames[number] == count == encoder.num_frames(len(utterance)) == alone.shape[2]
        assert relative_difference(alone[:, 0], padded[:, number, :count]) < 1e-5
        assert padded[:, number, count:].eq(0).all()


def test_filter_banks_keep_the_shape_of_the_spectrum_and_forget_the_loudness(relative_difference):
    encoder = TaskEncoder("fbank")
    low = torch.sin(2 * torch.pi * 300 * torch.arange(16000) / 16000)[None]
    high = torch.sin(2 * torch.pi * 3000 * torch.arange(16000) / 16000)[None]
    noise = 0.1 * torch.randn(1, 16000)
    (spectrum, quiet, other) = (encoder(wav)[0].mean(2) for wav in (low + noise, 0.5 * (low + noise), high + noise))
    assert relative_difference(spectrum, quiet) < 1e-3
    assert relative_difference(spectrum, other) > 0.5


def test_a_random_encoder_is_a_function_of_the_seed_and_no_trained_one(folder):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(tensor_digest(TaskEncoder(f"random:{folder}").state_dict()))
    assert states[0] == states[1] != states[2]
    assert tensor_digest(TaskEncoder(folder).state_dict()) not in states


def test_a_pre_trained_front_end_with_weights_rests_and_an_untrained_one_and_a_subsampling_do_not(folder, tmp_path):
    torch.manual_seed(1)
    layers = TransformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32, position_groups=2)
    whole = SpeechEncoder(ConvFeatureExtractor((8,) * 7), FeatureProjection(8, 16), layers)
    convolutional = save_encoder(whole, tmp_path / "wav2vec2", "# Card")
    for source, rests in ((convolutional, True), (f"random:{convolutional}", False), (folder, False)):
        encoder = TaskEncoder(source, freeze=False)
        hidden, _ = encoder(0.1 * torch.randn(1, 16000))
        hidden[-1].square().sum().backward()
        without = {name.split(".")[2] for name, weight in encoder.named_parameters() if weight.grad is None}
        assert (without == {"frontend"}) == rests and (rests or not without)


@pytest.mark.parametrize("masks", [True, False])
def test_parts_of_mel_features_are_masked_and_what_has_none_is_told(folder, tmp_path, caplog, masks):
    layers = TransformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32, position_groups=2)
    whole = SpeechEncoder(ConvFeatureExtractor((8,) * 7), FeatureProjection(8, 16), layers)
    convolutional = save_encoder(whole, tmp_path / "wav2vec2", "# Card")
    for source, masked in ((folder, masks), (convolutional, False)):
        caplog.clear()
        encoder = TaskEncoder(source, freeze=False, apply_spec_augment=masks).train()
        assert encoder.encoder.apply_spec_augment == masked == encoder.describe()["masked"]
        assert ("takes no mel features: nothing of its input is masked" in caplog.text) == (masks and not masked)


def test_frames_are_repeated_for_tasks_that_need_more_of_them(folder):
    encoder = TaskEncoder(folder, output_rate=50)
    hidden, frames = encoder(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    assert hidden.shape[2] == 50 and frames.tolist() == [50, 24]


def test_the_description_says_what_the_encoder_was(folder, make_speech_encoder, tmp_path):
    facts = {"model": "Wav2Vec2", "corpus": "Tones", "train_hours": 1.5, "step": 9}
    facts |= {"audio_hours": 2.0, "device_hours": 0.25}
    told = save_encoder(make_speech_encoder(), tmp_path / "told", "# Card", **facts)
    description = TaskEncoder(told).describe()
    parameters = sum(parameter.numel() for parameter in make_speech_encoder().parameters())
    assert description == {
        "source": str(told),
        "method": "Wav2Vec2",
        "corpus": "Tones",
        "updates": 9,
        "train_hours": 1.5,
        "audio_hours": 2.0,
        "device_hours": 0.25,
        "parameters": parameters,
    }
    assert TaskEncoder(f"random:{told}").describe()["method"] == "random Wav2Vec2"
    assert "audio_hours" not in TaskEncoder(f"random:{told}").describe()
    assert TaskEncoder(folder).describe()["updates"] is None


def test_an_encoder_of_another_sample_rate_is_refused_and_filter_banks_take_any(folder):
    with pytest.raises(InputError, match="trained on 16000 samples per second and is given 8000: give sample_rate 160"):
        TaskEncoder(folder, sample_rate=8000)
    assert TaskEncoder("fbank", sample_rate=8000).num_frames(8000) == 25


# ---------------------------------------------------------------- cache


def test_cached_states_are_those_of_the_utterance_alone(folder, rows, tmp_path, relative_difference):
    encoder = TaskEncoder(folder)
    started = time.perf_counter()
    cache = cache_features(tmp_path / "cache", encoder, rows, max_batch_seconds=2.0)
    assert 0 < cache.seconds < time.perf_counter() - started
    assert len(cache) == len(rows)
    assert cache_features(tmp_path / "cache", encoder, rows).seconds == cache.seconds
    for name, row in rows.items():
        wav = torch.from_numpy(soundfile.read(row["wav"], dtype="float32")[0])
        alone, _ = encoder(wav[None])
        assert relative_difference(alone[:, 0].transpose(0, 1), cache[name]) < 1e-5


def test_a_cache_is_made_again_when_the_weights_or_the_audio_change_and_only_then(folder, rows, tmp_path, monkeypatch):
    encoder = TaskEncoder(folder)
    calls = []
    forward = TaskEncoder.forward
    monkeypatch.setattr(TaskEncoder, "forward", lambda self, *args: calls.append(1) or forward(self, *args))

    def made(encoder, rows):
        calls.clear()
        cache_features(tmp_path / "cache", encoder, rows)
        return bool(calls)

    assert made(encoder, rows) and not made(encoder, rows)
    assert made(TaskEncoder(f"random:{folder}"), rows) and made(encoder, rows)
    assert made(TaskEncoder(folder, output_norm=True), rows) and made(encoder, rows)
    heads = Path(shutil.copytree(folder, tmp_path / "heads"))
    config = json.loads((heads / "config.json").read_text())
    config["encoder"]["num_heads"] *= 2
    (heads / "config.json").write_text(json.dumps(config))
    assert made(TaskEncoder(heads), rows) and made(encoder, rows)
    fewer = {name: row for name, row in rows.items() if name != "u0"}
    assert not made(encoder, fewer), "all of it is there"
    shutil.rmtree(tmp_path / "cache")
    assert made(encoder, fewer) and made(encoder, rows)
    assert made(encoder, {**rows, "u0": {**rows["u0"], "duration": 0.4}}) and made(encoder, rows)
    (states,) = (tmp_path / "cache").glob("states-*.f32")
    states.write_bytes(states.read_bytes()[:-4])
    assert made(encoder, rows)


def test_what_the_encoder_took_to_make_a_cache_is_given_back_to_the_system(folder, rows, tmp_path, monkeypatch):
    """On a CPU it is kept for the next tensors, and a head has no use for gigabytes."""
    given = []
    monkeypatch.setattr("speechbrain_bestrq.feature_cache.give_back_freed_memory", lambda: given.append(True))
    for _ in range(2):
        cache_features(tmp_path / "cache", TaskEncoder(folder), rows)
    assert given == [True]


def test_a_cache_that_is_open_stays_what_it_was(folder, rows, tmp_path):
    encoder = TaskEncoder(folder)
    opened = cache_features(tmp_path / "cache", encoder, rows)
    before = {name: opened[name] for name in rows}
    other = cache_features(tmp_path / "cache", TaskEncoder(f"random:{folder}"), dict(reversed(rows.items())))
    assert all(torch.equal(opened[name], states) for name, states in before.items())
    assert any(not torch.equal(other[name], states) for name, states in before.items())
    assert len(list((tmp_path / "cache").glob("states-*"))) == 1


def test_audio_that_was_replaced_is_heard_anew(folder, rows, tmp_path):
    rows = {name: dict(row) for name, row in rows.items()}
    name = next(iter(rows))
    rows[name]["wav"] = str(shutil.copy(rows[name]["wav"], tmp_path / "one.wav"))
    encoder = TaskEncoder(folder)
    before = cache_features(tmp_path / "cache", encoder, rows)[name]
    wave, rate = soundfile.read(rows[name]["wav"])
    soundfile.write(rows[name]["wav"], wave[::-1], rate)
    assert not torch.equal(cache_features(tmp_path / "cache", encoder, rows)[name], before)


def test_a_cache_that_was_interrupted_is_made_again(folder, rows, tmp_path, monkeypatch):
    encoder = TaskEncoder(folder)

    def stop(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TaskEncoder, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            cache_features(tmp_path / "cache", encoder, rows)
    assert len(cache_features(tmp_path / "cache", encoder, rows)) == len(rows)


def test_the_size_of_a_cache_is_said_first_and_a_full_disk_is_refused(folder, rows, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    encoder = TaskEncoder(folder)
    cache_features(tmp_path / "cache", encoder, rows)
    (states,) = (tmp_path / "cache").glob("states-*.f32")
    size = states.stat().st_size
    assert f"{size / 1e9:.2f} GB" in caplog.messages[0]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": size - 1}))
    with pytest.raises(InputError, match="free: make room"):
        cache_features(tmp_path / "other", encoder, rows)


@pytest.mark.parametrize("content", ["[1, 2]", '{"pages": 3}', "no JSON"])
def test_nothing_of_others_in_its_folder_is_written_over_or_removed(folder, rows, tmp_path, content):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "index.json").write_text(content)
    (cache / "states-of-the-union.csv").write_text("mine")
    encoder = TaskEncoder(folder, all_states=False)
    with pytest.raises(InputError, match="its index.json is not that of hidden states: give another folder"):
        cache_features(cache, encoder, rows)
    assert (cache / "index.json").read_text() == content
    (cache / "index.json").unlink()
    (cache / "states-0123456789abcdef.f32").write_text("of another encoder")
    cache_features(cache, encoder, rows)
    assert (cache / "states-of-the-union.csv").read_text() == "mine"
    assert not (cache / "states-0123456789abcdef.f32").exists()


def test_an_encoder_that_is_trained_is_not_cached(folder, rows, tmp_path):
    with pytest.raises(InputError, match="frozen"):
        cache_features(tmp_path / "cache", TaskEncoder(folder, freeze=False), rows)


def test_a_cache_can_be_opened_again(folder, rows, tmp_path):
    cache = cache_features(tmp_path / "cache", TaskEncoder("fbank"), rows)
    assert torch.equal(FeatureCache(tmp_path / "cache")["u1"], cache["u1"]) and cache["u1"].shape[1:] == (1, 320)


def test_other_audio_under_the_same_name_is_refused(folder, rows, tmp_path):
    hparams = {"cache_features": True, "cache_folder": tmp_path / "cache", "speech_encoder": TaskEncoder(folder)}
    hparams |= {"sample_rate": 16000, "max_eval_batch_seconds": 60.0}
    assert len(open_cache(hparams, {"valid": rows, "dev-clean": dict(rows)})) == len(rows), "it may be in two sets"
    noisy = {"u0": {**rows["u0"], "wav": rows["u1"]["wav"]}}
    with pytest.raises(InputError, match="'test-clean' and 'test-noisy' have different audio under one name, u0"):
        open_cache(hparams, {"test-clean": rows, "test-noisy": noisy})


def test_a_cache_folder_that_another_run_took_meanwhile_is_refused(folder, rows, tmp_path, monkeypatch):
    """A rank opens the cache after the main process has made it, when another run may have made its own."""
    hparams = {"cache_features": True, "cache_folder": tmp_path / "cache", "speech_encoder": TaskEncoder(folder)}
    hparams |= {"sample_rate": 16000, "max_eval_batch_seconds": 60.0}
    cache_features(tmp_path / "cache", TaskEncoder(f"random:{folder}"), rows)
    monkeypatch.setattr("speechbrain_bestrq.feature_cache.run_on_main", lambda make: None)  # as on another rank
    monkeypatch.setattr("speechbrain_bestrq.feature_cache.ddp_broadcast", lambda name, src: "states-of-this-run.f32")
    with pytest.raises(InputError, match="with another encoder or other audio at the same time: give each its own"):
        open_cache(hparams, {"train": rows})


# ---------------------------------------------------------------- results


def write_run(folder, errors, speakers=("a", "a", "b", "b")):
    """A run's errors on four utterances of ten words."""
    folder.mkdir()
    rows = [
        {"ID": f"u{number}", "group": speaker, "wer_errors": count, "wer_total": 10}
        for number, (count, speaker) in enumerate(zip(errors, speakers, strict=True))
    ]
    write_errors(folder, "test-clean", rows, ["ID", "group", "wer_errors", "wer_total"])
    return folder


def test_two_runs_are_compared_utterance_by_utterance(tmp_path):
    better, worse = write_run(tmp_path / "a", [1, 2, 1, 0]), write_run(tmp_path / "b", [3, 3, 2, 2])
    difference, not_better = compare_runs(better, worse, "test-clean", "wer")
    assert difference.value == pytest.approx(-0.15) and difference.high < 0 and not_better == 0.0
    difference, not_better = compare_runs(better, better, "test-clean", "wer")
    assert difference.value == 0.0 and not_better == 1.0


def test_one_speaker_makes_no_comparison_certain(tmp_path):
    errors, speaker = [1, 2, 1, 4, 3, 1], ["only"] * 6
    better, worse = (
        write_run(tmp_path / name, errors, speaker) for name, errors in (("a", errors), ("b", [2, 2, 2, 3, 4, 1]))
    )
    difference, not_better = compare_runs(better, worse, "test-clean", "wer")
    assert difference.low < difference.value < difference.high and 0 < not_better < 1


def test_runs_on_other_utterances_or_without_errors_are_not_compared(tmp_path):
    one, fewer = write_run(tmp_path / "a", [1, 2, 1, 0]), write_run(tmp_path / "b", [1, 2], "ab")
    with pytest.raises(InputError, match="not tested on the same utterances"):
        compare_runs(one, fewer, "test-clean", "wer")
    with pytest.raises(InputError, match="errors_test-other.csv is missing"):
        compare_runs(one, fewer, "test-other", "wer")
    with pytest.raises(InputError, match="has no errors of cer"):
        compare_runs(one, one, "test-clean", "cer")


def test_results_are_written_whole_and_read_back(tmp_path):
    results = {"sets": {"test-clean": {"wer": interval(Interval(0.5, 0.4, 0.6))}}, "seed": 1}
    write_results(tmp_path, results)
    assert read_results(tmp_path) == results
    with pytest.raises(ValueError):
        write_results(tmp_path, {"sets": {}, "loss": float("nan")})
    assert read_results(tmp_path) == results


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"sets": 3})])
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match="--test_only"):
        read_results(tmp_path)
    with pytest.raises(InputError, match="not been evaluated yet"):
        read_results(tmp_path / "nowhere")
