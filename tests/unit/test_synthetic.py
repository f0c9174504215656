"""Synthetic corpora: the voices, the recordings, the four layouts, going on after an interruption."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechbrain_bestrq import cli
from speechbrain_bestrq.corpora import _espeak, _voices, prepare_librispeech, read_manifest, read_summary, synthetic
from speechbrain_bestrq.corpora._espeak import Espeak, Request
from speechbrain_bestrq.corpora._intents import INTENTS, SLOTS, draw_sentence
from speechbrain_bestrq.corpora._layouts import LAYOUTS
from speechbrain_bestrq.corpora._rooms import Room, record
from speechbrain_bestrq.corpora._texts import TEMPLATES, compose, transcript
from speechbrain_bestrq.corpora._voices import Delivery, Speaker, estimate_seconds
from speechbrain_bestrq.corpora.synthetic import make_synthetic
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.locking import sole_writer

SIZES = {
    "librispeech": {"hours": 0.01, "speakers": 2},
    "voxceleb": {"hours": 0.01, "speakers": 2},
    "iemocap": {"hours": 0.03},
    "slurp": {"hours": 0.006, "speakers": 2},
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """One small corpus of each layout, only to be read."""
    root = tmp_path_factory.mktemp("synthetic")
    for layout, size in SIZES.items():
        make_synthetic(root / layout, layout, **size)
    return root


@pytest.fixture(scope="module")
def espeak():
    with Espeak() as espeak:
        yield espeak


def digests(folder):
    """Content of all files of a corpus, but for its record, which has the folder's name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "CORPUS.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def audio_of(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix in (".flac", ".wav"))


# --- voices ---

BREATHY = Request("Nobody answered the door, and the road was full of people.", "en-us+f3", 160, 50, 50, 7)


# breath is of espeak-ng's own random numbers, Reed's voice of the C library's
@pytest.mark.parametrize("variant", ["f3", "Reed"])
def test_speech_depends_on_the_request_alone_not_on_what_was_said_before(espeak, variant):
    request = BREATHY._replace(voice=f"en-us+{variant}")
    first = espeak.speak(request)
    assert len(first) > 2 * _espeak.SAMPLE_RATE
    espeak.speak(Request("Something else, by someone else!", "en+Alicia", 300, 90, 90, 1))
    assert np.array_equal(espeak.speak(request), first)
    with Espeak() as another:
        assert np.array_equal(another.speak(request), first)
    assert not np.array_equal(espeak.speak(request._replace(seed=9)), first)


@pytest.mark.parametrize("change", [{"rate": 240}, {"pitch": 80}, {"range": 95}, {"voice": "en-us+m1"}])
def test_every_setting_changes_the_speech(espeak, change):
    usual = BREATHY._replace(voice="en-us+m4")
    assert not np.array_equal(espeak.speak(usual._replace(**change)), espeak.speak(usual))


def test_every_accent_speaks(espeak):
    said = {accent: espeak.speak(BREATHY._replace(voice=f"{accent}+m4")).tobytes() for accent in _voices.ACCENTS}
    assert len(set(said.values())) == len(said)


def test_every_variant_is_there():
    # espeak-ng says nothing about a variant that is not there, and takes its usual voice
    present = set(os.listdir(Path(_espeak.find_library()[1]) / "voices" / "!v"))
    for variants in _voices.VARIANTS.values():
        assert len(set(variants)) == len(variants) and set(variants) <= present


def test_a_voice_that_is_not_there_is_an_error_and_the_next_one_speaks(espeak):
    with pytest.raises(RuntimeError, match="could not say 'Yes.' with the voice 'en-nowhere'"):
        espeak.speak(BREATHY._replace(text="Yes.", voice="en-nowhere"))
    assert len(espeak.speak(BREATHY))


def test_a_long_path_of_the_data_is_no_obstacle(tmp_path, monkeypatch):
    # espeak-ng keeps paths in buffers of some 160 characters
    library, data = _espeak.find_library()
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    (folder / "data").symlink_to(data)
    monkeypatch.setattr(_espeak, "find_library", lambda: (library, str(folder / "data")))
    with Espeak() as espeak:
        assert len(espeak.speak(BREATHY))


def test_a_library_that_does_not_load_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "libespeak-ng.so").write_text("no library")
    monkeypatch.setattr(_espeak, "find_library", lambda: (str(tmp_path / "libespeak-ng.so"), str(tmp_path)))
    with pytest.raises(InputError, match="^espeak-ng does not start .*: install espeakng-loader anew.$"):
        Espeak()


def test_without_espeak_the_error_says_what_to_install_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(InputError, match=r"pip install espeakng-loader"):
        make_synthetic(tmp_path / "new", "librispeech", hours=0.001, speakers=2)
    assert not any((tmp_path / "new").iterdir())


# --- recordings ---

SPEAKER = Speaker("en-us+m4", "M", 160.0, 50.0, 50.0, 320, 0.0)
DEAD = Room(0, 0.2, 90.0, 60.0, 0.0, -26.0, (0.0,) * 6)


def tone(frequency, seconds=2.0):
    time = np.arange(round(seconds * _espeak.SAMPLE_RATE)) / _espeak.SAMPLE_RATE
    return (8000.0 * np.sin(2.0 * np.pi * frequency * time)).astype(np.int16)


def record_tone(frequency=1000.0, tract=320, room=DEAD, delivery=_voices.USUAL, seed=0):
    recording = record(tone(frequency), SPEAKER._replace(tract=tract), delivery, room, np.random.default_rng(seed))
    return recording / 32768.0


def spectral_peak(signal):
    return np.abs(np.fft.rfft(signal * np.hanning(len(signal)))).argmax() * 16000.0 / len(signal)


@pytest.mark.parametrize("tract", sorted({*_voices.TRACTS["F"], *_voices.TRACTS["M"]}))
def test_a_longer_vocal_tract_lowers_every_frequency(tract):
    recording = record_tone(1000.0, tract)
    assert spectral_peak(recording) == pytest.approx(1000.0 * 320 / tract, abs=1.0)
    # and what was 2 s is longer by as much; 0.2 to 1 s of silence around it
    assert 2.0 * tract / 320 + 0.2 <= len(recording) / 16000 <= 2.0 * tract / 320 + 1.1


def test_level_and_noise_are_those_of_the_room():
    room = DEAD._replace(level=-30.0, snr=20.0)
    recording = record_tone(room=room)
    speech = 10 * np.log10(np.mean(recording[16000:24000] ** 2))
    noise = 10 * np.log10(np.mean(recording[:1500] ** 2))
    assert speech == pytest.approx(-30.0, abs=0.5)
    assert speech - noise == pytest.approx(20.0, abs=1.0)
    louder = record_tone(room=room, delivery=Delivery(gain=6.0))
    assert 10 * np.log10(np.mean(louder[16000:24000] ** 2)) == pytest.approx(-24.0, abs=0.5)


def test_nothing_is_clipped():
    recording = record_tone(delivery=Delivery(gain=60.0))
    assert np.abs(recording).max() == pytest.approx(0.9, abs=0.001)


def test_the_echo_follows_the_speech_and_does_not_wrap_round():
    echoing = record_tone(room=DEAD._replace(reverberation=0.6, direct=-5.0, snr=60.0), seed=3)
    energy = echoing**2
    assert energy[:1500].mean() < 1e-4 * energy.max()
    end = np.flatnonzero(energy > 0.01 * energy.max())[-1]
    dry = np.flatnonzero(record_tone(seed=3) ** 2 > 0.01 * energy.max())[-1]
    assert end > dry


def test_tilt_is_in_decibels_an_octave():
    flat, tilted = (
        [np.abs(np.fft.rfft(record_tone(f, delivery=Delivery(tilt=tilt))[8000:24000])).max() for f in (500.0, 2000.0)]
        for tilt in (0.0, -3.0)
    )
    change = 20 * np.log10((tilted[1] / tilted[0]) / (flat[1] / flat[0]))
    # the level is set after the tilt: each tone alone comes out as loud as before
    assert change == pytest.approx(0.0, abs=0.2)
    both = tone(500.0).astype(float) / 2 + tone(2000.0).astype(float) / 2
    spectra = [
        np.abs(np.fft.rfft(record(both, SPEAKER, Delivery(tilt=tilt), DEAD, np.random.default_rng(0))[8000:24000]))
        for tilt in (0.0, -3.0)
    ]
    ratios = [20 * np.log10(spectrum[2000] / spectrum[500]) for spectrum in spectra]
    assert ratios[1] - ratios[0] == pytest.approx(-6.0, abs=0.3)


# --- texts ---


@pytest.mark.parametrize("kind", TEMPLATES)
def test_texts_have_the_words_asked_for_and_none_left_to_fill_in(kind):
    generator = np.random.default_rng(0)
    texts = [compose(kind, 12, generator) for _ in range(300)]
    assert len(set(texts)) > 290
    for text in texts:
        assert 12 <= len(text.split()) <= 12 + 20
        assert text[0].isupper() and text[-1] == "." and not re.search(r"[{}|]| a [aeiou]|  ", text)
        assert re.fullmatch(r"[A-Z']+( [A-Z']+)*", transcript(text))
        assert len(transcript(text).split()) == len(text.split())


def test_every_template_of_an_intent_can_be_said():
    for actions in INTENTS.values():
        for templates in actions.values():
            for template in templates.split("|"):
                assert set(re.findall(r"\{(\w+)\}", template)) <= set(SLOTS)
                assert re.fullmatch(r"[a-zA-Z' {}_]+", template) and template == " ".join(template.split())


def test_entities_are_where_they_say():
    generator = np.random.default_rng(0)
    for _ in range(200):
        sentence = draw_sentence("train", generator)
        annotated = re.findall(r"\[(\w+) : ([^\]]+)\]", sentence.annotation)
        assert annotated == [(kind, " ".join(sentence.words[a:b])) for kind, a, b in sentence.entities]
        assert re.sub(r"\[\w+ : ([^\]]+)\]", r"\1", sentence.annotation) == sentence.text


# --- all layouts ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recordings_are_16_khz_speech_of_sensible_length_and_level(corpora, layout):
    files = audio_of(corpora / layout)
    assert len(files) >= 10
    for path in files:
        samples, rate = soundfile.read(path)
        assert rate == 16000 and samples.ndim == 1 and soundfile.info(path).subtype == "PCM_16"
        assert 1.0 < len(samples) / rate < 20.0
        assert 0.003 < np.sqrt(np.mean(samples**2)) < 0.3 and np.abs(samples).max() <= 0.91
        # speech comes and goes: its loud parts stand out from its quiet ones
        frames = samples[: len(samples) // 400 * 400].reshape(-1, 400)
        loud, quiet = np.percentile((frames**2).mean(1), [90, 5])
        assert loud > 3.0 * quiet


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_record_says_what_the_recordings_are_and_what_was_made(corpora, layout):
    record = json.loads((corpora / layout / "CORPUS.json").read_text())
    assert record["name"] == f"synthetic speech by espeak-ng in the layout of {LAYOUTS[layout].corpus}"
    files = audio_of(corpora / layout)
    assert record["made"]["utterances"] == len(files)
    seconds = sum(soundfile.info(path).duration for path in files)
    assert 3600 * record["made"]["hours"] == pytest.approx(seconds, abs=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_is_as_long_as_asked_by_estimates_that_hold(corpora, layout):
    size = SIZES[layout]
    utterances = list(LAYOUTS[layout].plan(size["hours"], size.get("speakers", 10), 0))
    guessed = sum(estimate_seconds(item.text, item.speaker, item.delivery) for item in utterances)
    measured = sum(soundfile.info(corpora / layout / item.path).duration for item in utterances)
    assert measured == pytest.approx(guessed, rel=0.12)
    # without the least number of utterances of each speaker, a part ends with the utterance that fills it
    plan = LAYOUTS[layout].plan(1.0, size.get("speakers", 10), 0)
    train = [
        item
        for item in plan
        if item.labels.get("split", item.labels.get("part", "train-"))
        in ("train-clean-100", "train", "dev" if layout == "voxceleb" else "train-")
    ]
    total = sum(estimate_seconds(item.text, item.speaker, item.delivery) for item in train)
    assert 3600 <= total < 3600 + 5 * 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_the_same_for_any_number_of_workers_and_after_an_interruption(corpora, tmp_path, monkeypatch, layout):
    made, record_whole = [], synthetic.record

    def record_some(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return record_whole(*arguments)

    folder = tmp_path / "again"
    monkeypatch.setattr(synthetic, "record", record_some)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic(folder, layout, **SIZES[layout], workers=1)
    assert len(audio_of(folder)) == 3 and not list(folder.rglob(".*"))
    kept = {path: path.stat().st_mtime_ns for path in audio_of(folder)}
    monkeypatch.setattr(synthetic, "record", record_whole)
    result = make_synthetic(folder, layout, **SIZES[layout], workers=3)
    assert digests(folder) == digests(corpora / layout)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert result["data_folder"] == str(folder)


def test_another_seed_is_another_corpus(corpora, tmp_path):
    make_synthetic(tmp_path / "other", "librispeech", **SIZES["librispeech"], seed=1)
    assert not set(digests(tmp_path / "other").values()) & set(digests(corpora / "librispeech").values())


def test_a_second_call_does_nothing(corpora, monkeypatch):
    folder = corpora / "slurp"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    made = make_synthetic(folder, "slurp", **SIZES["slurp"])
    assert made["utterances"] == len(audio_of(folder)) and made["data_folder"] == str(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# --- refusals ---


@pytest.mark.parametrize(
    "change",
    [{"hours": 0.02}, {"speakers": 3}, {"seed": 5}, {"layout": "voxceleb"}],
    ids=lambda change: next(iter(change)),
)
def test_a_corpus_of_other_parameters_is_refused_and_kept(corpora, change):
    before = digests(corpora / "librispeech")
    (key,) = change
    with pytest.raises(InputError, match=f"holds a synthetic corpus of {key} .*: give another folder, or delete"):
        make_synthetic(corpora / "librispeech", **{"layout": "librispeech", **SIZES["librispeech"], **change})
    assert digests(corpora / "librispeech") == before


@pytest.mark.parametrize("name", ["notes.txt", "CORPUS.json"])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path, name):
    (tmp_path / name).write_text('{"name": "my recordings"}')
    with pytest.raises(InputError, match="files that are not of a synthetic corpus: give a new or empty folder"):
        make_synthetic(tmp_path, "librispeech", hours=0.001, speakers=2)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"name": "my recordings"}'


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    with sole_writer(tmp_path), pytest.raises(InputError, match="is being written by another process: wait for it"):
        make_synthetic(tmp_path, "librispeech", hours=0.001, speakers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "timit"}, "layout is one of librispeech, voxceleb, iemocap, slurp, not 'timit'"),
        ({"hours": 0.0}, "hours is the length"),
        ({"hours": float("inf")}, "hours is the length"),
        ({"hours": float("nan")}, "hours is the length"),
        ({"speakers": 1}, "speakers is a count, at least 2"),
        ({"layout": "iemocap", "speakers": 12}, "IEMOCAP has 10, not 12: leave it out"),
        ({"hours": 50.0, "speakers": 4}, "speakers: 4 would say 12 hours each, .* at least 5"),
        ({"seed": -1}, "seed is a whole number"),
        ({"workers": 0}, "workers is a count of threads"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make_synthetic(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        make_synthetic(tmp_path / "file" / "new", "librispeech")


# --- each layout ---


def test_librispeech_is_taken_by_its_preparation_with_transcripts(corpora, tmp_path):
    splits = ("train-clean-100", "dev-clean", "test-clean")
    manifests = prepare_librispeech(
        corpora / "librispeech", tmp_path, *([split] for split in splits), resample=False, transcripts=True
    )
    assert read_summary(manifests["train"])["corpus"].startswith("synthetic speech by espeak-ng")
    rows = {split: read_manifest(manifests[split]) for split in splits}
    speakers = [{row["spk_id"] for row in rows[split].values()} for split in splits]
    assert [len(found) for found in speakers] == [2, 4, 4]
    assert len(set.union(*speakers)) == 10
    for row in [row for found in rows.values() for row in found.values()]:
        # 1 to 5 words a second, and nothing but words
        assert 1.0 < len(row["wrd"].split()) / row["duration"] < 5.0
        assert re.fullmatch(r"[A-Z' ]+", row["wrd"])


def test_librispeech_lists_its_speakers(corpora):
    lines = (corpora / "librispeech" / "SPEAKERS.TXT").read_text().splitlines()
    rows = [[field.strip() for field in line.split("|")] for line in lines if not line.startswith(";")]
    for speaker, gender, split, minutes, _ in rows:
        files = list((corpora / "librispeech" / split / speaker).rglob("*.flac"))
        assert float(minutes) == pytest.approx(sum(soundfile.info(path).duration for path in files) / 60, abs=0.006)
        assert gender in ("F", "M")
    assert len(rows) == 10


def test_voxceleb_trials_are_of_speakers_of_their_own_and_across_videos(corpora):
    root = corpora / "voxceleb"
    sets = {
        line.split("\t")[0]: line.split("\t")[4]
        for line in (root / "meta" / "vox1_meta.csv").read_text().splitlines()[1:]
    }
    assert {path.name for path in (root / "wav").iterdir()} == set(sets)
    trials = [line.split() for line in (root / "meta" / "veri_test.txt").read_text().splitlines()]
    assert len({tuple(trial) for trial in trials}) == len(trials)
    labels = [int(label) for label, _, _ in trials]
    assert 0.3 < np.mean(labels) < 0.7
    for label, *paths in trials:
        assert all((root / "wav" / path).is_file() for path in paths)
        (first, video, _), (second, other, _) = (path.split("/") for path in paths)
        assert sets[first] == sets[second] == "test"
        assert (first == second) == (label == "1") and (first, video) != (second, other)
    named = {path for _, *paths in trials for path in paths}
    assert named == {str(path.relative_to(root / "wav")) for path in audio_of(root) if sets[path.parts[-3]] == "test"}


def test_iemocap_has_a_label_and_a_transcript_for_every_turn(corpora):
    root = corpora / "iemocap"
    turns = {}
    for path in root.glob("Session*/dialog/EmoEvaluation/*.txt"):
        end = 0.0
        lines = [line for line in path.read_text().splitlines() if line.startswith("[")]
        for line in lines:
            times, turn, emotion, attributes = line.split("\t")
            start, stop = map(float, re.fullmatch(r"\[(\d+\.\d{4}) - (\d+\.\d{4})\]", times).groups())
            assert start > end and turn.startswith(path.stem)
            end = stop
            assert re.fullmatch(r"\[[1-5]\.[05]000, [1-5]\.[05]000, [1-5]\.[05]000\]", attributes)
            turns[turn] = (emotion, stop - start)
    for path in audio_of(root):
        emotion, seconds = turns.pop(path.stem)
        assert path.parts[-2] == path.stem.rpartition("_")[0] and path.parts[-5] == f"Session{path.stem[4]}"
        assert soundfile.info(path).duration == pytest.approx(seconds, abs=1e-3)
        assert re.fullmatch("ang|hap|exc|neu|sad|fru|sur|fea|oth", emotion)
        said = (root / path.parts[-5] / "dialog" / "transcriptions" / f"{path.parts[-2]}.txt").read_text()
        assert re.search(rf"^{path.stem} \[\d{{3}}\.\d{{4}}-\d{{3}}\.\d{{4}}\]: \w.*\.$", said, re.M)
    assert not turns
    assert {path.stem[:5] + path.stem.rpartition("_")[2][0] for path in audio_of(root)} == {
        f"Ses0{session}{letter}" for session in range(1, 6) for letter in "FM"
    }


def test_slurp_shares_no_sentence_and_no_speaker_between_its_parts(corpora):
    root = corpora / "slurp"
    metadata = json.loads((root / "dataset" / "slurp" / "metadata.json").read_text())
    sentences, speakers, files = [], [], []
    for part in ("train", "devel", "test"):
        entries = [json.loads(line) for line in (root / "dataset" / "slurp" / f"{part}.jsonl").read_text().splitlines()]
        sentences.append({entry["sentence"] for entry in entries})
        for entry in entries:
            assert entry["intent"] == f"{entry['scenario']}_{entry['action']}"
            assert entry["action"] in INTENTS[entry["scenario"]]
            assert " ".join(token["surface"] for token in entry["tokens"]) == entry["sentence"]
            for entity in entry["entities"]:
                words = " ".join(entry["tokens"][place]["surface"] for place in entity["span"])
                assert f"[{entity['type']} : {words}]" in entry["sentence_annotation"]
        found = [recording["file"] for entry in entries for recording in entry["recordings"]]
        users = {str(e["slurp_id"]): metadata[str(e["slurp_id"])]["recordings"] for e in entries}
        speakers.append({recording["usrid"] for recordings in users.values() for recording in recordings.values()})
        assert sorted(found) == sorted(file for recordings in users.values() for file in recordings)
        files += found
    assert sorted(files) == sorted(path.name for path in (root / "audio" / "slurp_real").iterdir())
    for parts in (sentences, speakers):
        assert len(set.union(*parts)) == sum(map(len, parts))


# --- command ---


def test_the_command_knows_every_layout():
    for layout in LAYOUTS:
        words = ["synthesize", "--layout", layout, "--output_folder", "new"]
        assert cli.build_parser().parse_args(words).layout == layout


def test_the_command_makes_a_corpus_and_prints_what_it_made(tmp_path, capsys):
    words = ["synthesize", "--layout", "slurp", "--output_folder", str(tmp_path / "new"), "--hours", "0.001"]
    assert cli.main([*words, "--speakers", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["layout"] == "slurp" and made["utterances"] == len(audio_of(tmp_path / "new"))
    assert cli.main(words) == 2
    assert "holds a synthetic corpus of speakers 2" in capsys.readouterr().err
