"""Preparation of corpora: manifests, LibriSpeech, folders of any audio."""

import itertools
import logging
import os
import shutil
import subprocess
import sys
import threading
import types
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_bestrq.audio import read_segment
from speechbrain_bestrq.corpora import (
    _audio_files,
    corpus_name,
    manifest,
    prepare_folder,
    prepare_librispeech,
    read_manifest,
    read_summary,
    write_manifest,
)
from speechbrain_bestrq.corpora._mp3 import header_falls_short
from speechbrain_bestrq.errors import InputError

SECONDS = 0.25


def write_audio(path, seconds=SECONDS, sample_rate=16000, channels=1, **format_options):
    """Write noise, which FLAC does not compress to nothing: a file cut in half lacks audio."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0.0, 0.1, (round(seconds * sample_rate), channels))
    soundfile.write(str(path), noise, sample_rate, **format_options)
    return path


def cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_split(root, split, speakers, chapters=("1", "2"), utterances=2, transcripts=True):
    for speaker in speakers:
        for chapter in chapters:
            folder = root / split / speaker / chapter
            names = [f"{speaker}-{chapter}-{number:04d}" for number in range(utterances)]
            for name in names:
                write_audio(folder / f"{name}.flac")
            if transcripts:
                lines = [f"{name} WORDS OF {name}\n" for name in names]
                (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))


@pytest.fixture
def librispeech(tmp_path):
    """Two speakers to train on and one to validate on, of four utterances each."""
    root = tmp_path / "LibriSpeech"
    write_split(root, "train-clean-100", ["103", "19"])
    write_split(root, "dev-clean", ["84"])
    return root


@pytest.fixture
def save(tmp_path):
    return tmp_path / "save"


@pytest.fixture
def folder(tmp_path):
    """Ten speakers with two files each."""
    for speaker in range(10):
        for number in range(2):
            write_audio(tmp_path / "audio" / f"speaker{speaker}" / f"{number}.wav")
    return tmp_path / "audio"


def prepare(librispeech, save, **options):
    options = {"train_splits": ["train-clean-100"], "valid_splits": ["dev-clean"]} | options
    return prepare_librispeech(librispeech, save, **options)


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


class TestManifest:
    def test_what_is_written_is_read(self, tmp_path):
        names = [
            "a,b",
            'say "a"',
            "$HOME",
            "ünï ço",
            "two\nlines",
            "c\rr",
            " space",
            "it's",
            b"\xff".decode("utf-8", "surrogateescape"),
        ]
        rows = [{"ID": name, "duration": 0.5 + i, "wav": f"/audio/{name}", "wrd": ""} for i, name in enumerate(names)]
        assert write_manifest(rows, tmp_path / "m.csv", ("ID", "duration", "wav", "wrd")) == len(names)
        data = read_manifest(tmp_path / "m.csv")
        assert list(data) == names
        assert [{"ID": name, **row} for name, row in data.items()] == rows

    def test_rows_are_not_collected(self, tmp_path):
        path = tmp_path / "m.csv"
        alive = most = 0

        class Row(dict):
            def __init__(self, **values):
                nonlocal alive, most
                super().__init__(values)
                alive += 1
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= 1

        count = write_manifest((Row(ID=f"{i}", duration=1.0, wav="/w") for i in range(5000)), path)
        assert count == 5000
        assert most <= 3

    def test_a_failure_leaves_the_old_manifest(self, tmp_path):
        path = tmp_path / "m.csv"
        write_manifest([{"ID": "old", "duration": 1.0, "wav": "/w"}], path)

        def rows():
            yield {"ID": "new", "duration": 1.0, "wav": "/w"}
            raise RuntimeError("interrupted")

        with pytest.raises(RuntimeError, match="interrupted"):
            write_manifest(rows(), path)
        assert list(read_manifest(path)) == ["old"]
        assert os.listdir(tmp_path) == ["m.csv"]

    @pytest.mark.parametrize("row", [{"ID": "a", "duration": 1.0}, {"ID": "a", "duration": 1.0, "wav": "/w", "x": 1}])
    def test_a_row_has_the_columns(self, tmp_path, row):
        with pytest.raises(ValueError, match="columns"):
            write_manifest([row], tmp_path / "m.csv")

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            ("ID,wav\na,/w\n", ["lacks the column(s) duration"]),
            ("", ["lacks the column(s) ID, duration, wav"]),
            ("ID,duration,wav\n", ["holds no utterances"]),
            ("ID,duration,wav\na,1,/w\na,2,/v\n", ["'a' twice"]),
            ("ID,duration,wav\na,1,/w\nb,long,/w\n", ["line 3", "'long'", "seconds"]),
            ("ID,duration,wav\na,nan,/w\n", ["line 2", "'nan'"]),
            ("ID,duration,wav\na,0,/w\n", ["line 2", "'0'"]),
            ("ID,duration,wav\na,1\n", ["line 2", "2 fields", "3"]),
            ("ID,duration,wav\na,1,/w,more\n", ["line 2", "4 fields", "3"]),
        ],
    )
    def test_what_is_no_manifest_is_refused(self, tmp_path, content, parts):
        path = tmp_path / "m.csv"
        path.write_text(content)
        with pytest.raises(InputError) as error:
            read_manifest(path)
        assert_one_line(error, path, *parts)

    def test_missing_manifest_is_refused(self, tmp_path):
        with pytest.raises(InputError) as error:
            read_manifest(tmp_path / "none.csv")
        assert_one_line(error, tmp_path / "none.csv", "does not exist")

    def test_summary_of_nothing_is_refused(self, tmp_path):
        with pytest.raises(InputError) as error:
            read_summary(tmp_path / "train.csv")
        assert_one_line(error, tmp_path / "train.csv", "prepare the corpus")

    def test_speechbrain_takes_it(self, tmp_path):
        write_manifest([{"ID": "a$b", "duration": 1.5, "wav": "/audio/a$b.wav"}], tmp_path / "m.csv")
        dataset = DynamicItemDataset(read_manifest(tmp_path / "m.csv"), output_keys=["id", "duration", "wav"])
        assert dataset[0] == {"id": "a$b", "duration": 1.5, "wav": "/audio/a$b.wav"}


class TestCorpusName:
    def test_name_goes_before_recordings(self, tmp_path):
        (tmp_path / "CORPUS.json").write_text('{"name": "Mine", "recordings": "EmoDB"}')
        assert corpus_name(tmp_path, "default") == "Mine"

    def test_other_content_leaves_the_default(self, tmp_path):
        (tmp_path / "CORPUS.json").write_text('{"layout": "LibriSpeech"}')
        assert corpus_name(tmp_path, "default") == "default"

    @pytest.mark.parametrize("content", ["{", "[1]"])
    def test_broken_file_is_refused(self, tmp_path, content):
        (tmp_path / "CORPUS.json").write_text(content)
        with pytest.raises(InputError) as error:
            corpus_name(tmp_path, "default")
        assert_one_line(error, tmp_path / "CORPUS.json", "mend it or remove it")


class TestLibriSpeech:
    def test_layout(self, librispeech, save):
        manifests = prepare(librispeech, save)
        assert manifests == {
            "train": save / "train.csv",
            "valid": save / "valid.csv",
            "train-clean-100": save / "train-clean-100.csv",
            "dev-clean": save / "dev-clean.csv",
        }
        train = read_manifest(manifests["train"])
        assert list(train) == sorted(f"{s}-{c}-000{u}" for s in ("103", "19") for c in (1, 2) for u in (0, 1))
        assert train["19-2-0001"] == {
            "duration": SECONDS,
            "wav": str(librispeech / "train-clean-100" / "19" / "2" / "19-2-0001.flac"),
            "spk_id": "19",
            "wrd": "WORDS OF 19-2-0001",
        }
        assert manifests["train"].read_bytes() == manifests["train-clean-100"].read_bytes()
        assert {row["spk_id"] for row in read_manifest(manifests["valid"]).values()} == {"84"}

    def test_several_splits(self, librispeech, save):
        write_split(librispeech, "train-other-500", ["7"])
        write_split(librispeech, "test-other", ["8"])
        manifests = prepare(
            librispeech,
            save,
            train_splits=["train-other-500", "train-clean-100"],
            valid_splits=["dev-clean", "test-other"],
            test_splits=["test-other"],
        )
        assert {row["spk_id"] for row in read_manifest(manifests["train"]).values()} == {"7", "103", "19"}
        assert len(read_manifest(manifests["valid"])) == 8
        assert len(read_manifest(manifests["test-other"])) == 4

    def test_summary(self, librispeech, save):
        (librispeech / "CORPUS.json").write_text('{"recordings": "noise"}')
        summary = read_summary(prepare(librispeech, save)["train"])
        assert summary["corpus"] == "noise"
        assert summary["utterances"] == 8
        assert summary["hours"] == pytest.approx(8 * SECONDS / 3600)

    def test_nothing_on_stderr_without_a_terminal(self, librispeech, save, capfd):
        prepare(librispeech, save)
        assert capfd.readouterr().err == ""

    def test_workers_change_nothing(self, librispeech, tmp_path, monkeypatch):
        monkeypatch.setattr(_audio_files, "CHUNK", 1)
        write_audio(librispeech / "train-clean-100" / "19" / "1" / "19-1-0000.flac").write_bytes(b"no audio")
        one, three = (prepare(librispeech, tmp_path / f"{n}", workers=n, max_unreadable=1) for n in (1, 3))
        assert len(one) == 4
        for key in one:
            assert one[key].read_bytes() == three[key].read_bytes()
        names = [sorted(path.name for path in (tmp_path / f"{n}").iterdir()) for n in (1, 3)]
        assert names[0] == names[1]

    def test_workers_probe_at_once(self, librispeech, save, monkeypatch):
        # each of two threads waits for the other: with one thread this would break
        barrier = threading.Barrier(2, timeout=20)
        probe = _audio_files.probe_audio

        def meet(path):
            barrier.wait()
            return probe(path)

        monkeypatch.setattr(_audio_files, "CHUNK", 1)
        monkeypatch.setattr(_audio_files, "probe_audio", meet)
        assert len(read_manifest(prepare(librispeech, save, workers=2)["train"])) == 8

    def test_files_under_way_are_bounded(self, monkeypatch):
        asked = 0

        def endless():
            nonlocal asked
            while True:
                asked += 1
                yield f"{asked}", "/nonexistent"

        monkeypatch.setattr(_audio_files, "CHUNK", 2)
        probes = _audio_files.probe_files(endless(), total=1, workers=2, label="")
        first = [next(probes)[0] for _ in range(3)]
        assert first == ["1", "2", "3"]
        assert asked <= (4 * 2 + 1) * 2
        probes.close()


class TestTranscripts:
    def test_utterance_without_one(self, librispeech, save, caplog):
        caplog.set_level(logging.INFO)
        path = librispeech / "train-clean-100" / "19" / "1" / "19-1.trans.txt"
        path.write_text("19-1-0001 ONLY THIS ONE\n")
        train = read_manifest(prepare(librispeech, save, transcripts=True)["train"])
        assert train["19-1-0000"]["wrd"] == ""
        assert train["19-1-0001"]["wrd"] == "ONLY THIS ONE"
        assert "train-clean-100: 1 utterances have no transcript" in caplog.text

    def test_a_mark_at_the_beginning_of_a_text_is_no_part_of_a_name(self, librispeech, save):
        path = librispeech / "train-clean-100" / "19" / "1" / "19-1.trans.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        train = read_manifest(prepare(librispeech, save, transcripts=True)["train"])
        assert train["19-1-0000"]["wrd"] == "WORDS OF 19-1-0000"

    def test_chapter_without_any(self, librispeech, save, caplog):
        caplog.set_level(logging.INFO)
        (librispeech / "train-clean-100" / "19" / "1" / "19-1.trans.txt").unlink()
        train = read_manifest(prepare(librispeech, save)["train"])
        assert [row["wrd"] == "" for row in train.values()] == [False] * 4 + [True] * 2 + [False] * 2
        assert "train-clean-100: 2 utterances have no transcript" in caplog.text

    def test_chapter_without_any_is_refused_where_they_are_needed(self, librispeech, save):
        path = librispeech / "train-clean-100" / "19" / "1" / "19-1.trans.txt"
        path.unlink()
        with pytest.raises(InputError) as error:
            prepare(librispeech, save, transcripts=True)
        assert_one_line(error, path, "transcripts are needed")
        assert not save.exists()

    def test_undecodable_file_is_refused(self, librispeech, save):
        path = librispeech / "train-clean-100" / "19" / "1" / "19-1.trans.txt"
        path.write_bytes(b"19-1-0000 \xff\n")
        with pytest.raises(InputError) as error:
            prepare(librispeech, save)
        assert_one_line(error, path, "cannot be read")


class TestPreparedOnce:
    def test_second_call_does_nothing(self, librispeech, save, caplog, monkeypatch):
        prepare(librispeech, save)
        before = snapshot(save)
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        prepare(librispeech, save)
        assert snapshot(save) == before
        assert "already prepared" in caplog.text

    def test_first_call_does_not_claim_so(self, librispeech, save, caplog):
        caplog.set_level(logging.INFO)
        prepare(librispeech, save)
        assert "prepared in" in caplog.text
        assert "already prepared" not in caplog.text

    def test_other_options_prepare_again(self, librispeech, save, caplog):
        write_split(librispeech, "train-other-500", ["7"])
        prepare(librispeech, save)
        split = snapshot(save)["train-clean-100.csv"]
        caplog.set_level(logging.INFO)
        manifests = prepare(librispeech, save, train_splits=["train-clean-100", "train-other-500"])
        assert len(read_manifest(manifests["train"])) == 12
        assert "already prepared" not in caplog.text
        assert snapshot(save)["train-clean-100.csv"] == split  # what did not change is not read again

    @pytest.mark.parametrize("change", ["add", "remove", "replace", "transcript"])
    def test_other_data_prepare_again(self, librispeech, save, change):
        before = read_manifest(prepare(librispeech, save)["train"])
        chapter = librispeech / "train-clean-100" / "19" / "1"
        if change == "add":
            write_audio(chapter / "19-1-0002.flac")
        elif change == "remove":
            (chapter / "19-1-0001.flac").unlink()
        elif change == "replace":
            write_audio(chapter / "19-1-0001.flac", seconds=2 * SECONDS)
        else:
            (chapter / "19-1.trans.txt").write_text("19-1-0001 OTHER WORDS\n")
        after = read_manifest(prepare(librispeech, save)["train"])
        assert len(after) - len(before) == {"add": 1, "remove": -1}.get(change, 0)
        if change == "replace":
            assert after["19-1-0001"]["duration"] == 2 * SECONDS
        if change == "transcript":
            assert after["19-1-0001"]["wrd"] == "OTHER WORDS"

    @pytest.mark.parametrize("probed", [3, 11])
    def test_interrupted_preparation_is_done_again(self, librispeech, tmp_path, save, monkeypatch, probed):
        whole = prepare(librispeech, tmp_path / "whole")
        probe, count = _audio_files.probe_audio, 0

        def interrupted(path):
            nonlocal count
            count += 1
            if count > probed:
                raise KeyboardInterrupt
            return probe(path)

        monkeypatch.setattr(_audio_files, "probe_audio", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(librispeech, save, workers=1)
        assert not (save / "train.csv").exists()
        with pytest.raises(InputError, match="finished preparation"):
            read_summary(save / "dev-clean.csv")
        monkeypatch.setattr(_audio_files, "probe_audio", probe)
        again = prepare(librispeech, save)
        for key in whole:
            assert again[key].read_bytes() == whole[key].read_bytes()

    @pytest.mark.parametrize("before", [False, True])
    def test_interruption_between_manifest_and_summary(self, librispeech, save, monkeypatch, before):
        if before:
            prepare(librispeech, save)
            write_audio(librispeech / "train-clean-100" / "19" / "1" / "19-1-0002.flac")
        write = manifest._write_summary

        def interrupted(path, summary):
            if summary["complete"]:
                raise KeyboardInterrupt
            write(path, summary)

        monkeypatch.setattr(manifest, "_write_summary", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(librispeech, save)
        monkeypatch.setattr(manifest, "_write_summary", write)
        assert len(read_manifest(prepare(librispeech, save)["train"])) == 8 + before

    def test_killed_process(self, librispeech, save):
        script = (
            "import os, sys\n"
            "from speechbrain_bestrq.corpora import _audio_files, prepare_librispeech\n"
            "probe, paths = _audio_files.probe_audio, []\n"
            "def kill(path):\n"
            "    paths.append(path)\n"
            "    return probe(path) if len(paths) < 5 else os._exit(9)\n"
            "_audio_files.probe_audio = kill\n"
            "prepare_librispeech(sys.argv[1], sys.argv[2], ['train-clean-100'], ['dev-clean'], workers=1)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(librispeech), str(save)], capture_output=True)
        assert done.returncode == 9, done.stderr
        assert not (save / "train-clean-100.csv").exists()
        assert len(read_manifest(prepare(librispeech, save)["train"])) == 8

    def test_edited_manifest_is_not_overwritten(self, librispeech, save):
        path = prepare(librispeech, save)["train"]
        edited = path.read_text().replace("WORDS", "WORKS")
        path.write_text(edited)
        with pytest.raises(InputError) as error:
            prepare(librispeech, save)
        assert_one_line(error, path, "was changed since it was prepared")
        assert path.read_text() == edited

    def test_foreign_files_are_not_overwritten(self, librispeech, save):
        for name in ("train.csv", "dev-clean.csv.json"):
            prepare(librispeech, save / name)
            for path in (save / name).iterdir():
                if path.name.startswith(name.split(".")[0]):
                    path.unlink()
            (save / name / name).write_text("[]")
            with pytest.raises(InputError) as error:
                prepare(librispeech, save / name)
            assert_one_line(error, save / name / name, "in the way")
            assert (save / name / name).read_text() == "[]"


class TestUnreadable:
    @pytest.fixture(params=["cut", "empty", "text", "short", "link"])
    def broken(self, request, librispeech):
        """A file that cannot be used, with the reason that has to be given."""
        path = librispeech / "train-clean-100" / "19" / "1" / "19-1-0000.flac"
        if request.param == "cut":
            cut_in_half(path)
            return path, "psf_fseek"
        path.unlink()
        if request.param == "empty":
            path.touch()
            return path, "the file is empty"
        if request.param == "text":
            path.write_text("a transcript with the wrong name")
            return path, "Format not recognised"
        if request.param == "short":
            write_audio(path, seconds=0.01)
            return path, "160 samples at 16000 Hz are too short"
        path.symlink_to("nowhere.flac")
        return path, "No such file"

    def test_refused_by_default(self, librispeech, save, broken):
        path, reason = broken
        with pytest.raises(InputError) as error:
            prepare(librispeech, save)
        assert_one_line(error, path, reason, "1 of 12 audio files", "max_unreadable to at least 1")
        assert not (save / "train.csv").exists()

    def test_skipped_up_to_the_limit(self, librispeech, save, broken, caplog):
        path, reason = broken
        train = read_manifest(prepare(librispeech, save, max_unreadable=1)["train"])
        assert len(train) == 7
        assert "19-1-0000" not in train
        assert f"cannot read '{path}'" in caplog.text
        assert reason in caplog.text
        assert reason in (save / "train-clean-100.csv.unreadable.txt").read_text()

    def test_limit_is_over_all_splits(self, librispeech, save):
        for split, name in (("train-clean-100/19", "19-1-0000"), ("dev-clean/84", "84-1-0001")):
            cut_in_half(librispeech / split / "1" / f"{name}.flac")
        with pytest.raises(InputError, match="2 of 12 audio files"):
            prepare(librispeech, save, max_unreadable=1)
        assert len(read_manifest(prepare(librispeech, save, max_unreadable=2)["valid"])) == 3

    def test_limit_holds_for_what_was_prepared_before(self, librispeech, save):
        cut_in_half(librispeech / "dev-clean" / "84" / "1" / "84-1-0001.flac")
        prepare(librispeech, save, max_unreadable=1)
        with pytest.raises(InputError, match="max_unreadable to at least 1"):
            prepare(librispeech, save)

    def test_mended_file_is_read(self, librispeech, save):
        path = librispeech / "train-clean-100" / "19" / "1" / "19-1-0000.flac"
        cut_in_half(path)
        prepare(librispeech, save, max_unreadable=1)
        write_audio(path)
        assert len(read_manifest(prepare(librispeech, save)["train"])) == 8
        assert not (save / "train-clean-100.csv.unreadable.txt").exists()

    @pytest.fixture
    def forbid(self, librispeech, monkeypatch):
        """A function that makes a file unreadable for a while, though the tree looks as before."""
        path = str(librispeech / "train-clean-100" / "19" / "1" / "19-1-0000.flac")
        probe = _audio_files.probe_audio

        def forbidden(one):
            return probe(one) if one != path else _audio_files.Probe(0.0, 0, 0, "no permission to read it")

        @contextmanager
        def forbid():
            with monkeypatch.context() as patch:
                patch.setattr(_audio_files, "probe_audio", forbidden)
                yield

        return forbid

    def test_after_a_refusal_a_file_that_did_not_change_is_looked_at_again(self, librispeech, save, forbid):
        """As after a ``chmod``, or with a library that knows its format."""
        with forbid(), pytest.raises(InputError, match="1 of .* audio files cannot be read"):
            prepare(librispeech, save)
        manifests = prepare(librispeech, save)
        assert len(read_manifest(manifests["train"])) == 8 and read_summary(manifests["train"])["unreadable"] == 0

    def test_what_a_run_began_with_stays_though_a_file_can_be_read_now(self, librispeech, save, forbid):
        with forbid():
            prepare(librispeech, save, max_unreadable=1)
        manifests = prepare(librispeech, save, max_unreadable=1)
        assert len(read_manifest(manifests["train"])) == 7 and read_summary(manifests["train"])["unreadable"] == 1

    def test_many_are_counted(self, tmp_path, save, caplog):
        for number in range(25):
            path = tmp_path / "audio" / f"{number:02d}.wav"
            write_audio(path).write_bytes(b"")
        for number in range(2):
            write_audio(tmp_path / "audio" / f"good{number}.wav")
        prepare_folder(tmp_path / "audio", save, max_unreadable=25)
        assert sum("cannot read '" in message for message in caplog.messages) == 20
        assert "cannot read 5 more files" in caplog.text
        lines = (save / "folder-audio.csv.unreadable.txt").read_text().splitlines()
        assert lines == [f"'{tmp_path}/audio/{number:02d}.wav'\tthe file is empty" for number in range(25)]

    def test_nothing_readable_is_refused_whatever_the_limit(self, tmp_path, save):
        write_audio(tmp_path / "audio" / "a.wav").write_bytes(b"")
        with pytest.raises(InputError) as error:
            prepare_folder(tmp_path / "audio", save, max_unreadable=10)
        assert_one_line(error, "none of the 1 audio files", tmp_path / "audio" / "a.wav")

    @pytest.mark.parametrize("options", [{"format": "FLAC"}, {"format": "MP3"}])
    def test_end_that_is_missing(self, tmp_path, options):
        path = write_audio(tmp_path / "audio", seconds=3.0, **options)
        assert _audio_files.probe_audio(str(path)).problem == ""
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
        assert _audio_files.probe_audio(str(path)).problem != ""

    def test_header_without_a_length(self, tmp_path):
        path = write_audio(tmp_path / "stream.flac")
        content = bytearray(path.read_bytes())
        content[21] &= 0xF0  # the last 36 bits before the checksum are the number of samples
        content[22:26] = bytes(4)
        path.write_bytes(content)
        assert _audio_files.probe_audio(str(path)).problem == "its header does not say how long it is"


class TestSampleRates:
    def test_others_are_kept_and_counted(self, librispeech, save, caplog):
        caplog.set_level(logging.INFO)
        path = librispeech / "train-clean-100" / "19" / "1" / "19-1-0000.flac"
        write_audio(path, sample_rate=44100, channels=2)
        train = read_manifest(prepare(librispeech, save)["train"])
        assert train["19-1-0000"]["duration"] == SECONDS
        assert "train-clean-100: 1 files have other sample rates (44100 Hz: 1)" in caplog.text
        assert "1 files have more than one channel" in caplog.text

    def test_others_are_refused(self, librispeech, save):
        path = librispeech / "train-clean-100" / "19" / "1" / "19-1-0000.flac"
        write_audio(path, sample_rate=8000)
        with pytest.raises(InputError) as error:
            prepare(librispeech, save, resample=False)
        assert_one_line(error, path, "8000 Hz", "resample")
        assert not (save / "train-clean-100.csv").exists()

    def test_others_are_refused_when_prepared_before(self, librispeech, save):
        prepare(librispeech, save, sample_rate=16000)
        with pytest.raises(InputError) as error:
            prepare(librispeech, save, sample_rate=8000, resample=False)
        assert_one_line(error, "16000 Hz, not 8000 Hz", "resample")

    def test_splits_to_test_on_may_be_copies_of_one_another_and_of_the_validation(self, librispeech, save):
        for name in ("noisy", "reverberant"):
            shutil.copytree(librispeech / "dev-clean", librispeech / name)
        splits = ["dev-clean", "noisy", "reverberant"]
        manifests = prepare_librispeech(librispeech, save, ["train-clean-100"], ["dev-clean"], splits)
        assert len({(tuple(read_manifest(manifests[split]))) for split in splits}) == 1


class TestLibriSpeechRefused:
    @pytest.fixture(autouse=True)
    def _nothing_is_opened(self, monkeypatch, save):
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        yield
        assert not save.exists()

    def refuse(self, root, save, *parts, **options):
        with pytest.raises(InputError) as error:
            prepare(root, save, **options)
        assert_one_line(error, *parts)

    def test_missing_folder(self, tmp_path, save):
        self.refuse(tmp_path / "none", save, f"data_folder '{tmp_path}/none' does not exist", "train-clean-100")

    def test_file_in_its_place(self, tmp_path, save):
        (tmp_path / "LibriSpeech.tar").touch()
        self.refuse(tmp_path / "LibriSpeech.tar", save, "is a file, not a folder")

    def test_empty_folder(self, tmp_path, save):
        (tmp_path / "LibriSpeech").mkdir()
        self.refuse(tmp_path / "LibriSpeech", save, f"data_folder '{tmp_path}/LibriSpeech' is empty")

    def test_parent(self, librispeech, save):
        self.refuse(librispeech.parent, save, f"give '{librispeech}'")

    def test_one_split(self, librispeech, save):
        self.refuse(librispeech / "dev-clean", save, "is one split", f"'{librispeech}'")

    def test_missing_split(self, librispeech, save):
        present = "it holds dev-clean, train-clean-100:"
        self.refuse(librispeech, save, "lacks the split(s) dev-other", present, valid_splits=["dev-other"])

    def test_split_without_audio(self, librispeech, save):
        (librispeech / "dev-other" / "1" / "2").mkdir(parents=True)
        self.refuse(librispeech, save, "split 'dev-other'", "no .flac file", valid_splits=["dev-other"])

    @pytest.mark.parametrize("name", ["19/1/stray.flac", "19/19-1-0009.flac", "19/1/more/19-1-0009.flac", "stray.flac"])
    def test_other_layout(self, librispeech, save, name):
        path = write_audio(librispeech / "train-clean-100" / name)
        self.refuse(librispeech, save, path, "LibriSpeech's layout")

    def test_utterance_in_two_splits(self, librispeech, save):
        write_split(librispeech, "dev-other", ["103"], chapters=["2"])
        self.refuse(
            librispeech,
            save,
            "'103-2-0000' is both in 'train-clean-100' and in 'dev-other'",
            valid_splits=["dev-other"],
        )

    def test_utterance_to_train_and_to_test_on(self, librispeech, save):
        write_split(librispeech, "test-clean", ["103"], chapters=["2"])
        message = "'103-2-0000' is both in 'train-clean-100' and in 'test-clean'"
        self.refuse(librispeech, save, message, test_splits=["test-clean"])

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ({"train_splits": "train-clean-100"}, "train_splits is a list"),
            ({"train_splits": []}, "train_splits is empty"),
            ({"valid_splits": []}, "valid_splits is empty"),
            ({"valid_splits": None}, "valid_splits is a list"),
            ({"train_splits": ["train-clean-100"] * 2}, "names 'train-clean-100' twice"),
            ({"valid_splits": ["train-clean-100"]}, "'train-clean-100' is both in train_splits and in valid_splits"),
            ({"test_splits": ["train-clean-100"]}, "'train-clean-100' is both in train_splits and in test_splits"),
            ({"test_splits": ["train"]}, "would be train.csv"),
            ({"test_splits": ["dev-clean/84"]}, "is a path"),
            ({"extra_folders": "unlabelled"}, "extra_folders is a list"),
            ({"extra_folders": ["/nonexistent"]}, "extra_folders '/nonexistent' does not exist"),
            ({"max_unreadable": -1}, "max_unreadable"),
            ({"workers": 0}, "workers"),
            ({"sample_rate": 0}, "sample_rate"),
        ],
    )
    def test_options(self, librispeech, save, options, part):
        self.refuse(librispeech, save, part, **options)

    def test_extra_folder_that_holds_the_validation_set(self, librispeech, save):
        self.refuse(librispeech, save, f"'{librispeech}'", "overlap", extra_folders=[librispeech])

    def test_extra_folder_without_audio(self, librispeech, tmp_path, save):
        (tmp_path / "extra").mkdir()
        (tmp_path / "extra" / "notes.txt").touch()
        self.refuse(librispeech, save, f"'{tmp_path}/extra' holds no file", extra_folders=[tmp_path / "extra"])


def test_save_folder_that_cannot_be_made(librispeech, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        prepare(librispeech, tmp_path / "file" / "save")
    assert_one_line(error, f"save_folder '{tmp_path}/file/save' cannot be made")


class TestExtraFolders:
    def test_added_to_train_alone(self, librispeech, tmp_path, save):
        path = write_audio(tmp_path / "extra" / "deep" / "a.wav")
        manifests = prepare(librispeech, save, extra_folders=[tmp_path / "extra"])
        train = read_manifest(manifests["train"])
        assert len(train) == 9
        assert train["extra/deep/a.wav"] == {"duration": SECONDS, "wav": str(path), "spk_id": "", "wrd": ""}
        assert len(read_manifest(manifests["valid"])) == 4
        assert read_summary(manifests["train"])["corpus"] == "LibriSpeech + extra"
        without = prepare(librispeech, save)
        assert len(read_manifest(without["train"])) == 8

    def test_same_name_is_refused(self, librispeech, tmp_path, save):
        folders = [write_audio(tmp_path / parent / "extra" / "a.wav").parent for parent in ("one", "two")]
        with pytest.raises(InputError) as error:
            prepare(librispeech, save, extra_folders=folders)
        assert_one_line(error, *folders, "same name")

    def test_a_link_to_what_is_read_anyway_is_refused(self, librispeech, folder, tmp_path, save):
        everything = write_audio(tmp_path / "everything" / "a.wav").parent
        (everything / "books").symlink_to(librispeech)
        with pytest.raises(InputError) as error:
            prepare(librispeech, save, extra_folders=[everything])
        assert_one_line(error, f"'{everything}/books/train-clean-100/", "would be used twice: remove the link")
        (everything / "books").unlink()
        (everything / "voices").symlink_to(folder)
        with pytest.raises(InputError) as error:
            prepare_folder(folder, save, extra_folders=[everything])
        assert_one_line(error, f"'{everything}/voices/speaker0' is '{folder}/speaker0'", "remove the link")
        assert not save.exists()
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.txt").touch()
        for place in (everything, librispeech / "dev-clean"):
            (place / "notes").symlink_to(tmp_path / "notes")  # without audio
        prepare(librispeech, save, extra_folders=[everything])  # what is elsewhere may be linked to

    @pytest.mark.parametrize("link", ["symbolic", "hard", "both to a third place"])
    def test_a_link_to_a_file_that_is_read_anyway_is_refused(self, librispeech, folder, tmp_path, save, link):
        """Validation audio would be trained on, and the best encoder chosen by what it has heard."""
        extra = write_audio(tmp_path / "extra" / "a.wav").parent
        heard = sorted((librispeech / "dev-clean").rglob("*.flac"))[0]
        if link == "hard":
            os.link(heard, extra / "b.flac")
        elif link == "symbolic":
            (extra / "b.flac").symlink_to(heard)
        else:
            store = heard.rename(tmp_path / heard.name)
            heard.symlink_to(store)
            (extra / "b.flac").symlink_to(store)
        prepare_folder(extra, save / "alone", extra_folders=[folder])
        with pytest.raises(InputError) as error:
            prepare(librispeech, save, extra_folders=[extra])
        assert_one_line(error, f"1 of the files in '{extra}'", f"'{extra}/b.flac', which is '{heard}'")

    def test_utterances_of_a_labelled_corpus_each_count_though_files_were_linked_to_save_room(self, librispeech, save):
        first, second = sorted((librispeech / "dev-clean").rglob("*.flac"))[:2]
        second.unlink()
        os.link(first, second)
        assert len(read_manifest(prepare(librispeech, save)["valid"])) == 4

    def test_one_name_in_each_of_several_folders_leaves_nothing_to_split(self, tmp_path, save):
        one, other = (write_audio(tmp_path / name / "audio.wav").parent for name in ("one", "other"))
        with pytest.raises(InputError) as error:
            prepare_folder(one, save, extra_folders=[other])
        assert_one_line(error, "all 2 readable audio files are 'audio.wav' of their folders", "give the folder")

    def test_second_root_of_a_folder(self, folder, tmp_path, save):
        write_audio(tmp_path / "more" / "a.wav")
        alone = {key: set(read_manifest(path)) for key, path in prepare_folder(folder, save).items()}
        manifests = prepare_folder(folder, save, extra_folders=[tmp_path / "more"])
        both = {key: set(read_manifest(path)) for key, path in manifests.items()}
        assert len(both["train"]) + len(both["valid"]) == 21
        assert {f"audio/{name}" for name in alone["valid"]} <= both["valid"]
        assert "more/a.wav" in both["train"] | both["valid"]


class TestFolder:
    def test_a_name_that_is_no_utf8_is_read(self, tmp_path, save):
        for name in ("a", "b"):
            write_audio(tmp_path / "audio" / f"{name}.wav")
        strange = os.fsencode(tmp_path / "audio") + b"/caf\xe9.wav"
        os.rename(tmp_path / "audio" / "a.wav", strange)
        manifests = prepare_folder(tmp_path / "audio", save)
        rows = [row for path in manifests.values() for row in read_manifest(path).values()]
        assert os.fsdecode(strange) in {row["wav"] for row in rows} and len(rows) == 2
        assert all(read_segment(row["wav"], 0, 1000).shape == (1000,) for row in rows)

    def test_an_encoding_without_places_is_named(self, tmp_path, save):
        for name in ("a", "b", "c"):
            write_audio(tmp_path / "audio" / f"{name}.wav")
        soundfile.write(tmp_path / "audio" / "phone.wav", np.zeros(16000), 8000, subtype="GSM610")
        with pytest.raises(InputError) as error:
            prepare_folder(tmp_path / "audio", save)
        assert_one_line(error, "phone.wav", "no stretch of GSM610 can be looked up: convert it, as by ffmpeg")

    def test_any_tree(self, tmp_path, save, caplog):
        caplog.set_level(logging.INFO)
        root = tmp_path / "audio"
        write_audio(root / "a b.wav")
        write_audio(root / "a" / "b" / "c.FLAC", format="FLAC")
        write_audio(root / "a" / "d.ogg", format="OGG", subtype="VORBIS")
        write_audio(root / "a" / "e.opus", format="OGG", subtype="OPUS")
        write_audio(root / "a" / "rates.wav", sample_rate=22050)
        write_audio(root / ".hidden.wav")
        write_audio(root / ".hidden" / "f.wav")
        write_audio(root / "folder.wav" / "g.wav")
        (root / "a" / "notes.txt").write_text("no audio")
        (root / "a" / "wav").write_text("no audio")
        manifests = prepare_folder(root, save)
        data = read_manifest(manifests["train"]) | read_manifest(manifests["valid"])
        names = ["a b.wav", "a/b/c.FLAC", "a/d.ogg", "a/e.opus", "a/rates.wav", "folder.wav/g.wav"]
        assert sorted(data) == names
        assert list(read_manifest(save / "folder-audio.csv")) == names
        assert {name: row["wav"] for name, row in data.items()} == {name: str(root / name) for name in names}
        assert all(row["duration"] == pytest.approx(SECONDS, abs=1e-4) for row in data.values())
        assert "2 files ignored that are no audio" in caplog.text

    def test_mp3(self, tmp_path, save):
        # libsndfile reads it since 1.1, and soundfile's wheels hold a newer one
        for name in ("a.mp3", "b.mp3"):
            write_audio(tmp_path / "audio" / name, seconds=1.0, format="MP3")
        train = read_manifest(prepare_folder(tmp_path / "audio", save)["train"])
        assert [row["duration"] for row in train.values()] == [pytest.approx(1.0, abs=0.1)]

    @pytest.mark.parametrize(
        "name",
        ["a,b", 'say "a"', "$HOME ${x}", "ünï 語", "two\nlines", "c\rr", " space ", "it's", "%s {x}", "-n", "a;b"],
    )
    def test_strange_names(self, tmp_path, save, name):
        path = write_audio(tmp_path / "audio" / name / f"{name}.wav")
        write_audio(tmp_path / "audio" / "plain.wav")
        manifests = prepare_folder(tmp_path / "audio", save)
        data = read_manifest(manifests["train"]) | read_manifest(manifests["valid"])
        assert data[f"{name}/{name}.wav"]["wav"] == str(path)
        before = snapshot(save)
        prepare_folder(tmp_path / "audio", save)
        assert snapshot(save) == before

    def test_strange_name_in_an_error_is_one_line(self, tmp_path, save):
        write_audio(tmp_path / "audio" / "two\nlines.wav").write_bytes(b"")
        write_audio(tmp_path / "audio" / "plain.wav")
        with pytest.raises(InputError) as error:
            prepare_folder(tmp_path / "audio", save)
        assert_one_line(error, r"two\nlines.wav")

    def test_order_is_that_of_the_paths(self, tmp_path):
        names = ["a b/1.wav", "a-b.wav", "a.wav", "a/2.wav", "a/b/3.wav", "a0/4.wav", "B.wav"]
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).touch()
        found = [relative for relative, _ in _audio_files.walk_files(tmp_path)]
        assert found == sorted(names)

    def test_links(self, tmp_path, save, caplog):
        elsewhere = write_audio(tmp_path / "elsewhere" / "x.wav").parent
        root = tmp_path / "audio"
        write_audio(root / "a" / "1.wav")
        (root / "a" / "loop").symlink_to(root)
        (root / "itself").symlink_to(root / "itself")
        (root / "linked").symlink_to(elsewhere)
        (root / "linked2").symlink_to(elsewhere)
        (root / "z.wav").symlink_to(root / "a" / "1.wav")
        # of a file and the links to it, symbolic or not, one: the others could come to be validated on
        os.link(root / "a" / "1.wav", root / "b.wav")
        with caplog.at_level("WARNING"):
            prepare_folder(root, save)
        assert list(read_manifest(save / "folder-audio.csv")) == ["a/1.wav", "linked/x.wav"]
        assert "audio: 2 files are links to others of the folder, and left out, such as b.wav" in caplog.text

    @pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (22050, 2), (48000, 1)])
    def test_mp3_files_put_one_behind_another_are_named(self, tmp_path, rate, channels):
        """As podcasts are, with advertisements before: the header is that of the first, and so would be the length."""
        noise = 0.1 * np.random.default_rng(0).standard_normal((4 * rate, channels))
        for number in (1, 4):
            soundfile.write(tmp_path / f"{number}.mp3", noise[: number * rate], rate)
        parts = [(tmp_path / f"{number}.mp3").read_bytes() for number in (1, 4)]
        (tmp_path / "both.mp3").write_bytes(parts[0] + parts[1])
        cover = bytes([0, 0, 0, 0, 1, 0, 0]) + bytes(2**14)  # of 16384 bytes, said in seven bits each
        (tmp_path / "tagged.mp3").write_bytes(b"ID3" + cover + parts[0] + b"TAG" + bytes(125))
        ape = b"APETAGEX" + bytes(24)
        (tmp_path / "ape.mp3").write_bytes(parts[0] + bytes(len(parts[0])) + ape)
        header = max(parts[0].find(b"Info"), parts[0].find(b"Xing"))
        broken_off = parts[0][: header + 8] + bytes(8) + parts[0][header + 16 :]
        (tmp_path / "off").write_bytes(broken_off + parts[1])
        (tmp_path / "short").write_bytes(parts[0] + bytes(4000))  # tags behind a short file
        assert not any(header_falls_short(str(tmp_path / name)) for name in ("off", "short"))
        problems = {path.stem: _audio_files.probe_audio(str(path)).problem for path in tmp_path.glob("*.mp3")}
        assert "ffmpeg -i a.mp3 -c copy b.mp3" in problems.pop("both")
        assert set(problems.values()) == {""}

    def test_what_a_disk_keeps_for_itself_is_passed_over(self, folder, save, monkeypatch):
        (folder / "lost+found").mkdir()
        scandir = os.scandir

        def as_a_user(path):
            if path.endswith("lost+found"):
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(_audio_files.os, "scandir", as_a_user)
        assert sum(len(read_manifest(path)) for path in prepare_folder(folder, save).values()) == 20

    def test_a_rate_that_cannot_be_resampled_is_refused_before_it_counts_as_damage(self, folder, save):
        path = folder / "speaker0" / "old.wav"
        soundfile.write(path, np.zeros(22254), 22254)
        with pytest.raises(InputError) as error:
            prepare_folder(folder, save, max_unreadable=10)
        assert_one_line(error, path, "22254 Hz, which cannot be resampled to 16000 Hz")

    def test_disks_that_do_not_number_their_files(self, folder, save, monkeypatch):
        numbers = itertools.count(1)
        for inode, size in ((lambda: 0, lambda: 1), (lambda: 7, lambda: next(numbers))):  # none, and the same for all
            monkeypatch.setattr(
                _audio_files,
                "_status",
                lambda entry, inode=inode, size=size: types.SimpleNamespace(
                    st_dev=1, st_ino=inode(), st_size=size(), st_mtime_ns=1
                ),
            )
            assert sum(len(read_manifest(path)) for path in prepare_folder(folder, save).values()) == 20

    def test_other_extensions(self, folder, save):
        write_audio(folder / "speaker0" / "9.aiff", format="AIFF")
        write_audio(folder / "speaker1" / "9.aiff", format="AIFF")
        manifests = prepare_folder(folder, save, extensions=[".AIFF"])
        assert sum(len(read_manifest(path)) for path in manifests.values()) == 2

    def test_pipe_with_the_name_of_audio(self, folder, save):
        os.mkfifo(folder / "pipe.wav")  # opening it would wait for ever
        manifests = prepare_folder(folder, save)
        assert sum(len(read_manifest(path)) for path in manifests.values()) == 20


class TestFolderSplit:
    @staticmethod
    def split(root, save, **options):
        return {key: set(read_manifest(path)) for key, path in prepare_folder(root, save, **options).items()}

    def test_speakers_stay_together(self, folder, save):
        sides = self.split(folder, save, valid_share=0.3)
        speakers = {key: {name.split("/")[0] for name in names} for key, names in sides.items()}
        assert not speakers["train"] & speakers["valid"]
        assert len(speakers["train"] | speakers["valid"]) == 10

    def test_share(self, tmp_path, save):
        for number in range(200):
            write_audio(tmp_path / "audio" / f"{number}.wav", seconds=0.03)
        sides = self.split(tmp_path / "audio", save, valid_share=0.2)
        assert 0.1 < len(sides["valid"]) / 200 < 0.3

    def test_seed_draws_another(self, folder, save):
        drawn = {frozenset(self.split(folder, save, seed=seed)["valid"]) for seed in range(6)}
        assert len(drawn) > 1

    def test_same_wherever_it_lies(self, folder, tmp_path, save):
        first = self.split(folder, save, valid_share=0.3)
        folder.rename(tmp_path / "moved")
        assert self.split(tmp_path / "moved", tmp_path / "other", valid_share=0.3) == first

    def test_stable_when_files_are_added(self, folder, tmp_path, save):
        first = self.split(folder, save, valid_share=0.3)
        for number in range(10, 20):
            write_audio(folder / f"speaker{number}" / "0.wav")
        write_audio(folder / "speaker0" / "9.wav")
        second = self.split(folder, save, valid_share=0.3)
        assert first["train"] <= second["train"]
        assert first["valid"] <= second["valid"]
        assert len(second["train"] | second["valid"]) == 31

    def test_limit_in_hours(self, folder, save):
        hours = 3 * SECONDS / 3600  # one speaker of two files fits, two do not
        sides = self.split(folder, save, valid_share=0.9, max_valid_hours=hours)
        assert len(sides["valid"]) == 2
        assert len(sides["train"]) == 18

    def test_small_share_still_has_one(self, folder, save):
        sides = self.split(folder, save, valid_share=1e-9)
        assert len(sides["valid"]) == 2

    def test_single_sub_folder_is_split_below(self, folder, tmp_path, save, caplog):
        (tmp_path / "outer").mkdir()
        folder.rename(tmp_path / "outer" / "wavs")
        sides = self.split(tmp_path / "outer", save, valid_share=0.3)
        speakers = {key: {name.split("/")[1] for name in names} for key, names in sides.items()}
        assert not speakers["train"] & speakers["valid"]
        assert "drawn from level 2" in caplog.text

    def test_two_files_are_enough(self, tmp_path, save):
        for name in ("a", "b"):
            write_audio(tmp_path / "audio" / f"{name}.wav")
        sides = self.split(tmp_path / "audio", save)
        assert len(sides["train"]) == len(sides["valid"]) == 1

    def test_changed_split_does_not_probe_again(self, folder, save, monkeypatch):
        first = self.split(folder, save)
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        second = self.split(folder, save, valid_share=0.5)
        assert len(second["valid"]) > len(first["valid"])

    def test_too_little_is_refused(self, tmp_path, save):
        write_audio(tmp_path / "audio" / "s" / "a.wav")
        with pytest.raises(InputError) as error:
            prepare_folder(tmp_path / "audio", save)
        assert_one_line(error, tmp_path / "audio", "no validation set", "one readable audio file")
        assert not (save / "train.csv").exists()

    def test_of_recordings_that_are_all_too_long_the_shortest_is_for_validation(self, tmp_path, save, caplog):
        for name, seconds in (("a", 2.0), ("b", 1.0), ("c", 3.0)):
            write_audio(tmp_path / "audio" / "s" / f"{name}.wav", seconds=seconds)
        sides = self.split(tmp_path / "audio", save, max_valid_hours=0.5 / 3600)
        assert list(sides["valid"]) == ["s/b.wav"]
        assert "the shortest is taken: s/b" in caplog.text

    def test_a_validation_set_of_a_jingle_is_warned_of(self, tmp_path, save, caplog):
        for name, seconds in (("a", 90.0), ("b", 90.0), ("jingle", 0.1)):
            write_audio(tmp_path / "audio" / f"{name}.wav", seconds=seconds)
        self.split(tmp_path / "audio", save, max_valid_hours=0.01)
        assert "the validation set, by which the best encoder is chosen, has 0 s of audio" in caplog.text

    def test_audio_of_another_kind_is_told_of(self, tmp_path, save, caplog):
        for name in ("a", "b", "c"):
            write_audio(tmp_path / "audio" / f"{name}.wav")
        (tmp_path / "audio" / "d.M4A").write_bytes(b"")
        self.split(tmp_path / "audio", save)
        assert "1 of the files ignored are audio of another kind, such as .m4a" in caplog.text

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ({"valid_share": 0.0}, "valid_share"),
            ({"valid_share": 1.0}, "valid_share"),
            ({"max_valid_hours": 0.0}, "max_valid_hours"),
            ({"extensions": "wav"}, "extensions is a list"),
            ({"extensions": []}, "extensions must name"),
            ({"extensions": ["raw"]}, "'raw'"),
            (
                {"extensions": ["m4a"]},
                "holds no file that ends in .m4a (20 other files)",
            ),
        ],
    )
    def test_options(self, folder, save, options, part):
        with pytest.raises(InputError) as error:
            prepare_folder(folder, save, **options)
        assert_one_line(error, part)
        assert not save.exists()

    def test_missing_and_empty(self, tmp_path, save):
        (tmp_path / "empty").mkdir()
        for name, part in (("none", "does not exist"), ("empty", "is empty")):
            with pytest.raises(InputError) as error:
                prepare_folder(tmp_path / name, save)
            assert_one_line(error, f"data_folder '{tmp_path / name}' {part}")
