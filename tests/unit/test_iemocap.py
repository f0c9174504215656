"""Preparation of IEMOCAP: the lines of its label files, classes, folds."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
import soundfile

from speechbrain_bestrq.cli import main
from speechbrain_bestrq.corpora import (
    _audio_files,
    fold_manifests,
    iemocap_folds,
    prepare_iemocap,
    read_manifest,
    read_summary,
)
from speechbrain_bestrq.corpora.iemocap import FOLDS, SESSIONS, SPEAKERS
from speechbrain_bestrq.errors import InputError

# every kind of line that the release has, in its form; the turns are made up
EVALUATION = """\
% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
C-E3:\tNeutral;\t()
C-E4:\tNeutral;\t()
C-F1:\tNeutral;\t(curious\x85[hm])
A-E3:\tval 3; act 2; dom  2;\t()
A-E4:\tval 2; act 3; dom  3;\t(annoyed but polite, [not sure] about\tthis one)
A-F1:\tval 3; act 2; dom  1;\t()

[7.5712 - 10.4750]\tSes01F_impro01_M000\thap\t[3.5000, 3.5000, 3.0000]
C-E1:\tHappiness; Excited;\t()
C-E5:\tOther;\t(tr\xe8s content)
C-M1:\tHappiness;\t()
A-M1:\tval 4; act ; dom  ;\t()

[110.0100 - 111.3925]\tSes01F_impro01_F001\texc\t[4.0000, 4.0000, 3.5000]
[112.9200 - 114.9975]\tSes01F_impro01_M001\txxx\t[2.5000, 2.5000, 3.0000]
C-E2:\tFrustration;\t()
[115.0000 - 116.0000]\tSes01F_impro01_F002\tfru\t[2.5000, 2.5000, 3.0000]
"""
# the speaker is the letter of the turn's last part, wherever that stands in the name
SCRIPTED = """\
% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[0.5000 - 2.0000]\tSes01M_script01_1b_F000\tsad\t[2.5000, 2.5000, 2.5000]
C-E2:\tSadness;\t()
[2.5000 - 4.0000]\tSes01M_script01_1b_M000\tang\t[2.5000, 2.5000, 2.5000]
"""


def write_audio(path, sample_rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), np.random.default_rng(0).normal(0.0, 0.1, sample_rate // 10), sample_rate)
    return path


def write_dialog(root, dialog, content):
    """Write a label file, and a recording for each of its turns."""
    session = root / f"Session{dialog[4]}"
    path = session / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("latin-1"))
    for line in content.split("\n"):
        if line.startswith("["):
            write_audio(session / "sentences" / "wav" / dialog / f"{line.split()[3]}.wav")


def rename(content, session):
    return content.replace("Ses01", f"Ses0{session}")


@pytest.fixture
def iemocap(tmp_path):
    """Five sessions with one dialog of each kind, seven turns in all: neu, hap, exc, xxx, fru, sad, ang."""
    root = tmp_path / "IEMOCAP"
    for session in range(1, 6):
        write_dialog(root, f"Ses0{session}F_impro01", rename(EVALUATION, session))
        write_dialog(root, f"Ses0{session}M_script01_1b", rename(SCRIPTED, session))
    return root


@pytest.fixture
def save(tmp_path):
    return tmp_path / "save"


def refuse(iemocap, save, *parts, **options):
    with pytest.raises(InputError) as error:
        prepare_iemocap(iemocap, save, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def snapshot(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


class TestLabels:
    def test_every_kind_of_line(self, iemocap, save, caplog):
        rows = read_manifest(prepare_iemocap(iemocap, save)["all"])
        first = {name: row for name, row in rows.items() if row["session"] == "Session1"}
        assert {name: (row["emo"], row["spk_id"], row["kind"]) for name, row in first.items()} == {
            "Ses01F_impro01_F000": ("neu", "Ses01F", "impro"),
            "Ses01F_impro01_F001": ("hap", "Ses01F", "impro"),
            "Ses01F_impro01_M000": ("hap", "Ses01M", "impro"),
            "Ses01M_script01_1b_F000": ("sad", "Ses01F", "script"),
            "Ses01M_script01_1b_M000": ("ang", "Ses01M", "script"),
        }
        assert first["Ses01M_script01_1b_F000"]["wav"] == str(
            iemocap / "Session1/sentences/wav/Ses01M_script01_1b/Ses01M_script01_1b_F000.wav"
        )
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []

    def test_counts_per_class_are_those_of_the_files(self, iemocap, save, caplog):
        caplog.set_level(logging.INFO)
        manifests = prepare_iemocap(iemocap, save)
        summary = read_summary(manifests["all"])
        assert summary["classes"] == {"ang": 5, "hap": 10, "neu": 5, "sad": 5}
        assert summary["left_out"] == {"fru": 5, "xxx": 5}
        assert summary["utterances"] == 25
        assert Counter(row["emo"] for row in read_manifest(manifests["all"]).values()) == summary["classes"]
        assert "turns: ang 5, hap 10, neu 5, sad 5; left out: fru 5, xxx 5" in caplog.text

    def test_windows_line_ends(self, iemocap, save):
        before = read_manifest(prepare_iemocap(iemocap, save)["all"])
        for path in iemocap.rglob("EmoEvaluation/*.txt"):
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        assert read_manifest(prepare_iemocap(iemocap, save / "again")["all"]) == before

    def test_sub_folders_and_hidden_files_are_passed_over(self, iemocap, save):
        folder = iemocap / "Session1" / "dialog" / "EmoEvaluation"
        for name in ("Attribute", "Categorical", "Self-evaluation"):
            (folder / name).mkdir()
            (folder / name / "Ses01F_impro01_e2.txt").write_text("Ses01F_impro01_F000 :Anger; ()\n[nothing]\n")
        (folder / "._Ses01F_impro01.txt").write_bytes(b"\x00\x05\x16\x07[")
        (folder / "Ses01F_impro01.anvil").write_text("[no text]")
        write_audio(iemocap / "Session1" / "dialog" / "wav" / "Ses01F_impro01.wav")
        write_audio(iemocap / "Session1" / "sentences" / "wav" / "Ses01F_impro01" / "._Ses01F_impro01_F000.wav")
        assert len(read_manifest(prepare_iemocap(iemocap, save)["all"])) == 25

    def test_line_of_no_known_kind_is_reported(self, iemocap, save, caplog):
        path = iemocap / "Session2" / "dialog" / "EmoEvaluation" / "Ses02F_impro01.txt"
        path.write_bytes(path.read_bytes() + b"a comment that goes on)\nand on)\n")
        assert len(read_manifest(prepare_iemocap(iemocap, save)["all"])) == 25
        assert f"'{path}': 2 lines are of no known kind, first line 22" in caplog.text

    @pytest.mark.parametrize(
        ("line", "part"),
        [
            ("[1.0000 - 2.0000]\tSes01F_impro01_F000\tjoy\t[2.5000, 2.5000, 2.5000]", "'joy' is no label"),
            ("[1.0000 - 2.0000]\tSes01F_impro01_F000\tneu", "is not '[START - END]"),
            ("[1.0000 - 2.0000]\tSes01F_impro01_F000\t[2.5000, 2.5000, 2.5000]", "is not '[START - END]"),
            ("[1.0000]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]", "is not '[START - END]"),
            ("[1.0000 - 2.0000]\tF000\tneu\t[2.5000, 2.5000, 2.5000]", "is not '[START - END]"),
            ("[1.0000 - 2.0000]\tSes01F_impro01_F000\tang\t[2.5000, 2.5000, 2.5000]", "is 'ang' here and 'neu' before"),
        ],
    )
    def test_broken_turn_is_refused_with_its_line(self, iemocap, save, line, part):
        path = iemocap / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
        path.write_bytes(path.read_bytes() + line.encode() + b"\n")
        refuse(iemocap, save, f"labels '{path}', line 22", part)
        assert not save.exists()

    def test_turn_labelled_twice_alike_counts_once(self, iemocap, save):
        path = iemocap / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
        path.write_bytes(path.read_bytes() + EVALUATION.splitlines()[2].encode() + b"\n")
        assert len(read_manifest(prepare_iemocap(iemocap, save)["all"])) == 25

    def test_recording_without_a_label_is_left_out_and_counted(self, iemocap, save):
        write_audio(iemocap / "Session1" / "sentences" / "wav" / "Ses01F_impro01" / "Ses01F_impro01_FXX0.wav")
        summary = read_summary(prepare_iemocap(iemocap, save)["all"])
        assert summary["left_out"]["without a label"] == 1
        assert summary["utterances"] == 25


class TestClasses:
    def test_map_decides(self, iemocap, save):
        classes = {"fru": "bad", "ang": "bad", "neu": "neu"}
        manifests = prepare_iemocap(iemocap, save, classes=classes)
        assert read_summary(manifests["all"])["classes"] == {"bad": 10, "neu": 5}
        assert read_summary(manifests["all"])["left_out"] == {"exc": 5, "hap": 5, "sad": 5, "xxx": 5}

    def test_kinds(self, iemocap, save):
        impro = prepare_iemocap(iemocap, save, kinds=["impro"], classes={"neu": "neu", "hap": "hap"})
        assert {row["kind"] for row in read_manifest(impro["all"]).values()} == {"impro"}
        assert read_summary(impro["all"])["other_kind"] == 10
        script = prepare_iemocap(iemocap, save, kinds=["script"], classes={"sad": "sad", "ang": "ang"})
        assert {row["kind"] for row in read_manifest(script["all"]).values()} == {"script"}

    def test_class_without_a_turn_is_refused(self, iemocap, save):
        refuse(iemocap, save, "no turn of the class(es) dis", classes={"dis": "dis", "neu": "neu"})
        refuse(iemocap, save, "no turn of the class(es) ang, sad in impro dialogs", kinds=["impro"])
        assert not save.exists()


class TestFolds:
    @pytest.mark.parametrize(("by", "sizes"), [("speaker", (20, 2, 3)), ("session", (15, 5, 5))])
    def test_manifests_of_each_fold(self, iemocap, save, by, sizes):
        manifests = prepare_iemocap(iemocap, save, folds=by)
        assert len(manifests) == 1 + 3 * len(FOLDS[by])
        everything = read_manifest(manifests["all"])
        for name in FOLDS[by]:
            sides = {side: read_manifest(path) for side, path in fold_manifests(manifests, name).items()}
            assert {row["spk_id" if by == "speaker" else "session"] for row in sides["test"].values()} == {name}
            assert sides["train"] | sides["valid"] | sides["test"] == everything
            assert sum(map(len, sides.values())) == len(everything)
        assert tuple(len(sides[side]) for side in ("train", "test", "valid")) == sizes

    @pytest.mark.parametrize("by", ["speaker", "session"])
    def test_each_turn_is_tested_and_validated_once(self, by):
        rows = [
            {"ID": f"{speaker}-{number}", "spk_id": speaker, "session": f"Session{speaker[4]}"}
            for number in range(3)
            for speaker in SPEAKERS
        ]
        folds = iemocap_folds(rows, by)
        assert [fold.name for fold in folds] == list(FOLDS[by])
        for side in ("test", "valid"):
            assert sorted(name for fold in folds for name in getattr(fold, side)) == sorted(row["ID"] for row in rows)
        for fold in folds:
            owners = [{name.split("-")[0] for name in side} for side in (fold.train, fold.valid, fold.test)]
            assert sum(map(len, owners)) == len(set().union(*owners)) == 10
            # whoever talks with a test speaker is not trained on
            assert not {name[:5] for name in owners[0]} & {name[:5] for name in owners[1] | owners[2]}

    def test_validation_speaker_is_the_other_one_of_the_session(self):
        rows = [{"ID": speaker, "spk_id": speaker, "session": "any"} for speaker in SPEAKERS]
        valid = {fold.name: fold.valid for fold in iemocap_folds(rows, "speaker")}
        assert valid["Ses04F"] == ["Ses04M"]
        assert valid["Ses04M"] == ["Ses04F"]

    def test_fold_that_does_not_exist_is_refused(self, iemocap, save):
        manifests = prepare_iemocap(iemocap, save, folds="session")
        with pytest.raises(InputError, match="fold 'Session6' does not exist: name one of Session1, Session2"):
            fold_manifests(manifests, "Session6")
        with pytest.raises(InputError, match="fold '3' does not exist"):
            fold_manifests(manifests, 3)
        with pytest.raises(InputError, match="'speaker' or 'session'"):
            iemocap_folds([], "dialog")

    def test_fold_without_a_turn_on_one_side_is_refused(self, iemocap, save):
        # the woman of each session says nothing happy, but for what is excited
        refuse(iemocap, save, "fold 'Ses01F' has no turn in test", classes={"hap": "hap"})


class TestBadData:
    def test_missing_session(self, iemocap, save):
        (iemocap / "Session3").rename(iemocap / "Session9")
        refuse(iemocap, save, iemocap, "lacks Session3:", "Session1 to Session5")
        assert not save.exists()

    def test_folder_above(self, iemocap, save):
        refuse(iemocap.parent, save, f"give '{iemocap}'")
        refuse(iemocap / "Session1", save, "lacks Session1, Session2")
        refuse(iemocap / "none", save, "does not exist")

    @pytest.mark.parametrize("folder", ["Session2/sentences/wav", "Session2/dialog/EmoEvaluation"])
    def test_part_of_a_session(self, iemocap, tmp_path, save, folder):
        (iemocap / folder).rename(tmp_path / "away")
        refuse(iemocap, save, iemocap / folder, "unpack 'Session2'")
        (iemocap / folder).mkdir()
        refuse(iemocap, save, iemocap / folder, "unpack")

    def test_turn_without_a_file(self, iemocap, save, monkeypatch):
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        folder = iemocap / "Session2" / "sentences" / "wav" / "Ses02F_impro01"
        (folder / "Ses02F_impro01_F000.wav").unlink()
        (folder / "Ses02F_impro01_M001.wav").unlink()
        refuse(iemocap, save, "Session2: 2 of 7 turns with a label have no file", "'Ses02F_impro01_F000'")
        assert not save.exists()

    @pytest.mark.parametrize(
        "name", ["Ses01F_impro02/Ses01F_impro01_F009.wav", "stray.wav", "Ses02F_impro01/Ses02F_impro01_F009.wav"]
    )
    def test_other_layout(self, iemocap, save, name):
        path = write_audio(iemocap / "Session1" / "sentences" / "wav" / name)
        refuse(iemocap, save, path, "IEMOCAP's layout")

    def test_empty_recording(self, iemocap, save):
        path = iemocap / "Session1" / "sentences" / "wav" / "Ses01F_impro01" / "Ses01F_impro01_F000.wav"
        path.write_bytes(b"")
        refuse(iemocap, save, "1 of 35 audio files", path, "the file is empty", "max_unreadable")
        assert len(read_manifest(prepare_iemocap(iemocap, save, max_unreadable=1)["all"])) == 24

    def test_other_rate(self, iemocap, save):
        name = "Ses01F_impro01_F000.wav"
        write_audio(iemocap / "Session1" / "sentences" / "wav" / "Ses01F_impro01" / name, sample_rate=8000)
        refuse(iemocap, save, "8000 Hz", "resample", resample=False)
        assert len(read_manifest(prepare_iemocap(iemocap, save)["all"])) == 25

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ({"classes": {}}, "classes maps labels"),
            ({"classes": ["ang", "sad"]}, "classes maps labels"),
            ({"classes": {"happy": "hap"}}, "classes: 'happy' is no label of the release"),
            ({"folds": "dialog"}, "folds is 'speaker' or 'session'"),
            ({"kinds": "impro"}, "kinds is a list"),
            ({"kinds": []}, "kinds is a list of impro and script"),
            ({"kinds": ["improvised"]}, "kinds is a list of impro and script"),
            ({"max_unreadable": -1}, "max_unreadable"),
            ({"workers": 0}, "workers"),
        ],
    )
    def test_options(self, iemocap, save, options, part):
        refuse(iemocap, save, part, **options)
        assert not save.exists()


class TestPreparedOnce:
    def test_second_call_does_nothing(self, iemocap, save, monkeypatch, caplog):
        prepare_iemocap(iemocap, save)
        before = snapshot(save)
        assert len(before) == 2 * (len(SESSIONS) + 1 + 30)
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        prepare_iemocap(iemocap, save)
        assert snapshot(save) == before
        assert "already prepared" in caplog.text

    def test_other_classes_do_not_read_the_audio_again(self, iemocap, save, monkeypatch):
        prepare_iemocap(iemocap, save)
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        manifests = prepare_iemocap(iemocap, save, classes={"neu": "neu", "ang": "ang"})
        assert len(read_manifest(manifests["Ses02M/train"])) == 8

    def test_changed_label_prepares_again(self, iemocap, save):
        before = read_manifest(prepare_iemocap(iemocap, save)["Ses01F/test"])
        path = iemocap / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
        path.write_bytes(path.read_bytes().replace(b"F000\tneu", b"F000\tang"))
        after = read_manifest(prepare_iemocap(iemocap, save)["Ses01F/test"])
        assert [row["emo"] for row in before.values()] == ["neu", "hap", "sad"]
        assert [row["emo"] for row in after.values()] == ["ang", "hap", "sad"]

    def test_workers_change_nothing(self, iemocap, tmp_path, monkeypatch):
        monkeypatch.setattr(_audio_files, "CHUNK", 1)
        one, three = (prepare_iemocap(iemocap, tmp_path / f"{n}", workers=n) for n in (1, 3))
        assert len(one) == 31
        for key in one:
            assert one[key].read_bytes() == three[key].read_bytes()


def test_command_line_hands_its_options_on(iemocap, save, capsys):
    words = ["prepare", "--corpus", "iemocap", "--data_folder", str(iemocap), "--save_folder", str(save)]
    assert main([*words, "--classes", "hap=joy", "exc=joy", "--folds", "session", "--kinds", "impro", "--json"]) == 0
    manifests = json.loads(capsys.readouterr().out)
    assert {row["emo"] for row in read_manifest(manifests["Session2/test"]).values()} == {"joy"}
    assert main([*words, "--classes", "hap"]) == 2
    assert "'hap' is not LABEL=CLASS" in capsys.readouterr().err
