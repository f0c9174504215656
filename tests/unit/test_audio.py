"""Properties of the table of utterances, of reading, and of the loader."""

import math
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st

from speechbrain_bestrq.audio import AudioTable, as_float, read_segment
from speechbrain_bestrq.batching import BatchPlan, LadderBatchSampler, PaddedBatchSampler
from speechbrain_bestrq.corpora._audio_files import probe_audio
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.masking import SpanMasking
from speechbrain_bestrq.pretraining_data import WaveformDataset, make_loader

RATE = 16000


def noise(samples, channels=1, seed=0):
    """White noise in int16 steps, shape (samples, channels)."""
    return np.random.default_rng(seed).integers(-9000, 9000, (samples, channels)).astype(np.int16)


def frame_lengths(samples):
    """Encoder frames of so many samples."""
    return (1 + samples // 160) // 4


@pytest.fixture
def corpus(tmp_path):
    """A folder of 24 utterances of 1 to 3 s, and its manifest."""
    data = {}
    for index, seconds in enumerate(np.random.default_rng(3).uniform(1, 3, 24)):
        path = tmp_path / f"utt {index}.flac"
        soundfile.write(path, noise(int(seconds * RATE), seed=index), RATE)
        data[f"u{index}"] = {"wav": str(path), "duration": int(seconds * RATE) / RATE}
    return data


def make_dataset(data, rank=0, **options):
    table = AudioTable.from_manifest(data, RATE)
    return WaveformDataset(table, SpanMasking(0.06, 10), frame_lengths, seed=7, rank=rank, **options)


def same(first, second):
    """Whether two batches are equal in all they hold."""
    return (
        torch.equal(first.wavs, second.wavs)
        and torch.equal(first.masked.mask, second.masked.mask)
        and torch.equal(first.masked.indices, second.masked.indices)
        and (first.wav_lens is None) == (second.wav_lens is None)
        and (first.wav_lens is None or torch.equal(first.wav_lens, second.wav_lens))
        and all(
            getattr(first, name) == getattr(second, name)
            for name in ("noise_seed", "dropout_seed", "number", "seconds", "cut_seconds")
        )
    )


# ---- the table


def test_table_gives_back_names_paths_and_lengths():
    data = {
        "a": {"wav": "/x/a b.flac", "duration": 1.00003},
        "ü,\n$": {"wav": "/x/ü$'\".wav", "duration": 2.0},
        "surrogate": {"wav": "/x/\udcff.wav", "duration": 3.5},
        "": {"wav": "", "duration": 0.1},
    }
    table = AudioTable.from_manifest(data, RATE)
    assert [table.name(i) for i in range(4)] == list(data)
    assert [table.path(i) for i in range(4)] == [row["wav"] for row in data.values()]
    assert table.lengths.tolist() == [16000, 32000, 56000, 1600] and table.lengths.dtype == np.int64
    assert table.hours * 3600 == pytest.approx(6.6)


def test_table_cuts_the_too_long_and_leaves_out_the_too_short():
    data = {str(seconds): {"wav": f"/{seconds}", "duration": seconds} for seconds in (0.5, 1.0, 2.0, 60.0, 60.1, 150.0)}
    table = AudioTable.from_manifest(data, RATE, min_seconds=1.0, max_seconds=60.0)
    names = [table.name(i) for i in range(len(table))]
    assert names == ["1.0", "2.0", "60.0", "60.1#0", "60.1#1", "150.0#0", "150.0#1", "150.0#2"]
    assert [table.path(i) for i in range(len(table))] == [f"/{name.split('#')[0]}" for name in names]
    assert table.starts.tolist() == [0, 0, 0, 0, 480800, 0, 800000, 1600000]
    assert table.lengths.tolist() == [16000, 32000, 960000, 480800, 480800, 800000, 800000, 800000]
    assert (table.too_short, table.recordings_cut) == (1, 2)
    assert table.hours_left_out * 3600 == pytest.approx(0.5)


@given(
    st.lists(st.integers(1, 500_000), min_size=1, max_size=20),
    st.floats(0.05, 20.0),
    st.sampled_from([8000, 11025, 16000]),
)
def test_the_parts_of_a_long_recording_are_all_of_it_in_order_and_none_is_too_long(lengths, longest, rate):
    data = {str(i): {"wav": str(i), "duration": samples / rate} for i, samples in enumerate(lengths)}
    table = AudioTable.from_manifest(data, rate, max_seconds=longest)
    assert table.lengths.max() <= longest * rate + 1e-6 and table.lengths.min() >= 1
    ends = {}
    for i in range(len(table)):
        assert table.starts[i] == ends.get(table.path(i), 0)
        ends[table.path(i)] = table.starts[i] + table.lengths[i]
    assert ends == {str(i): samples for i, samples in enumerate(lengths)}


@pytest.mark.parametrize("longest", [16.06, 32.05, 25.0, 0.1])
def test_a_recording_of_just_the_most_seconds_stays_whole(longest):
    data = {"a": {"wav": "a", "duration": longest}, "b": {"wav": "b", "duration": longest + 1 / RATE}}
    table = AudioTable.from_manifest(data, RATE, max_seconds=longest)
    assert [table.name(i) for i in range(len(table))] == ["a", "b#0", "b#1"]


def test_parts_that_are_too_short_are_left_out():
    """Of 26 s the halves are, though the whole is not."""
    data = {"a": {"wav": "a", "duration": 26.0}, "b": {"wav": "b", "duration": 24.0}}
    table = AudioTable.from_manifest(data, RATE, min_seconds=20.0, max_seconds=25.0)
    assert [table.name(i) for i in range(len(table))] == ["b"]
    assert (table.too_short, table.hours_left_out * 3600) == (2, pytest.approx(26.0))


@pytest.mark.parametrize("data", [{}, {"a": {"wav": "a.wav", "duration": 0.5}}])
def test_table_with_nothing_left_is_refused_with_the_keys(data):
    with pytest.raises(InputError, match="min_seconds = 2, or are once they are cut to max_seconds = 60") as raised:
        AudioTable.from_manifest(data, RATE, min_seconds=2, max_seconds=60)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("longest", [0.0, -1.0, float("nan"), 1e-9])
def test_parts_without_a_sample_are_refused(longest):
    with pytest.raises(InputError, match="max_seconds"):
        AudioTable.from_manifest({"a": {"wav": "a.wav", "duration": 0.5}}, RATE, max_seconds=longest)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3"])
@pytest.mark.parametrize("rate", [RATE, 48000])
def test_parts_of_a_recording_are_the_whole_of_it_one_after_the_other(tmp_path, name, rate):
    path = tmp_path / name
    tone = 0.3 * np.sin(np.arange(5 * rate) * (2 * np.pi * 440 / rate)) + noise(5 * rate)[:, 0] / 2**18
    options = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    soundfile.write(path, tone, rate, **options)
    table = AudioTable.from_manifest({"a": {"wav": str(path), "duration": 5.0}}, RATE, max_seconds=0.6)
    parts = [as_float(table.read(i, 0, int(table.lengths[i]))) for i in range(len(table))]
    assert len(parts) == 9
    whole = read_segment(str(path), 0, 5 * RATE, RATE)
    # an Opus decoder that begins amid a stream takes a while to be the same in the last bits
    tolerance = 2e-3 if name == "a.opus" else 1e-5
    assert np.abs(np.concatenate(parts) - whole).max() < tolerance
    later = as_float(table.read(4, 1000, 200))
    assert np.abs(later - parts[4][1000:1200]).max() < tolerance


@pytest.mark.parametrize("rate", [RATE, 22050, 44100])
def test_parts_of_mp3_read_from_one_open_file_are_those_of_the_whole(tmp_path, rate):
    """Right behind a seek its decoder lacks what the frames before have left for the next."""
    time = np.arange(20 * rate) / rate
    tones = sum(0.1 * np.sin(2 * np.pi * pitch * time * (1 + 0.02 * np.sin(3 * time))) for pitch in (150, 700, 1900))
    noisy = 0.02 * np.random.default_rng(0).standard_normal(len(time))
    wave = tones * (np.sin(2 * np.pi * 2.3 * time) > 0) + noisy * (np.sin(2 * np.pi * 0.7 * time) > 0)
    soundfile.write(tmp_path / "a.mp3", wave, rate)
    table = AudioTable.from_manifest({"a": {"wav": f"{tmp_path}/a.mp3", "duration": 20.0}}, RATE, max_seconds=0.73)
    parts = np.concatenate([as_float(part) for part in table.read_run(range(len(table)))])
    whole = read_segment(f"{tmp_path}/a.mp3", 0, 20 * RATE, RATE)[: len(parts)]
    assert len(table) > 25 and np.abs(parts - whole).max() < 1e-4


def test_table_is_compact():
    count = 20_000
    paths = [f"/corpora/LibriSpeech/train-clean-360/{i}/{i}/{i}-{i}-0000.flac" for i in range(count)]
    table = AudioTable([f"{i}-{i}-0000" for i in range(count)], paths, np.ones(count), RATE)
    assert len(pickle.dumps(table)) < 130 * count


# ---- reading


@pytest.mark.parametrize(("name", "channels"), [("a.wav", 1), ("a.flac", 1), ("a.wav", 2), ("a.flac", 3)])
def test_a_segment_is_that_stretch_of_the_file_with_channels_averaged(tmp_path, name, channels):
    audio = noise(20000, channels)
    soundfile.write(tmp_path / name, audio, RATE)
    segment = read_segment(str(tmp_path / name), 1234, 5678, RATE)
    assert segment.dtype == np.float32 and segment.shape == (5678,)
    expected = (audio.astype(np.float64) / 32768).mean(axis=1)[1234 : 1234 + 5678]
    assert np.abs(segment - expected).max() < 1e-6


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 15999])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_resampled_segment_equals_that_stretch_of_the_whole_file_resampled(tmp_path, rate, channels):
    if rate == 15999:
        # a kernel of 16000 x 16011 weights: not with reasonable effort
        soundfile.write(tmp_path / "a.wav", noise(rate, channels), rate)
        with pytest.raises(InputError, match="a.wav has 15999 samples per second, which cannot be resampled to 16000"):
            read_segment(str(tmp_path / "a.wav"), 0, 100, RATE)
        return
    audio = noise(int(1.7 * rate), channels)
    soundfile.write(tmp_path / "a.wav", audio, rate)
    mono = torch.from_numpy((audio / 32768).mean(axis=1).astype(np.float32))
    whole = torchaudio.functional.resample(mono, rate, RATE).numpy()
    for start, samples in ((0, len(whole)), (0, 500), (1, 7), (10007, 9001), (len(whole) - 333, 333)):
        segment = read_segment(str(tmp_path / "a.wav"), start, samples, RATE)
        assert segment.shape == (samples,)
        assert np.abs(segment - whole[start : start + samples]).max() < 1e-5


def test_only_the_segment_is_decoded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", noise(48000 * 20), 48000)
    asked = []
    read = soundfile.SoundFile.read

    def counting(self, frames=-1, *arguments, **options):
        asked.append(frames)
        return read(self, frames, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    read_segment(str(tmp_path / "a.wav"), 100_000, 16000, RATE)
    assert len(asked) == 1 and 48000 <= asked[0] < 49000


@pytest.mark.parametrize("rate", [16000, 24000])
def test_a_file_a_little_too_short_is_filled_up_and_one_much_too_short_is_refused(tmp_path, rate):
    path = str(tmp_path / "a.wav")
    soundfile.write(path, noise(rate), rate)
    filled = read_segment(path, 8000, 8640, RATE)
    assert filled.shape == (8640,) and np.all(filled[8000:] == 0)
    assert np.array_equal(filled[:8000], read_segment(path, 8000, 8000, RATE))
    with pytest.raises(InputError, match=r"a.wav ends 0.04 s before .* audio of the same length in its place"):
        read_segment(path, 8000, 8641, RATE)
    with pytest.raises(InputError, match="ends 0.50 s before"):
        read_segment(path, 50000, 8000, RATE)


def test_unreadable_files_are_named(tmp_path):
    text = tmp_path / "text.wav"
    text.write_text("no audio")
    missing = tmp_path / "missing.flac"
    for path in (text, missing):
        with pytest.raises(
            InputError, match=rf"{re.escape(str(path))} cannot be read .*audio of the same length in its place"
        ) as raised:
            read_segment(str(path), 0, 100, RATE)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, rate, value):
    audio = np.zeros(2 * rate, np.float32)
    audio[rate + 100] = value
    soundfile.write(tmp_path / "a.wav", audio, rate, subtype="FLOAT")
    assert np.isfinite(read_segment(str(tmp_path / "a.wav"), 0, 8000, 16000)).all()
    with pytest.raises(InputError, match="a.wav has samples that are no numbers, or infinite; restore it"):
        read_segment(str(tmp_path / "a.wav"), 16000, 8000, 16000)


def test_a_file_cut_short_on_disk_is_refused(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(32000), RATE)
    path.write_bytes(path.read_bytes()[:30000])
    with pytest.raises(InputError, match="a.flac"):
        read_segment(str(path), 16000, 16000, RATE)


def test_a_long_vorbis_is_read_from_where_a_part_lies_but_not_from_within_its_last_page(tmp_path, monkeypatch):
    rate, seconds = 8000, 60
    path = str(tmp_path / "a.ogg")
    with soundfile.SoundFile(path, "w", rate, 1, format="OGG", subtype="VORBIS") as file:
        for block in range(seconds):  # libsndfile's encoder overflows its stack on much at once
            file.write(noise(rate, seed=block) / 2**17)
    whole = read_segment(path, 0, seconds * rate, rate)
    sought, seek = [], soundfile.SoundFile.seek

    def noted(file, frames, *more):
        sought[-1].append(frames)  # reading asks for its place, too
        return seek(file, frames, *more)

    monkeypatch.setattr(soundfile.SoundFile, "seek", noted)
    starts = [0, 10 * rate, 39 * rate, 41 * rate, 55 * rate, 59 * rate, 60 * rate - 100]
    for start in starts:
        samples = min(2 * rate, seconds * rate - start)
        sought.append([])
        part = read_segment(path, start, samples, rate)
        assert np.abs(part - whole[start : start + samples]).max() < 1e-5, start
    # to read the first parts, an hour of a podcast is not decoded
    assert [first for first, *_ in sought] == [*starts[:3], *[40 * rate] * 4]


# ---- files that turn out to be damaged


def damage(path):
    """Spoil the middle of a FLAC file: its header and its end, which the preparation looks at, stay whole."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 3, len(content) // 2)
    content[middle] = np.random.default_rng(0).bytes(middle.stop - middle.start)
    path.write_bytes(content)
    assert not probe_audio(str(path)).problem


@pytest.fixture
def equally_long(tmp_path):
    """A manifest of 12 utterances of one second, of whose batches each has three."""
    data = {}
    for index in range(12):
        path = tmp_path / f"{index}.flac"
        soundfile.write(path, noise(RATE, seed=index), RATE)
        data[str(index)] = {"wav": str(path), "duration": 1.0}
    return data


def training_batches(data, num_workers=0, epoch=1, **options):
    """Plans and batches of an epoch."""
    dataset = make_dataset(data, **options)
    sampler = LadderBatchSampler(dataset.table.lengths, 3 * RATE, seed=5)
    sampler.set_epoch(epoch)
    return list(zip(sampler, make_loader(dataset, sampler, num_workers), strict=True))


def test_another_utterance_of_its_batch_stands_in_for_a_damaged_file_and_all_else_stays(equally_long, caplog):
    whole = training_batches(equally_long)
    damaged = [4, 7]
    for index in damaged:
        damage(Path(equally_long[str(index)]["wav"]))
    found = training_batches(equally_long, max_unreadable=2)
    assert len(caplog.messages) == 2
    assert all(f"{index}.flac cannot be read" in caplog.text for index in damaged)
    for (plan, before), (_, after) in zip(whole, found, strict=True):
        rows = plan.indices.tolist()
        for row, index in enumerate(rows):
            stands_in = row
            while rows[stands_in] in damaged:
                stands_in = (stands_in + 1) % len(rows)
            assert torch.equal(after.wavs[row], before.wavs[stands_in]) and (stands_in != row) == (index in damaged)
        assert same(replace(after, wavs=before.wavs), before)
    for (_, one), (_, other) in zip(found, training_batches(equally_long, 2, max_unreadable=2), strict=True):
        assert same(one, other)  # whatever was read before in the process


def test_a_damaged_file_is_named_once_however_often_it_is_met(equally_long, caplog):
    damage(Path(equally_long["4"]["wav"]))
    dataset = make_dataset(equally_long, max_unreadable=1)
    sampler = LadderBatchSampler(dataset.table.lengths, 3 * RATE)
    for _ in range(3):
        assert len(list(make_loader(dataset, sampler))) == 4
    assert len(caplog.messages) == 1


def test_too_many_damaged_files_are_refused_in_one_line(equally_long):
    with pytest.raises(InputError, match="cannot be read") as refused:
        damage(Path(equally_long["4"]["wav"]))
        training_batches(equally_long)
    assert "max_unreadable" not in str(refused.value)
    for index in (0, 2):
        damage(Path(equally_long[str(index)]["wav"]))
    with pytest.raises(
        InputError, match=r"more than max_unreadable = 2 files of the training audio are damaged: .* of the same length"
    ) as refused:
        training_batches(equally_long, max_unreadable=2)
    assert "\n" not in str(refused.value)


def test_for_a_long_recording_that_is_damaged_no_other_part_of_it_stands_in(tmp_path):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", noise(20 * RATE, seed=ord(name)), RATE)
    data = {name: {"wav": str(tmp_path / f"{name}.wav"), "duration": 20.0} for name in "ab"}
    table = AudioTable.from_manifest(data, RATE, max_seconds=1.0)
    dataset = WaveformDataset(table, SpanMasking(0.06, 10), frame_lengths, max_unreadable=1)
    (tmp_path / "a.wav").unlink()
    batch = dataset.__getitems__(BatchPlan(1, 0, RATE, np.array([3]), np.array([0])))
    assert torch.equal(batch.wavs[0], torch.from_numpy(noise(20 * RATE, seed=ord("b"))[:RATE, 0]))


def test_for_a_batch_of_damaged_files_alone_the_next_of_the_corpus_stands_in(equally_long):
    for index in (0, 4, 10, 11):
        damage(Path(equally_long[str(index)]["wav"]))
    dataset = make_dataset(equally_long, max_unreadable=9)
    for indices, stands_in in (([0, 4], 5), ([10, 11], 1)):  # after the last comes the first that can be read
        batch = dataset.__getitems__(BatchPlan(1, 0, RATE, np.array(indices), np.array([0, 0])))
        expected = torch.from_numpy(noise(RATE, seed=stands_in)[:, 0])
        assert torch.equal(batch.wavs, expected.expand(2, -1))
    with_a_short_one = make_dataset(
        {**equally_long, "9": {"wav": equally_long["9"]["wav"], "duration": 0.25}}, max_unreadable=9
    )
    damage(Path(equally_long["8"]["wav"]))
    batch = with_a_short_one.__getitems__(BatchPlan(1, 0, RATE, np.array([8]), np.array([0])))
    quarter = torch.from_numpy(noise(RATE, seed=9)[: RATE // 4, 0])
    assert torch.equal(batch.wavs[0], quarter.repeat(4))
    for index in (1, 2, 3, 5, 6, 7, 9):
        damage(Path(equally_long[str(index)]["wav"]))
    with pytest.raises(InputError, match=r"nothing of a batch can be read, nor .*: .*4.flac .* same length") as refused:
        dataset.__getitems__(BatchPlan(1, 1, RATE, np.array([0, 4]), np.array([0, 0])))
    assert "\n" not in str(refused.value)


# ---- batches


def test_ladder_batches_hold_the_planned_stretches_without_padding(corpus):
    dataset = make_dataset(corpus)
    sampler = LadderBatchSampler(dataset.table.lengths, 10 * RATE, max_cut=0.1)
    sampler.set_epoch(1)
    seconds = cut = 0.0
    for plan in sampler:
        loaded = dataset.__getitems__(plan)
        assert loaded.wavs.dtype == torch.int16
        batch = loaded.to("cpu")
        assert batch.wavs.dtype == torch.float32 and batch.wavs.shape == (len(plan.indices), plan.samples)
        assert batch.wav_lens is None
        assert batch.masked.mask.shape == (len(plan.indices), frame_lengths(plan.samples))
        for row, index, start in zip(batch.wavs, plan.indices, plan.starts, strict=True):
            whole = soundfile.read(dataset.table.path(index), dtype="float32")[0]
            assert np.array_equal(row.numpy(), whole[start : start + plan.samples])
        seconds, cut = seconds + batch.seconds, cut + batch.cut_seconds
    assert seconds + cut == pytest.approx(dataset.table.hours * 3600)
    assert cut / (seconds + cut) == pytest.approx(sampler.cut_share)
    assert sampler.cut_share > 0


def test_padded_batches_hold_whole_utterances_and_their_lengths(corpus):
    dataset = make_dataset(corpus)
    beyond_the_shortest = []
    for plan in PaddedBatchSampler(dataset.table.lengths, 10 * RATE):
        batch = dataset.__getitems__(plan)
        lengths = torch.from_numpy(dataset.table.lengths[plan.indices])
        assert torch.equal((batch.wav_lens * plan.samples).round().long(), lengths)
        assert batch.cut_seconds == 0 and batch.seconds == pytest.approx(int(lengths.sum()) / RATE)
        for row, length, frames in zip(batch.wavs, lengths, batch.masked.mask, strict=True):
            assert not row[length:].any() and row[:length].any()
            assert not frames[frame_lengths(length) :].any() and frames.any()
            beyond_the_shortest.append(bool(frames[frame_lengths(lengths.min()) :].any()))
    assert any(beyond_the_shortest)


def test_relative_lengths_in_single_precision_give_every_integer_length_back():
    for longest in (480, 16001, 959_999, 960_000):  # 60 s
        lengths = np.arange(480, longest + 1)
        relative = torch.from_numpy(lengths / longest).float()
        assert torch.equal((relative * longest).round().long(), torch.from_numpy(lengths))


def test_the_longest_batch_of_all_equal_lengths_counts_as_unpadded(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(RATE), RATE)
    dataset = make_dataset({name: {"wav": str(tmp_path / "a.wav"), "duration": 1.0} for name in "abc"})
    (plan,) = PaddedBatchSampler(dataset.table.lengths, 10 * RATE)
    assert dataset.__getitems__(plan).wav_lens is None


def test_masks_and_seeds_differ_between_batches_epochs_and_ranks_and_are_reproducible(corpus):
    plan = next(iter(LadderBatchSampler(make_dataset(corpus).table.lengths, 10 * RATE)))

    def drawn(rank, epoch, number):
        batch = make_dataset(corpus, rank).__getitems__(plan._replace(epoch=epoch, number=number))
        return batch.masked.mask.numpy().tobytes(), batch.noise_seed, batch.dropout_seed

    steps = [(rank, epoch, number) for rank in (0, 1) for epoch in (1, 2) for number in (0, 1)]
    draws = [drawn(*step) for step in steps]
    assert draws == [drawn(*step) for step in steps]
    for kind in zip(*draws, strict=True):
        assert len(set(kind)) == len(steps)
    assert not {noise for _, noise, _ in draws} & {dropout for _, _, dropout in draws}


def test_a_batch_moves_whole(corpus):
    dataset = make_dataset(corpus)
    batch = dataset.__getitems__(next(iter(PaddedBatchSampler(dataset.table.lengths, 10 * RATE))))
    moved = batch.to("meta")
    assert {moved.wavs.device.type, moved.wav_lens.device.type} == {"meta"}
    assert {moved.masked.mask.device.type, moved.masked.indices.device.type} == {"meta"}
    assert moved.masked.count == batch.masked.count and moved.noise_seed == batch.noise_seed
    assert same(batch.to("cpu"), replace(batch, wavs=batch.wavs / 32768))


@pytest.mark.parametrize("other", [{"subtype": "PCM_24"}, {"samplerate": 8000}, {"channels": 2}])
def test_audio_that_is_not_16_bit_mono_at_the_rate_is_loaded_as_it_was(tmp_path, other):
    rate, channels = other.get("samplerate", RATE), other.get("channels", 1)
    soundfile.write(tmp_path / "a.wav", noise(RATE), RATE)
    soundfile.write(tmp_path / "b.wav", noise(rate, channels) / 40000, rate, other.get("subtype"))
    dataset = make_dataset({name: {"wav": str(tmp_path / f"{name}.wav"), "duration": 1.0} for name in "ab"})
    batch = dataset.__getitems__(BatchPlan(1, 0, RATE, np.array([0, 1]), np.array([0, 0])))
    assert batch.wavs.dtype == torch.float32
    for row, name in zip(batch.wavs, "ab", strict=True):
        assert np.array_equal(row.numpy(), read_segment(str(tmp_path / f"{name}.wav"), 0, RATE, RATE))


# ---- the loader


def test_loading_workers_change_nothing(corpus):
    def batches(num_workers):
        dataset = make_dataset(corpus)
        sampler = LadderBatchSampler(dataset.table.lengths, 6 * RATE)
        loader = make_loader(dataset, sampler, num_workers)
        assert len(loader) == len(sampler)
        epochs = []
        for epoch in (1, 2):
            sampler.set_epoch(epoch)
            epochs.append(list(loader))
        return epochs

    alone, helped = batches(0), batches(2)
    for epoch in (0, 1):
        assert len(alone[epoch]) == len(helped[epoch]) > 3
        assert all(same(first, second) for first, second in zip(alone[epoch], helped[epoch], strict=True))
    assert not same(alone[0][0], alone[1][0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_first_k_and_rest_are_all_although_loaders_prefetch(corpus, num_workers):
    def start():
        dataset = make_dataset(corpus)
        sampler = LadderBatchSampler(dataset.table.lengths, 6 * RATE)
        sampler.set_epoch(3)
        return sampler, make_loader(dataset, sampler, num_workers)

    sampler, loader = start()
    every = list(loader)
    sampler, loader = start()
    seen = []
    for batch in loader:
        seen.append(batch)
        sampler.position += 1
        if len(seen) == 3:
            break
    state = sampler.state_dict()
    resumed, loader = start()
    resumed.load_state_dict(state)
    seen += list(loader)
    assert len(seen) == len(every) and all(map(same, seen, every))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_leaves_the_global_generator_alone(corpus, num_workers):
    dataset = make_dataset(corpus)
    loader = make_loader(dataset, PaddedBatchSampler(dataset.table.lengths, 10 * RATE), num_workers)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert len(list(loader)) == len(loader) > 1
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_damaged_after_preparation_stops_the_loader_with_its_name(corpus, num_workers):
    with open(corpus["u5"]["wav"], "wb") as file:
        file.write(b"damaged")
    dataset = make_dataset(corpus)
    loader = make_loader(dataset, LadderBatchSampler(dataset.table.lengths, 10 * RATE), num_workers)
    with pytest.raises(InputError, match="utt 5.flac cannot be read"):
        list(loader)


def test_batches_reach_a_process_that_was_not_forked(corpus):
    # what macOS, and Python 3.14 everywhere, do with the dataset and its batches
    dataset = make_dataset(corpus)
    plan = next(iter(LadderBatchSampler(dataset.table.lengths, 10 * RATE)))
    assert isinstance(plan, BatchPlan)
    copy = pickle.loads(pickle.dumps(dataset))
    assert same(copy.__getitems__(pickle.loads(pickle.dumps(plan))), dataset.__getitems__(plan))
    assert math.isclose(copy.table.hours, dataset.table.hours)


def test_workers_read_in_one_thread(corpus):
    # in a process of its own: this one's setting must not decide
    code = (
        "import sys, torch; from speechbrain_bestrq.pretraining_data import make_loader\n"
        "class Threads:\n"
        "    def __getitems__(self, plan): return torch.get_num_threads()\n"
        "    def __len__(self): return 1\n"
        "torch.set_num_threads(3)\n"
        "print(list(make_loader(Threads(), [[0], [0]], num_workers=1)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1, 1]"


def test_the_loader_pins_every_tensor_of_a_batch(corpus, monkeypatch):
    dataset = make_dataset(corpus)
    batch = dataset.__getitems__(next(iter(PaddedBatchSampler(dataset.table.lengths, 10 * RATE))))
    pinned = []
    # pinning itself needs a GPU: that each tensor is asked to, and nothing is lost, does not
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    copy = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert {id(tensor) for tensor in pinned} == {
        id(tensor) for tensor in (batch.wavs, batch.wav_lens, batch.masked.mask, batch.masked.indices)
    }
    assert copy is not batch and same(copy, batch)
