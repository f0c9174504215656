"""The check of the codebook: what it counts, what it makes of it, and its command."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_bestrq import codebook_check
from speechbrain_bestrq.audio import AudioTable
from speechbrain_bestrq.cli import main
from speechbrain_bestrq.codebook_use import (
    CodebookUse,
    choose_audio,
    count_codes,
    judge,
    log_codebook_use,
    loud_frames,
    use_statistics,
)
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import LogMel
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer

RATE = 16000
HPARAMS = str(Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "pretrain" / "hparams" / "bestrq.yaml")
SMALL = ["--d_model=16", "--num_layers=1", "--num_heads=2", "--d_ffn=32", "--kernel_size=3", "--codebook_size=1024"]


def syllables(seconds, seed=1):
    """Bursts of noise of changing loudness and colour, quiet as speech is."""
    generator = np.random.default_rng(seed)
    pieces = []
    for _ in range(round(5 * seconds)):
        wave = np.fft.rfft(generator.standard_normal(RATE // 5))
        colour = np.interp(np.arange(len(wave)), np.linspace(0, len(wave), 8), generator.standard_normal(8))
        level = 0.005 * np.exp(0.3 * generator.standard_normal())
        pieces.append(level * np.fft.irfft(wave * np.exp(0.5 * colour)))
    return np.concatenate(pieces).astype(np.float32)


def as_batch(wave):
    return torch.from_numpy(wave)[None], None


def identity_frontend():
    """A front end whose statistics change nothing: its features are not normalised."""
    frontend = LogMel()
    frontend.load_state_dict({"mean": torch.zeros(80), "deviation": torch.ones(80)})
    return frontend


def measured_frontend(audio):
    frontend = LogMel()
    frontend.measure(audio)
    return frontend


# ---------------------------------------------------------------- counting


def test_silence_is_what_is_far_below_the_loud_level_or_below_the_floor():
    wave = 0.1 * torch.randn(2, 20 * 640, generator=torch.Generator().manual_seed(0))
    wave[:, 10 * 640 :] *= 0.01  # -40 dB
    wave[0, 5 * 640 : 10 * 640] *= 0.1  # -20 dB
    loud = loud_frames(wave, torch.tensor([20, 20]), 20, 640, 160)
    # the frame on the border hears a little of the louder side
    assert loud[:, :10].all() and not loud[:, 11:].any()
    shifted = loud_frames(wave + 0.3, torch.tensor([20, 20]), 20, 640, 160)
    assert torch.equal(shifted[:, :-1], loud[:, :-1]), "a constant offset is no sound"
    assert not loud_frames(1e-5 * torch.randn(1, 6400), torch.tensor([10]), 10, 640, 160).any()
    assert not loud_frames(torch.zeros(1, 6400), torch.tensor([10]), 10, 640, 160).any()


def test_padding_is_neither_counted_nor_heard():
    waves = [syllables(seconds, seed) for seed, seconds in enumerate((2.0, 1.0, 1.4))]
    quantizer = RandomProjectionQuantizer(320, codebook_size=64, num_codebooks=2)
    frontend = measured_frontend([as_batch(wave) for wave in waves])
    alone = count_codes(frontend, quantizer, [as_batch(wave) for wave in waves])
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
    lengths = torch.tensor([len(wave) / padded.shape[1] for wave in waves])
    together = count_codes(frontend, quantizer, [(padded, lengths)])
    assert torch.equal(alone.speech, together.speech) and torch.equal(alone.everything, together.everything)
    assert alone.everything.sum(1).tolist() == [25 + 50 + 35] * 2
    assert together.offset == pytest.approx(alone.offset, abs=1e-6)


def test_the_loud_level_is_that_of_the_utterance_without_its_padding():
    """3 loud frames of 25 are over 5 %, 3 of 100 are not."""
    wave = 0.001 * torch.randn(1, 25 * 640, generator=torch.Generator().manual_seed(0))
    wave[:, : 3 * 640] *= 100
    alone = loud_frames(wave, torch.tensor([25]), 25, 640, 160)
    padded = loud_frames(torch.nn.functional.pad(wave, (0, 75 * 640)), torch.tensor([25]), 100, 640, 160)
    assert alone.sum() in (3, 4)
    assert torch.equal(padded[:, :25], alone) and not padded[:, 25:].any()


def test_silent_frames_are_counted_apart():
    speech, quiet = syllables(4.0), 1e-4 * syllables(4.0, seed=2)
    frontend, quantizer = measured_frontend([as_batch(speech)]), RandomProjectionQuantizer(320, codebook_size=256)
    use = count_codes(frontend, quantizer, [as_batch(np.concatenate([speech, quiet]))])
    assert use.silent_share == pytest.approx(0.5, abs=0.02)
    assert use.everything.sum() == 200 and (use.everything >= use.speech).all()
    # silence is all alike: it makes one code common
    shares = [use_statistics(counts[0])["commonest_share"] for counts in (use.everything, use.speech)]
    assert shares[0] > 0.45 > 0.25 > shares[1]


def test_counting_draws_nothing_and_gives_the_same_again():
    audio = [as_batch(syllables(2.0))]
    quantizer, frontend = RandomProjectionQuantizer(320), measured_frontend(audio)
    state = torch.random.get_rng_state()
    first, second = (count_codes(frontend, quantizer, audio) for _ in range(2))
    assert torch.equal(first.speech, second.speech)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_labels_over_time_are_those_of_whole_utterances():
    """Silence is left out after labels were made, not before: over time, labels hang on all frames."""
    wave = np.concatenate([syllables(1.0), 1e-4 * syllables(1.0, seed=2)])
    frontend = measured_frontend([as_batch(wave)])
    quantizer = RandomProjectionQuantizer(320, codebook_size=64, normalize="time")
    features, _ = frontend(torch.from_numpy(wave)[None])
    labels = quantizer(features.unflatten(1, (-1, 4)).flatten(2)).flatten()
    use = count_codes(frontend, quantizer, [as_batch(wave)])
    assert torch.equal(use.everything[0], torch.bincount(labels, minlength=64).double())
    assert 24 <= use.frames <= 27
    assert (use.speech[0] <= torch.bincount(labels[:27], minlength=64)).all()


@pytest.fixture
def table(tmp_path):
    paths = [str(tmp_path / f"{number}.wav") for number in range(20)]
    for number, path in enumerate(paths):
        soundfile.write(path, np.full(8000 + 800 * number, number / 100), RATE, subtype="FLOAT")
    return AudioTable([str(number) for number in range(20)], paths, [0.5 + 0.05 * number for number in range(20)], RATE)


def test_audio_is_a_choice_of_the_seed_over_the_whole_corpus(table):
    def chosen(minutes, seed=0):
        return [round(100 * float(wavs[0, 0])) for wavs, _ in choose_audio(table, minutes, seed)]

    assert chosen(5 / 60) == chosen(5 / 60) != chosen(5 / 60, seed=1)
    assert chosen(8 / 60)[: len(chosen(5 / 60))] == chosen(5 / 60)
    assert sorted(chosen(100)) == list(range(20))
    seconds = [wavs.shape[1] / RATE for wavs, _ in choose_audio(table, 5 / 60)]
    assert sum(seconds) >= 5 > sum(seconds[:-1])
    assert max(chosen(5 / 60)) > 10, "not the head of the corpus"


def test_damaged_files_are_passed_over_up_to_the_limit(table):
    whole = [len(wavs[0]) for wavs, _ in choose_audio(table, 100)]
    Path(table.path(3)).write_bytes(b"no audio")
    with pytest.raises(InputError, match=r"3\.wav cannot be read"):
        choose_audio(table, 100)
    lengths = [len(wavs[0]) for wavs, _ in choose_audio(table, 100, max_unreadable=1)]
    assert lengths == [length for length in whole if length != 8000 + 3 * 800]
    Path(table.path(4)).write_bytes(b"no audio")
    with pytest.raises(InputError, match="more than max_unreadable = 1 files"):
        choose_audio(table, 100, max_unreadable=1)


# ---------------------------------------------------------------- judging


def test_the_check_fails_on_features_that_are_not_normalised_and_passes_on_normalised_ones():
    audio = [as_batch(syllables(25.0, seed)) for seed in (1, 2)]
    quantizer = RandomProjectionQuantizer(320, codebook_size=1024)
    raw = count_codes(identity_frontend(), quantizer, audio)
    normalised = count_codes(measured_frontend(audio), quantizer, audio)
    assert judge(normalised, quantizer).status == "passed"
    verdict = judge(raw, quantizer)
    assert verdict.status == "failed"
    assert "perplexity" in verdict.reasons[0] and "commonest code labels" in verdict.reasons[1]
    assert "features are not normalised" in verdict.remedy and "normalize: global" in verdict.remedy


def even(used, frames=100_000, codes=8192):
    """Counts of so many codes used alike: their number is the perplexity."""
    counts = torch.zeros(1, codes, dtype=torch.float64)
    counts[0, :used] = frames / used
    return counts


@pytest.mark.parametrize(
    ("used", "status"), [(81, "failed"), (82, "warned"), (409, "warned"), (410, "passed"), (8192, "passed")]
)
def test_thresholds_of_perplexity(used, status):
    """1 % of 8192 codes are 81.9, 5 % are 409.6."""
    verdict = judge(CodebookUse(even(used), even(used), 0.0), RandomProjectionQuantizer(320))
    assert verdict.status == status
    assert bool(verdict.remedy) == bool(verdict.reasons) == (status != "passed")


@pytest.mark.parametrize(("share", "status"), [(0.19, "passed"), (0.21, "failed")])
def test_a_code_too_common_fails_whatever_the_perplexity(share, status):
    counts = (1 - share) * even(8192)
    counts[0, 5] += share * 100_000
    verdict = judge(CodebookUse(counts, counts, 0.0), RandomProjectionQuantizer(320))
    assert verdict.status == status
    assert use_statistics(counts[0])["perplexity_share"] > 0.1


def test_speech_is_judged_not_silence():
    silent = even(8192)
    silent[0, 0] += 100_000
    quantizer = RandomProjectionQuantizer(320)
    assert judge(CodebookUse(even(8192), silent, 0.0), quantizer).status == "passed"
    assert judge(CodebookUse(silent, silent, 0.0), quantizer).status == "failed"


def test_one_bad_codebook_among_good_ones_fails_and_is_named():
    counts = torch.cat([even(8192), even(7), even(8192)])
    verdict = judge(CodebookUse(counts, counts, 0.0), RandomProjectionQuantizer(320, num_codebooks=3))
    assert verdict.status == "failed" and verdict.reasons == ("codebook 2's perplexity is 7 of 8192 (0.1%, under 1%)",)


def test_few_frames_are_not_judged():
    """A perplexity cannot exceed the frames: 400 of them, all different, would seem to be under 5 %."""
    quantizer = RandomProjectionQuantizer(320)
    assert judge(CodebookUse(even(400, 400), even(400, 400), 0.0), quantizer) is None
    assert judge(CodebookUse(even(4096, 4096), even(4096, 4096), 0.0), quantizer).status == "passed"


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "set whiten: 16 in the YAML's quantizer"),
        ({"normalize": "time"}, "set whiten: 16 in place of normalize: time"),
        ({"whiten": 16}, "set whiten above 16 in the YAML, and listen to the audio"),
        ({"whiten": 320}, "listen to the audio: a tone"),
    ],
)
def test_the_remedy_is_one_that_is_left(settings, remedy):
    verdict = judge(CodebookUse(even(9), even(9), 0.0), RandomProjectionQuantizer(320, **settings))
    assert verdict.remedy.startswith(remedy)
    assert "\n" not in str(verdict) and str(verdict).endswith(".")


def test_a_model_without_such_a_quantizer_is_let_alone(caplog):
    with caplog.at_level("INFO"):
        log_codebook_use(torch.nn.Linear(1, 1), [])
    assert not caplog.records


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four speakers of 16 s each, as a folder of audio."""
    folder = tmp_path_factory.mktemp("corpus") / "audio"
    for speaker in range(4):
        (folder / str(speaker)).mkdir(parents=True)
        for number in range(2):
            wave = syllables(8.0, seed=10 * speaker + number)
            soundfile.write(folder / str(speaker) / f"{number}.wav", wave, RATE, subtype="FLOAT")
    return folder


def write_tones(folder):
    folder.mkdir()
    for number in range(10):
        wave = 0.1 * np.sin(2 * np.pi * 440 * np.arange(6 * RATE) / RATE)
        soundfile.write(folder / f"{number}.wav", wave, RATE)
    return folder


def test_the_command_passes_on_varied_audio_and_writes_into_its_folder_alone(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["check-codebook", HPARAMS, "--data_folder", str(corpus), "--corpus", "folder", "--num_codebooks=2", *SMALL]
    assert main([*words, "--output_folder", "check", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "passed" and result["reasons"] == [] and result["codebook_size"] == 1024
    assert len(result["codebooks"]) == 2
    for values in result["codebooks"]:
        assert values["frames"] == result["frames"] <= values["with_silence"]["frames"]
        assert values["codes_used"] >= values["perplexity"] > 0.05 * 1024
        assert values["entropy"] == pytest.approx(np.log(values["perplexity"]))
    assert result["codebooks"][0]["perplexity"] != result["codebooks"][1]["perplexity"]
    assert Path(result["plot"]).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["check"]
    assert {path.name for path in (tmp_path / "check").iterdir()} == {"codebook.png", "manifests"}


def test_the_picture_bears_the_true_name_of_the_corpus_and_no_path(corpus, manifest, tmp_path, monkeypatch):
    titles = []
    draw = codebook_check.draw_codebook_use
    monkeypatch.setattr(
        codebook_check, "draw_codebook_use", lambda use, path, title: titles.append(title) or draw(use, path, title)
    )
    named = tmp_path / "named" / "LibriSpeech"
    shutil.copytree(corpus, named)
    (named / "CORPUS.json").write_text('{"name": "syllables"}')
    for source in (["--data_folder", str(named)], ["--data_folder", str(corpus)], ["--manifest", str(manifest)]):
        words = ["check-codebook", HPARAMS, *source, "--corpus", "folder", *SMALL]
        main([*words, "--output_folder", str(tmp_path / "check")])
    own = tmp_path / "own.yaml"
    own.write_text(Path(HPARAMS).read_text().replace("data_folder: !PLACEHOLDER", f"data_folder: {named}"))
    main(["check-codebook", str(own), "--corpus", "folder", *SMALL, "--output_folder", str(tmp_path / "check")])
    names = [title.partition(" on ")[2].partition(":")[0] for title in titles]
    assert names == ["syllables", "audio", "manifest.csv", "syllables"]


def test_the_command_fails_on_tones_with_reason_and_remedy(tmp_path, capsys):
    words = ["check-codebook", HPARAMS, "--data_folder", str(write_tones(tmp_path / "tones")), "--corpus", "folder"]
    assert main([*words, *SMALL, "--output_folder", str(tmp_path / "check")]) == 1
    printed = capsys.readouterr().out
    assert "result: failed\n" in printed and "remedy: set whiten above 16" in printed
    assert "| 1, speech |" in printed and "| 1, with silence |" in printed


@pytest.fixture(scope="module")
def manifest(corpus):
    path = corpus.parent / "manifest.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "duration", "wav"])
        writer.writerows([str(number), 8.0, str(wav)] for number, wav in enumerate(sorted(corpus.rglob("*.wav"))))
    return path


def test_a_manifest_will_do_and_the_choice_is_that_of_the_seed(manifest, tmp_path, capsys):
    results = []
    for more in (["--seed=1"], ["--seed=1"], ["--seed=2"]):
        words = ["check-codebook", HPARAMS, "--manifest", str(manifest), "--output_folder", str(tmp_path), "--json"]
        assert main([*words, "--minutes", "0.75", *SMALL, *more]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1] != results[2]
    assert results[0]["utterances"] == 6 and results[0]["minutes"] == pytest.approx(0.8)
    assert not (tmp_path / "manifests").exists()


BAD_INPUT = {
    "no data": ([], "data_folder is left open"),
    "both": (["--data_folder", "a", "--manifest", "b"], "exclude each other"),
    "an unknown key": (["--manifest", "MANIFEST", "--codebok_size=4"], "did you mean --codebook_size"),
    "too little audio": (["--manifest", "MANIFEST", "--minutes=0.2"], "512|1000 are needed; raise --minutes"),
    "too small a corpus": (["--manifest", "MANIFEST", "--codebook_size=8192"], "4096 are needed; add audio"),
    "no minutes": (["--manifest", "MANIFEST", "--minutes=0"], "--minutes is above 0"),
    "no manifest": (["--manifest", "/nowhere.csv"], "/nowhere.csv"),
    "a value out of range": (["--manifest", "MANIFEST", "--whiten=8"], "whiten is the number of components kept"),
    "a word too many": (["--manifest", "MANIFEST", "whiten", "32"], "'whiten' belongs to no option"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(case, manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, message = BAD_INPUT[case]
    words = [str(manifest) if word == "MANIFEST" else word for word in words]
    small = [option for option in SMALL if option.split("=")[0] not in " ".join(words)]
    assert main(["check-codebook", HPARAMS, *words, *small]) == 2
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("sb-bestrq: error: ")]
    assert output.out == "" and len(lines) == 1
    assert any(part in lines[0] for part in message.split("|"))
    assert not list(tmp_path.rglob("*.png"))
