"""Audio decoded once into 16-bit samples that are mapped into memory."""

import logging
import os
import pickle
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_bestrq import pcm_cache
from speechbrain_bestrq.audio import AudioTable, read_segment
from speechbrain_bestrq.batching import LadderBatchSampler
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.masking import SpanMasking
from speechbrain_bestrq.pcm_cache import cache_audio
from speechbrain_bestrq.pretraining_data import WaveformDataset, make_loader

RATE = 16000


@pytest.fixture
def table(tmp_path):
    """Twelve utterances of 1 to 2 s, 16 bits."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(RATE, 2 * RATE, 12)
    paths = [str(tmp_path / f"{index}.flac") for index in range(12)]
    for path, samples in zip(paths, lengths, strict=True):
        soundfile.write(path, generator.integers(-9000, 9000, samples).astype(np.int16), RATE)
    return AudioTable(map(str, range(12)), paths, lengths / RATE, RATE)


def batches(table, cache=None, num_workers=0, max_unreadable=0):
    """All batches of an epoch, as they reach the model."""
    more = {"cache": cache, "max_unreadable": max_unreadable}
    dataset = WaveformDataset(table, SpanMasking(0.06, 10), lambda samples: (1 + samples // 160) // 4, **more)
    sampler = LadderBatchSampler(table.lengths, 5 * RATE, max_cut=0.1)
    return [batch.to("cpu") for batch in make_loader(dataset, sampler, num_workers)]


def test_batches_are_those_of_the_files(table, tmp_path):
    cache = cache_audio(table, tmp_path / "cache", threads=3)
    for workers in (0, 2):
        for plain, cached in zip(batches(table), batches(table, cache, workers), strict=True):
            assert torch.equal(plain.wavs, cached.wavs)


def test_a_cache_is_made_once_and_again_when_a_file_changes(table, tmp_path, monkeypatch):
    first = cache_audio(table, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(AudioTable, "read_run", None)  # nothing is decoded
        assert cache_audio(table, tmp_path / "cache").path == first.path
    os.utime(table.path(3), (1, 1))
    second = cache_audio(table, tmp_path / "cache")
    assert second.path != first.path and np.array_equal(second.read(3, 0, 9), first.read(3, 0, 9))


def test_what_is_sent_to_a_spawned_worker_is_small(table, tmp_path):
    cache = cache_audio(table, tmp_path / "cache")
    sent = pickle.dumps(cache)
    assert len(sent) < 2000 and np.array_equal(pickle.loads(sent).read(5, 100, 200), cache.read(5, 100, 200))


def test_other_audio_is_rounded_and_counted(tmp_path, caplog):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, RATE)
    wave[100] = 1.5
    soundfile.write(tmp_path / "a.wav", wave, RATE, "FLOAT")
    soundfile.write(tmp_path / "b.wav", 0.5 * wave[::2], RATE // 2, "PCM_16")
    table = AudioTable("ab", [f"{tmp_path}/a.wav", f"{tmp_path}/b.wav"], [1.0, 1.0], RATE)
    with caplog.at_level(logging.WARNING):
        cache = cache_audio(table, tmp_path / "cache")
    assert "2 of 2 utterances are not 16-bit" in caplog.text and "1 of them are louder" in caplog.text
    for index in range(2):
        exact = read_segment(table.path(index), 0, RATE, RATE)
        found = cache.read(index, 0, RATE) / 32768
        assert np.abs(found - np.clip(exact, -1, 32767 / 32768)).max() <= 0.5 / 32768 + 1e-9


def test_parts_of_a_recording_are_cached_by_where_they_lie_in_it(tmp_path):
    audio = np.random.default_rng(0).integers(-9000, 9000, 5 * RATE).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", audio, RATE)
    rows = {"a": {"wav": f"{tmp_path}/a.flac", "duration": 5.0}}
    cache = cache_audio(AudioTable.from_manifest(rows, RATE, max_seconds=1.3), tmp_path / "cache")
    parts = [cache.read(part, 0, 5 * RATE // 4) for part in range(4)]
    assert np.array_equal(np.concatenate(parts), audio)
    # as many of the same length from elsewhere in the same file are others
    moved = AudioTable("abcd", [f"{tmp_path}/a.flac"] * 4, [1.25] * 4, RATE, starts=[0, 100, 200, 300])
    assert np.array_equal(cache_audio(moved, tmp_path / "cache").read(3, 0, 50), audio[300:350])


def test_a_long_recording_is_opened_once_for_many_of_its_parts(tmp_path, monkeypatch):
    """A place in an hour of mp3 is up to two seconds away, and an hour has 144 parts."""
    audio = np.random.default_rng(0).integers(-9000, 9000, 13 * RATE).astype(np.int16)
    for name, samples in (("a.flac", 13 * RATE), ("b.flac", RATE), ("c.flac", RATE)):
        soundfile.write(tmp_path / name, audio[:samples], RATE)
    rows = {name: {"wav": f"{tmp_path}/{name}.flac", "duration": 13.0 if name == "a" else 1.0} for name in "abc"}
    table = AudioTable.from_manifest(rows, RATE, min_seconds=0.05, max_seconds=0.1)
    opened, init = [], soundfile.SoundFile.__init__

    def noted(file, path, *more, **options):
        opened.append(Path(os.fsdecode(path)).stem)
        init(file, path, *more, **options)

    monkeypatch.setattr(soundfile.SoundFile, "__init__", noted)
    cache = cache_audio(table, tmp_path / "cache", threads=2)
    assert len(table) == 150
    # two threads: blocks of 128 utterances, in runs of 64
    assert sorted(opened) == ["a", "a", "a", "b", "c"]
    for index in range(len(table)):
        assert np.array_equal(cache.read(index, 0, RATE // 10), table.read(index, 0, RATE // 10)), index


def test_what_is_damaged_of_a_long_recording_leaves_its_other_parts(tmp_path, monkeypatch):
    audio = np.random.default_rng(0).integers(-9000, 9000, 4 * RATE).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", audio, RATE)
    table = AudioTable("abcd", [f"{tmp_path}/a.wav"] * 4, [1.0] * 4, RATE, starts=[0, RATE, 2 * RATE, 3 * RATE])
    read = soundfile.SoundFile.read

    def damaged(file, *arguments, **options):
        if file.tell() == 2 * RATE:
            raise soundfile.SoundFileError("spoiled")
        return read(file, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", damaged)
    cache = cache_audio(table, tmp_path / "cache", max_unreadable=1)
    assert list(cache.damaged) == [2]
    for index in (0, 1, 3):
        assert np.array_equal(cache.read(index, 0, RATE), audio[index * RATE : (index + 1) * RATE])


def test_what_is_asked_to_stop_does_not_read_a_long_recording_to_its_end(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros(8 * RATE, np.int16), RATE)
    soundfile.write(tmp_path / "b.wav", np.zeros(8 * RATE, np.int16), RATE)
    rows = {name: {"wav": f"{tmp_path}/{name}.wav", "duration": 8.0} for name in "ab"}
    table = AudioTable.from_manifest(rows, RATE, min_seconds=0.1, max_seconds=0.2)
    seen, read_run = [], AudioTable.read_run

    def slow(self, run):
        for audio in read_run(self, run):
            if self.path(run[0]).endswith("a.wav"):
                raise KeyboardInterrupt  # while the other thread is amid its recording
            time.sleep(0.05)
            seen.append(1)
            yield audio

    monkeypatch.setattr(AudioTable, "read_run", slow)
    with pytest.raises(KeyboardInterrupt):
        cache_audio(table, tmp_path / "cache", threads=2)
    assert len(seen) < 20


def test_a_kill_leaves_nothing_that_looks_whole(table, tmp_path, monkeypatch):
    def killed(self, run):
        if 7 in run:
            raise KeyboardInterrupt
        return [np.zeros(self.lengths[index], dtype=np.int16) for index in run]

    with monkeypatch.context() as patch:
        patch.setattr(AudioTable, "read_run", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_audio(table, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.int16*"))
    # and what a kill that cannot be caught leaves behind is written over
    (tmp_path / "cache" / f"{pcm_cache._digest(table)}.int16.writing").write_bytes(b"half")
    cache = cache_audio(table, tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock", cache.path.name}


def test_a_disk_without_room_is_refused_before_any_decoding(table, tmp_path, monkeypatch):
    monkeypatch.setattr(pcm_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    monkeypatch.setattr(AudioTable, "read_run", None)
    with pytest.raises(InputError, match="takes 0.00 GB, and .* has room for 0.00 GB: name another cache_folder"):
        cache_audio(table, tmp_path / "cache")


def test_what_a_killed_process_left_is_not_counted_as_taken(table, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    left = folder / f"{pcm_cache._digest(table)}.int16.writing"
    left.write_bytes(b"half")
    monkeypatch.setattr(pcm_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 if left.exists() else 1e9))
    assert len(cache_audio(table, folder).lengths) == len(table)


def test_a_disk_that_fills_up_meanwhile_is_told_in_a_line(table, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"int16 cannot be written \(No space left on device\): make room"):
        cache_audio(table, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.int16*"))


@pytest.fixture
def damaged(table):
    """The table with two files that cannot be decoded."""
    for index in (2, 7):
        Path(table.path(index)).write_bytes(b"damaged")
    return table


def test_a_file_that_is_damaged_or_gone_is_named(damaged, tmp_path):
    with pytest.raises(InputError, match=re.escape(damaged.path(2))):
        cache_audio(damaged, tmp_path / "cache")
    os.remove(damaged.path(2))
    with pytest.raises(InputError, match=re.escape(damaged.path(2))):
        cache_audio(damaged, tmp_path / "cache", max_unreadable=9)


def test_as_many_damaged_files_as_are_allowed_are_passed_over_as_without_a_cache(damaged, tmp_path, caplog):
    with pytest.raises(
        InputError, match="more than max_unreadable = 1 files of the training audio are damaged: .*7.flac"
    ):
        cache_audio(damaged, tmp_path / "cache", max_unreadable=1)
    assert not list((tmp_path / "cache").glob("*.int16*"))
    cache = cache_audio(damaged, tmp_path / "cache", max_unreadable=2)
    assert all(f"{index}.flac cannot be read" in caplog.text for index in (2, 7))
    with pytest.raises(InputError, match="2.flac cannot be read"):
        cache.read(2, 0, 9)
    plain, cached = (batches(damaged, one, max_unreadable=2) for one in (None, cache))
    assert all(torch.equal(one.wavs, other.wavs) for one, other in zip(plain, cached, strict=True))
    # a run that allows fewer does not take it
    with pytest.raises(InputError, match="more than max_unreadable = 1"):
        cache_audio(damaged, tmp_path / "cache", max_unreadable=1)
    assert pickle.loads(pickle.dumps(cache)).damaged == cache.damaged
