"""Preparation of VoxCeleb: layouts, trial lists, who is on which side."""

import json
import logging
import os
import subprocess
from collections import Counter

import numpy as np
import pytest
import soundfile

from speechbrain_bestrq.cli import main
from speechbrain_bestrq.corpora import _audio_files, prepare_voxceleb, read_manifest, read_summary, read_trials
from speechbrain_bestrq.corpora._audio_files import Probe
from speechbrain_bestrq.corpora._trials import draw_trials
from speechbrain_bestrq.errors import InputError

SPEAKERS = [f"id1000{number}" for number in range(1, 9)]
VIDEOS = ("x6uYqmx31kE", "-GWXujl_xAV")
# speakers 1 and 2 are on trial, six are left
TRIALS = [
    "1 id10001/x6uYqmx31kE/00001.wav id10001/-GWXujl_xAV/00002.wav",
    "0 id10001/x6uYqmx31kE/00001.wav id10002/x6uYqmx31kE/00001.wav",
    "1 id10002/x6uYqmx31kE/00001.wav id10002/-GWXujl_xAV/00001.wav",
]


def write_audio(path, sample_rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), np.random.default_rng(0).normal(0.0, 0.1, sample_rate // 10), sample_rate)
    return path


def write_speakers(folder, speakers, videos=VIDEOS, utterances=2):
    for speaker in speakers:
        for video in videos:
            for number in range(1, utterances + 1):
                write_audio(folder / speaker / video / f"{number:05d}.wav")


def write_list(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def voxceleb(tmp_path):
    """Eight speakers with two videos of two utterances each; two of the speakers are on trial."""
    root = tmp_path / "VoxCeleb1"
    write_speakers(root / "wav", SPEAKERS)
    write_list(root / "meta" / "veri_test.txt", TRIALS)
    return root


@pytest.fixture
def save(tmp_path):
    return tmp_path / "save"


def read(manifests):
    return {key: read_manifest(manifests[key]) for key in ("train", "valid", "test")}


def speakers_of(rows):
    return {row["spk_id"] for row in rows.values()}


def refuse(voxceleb, save, *parts, **options):
    with pytest.raises(InputError) as error:
        prepare_voxceleb(voxceleb, save, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


class TestLayout:
    def test_manifests(self, voxceleb, save):
        manifests = prepare_voxceleb(voxceleb, save)
        assert manifests == {key: save / f"{key}.csv" for key in ("train", "valid", "test", "trials", "valid_trials")}
        rows = read(manifests)
        assert rows["test"] == {
            f"{name}": {"duration": 0.1, "wav": str(voxceleb / "wav" / f"{name}.wav"), "spk_id": name[:7]}
            for name in sorted({path.removesuffix(".wav") for line in TRIALS for path in line.split()[1:]})
        }
        assert len(rows["train"]) == 4 * 4
        assert list(rows["train"]) == sorted(rows["train"])
        assert read_summary(manifests["trials"])["rows"] == 3

    @pytest.mark.parametrize("above", ["", "dev/wav", "dev/aac", "vox1/dev/wav"])
    def test_same_wherever_the_speakers_lie(self, voxceleb, tmp_path, save, above):
        there = tmp_path / "other" / above
        there.parent.mkdir(parents=True, exist_ok=True)
        before = read(prepare_voxceleb(voxceleb, save))
        (voxceleb / "wav").rename(there)
        after = read(prepare_voxceleb(tmp_path / "other", tmp_path / "again", trials=[voxceleb / "meta/veri_test.txt"]))
        assert {key: list(rows) for key, rows in after.items()} == {key: list(rows) for key, rows in before.items()}
        assert after["train"]["id10003/-GWXujl_xAV/00001"]["wav"] == str(there / "id10003/-GWXujl_xAV/00001.wav")

    def test_dev_and_test_side_by_side(self, voxceleb, save):
        for number, speaker in enumerate(SPEAKERS):
            new = voxceleb / ("test" if number < 2 else "dev") / "wav" / speaker
            new.parent.mkdir(parents=True, exist_ok=True)
            (voxceleb / "wav" / speaker).rename(new)
        (voxceleb / "wav").rmdir()
        rows = read(prepare_voxceleb(voxceleb, save))
        assert len(rows["test"]) == 4
        assert all("/test/wav/" in row["wav"] for row in rows["test"].values())

    def test_other_formats_answer_to_the_same_names(self, voxceleb, save):
        for path in sorted((voxceleb / "wav").rglob("*.wav")):
            soundfile.write(str(path.with_suffix(".flac")), soundfile.read(path)[0], 16000)
            path.unlink()
        rows = read(prepare_voxceleb(voxceleb, save))
        assert rows["test"]["id10001/x6uYqmx31kE/00001"]["wav"].endswith("00001.flac")

    def test_extra_folder_is_trained_on(self, voxceleb, tmp_path, save):
        write_speakers(tmp_path / "VoxCeleb2" / "dev" / "wav", ["id00012", "id00015"])
        manifests = prepare_voxceleb(voxceleb, save, extra_folders=[tmp_path / "VoxCeleb2"])
        rows = read(manifests)
        assert speakers_of(rows["train"]) | speakers_of(rows["valid"]) == {*SPEAKERS[2:], "id00012", "id00015"}
        assert read_summary(manifests["train"])["corpus"] == "VoxCeleb + VoxCeleb2"

    def test_corpus_says_what_it_is(self, voxceleb, save):
        (voxceleb / "CORPUS.json").write_text('{"recordings": "noise"}')
        assert read_summary(prepare_voxceleb(voxceleb, save)["train"])["corpus"] == "noise"

    @pytest.mark.parametrize("name", ["wav/id10003/stray.wav", "wav/speaker/video/00001.wav", "noise.wav"])
    def test_other_layout_is_refused(self, voxceleb, save, name):
        path = write_audio(voxceleb / name)
        refuse(voxceleb, save, path, "VoxCeleb's layout")
        assert not save.exists()

    def test_utterance_in_two_folders_is_refused(self, voxceleb, save):
        path = write_audio(voxceleb / "z" / "id10003" / "x6uYqmx31kE" / "00001.wav")
        refuse(voxceleb, save, "'id10003/x6uYqmx31kE/00001' is there twice", path)

    def test_folders_of_one_name_are_refused(self, voxceleb, tmp_path, save):
        other = tmp_path / "more" / "VoxCeleb1"
        write_speakers(other / "wav", ["id00012"])
        refuse(voxceleb, save, voxceleb, other, "same name", extra_folders=[other])

    def test_no_audio_is_refused(self, voxceleb, tmp_path, save):
        (tmp_path / "empty").mkdir()
        refuse(tmp_path / "empty", save, "is empty")
        refuse(tmp_path / "none", save, "does not exist")
        (tmp_path / "empty" / "notes.txt").touch()
        refuse(tmp_path / "empty", save, "holds no file that ends in", trials=[voxceleb / "meta" / "veri_test.txt"])


class TestM4a:
    def test_command_of_the_error_converts_them(self, voxceleb, tmp_path, save):
        folder = tmp_path / "Vox Celeb2" / "dev" / "aac" / "id00012" / "it's"
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"0000{number}.m4a").write_bytes(b"not read")
        folders = [tmp_path / "Vox Celeb2"]
        message = refuse(voxceleb, save, "3 recordings", "are m4a", folder / "00000.m4a", extra_folders=folders)
        assert not save.exists()
        # an ffmpeg that writes its last argument: what counts here is which files it is called with
        fake = tmp_path / "bin" / "ffmpeg"
        fake.parent.mkdir()
        fake.write_text('#!/bin/sh\nfor last; do :; done\necho "$*" > "$last"\n')
        fake.chmod(0o755)
        command = message.partition("convert them with ")[2]
        environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
        subprocess.run(["sh", "-c", command], check=True, env=environment, timeout=60)
        assert sorted(path.name for path in folder.glob("*.wav")) == ["00000.wav", "00001.wav", "00002.wav"]
        assert f"-i {folder}/00001.m4a -ac 1 -ar 16000" in (folder / "00001.wav").read_text()

    def test_converted_ones_are_passed_over(self, voxceleb, save):
        for path in (voxceleb / "wav" / "id10003").rglob("*.wav"):
            path.with_suffix(".m4a").touch()
        assert len(read(prepare_voxceleb(voxceleb, save))["train"]) == 16


class TestTrialLists:
    def test_content(self, voxceleb, save):
        trials = read_trials(prepare_voxceleb(voxceleb, save)["trials"])
        assert trials == {
            "veri_test": [
                (1, "id10001/x6uYqmx31kE/00001", "id10001/-GWXujl_xAV/00002"),
                (0, "id10001/x6uYqmx31kE/00001", "id10002/x6uYqmx31kE/00001"),
                (1, "id10002/x6uYqmx31kE/00001", "id10002/-GWXujl_xAV/00001"),
            ]
        }

    def test_spaces_empty_lines_and_folders_above_do_not_matter(self, voxceleb, save):
        plain = read_trials(prepare_voxceleb(voxceleb, save)["trials"])
        lines = [line.replace(" ", " \t", 1).replace(" id", "  wav/id") + "\r" for line in TRIALS]
        write_list(voxceleb / "meta" / "veri_test.txt", ["", *lines, "  "])
        assert read_trials(prepare_voxceleb(voxceleb, save)["trials"]) == plain

    def test_several_by_name_and_by_path(self, voxceleb, tmp_path, save):
        hard = write_list(tmp_path / "list_test_hard.txt", [line.replace("id10002", "id10003") for line in TRIALS])
        write_list(voxceleb / "veri_test2.txt", TRIALS[:2])
        manifests = prepare_voxceleb(voxceleb, save, trials=["veri_test.txt", "veri_test2.txt", hard])
        lists = read_trials(manifests["trials"])
        assert {name: len(trials) for name, trials in lists.items()} == {
            "veri_test": 3,
            "veri_test2": 2,
            "list_test_hard": 3,
        }
        assert speakers_of(read_manifest(manifests["test"])) == {"id10001", "id10002", "id10003"}
        assert "id10003" not in speakers_of(read_manifest(manifests["train"]))

    @pytest.mark.parametrize(
        "line",
        [
            "id10001-x6uYqmx31kE-00001 id10002-x6uYqmx31kE-00001 target",
            "target id10001/x6uYqmx31kE/00001.wav id10002/x6uYqmx31kE/00001.wav",
            "2 id10001/x6uYqmx31kE/00001.wav id10002/x6uYqmx31kE/00001.wav",
            "1 id10001/x6uYqmx31kE/00001.wav",
            "1 id10001/x6uYqmx31kE/00001.wav id10002/x6uYqmx31kE/00001.wav 0.5",
            "1,id10001/x6uYqmx31kE/00001.wav,id10002/x6uYqmx31kE/00001.wav",
            "1 anna/one/00001.wav bert/two/00001.wav",
            b"\xff\xfe".decode("utf-8", "surrogateescape"),
        ],
    )
    def test_another_format_is_refused_with_the_line(self, voxceleb, save, line):
        path = voxceleb / "meta" / "veri_test.txt"
        path.write_bytes("\n".join([*TRIALS, "", line]).encode("utf-8", "surrogateescape"))
        refuse(voxceleb, save, f"trial list '{path}', line 5", "VoxCeleb's own format")
        assert not save.exists()

    def test_missing_files_are_counted_before_time_is_spent(self, voxceleb, save, monkeypatch):
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        wrong = "1 id10001/x6uYqmx31kE/00009.wav id10002/x6uYqmx31kE/00001.wav"
        path = write_list(voxceleb / "meta" / "veri_test.txt", [*TRIALS, wrong, wrong])
        refuse(voxceleb, save, path, "2 of 5 trials name 1 utterances", "'id10001/x6uYqmx31kE/00009' (line 4)")
        assert not save.exists()

    @pytest.mark.parametrize(("lines", "part"), [(TRIALS[:1], "1 target and 0 impostor"), ([], "0 target and 0")])
    def test_list_without_both_kinds_is_refused(self, voxceleb, save, lines, part):
        write_list(voxceleb / "meta" / "veri_test.txt", lines)
        refuse(voxceleb, save, part)

    def test_absent_list_is_refused_with_those_there(self, voxceleb, save):
        refuse(voxceleb, save, "'veri_test3.txt' is neither", "there are veri_test.txt", trials=["veri_test3.txt"])

    def test_two_of_one_name_are_refused(self, voxceleb, tmp_path, save):
        other = write_list(tmp_path / "veri_test.txt", TRIALS)
        refuse(voxceleb, save, other, "same name", trials=["veri_test.txt", other])

    def test_labels_that_contradict_the_speakers_are_reported(self, voxceleb, save, caplog):
        prepare_voxceleb(voxceleb, save)
        assert "trials contradict" not in caplog.text
        write_list(voxceleb / "meta" / "veri_test.txt", ["0" + TRIALS[0][1:], *TRIALS[1:]])
        prepare_voxceleb(voxceleb, save)
        assert "the labels of 1 of 3 trials contradict" in caplog.text

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (None, "do not exist"),
            ("", "first line has to be list,label,first,second"),
            ("ID,duration,wav\n", "first line has to be"),
            ("list,label,first,second\n", "hold no trial"),
            ("list,label,first,second\na,1,b,c\na,yes,b,c\n", "line 3"),
            ("list,label,first,second\na,1,b\n", "line 2"),
        ],
    )
    def test_what_is_no_table_of_trials_is_refused(self, tmp_path, content, part):
        if content is not None:
            (tmp_path / "trials.csv").write_text(content)
        with pytest.raises(InputError, match=part):
            read_trials(tmp_path / "trials.csv")


class TestSides:
    def test_no_speaker_is_on_two_sides(self, voxceleb, save):
        rows = read(prepare_voxceleb(voxceleb, save, valid_share=0.5))
        train, valid, test = (speakers_of(rows[key]) for key in ("train", "valid", "test"))
        assert test == {"id10001", "id10002"}
        assert len(train) == len(valid) == 3
        assert train | valid == set(SPEAKERS[2:])

    def test_what_the_trial_lists_cost_is_counted(self, voxceleb, save, caplog):
        caplog.set_level(logging.INFO)
        summary = read_summary(prepare_voxceleb(voxceleb, save)["train"])
        assert summary["trial_speakers"] == 2
        assert summary["trial_speaker_utterances"] == 8
        assert summary["trial_speaker_hours"] == pytest.approx(8 * 0.1 / 3600)
        assert (
            "kept out of training for the trial lists: 8 utterances, 0.00 hours, of which the lists do not name 4"
            in (caplog.text)
        )

    def test_lists_that_leave_nobody_are_refused(self, voxceleb, save):
        pairs = zip(SPEAKERS[::2], SPEAKERS[1::2], strict=True)
        lines = [f"0 {one}/x6uYqmx31kE/00001.wav {two}/x6uYqmx31kE/00001.wav" for one, two in pairs]
        write_list(voxceleb / "meta" / "veri_test.txt", [*TRIALS, *lines])
        refuse(voxceleb, save, voxceleb, "0 speakers are left when the 8 of the trial lists", "VoxCeleb 2")

    def test_speaker_with_one_utterance_is_trained_on_alone(self, voxceleb, save):
        write_speakers(voxceleb / "wav", [f"id1002{number}" for number in range(6)], videos=["v"], utterances=1)
        for seed in range(5):
            manifests = prepare_voxceleb(voxceleb, save, valid_share=0.4, seed=seed)
            rows = read(manifests)
            assert speakers_of(rows["valid"]) < set(SPEAKERS)
            assert {f"id1002{number}" for number in range(6)} < speakers_of(rows["train"])
        assert read_summary(manifests["train"])["single_utterance_speakers"] == 6

    def test_too_large_a_share_is_refused(self, voxceleb, save):
        refuse(voxceleb, save, "of 6 speakers", "valid_share = 0.9", valid_share=0.9)

    def test_seed_draws_others_and_a_new_speaker_moves_none(self, voxceleb, tmp_path, save):
        def valid(folder, **options):
            return frozenset(
                speakers_of(read(prepare_voxceleb(voxceleb, folder, valid_share=0.34, **options))["valid"])
            )

        first = valid(save)
        assert len({first, *(valid(save, seed=seed) for seed in range(1, 5))}) > 1
        assert valid(tmp_path / "other") == first
        write_speakers(voxceleb / "wav", ["id10050"])
        assert valid(save) <= first | {"id10050"}


class TestValidationTrials:
    def test_valid_holds_what_they_name(self, voxceleb, save):
        manifests = prepare_voxceleb(voxceleb, save, valid_trials=4)
        trials = read_trials(manifests["valid_trials"])["valid"]
        assert Counter(label for label, *_ in trials) == {0: 2, 1: 2}
        assert set(read_manifest(manifests["valid"])) == {identifier for _, *pair in trials for identifier in pair}

    @pytest.fixture
    def utterances(self):
        # 1, 2, ... 12 utterances in two videos each, but for the last
        made = {f"id{n:02d}": [f"id{n:02d}/{'ab'[i % 2]}/{i}" for i in range(n)] for n in range(2, 13)}
        return made | {"id99": [f"id99/only/{i}" for i in range(5)]}

    @pytest.mark.parametrize("most", [2, 7, 100, 10**6])
    @pytest.mark.parametrize("seed", range(5))
    def test_balanced_true_and_none_twice(self, utterances, most, seed):
        trials = draw_trials(utterances, most, seed)
        labels = Counter(label for label, *_ in trials)
        assert labels[0] == labels[1]
        # sum of n² / 4 pairs across two videos, and 10 of the only video
        assert len(trials) == min(most // 2, sum(n * n // 4 for n in range(2, 13)) + 10) * 2
        assert len({frozenset(pair) for _, *pair in trials}) == len(trials)
        owner = {identifier: speaker for speaker, named in utterances.items() for identifier in named}
        for label, first, second in trials:
            assert label == (owner[first] == owner[second])
            if label and owner[first] != "id99":
                assert first.split("/")[1] != second.split("/")[1]

    def test_all_pairs_can_be_drawn(self):
        utterances = {"a": ["a/1/1", "a/2/1"], "b": ["b/1/1", "b/1/2"], "c": ["c/1/1", "c/2/1"]}
        drawn = {trial for seed in range(200) for trial in draw_trials(utterances, 6, seed)}
        assert sum(label for label, *_ in drawn) == 3
        assert len(drawn) == 3 + 12

    def test_targets_are_shared_out_evenly(self, utterances):
        trials = draw_trials(utterances, 2 * 60, seed=1)
        counts = Counter(first.split("/")[0] for label, first, _ in trials if label)
        # ids 2 and 3 have no more than 1 and 2 pairs
        assert (counts["id02"], counts["id03"]) == (1, 2)
        assert {counts[speaker] for speaker in utterances if speaker not in ("id02", "id03", "id04")} <= {5, 6}
        assert counts.total() == 60

    def test_function_of_the_seed(self, utterances):
        assert draw_trials(utterances, 50, 3) == draw_trials(dict(reversed(utterances.items())), 50, 3)
        assert draw_trials(utterances, 50, 3) != draw_trials(utterances, 50, 4)


class TestUnreadable:
    @pytest.fixture
    def broken(self, voxceleb):
        path = voxceleb / "wav" / "id10005" / "x6uYqmx31kE" / "00001.wav"
        path.write_bytes(b"")
        return path

    def test_refused_by_name(self, voxceleb, save, broken):
        refuse(voxceleb, save, "1 of 32 audio files", broken, "the file is empty", "max_unreadable")

    def test_skipped_up_to_the_limit(self, voxceleb, save, broken):
        rows = read(prepare_voxceleb(voxceleb, save, max_unreadable=1))
        assert "id10005/x6uYqmx31kE/00001" not in rows["train"] | rows["valid"]
        assert len(rows["train"]) + len(rows["valid"]) == 23

    def test_refused_if_a_trial_names_it(self, voxceleb, save):
        (voxceleb / "wav" / "id10002" / "x6uYqmx31kE" / "00001.wav").write_bytes(b"")
        for _ in range(2):
            refuse(voxceleb, save, "1 utterances that trials name", "id10002/x6uYqmx31kE/00001", max_unreadable=1)

    def test_one_that_a_trial_names_is_looked_at_again_once_it_can_be_read(self, voxceleb, save, monkeypatch):
        probe = _audio_files.probe_audio
        path = voxceleb / "wav" / "id10002" / "x6uYqmx31kE" / "00001.wav"
        forbidden = Probe(0.0, 0, 0, "no permission to read it")
        with monkeypatch.context() as patch:
            patch.setattr(_audio_files, "probe_audio", lambda one: forbidden if one == str(path) else probe(one))
            refuse(voxceleb, save, "1 utterances that trials name", max_unreadable=1)
        # new permissions change neither size nor time
        assert "id10002/x6uYqmx31kE/00001" in read(prepare_voxceleb(voxceleb, save, max_unreadable=1))["test"]

    def test_other_rate_is_refused_without_resampling(self, voxceleb, save):
        write_audio(voxceleb / "wav" / "id10005" / "x6uYqmx31kE" / "00001.wav", sample_rate=8000)
        refuse(voxceleb, save, "8000 Hz", "resample", resample=False)
        assert len(read(prepare_voxceleb(voxceleb, save))["train"]) == 16


class TestPreparedOnce:
    def snapshot(self, folder):
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}

    def test_second_call_does_nothing(self, voxceleb, save, monkeypatch, caplog):
        prepare_voxceleb(voxceleb, save)
        before = self.snapshot(save)
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        prepare_voxceleb(voxceleb, save)
        assert self.snapshot(save) == before
        assert "already prepared" in caplog.text

    def test_other_list_does_not_read_the_audio_again(self, voxceleb, save, monkeypatch):
        prepare_voxceleb(voxceleb, save)
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        write_list(voxceleb / "meta" / "veri_test.txt", [line.replace("id10002", "id10004") for line in TRIALS])
        rows = read(prepare_voxceleb(voxceleb, save))
        assert speakers_of(rows["test"]) == {"id10001", "id10004"}
        assert "id10004" not in speakers_of(rows["train"]) | speakers_of(rows["valid"])

    def test_workers_change_nothing(self, voxceleb, tmp_path, monkeypatch):
        monkeypatch.setattr(_audio_files, "CHUNK", 1)
        one, three = (prepare_voxceleb(voxceleb, tmp_path / f"{n}", workers=n) for n in (1, 3))
        assert len(one) == 5
        for key in one:
            assert one[key].read_bytes() == three[key].read_bytes()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"trials": "veri_test.txt"}, "trials is a list"),
        ({"trials": []}, "trials is empty"),
        ({"valid_share": 0.0}, "valid_share is above 0"),
        ({"valid_share": 1.0}, "valid_share is above 0"),
        ({"valid_trials": 1}, "valid_trials is a count"),
        ({"extra_folders": "VoxCeleb2"}, "extra_folders is a list"),
        ({"extra_folders": ["/nonexistent"]}, "extra_folders '/nonexistent' does not exist"),
        ({"max_unreadable": -1}, "max_unreadable"),
        ({"workers": 0}, "workers"),
        ({"sample_rate": 0}, "sample_rate"),
    ],
)
def test_options_are_checked(voxceleb, save, options, part):
    refuse(voxceleb, save, part, **options)
    assert not save.exists()


def test_command_line_hands_its_options_on(voxceleb, tmp_path, save, capsys):
    write_list(voxceleb / "meta" / "veri_test2.txt", TRIALS[:2])
    write_speakers(tmp_path / "VoxCeleb2" / "dev" / "wav", ["id00012"])
    words = ["prepare", "--corpus", "voxceleb", "--data_folder", str(voxceleb), "--save_folder", str(save)]
    words += ["--trials", "veri_test2.txt", "--valid_share", "0.4", "--valid_trials", "4", "--seed", "1"]
    assert main([*words, "--extra_folders", str(tmp_path / "VoxCeleb2"), "--json"]) == 0
    manifests = json.loads(capsys.readouterr().out)
    assert list(read_trials(manifests["trials"])) == ["veri_test2"]
    assert len(read_trials(manifests["valid_trials"])["valid"]) == 4
    assert len(speakers_of(read_manifest(manifests["train"]))) == 4
    assert main([*words, "--kinds", "impro"]) == 2
    assert "--kinds is for --corpus iemocap: leave it out with --corpus voxceleb" in capsys.readouterr().err
