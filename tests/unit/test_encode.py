"""Encoding a folder: what is written, in any order and after any interruption, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import soundfile
import torch

from speechbrain_bestrq import encode
from speechbrain_bestrq.artefact import load_encoder, save_encoder
from speechbrain_bestrq.audio import read_segment
from speechbrain_bestrq.cli import main
from speechbrain_bestrq.corpora._audio_files import Probe, probe_audio
from speechbrain_bestrq.encode import chosen_layers, encode_folder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.hidden_states import HiddenStatesFile
from speechbrain_bestrq.locking import sole_writer
from speechbrain_bestrq.windows import Window, plan_batches, plan_windows, samples_per_frame

RATE = 16000


def noise(seconds, rate=RATE, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))


@pytest.fixture
def encoder(make_speech_encoder, tmp_path):
    """A run's output folder with an encoder of three hidden states."""
    save_encoder(make_speech_encoder(normalize="global"), tmp_path / "run" / "encoder", "# Tiny")
    return tmp_path / "run"


@pytest.fixture
def audio(tmp_path):
    """Files of several lengths, depths, rates and channels."""
    folder = tmp_path / "audio"
    (folder / "deep" / "er").mkdir(parents=True)
    for number, seconds in enumerate((0.3, 2.5, 1.1, 0.04, 1.7)):
        soundfile.write(folder / f"{number}.wav", noise(seconds, seed=number), RATE)
    soundfile.write(folder / "deep" / "other rate.flac", noise(1.5, 44100, seed=10), 44100)
    soundfile.write(
        folder / "deep" / "er" / "é.b.wav", np.stack([noise(0.9, 8000, seed) for seed in (11, 12)], 1), 8000
    )
    (folder / "deep" / "notes.txt").write_text("no audio")
    return folder


def one_at_a_time(encoder, path):
    """All hidden states of a file by itself, (layers, T, D)."""
    info = soundfile.info(path)
    wave = read_segment(str(path), 0, round(info.frames / info.samplerate * RATE), RATE)
    with torch.inference_mode():
        return load_encoder(encoder / "encoder")(torch.from_numpy(wave)[None])[0][:, 0].numpy()


def outputs(folder):
    return {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}


RECORDS = {"encoding.json", "encoded.jsonl"}


def times(folder):
    return {name: path.stat().st_mtime_ns for name, path in outputs(folder).items() if name not in RECORDS}


# ---------------------------------------------------------------- what is written


def test_files_in_a_batch_equal_each_by_itself(encoder, audio, tmp_path, relative_difference):
    summary = encode_folder(encoder, audio, tmp_path / "out", layers=["all"])
    assert summary["layers"] == [0, 1, 2] and summary["files"] == summary["encoded"] == 7
    expected = {"0.npy", "1.npy", "2.npy", "3.npy", "4.npy", "deep/other rate.npy", "deep/er/é.b.npy"}
    assert set(outputs(tmp_path / "out")) == expected | RECORDS
    sources = {path.with_suffix("").relative_to(audio): path for path in audio.rglob("*") if path.suffix != ".txt"}
    for name, path in outputs(tmp_path / "out").items():
        if name in RECORDS:
            continue
        ours = np.load(path)
        alone = one_at_a_time(encoder, sources[Path(name).with_suffix("")])
        assert ours.dtype == np.float32 and ours.shape == alone.shape
        assert relative_difference(torch.from_numpy(alone), torch.from_numpy(ours)) < 1e-5, name


def test_an_encoder_that_hears_waveforms_does_as_well(audio, tmp_path, relative_difference, toy):
    save_encoder(toy.make_wav2vec2().speech_encoder, tmp_path / "run" / "encoder", "# Tiny")
    assert encode_folder(tmp_path / "run", audio, tmp_path / "out", layers=["all"])["encoded"] == 7
    for name in times(tmp_path / "out"):
        alone = one_at_a_time(tmp_path / "run", next(audio.rglob(f"{Path(name).stem}.*")))
        states = np.load(tmp_path / "out" / name)
        assert states.shape == alone.shape
        assert relative_difference(torch.from_numpy(states), torch.from_numpy(alone)) < 1e-5


def test_layers_come_in_the_order_given_and_formats_hold_the_same(encoder, audio, tmp_path):
    encode_folder(encoder, audio, tmp_path / "all", layers=["all"])
    encode_folder(encoder / "encoder", audio, tmp_path / "some", layers=["-1", "0"], file_format="safetensors")
    every = np.load(tmp_path / "all" / "2.npy")
    some = safetensors.numpy.load_file(tmp_path / "some" / "2.safetensors")
    assert set(some) == {"hidden_states"}
    np.testing.assert_array_equal(some["hidden_states"], every[[2, 0]])


def test_a_long_file_is_encoded_in_windows_with_context(encoder, tmp_path, relative_difference):
    """70 s are two windows: what is kept of each is what the encoder says of that stretch."""
    wave = noise(70.013)
    (tmp_path / "long").mkdir()
    soundfile.write(tmp_path / "long" / "a.wav", wave, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "long" / "b.wav", wave[: 3 * RATE], RATE, subtype="FLOAT")
    encode_folder(encoder, tmp_path / "long", tmp_path / "out", layers=[1, 2])
    hidden = torch.from_numpy(np.load(tmp_path / "out" / "a.npy"))
    assert hidden.shape == (2, 1750, 16)
    speech_encoder = load_encoder(encoder / "encoder")
    whole = torch.from_numpy(wave).float()[None]
    with torch.inference_mode():
        first = speech_encoder(whole[:, : 60 * RATE])[0][1:, 0, :1375]
        second = speech_encoder(whole[:, 50 * RATE :])[0][1:, 0, 125:]
    assert relative_difference(torch.cat([first, second], 1), hidden) < 1e-5
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_windows_share_out_every_frame_once_with_context_on_both_sides():
    for seconds in (0.04, 59.9, 60.0, 60.03, 60.05, 61, 109.99, 110, 110.1, 400, 3601.7):
        samples = round(seconds * RATE)
        frames = (1 + samples // 160) // 4
        windows = list(plan_windows(7, samples, frames, 640, RATE))
        kept = [frame for window in windows for frame in range(window.first, window.first + window.frames)]
        assert kept == list(range(frames)), seconds
        assert all(window.file == 7 and window.start % 640 == 0 for window in windows)
        for number, window in enumerate(windows):
            begin, heard = window.start // 640, (1 + window.samples // 160) // 4
            assert window.first - begin == window.skipped >= (125 if number else 0)
            after = begin + heard - (window.first + window.frames)
            assert after >= 125 if number < len(windows) - 1 else after == 0
            assert window.samples < 60 * RATE + 640 and window.start + window.samples <= samples
        assert windows[-1].start + windows[-1].samples == samples


def test_no_batch_is_larger_than_allowed_and_none_is_left_out():
    lengths = sorted(np.random.default_rng(0).integers(1, 100, 200).tolist(), reverse=True)
    windows = [Window(number, 0, length, 0, 0, 1) for number, length in enumerate(lengths)]
    batches = list(plan_batches(windows, 250))
    assert [window for batch in batches for window in batch] == windows
    assert all(len(batch) * max(window.samples for window in batch) <= 250 for batch in batches)
    assert len(batches) < 80


@pytest.mark.parametrize(
    ("frontend", "step"),
    [
        ({}, 640),
        ({"hop_ms": 12}, 768),
        ({"sample_rate": 22050}, 880),
        ({"hop_ms": 200, "window_ms": 200}, 12800),
    ],
)
def test_the_step_of_a_front_end_is_found_and_the_windows_of_a_long_file_fit_it(make_speech_encoder, frontend, step):
    encoder = make_speech_encoder(**frontend)
    rate = encoder.frontend.sample_rate
    assert samples_per_frame(encoder) == step
    samples = round(205.3 * rate)
    windows = list(plan_windows(0, samples, encoder.num_frames(samples), step, rate))
    assert len(windows) > 2 and all(window.start % step == 0 for window in windows)
    for window in windows:
        assert window.skipped + window.frames <= encoder.num_frames(window.samples)


# ---------------------------------------------------------------- once more


def test_a_second_call_does_what_is_missing_and_nothing_else(encoder, audio, tmp_path):
    out = tmp_path / "out"
    encode_folder(encoder, audio, out)
    before = {name: path.read_bytes() for name, path in outputs(out).items()}
    (out / "1.npy").unlink()
    (out / "2.npy").write_bytes(before["2.npy"][:-1])  # cut short by a crash
    os.utime(out / "deep" / "er" / "é.b.npy", ns=(4 * 10**18, 4 * 10**18))
    kept = times(out)
    soundfile.write(audio / "new.wav", noise(0.5), RATE)
    summary = encode_folder(encoder, audio, out)
    assert (summary["encoded"], summary["skipped"]) == (3, 5)
    after = {name: path.read_bytes() for name, path in outputs(out).items()}
    assert after.pop("new.npy") and after.keys() == before.keys()
    for name, content in before.items():
        if name in RECORDS:
            assert after[name].startswith(content)
            continue
        if name in ("1.npy", "2.npy"):  # in other company: equal but for rounding
            np.testing.assert_allclose(
                np.frombuffer(after[name], "<f4", offset=128), np.frombuffer(content, "<f4", offset=128), atol=1e-5
            )
        else:
            assert after[name] == content and times(out)[name] == kept[name]
    assert encode_folder(encoder, audio, out)["encoded"] == 0


def test_audio_that_was_replaced_is_encoded_again(encoder, audio, tmp_path):
    out = tmp_path / "out"
    encode_folder(encoder, audio, out)
    before = (out / "1.npy").read_bytes()
    name = next(path for path in audio.iterdir() if path.stem == "1")
    wave, rate = soundfile.read(name)
    soundfile.write(name, wave[::-1], rate)
    later = (out / "1.npy").stat().st_mtime_ns + 10**9
    os.utime(name, ns=(later, later))
    assert encode_folder(encoder, audio, out)["encoded"] == 1
    assert (out / "1.npy").read_bytes() != before


def test_audio_of_another_date_or_ending_is_not_taken_for_what_was_encoded(encoder, audio, tmp_path):
    out = tmp_path / "out"
    encode_folder(encoder, audio, out)
    before = (out / "1.npy").read_bytes()
    wave, rate = soundfile.read(audio / "1.wav")
    day = 86400 * 10**9
    earlier = (audio / "1.wav").stat().st_mtime_ns - day  # as mv and cp -p leave it
    soundfile.write(audio / "1.wav", wave[::-1], rate)
    os.utime(audio / "1.wav", ns=(earlier, earlier))
    assert encode_folder(encoder, audio, out)["encoded"] == 1
    replaced = (out / "1.npy").read_bytes()
    assert replaced != before
    # of one length and one time, by another name
    soundfile.write(audio / "1.flac", wave, rate)
    (audio / "1.wav").rename(audio / "1.bak")
    os.utime(audio / "1.flac", ns=(earlier, earlier))
    assert encode_folder(encoder, audio, out)["encoded"] == 1
    assert (out / "1.npy").read_bytes() != replaced
    assert encode_folder(encoder, audio, out)["encoded"] == 0


def test_audio_that_is_taken_away_after_it_was_read_ends_nothing(encoder, audio, tmp_path, monkeypatch):
    write = HiddenStatesFile.write

    def taken(file, first, values):
        (audio / "1.wav").unlink(missing_ok=True)
        write(file, first, values)

    monkeypatch.setattr(HiddenStatesFile, "write", taken)
    assert encode_folder(encoder, audio, tmp_path / "out")["encoded"] == 7


def test_a_damaged_list_counts_as_far_as_it_can_be_read(encoder, audio, tmp_path):
    out = tmp_path / "out"
    encode_folder(encoder, audio, out)
    record = out / "encoded.jsonl"
    record.write_bytes(b"\xff\xfe\n" + record.read_bytes())
    assert encode_folder(encoder, audio, out)["encoded"] == 0


def test_a_line_that_a_kill_has_torn_costs_one_file(encoder, audio, tmp_path):
    out = tmp_path / "out"
    encode_folder(encoder, audio, out)
    record = out / "encoded.jsonl"
    record.write_bytes(record.read_bytes()[:-9])
    assert encode_folder(encoder, audio, out)["encoded"] == 1
    assert encode_folder(encoder, audio, out)["encoded"] == 0


def test_features_of_another_folder_are_not_taken_for_these(encoder, audio, tmp_path):
    out = tmp_path / "out"
    encode_folder(encoder, audio, out)
    other = shutil.copytree(audio, tmp_path / "other")
    with pytest.raises(InputError, match="holds hidden states of other settings .audio_folder"):
        encode_folder(encoder, other, out)


def test_two_processes_do_not_write_to_one_folder(encoder, audio, tmp_path):
    with sole_writer(tmp_path / "out"), pytest.raises(InputError, match="is being written by another process"):
        encode_folder(encoder, audio, tmp_path / "out")


def test_an_interrupted_call_leaves_whole_files_alone_and_is_finished_by_the_next(
    encoder, audio, tmp_path, monkeypatch
):
    write, count = HiddenStatesFile.write, 0

    def interrupted(file, first, values):
        nonlocal count
        count += 1
        if count == 4:
            file.file.write(b"half of it")
            assert not file.path.exists(), "a kill now would leave a file that seems whole"
            raise KeyboardInterrupt
        write(file, first, values)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStatesFile, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode_folder(encoder, audio, tmp_path / "out", layers=["all"])
    assert len(times(tmp_path / "out")) == 3
    encode_folder(encoder, audio, tmp_path / "whole", layers=["all"])
    summary = encode_folder(encoder, audio, tmp_path / "out", layers=["all"])
    assert summary["skipped"] == 3 and summary["encoded"] == 4
    assert outputs(tmp_path / "out").keys() == outputs(tmp_path / "whole").keys()
    for name in times(tmp_path / "whole"):
        np.testing.assert_allclose(
            np.load(tmp_path / "out" / name), np.load(tmp_path / "whole" / name), atol=1e-5, err_msg=name
        )


def test_a_folder_of_other_settings_is_refused_and_left_alone(encoder, audio, tmp_path, make_speech_encoder):
    out = tmp_path / "out"
    encode_folder(encoder, audio, out)
    before = times(out)
    save_encoder(make_speech_encoder(normalize="global", seed=1), tmp_path / "other", "# Other")
    for message, options in {
        r"layers: \[2\] there, \[0\] here": {"layers": [0]},
        r"format: npy there, safetensors here": {"file_format": "safetensors"},
        r"encoder: [0-9a-f]+ there, [0-9a-f]+ here": {"encoder": tmp_path / "other"},
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            encode_folder(**{"encoder": encoder, "audio_folder": audio, "output_folder": out, **options})
        assert "\n" not in str(caught.value) and "another output_folder" in str(caught.value)
    assert times(out) == before
    shutil.copytree(encoder, tmp_path / "moved")
    assert encode_folder(tmp_path / "moved", audio, out)["skipped"] == 7


def test_a_folder_of_other_things_is_refused(encoder, audio):
    before = outputs(audio).keys()
    with pytest.raises(InputError, match="holds other things: give a new folder"):
        encode_folder(encoder, audio, audio)
    assert outputs(audio).keys() == before


# ---------------------------------------------------------------- what cannot be used


def test_two_files_of_one_output_are_refused_before_anything_is_written(encoder, audio, tmp_path):
    soundfile.write(audio / "deep" / "other rate.wav", noise(0.5), RATE)
    with pytest.raises(InputError, match=r"other rate\.flac' and 'deep/other rate\.wav' .* would have one output"):
        encode_folder(encoder, audio, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert encode_folder(encoder, audio, tmp_path / "out", extensions=["wav"])["encoded"] == 7


def test_unreadable_files_are_counted_and_named_up_to_the_limit(encoder, audio, tmp_path, monkeypatch):
    """Two whose header tells, one whose audio turns out to be damaged."""
    (audio / "empty.wav").write_bytes(b"")
    soundfile.write(audio / "short.wav", noise(0.026), RATE)
    with pytest.raises(InputError, match=r"2 audio files .* first empty\.wav: the file is empty: .*--max_unreadable 2"):
        encode_folder(encoder, audio, tmp_path / "out", max_unreadable=1)
    assert not (tmp_path / "out").exists()

    def damaged(path, *arguments):
        if path.endswith("2.wav"):
            assert arguments[-1] == "mend or remove it"  # other audio in its place would be encoded under its name
            raise InputError(f"{path} cannot be read.")
        return read_segment(path, *arguments)

    monkeypatch.setattr(encode, "read_segment", damaged)
    with pytest.raises(InputError, match="3 audio files"):
        encode_folder(encoder, audio, tmp_path / "out", max_unreadable=2)
    summary = encode_folder(encoder, audio, tmp_path / "lenient", max_unreadable=3)
    assert (summary["unreadable"], summary["files"], summary["encoded"]) == (3, 6, 6)
    # without 2.wav
    assert summary["hours"] == pytest.approx((0.3 + 2.5 + 0.04 + 1.7 + 1.5 + 0.9) / 3600, abs=1e-6)
    assert [line.split(":")[0] for line in summary["unreadable_files"]] == ["empty.wav", "short.wav", "2.wav"]
    assert "2.npy" not in outputs(tmp_path / "lenient") and len(times(tmp_path / "lenient")) == 6


def test_states_of_audio_that_cannot_be_read_any_more_are_removed(encoder, audio, tmp_path, monkeypatch):
    """One whose header tells, and one whose audio turns out to be damaged; others of the folder stay."""
    out = tmp_path / "out"
    encode_folder(encoder, audio, out)
    (out / "notes.npy").write_bytes(b"somebody's")
    (audio / "1.wav").write_bytes(b"")
    (audio / "notes.wav").write_bytes(b"")
    soundfile.write(audio / "2.wav", noise(0.7, seed=9), RATE)

    def damaged(path, *arguments):
        raise InputError(f"{path} cannot be read.")

    monkeypatch.setattr(encode, "read_segment", damaged)
    assert encode_folder(encoder, audio, out, max_unreadable=3)["unreadable"] == 3
    assert {"1.npy", "2.npy"}.isdisjoint(outputs(out)) and "notes.npy" in outputs(out)
    assert len(times(out)) == 7 - 2 + 1
    (out / "1.npy").write_bytes(b"somebody's")
    records = (out / "encoded.jsonl").read_text()
    encode_folder(encoder, audio, out, max_unreadable=3)
    assert (out / "1.npy").exists() and (out / "encoded.jsonl").read_text() == records


def test_states_of_audio_that_is_what_it_was_stay_though_it_cannot_be_read_now(encoder, audio, tmp_path, monkeypatch):
    """A network disk may be away for a moment; and a file beside it, with another ending, is another file."""
    out = tmp_path / "out"
    encode_folder(encoder, audio, out, extensions=["wav"])
    soundfile.write(audio / "0.flac", noise(0.3), RATE)
    (audio / "0.flac").write_bytes((audio / "0.flac").read_bytes()[:20])
    before = times(out)
    encode_folder(encoder, audio, out, extensions=["flac"], max_unreadable=1)

    def away(files, *_):
        for relative, path in files:
            yield relative, path, Probe(0.0, 0, 0, "Input/output error") if relative == "1.wav" else probe_audio(path)

    monkeypatch.setattr(encode, "probe_files", away)
    assert encode_folder(encoder, audio, out, extensions=["wav"], max_unreadable=1)["unreadable"] == 1
    assert before.items() <= times(out).items()


def test_names_as_long_as_the_disk_takes(encoder, tmp_path):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / f"{'x' * 251}.wav", noise(0.3), RATE)
    encode_folder(encoder, tmp_path / "audio", tmp_path / "out")
    assert list(times(tmp_path / "out")) == [f"{'x' * 251}.npy"]
    with pytest.raises(InputError, match=r"the output of 'x{251}\.wav' would have a name of more than the 255 bytes"):
        encode_folder(encoder, tmp_path / "audio", tmp_path / "other", file_format="safetensors")


def test_a_full_disk_is_said_before_and_while_writing(encoder, audio, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(InputError, match=r"needs 0\.0 GB, but 0\.0 GB are free"):
            encode_folder(encoder, audio, tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HiddenStatesFile, "write", full)
    with pytest.raises(InputError, match="cannot be written to .No space left on device.*goes on from there"):
        encode_folder(encoder, audio, tmp_path / "full")
    assert not times(tmp_path / "full")


def test_what_a_full_disk_left_goes_though_nothing_more_can_be_written(tmp_path):
    file = HiddenStatesFile(tmp_path / "a.npy", "npy", (1, 2, 3))
    file.file.close()
    descriptor = os.open("/dev/full", os.O_WRONLY)
    file.file = os.fdopen(descriptor, "wb")
    file.file.write(b"what waits to be written")
    file.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "there is no layer 3: 0 to 2, or -1"),
        ({"layers": [-4]}, "there is no layer -4"),
        ({"layers": ["last"]}, "--layers are numbers, or all: not last"),
        ({"layers": [0, -3]}, "names a layer twice"),
        ({"file_format": "csv"}, "--format is npy or safetensors"),
        ({"batch_seconds": 20}, "--batch_seconds is at least 60"),
        ({"batch_seconds": float("inf")}, "--batch_seconds is at least 60"),
        ({"device": "tpu0"}, "--device is cpu, cuda"),
        ({"device": "cuda:99"}, "--device cuda:99: there are"),
        ({"max_unreadable": -1}, "--max_unreadable is a count"),
        ({"extensions": ["xyz"]}, r"holds no \.xyz file"),
        ({"audio_folder": "/nowhere"}, "audio_folder '/nowhere' does not exist"),
        ({"encoder": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(encoder, audio, tmp_path, options, message):
    given = {"encoder": encoder, "audio_folder": audio, "output_folder": tmp_path / "out", **options}
    with pytest.raises(InputError, match=message) as caught:
        encode_folder(**given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_layers_are_counted_from_either_end():
    assert chosen_layers(["0", "-1", "4"], 13) == [0, 12, 4]


# ---------------------------------------------------------------- the command


def test_the_command_says_what_it_did(encoder, audio, tmp_path, capsys):
    words = ["encode", str(encoder), str(audio), str(tmp_path / "out"), "--layers", "0", "-1"]
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["encoded"], summary["layers"]) == (7, [0, 2])
    assert np.load(tmp_path / "out" / "1.npy").shape == (2, 62, 16)
    assert main(words) == 0
    assert "0 files encoded" in capsys.readouterr().out
    assert main([*words, "--format", "safetensors"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("sb-bestrq: error: ")
