"""Preparation of SLURP: its two layouts, its lines, its labels."""

import json
import logging

import numpy as np
import pytest
import soundfile

from speechbrain_bestrq.cli import main
from speechbrain_bestrq.corpora import _audio_files, prepare_slurp, read_manifest, read_summary
from speechbrain_bestrq.corpora.manifest import count_unreadable, iterate_manifest
from speechbrain_bestrq.errors import InputError


def write_audio(path, sample_rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), np.random.default_rng(0).normal(0.0, 0.1, sample_rate // 10), sample_rate)
    return path


def line(number, scenario, action, files, /, **changes):
    """A line in the release's form."""
    content = {
        "slurp_id": number,
        "sentence": f"say {scenario}, please",
        "sentence_annotation": f"say [thing : {scenario}], please",
        "intent": f"{scenario}_{action}",
        "action": action,
        "tokens": [{"surface": "say", "id": 0, "lemma": "say", "pos": "VB"}],
        "scenario": scenario,
        "recordings": [{"file": file, "wer": 0.0, "ent_wer": 0.0, "status": "correct"} for file in files],
        "entities": [{"span": [1], "type": "thing"}],
    }
    return json.dumps(content | changes)


LINES = {
    "train": [
        line(1, "alarm", "set", ["audio-1-headset.flac", "audio-1.flac", "audio--2.flac"]),
        line(2, "music", "play", ["audio-3-headset.flac"]),
        # the release's own intent is at times another one
        line(3, "weather", "query", ["audio-4.flac"], intent="query"),
    ],
    "devel": [line(4, "music", "play", ["audio-5-headset.flac", "audio-5.flac"])],
    "test": [
        line(5, "weather", "query", ["audio-6-headset.flac", "audio-6.flac"]),
        line(6, "alarm", "query", ["audio-7.flac"]),
    ],
    "train_synthetic": [line(7, "news", "query", ["audio-8-headset.flac", "audio-9.flac"])],
}


def write_texts(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    for split, content in lines.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{text}\n" for text in content))


def write_recordings(folder, *splits):
    for split in splits:
        for text in LINES[split]:
            for recording in json.loads(text)["recordings"]:
                write_audio(folder / recording["file"])


@pytest.fixture
def slurp(tmp_path):
    root = tmp_path / "slurp"
    write_texts(root / "dataset" / "slurp", LINES)
    write_recordings(root / "audio" / "slurp_real", "train", "devel", "test")
    write_recordings(root / "audio" / "slurp_synth", "train_synthetic")
    return root


@pytest.fixture
def save(tmp_path):
    return tmp_path / "save"


def refuse(slurp, save, *parts, **options):
    with pytest.raises(InputError) as error:
        prepare_slurp(slurp, save, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def names(path):
    return list(read_manifest(path))


class TestLayouts:
    def test_release(self, slurp, save):
        manifests = prepare_slurp(slurp, save)
        assert manifests == {key: save / f"{key}.csv" for key in ("train", "valid", "test")}
        train = read_manifest(manifests["train"])
        assert list(train) == ["audio-1-headset", "audio-1", "audio--2", "audio-3-headset", "audio-4"]
        assert train["audio--2"] == {
            "duration": 0.1,
            "wav": str(slurp / "audio" / "slurp_real" / "audio--2.flac"),
            "spk_id": "",
            "scenario": "alarm",
            "action": "set",
            "intent": "alarm_set",
            "sentence": "say alarm, please",
        }
        assert train["audio-4"]["intent"] == "weather_query"
        assert names(manifests["valid"]) == ["audio-5-headset", "audio-5"]
        assert names(manifests["test"]) == ["audio-6-headset", "audio-6", "audio-7"]

    @pytest.mark.parametrize("train", ["train", "train_real"])
    def test_that_of_speechbrain(self, slurp, tmp_path, save, train):
        before = {key: names(path) for key, path in prepare_slurp(slurp, save, synthetic=True).items()}
        flat = tmp_path / "flat"
        flat.mkdir()
        for path in (slurp / "dataset" / "slurp").iterdir():
            path.rename(flat / path.name)
        for path in (slurp / "audio").iterdir():
            path.rename(flat / path.name)
        (flat / "train.jsonl").rename(flat / f"{train}.jsonl")
        after = {key: names(path) for key, path in prepare_slurp(flat, save / "again", synthetic=True).items()}
        assert after == before

    def test_two_training_texts_are_refused(self, slurp, save):
        write_texts(slurp / "dataset" / "slurp", {"train_real": LINES["train"]})
        refuse(slurp, save, "train.jsonl' and", "train_real.jsonl' are both there")

    def test_unreferenced_audio_is_passed_over(self, slurp, save):
        write_audio(slurp / "audio" / "slurp_real" / "audio-99.flac")
        assert "audio-99" not in names(prepare_slurp(slurp, save)["train"])

    @pytest.mark.parametrize("split", ["devel", "test"])
    def test_missing_text_is_refused(self, slurp, save, split):
        path = slurp / "dataset" / "slurp" / f"{split}.jsonl"
        path.unlink()
        refuse(slurp, save, path, "does not exist")
        assert not save.exists()

    def test_other_folder_is_refused(self, slurp, tmp_path, save):
        refuse(slurp / "audio", save, slurp / "audio", "dataset/slurp/train.jsonl")
        refuse(tmp_path / "none", save, "does not exist")

    @pytest.mark.parametrize("name", ["slurp_real", "slurp_synth"])
    def test_missing_audio_is_refused(self, slurp, tmp_path, save, name):
        (slurp / "audio" / name).rename(tmp_path / "away")
        refuse(slurp, save, f"neither audio/{name} nor {name}", f"unpack {name}.tar.gz", synthetic=True)
        (slurp / "audio" / name).mkdir()
        refuse(slurp, save, slurp / "audio" / name, "holds no audio", synthetic=True)


class TestSelection:
    @pytest.mark.parametrize(
        ("microphones", "train", "test"),
        [
            (["headset"], ["audio-1-headset", "audio-3-headset"], ["audio-6-headset"]),
            (["distant"], ["audio-1", "audio--2", "audio-4"], ["audio-6", "audio-7"]),
        ],
    )
    def test_microphones(self, slurp, save, microphones, train, test):
        manifests = prepare_slurp(slurp, save, microphones=microphones)
        assert names(manifests["train"]) == train
        assert names(manifests["test"]) == test

    def test_part_without_such_recordings_is_refused(self, slurp, save):
        write_texts(slurp / "dataset" / "slurp", {"devel": [line(4, "music", "play", ["audio-5.flac"])]})
        refuse(slurp, save, "devel.jsonl' names no recording by headset", microphones=["headset"])
        assert not save.exists()

    def test_synthetic_is_for_training_alone_whatever_the_microphone(self, slurp, save):
        real, both = prepare_slurp(slurp, save), prepare_slurp(slurp, save / "both", synthetic=True)
        assert names(both["train"]) == [*names(real["train"]), "audio-8-headset", "audio-9"]
        assert names(both["test"]) == names(real["test"])
        assert read_summary(both["train"])["labels"]["scenario"] == ["alarm", "music", "news", "weather"]
        headset = prepare_slurp(slurp, save / "headset", synthetic=True, microphones=["headset"])
        assert names(headset["train"]) == ["audio-1-headset", "audio-3-headset", "audio-8-headset", "audio-9"]


class TestLabels:
    def test_those_of_the_training_part(self, slurp, save, caplog):
        caplog.set_level(logging.INFO)
        manifests = prepare_slurp(slurp, save)
        labels = {
            "scenario": ["alarm", "music", "weather"],
            "action": ["play", "query", "set"],
            "intent": ["alarm_set", "music_play", "weather_query"],
        }
        for key in manifests:
            assert read_summary(manifests[key])["labels"] == labels
        assert "labels: 3 of scenario, 3 of action, 3 of intent" in caplog.text

    def test_unseen_ones_are_counted_and_named(self, slurp, save, caplog):
        manifests = prepare_slurp(slurp, save)
        assert read_summary(manifests["valid"])["unseen"] == {"scenario": {}, "action": {}, "intent": {}}
        unseen = {"scenario": {}, "action": {}, "intent": {"alarm_query": 1}}
        assert read_summary(manifests["test"])["unseen"] == unseen
        assert "test: of 1 recordings the intent is not in the training part: alarm_query" in caplog.text
        assert "audio-7" in names(manifests["test"])

    def test_microphones_that_are_not_used_teach_nothing(self, slurp, save):
        summary = read_summary(prepare_slurp(slurp, save, microphones=["headset"])["test"])
        assert summary["labels"]["scenario"] == ["alarm", "music"]
        assert summary["unseen"]["scenario"] == {"weather": 1}


class TestSpeakers:
    def write(self, slurp, content):
        (slurp / "dataset" / "slurp" / "metadata.json").write_text(content)

    def test_out_of_the_metadata(self, slurp, save, caplog):
        caplog.set_level(logging.INFO)
        recordings = {"audio-1.flac": {"usrid": "FE-488", "status": "correct"}, "audio-6.flac": {"usrid": "UNK-323"}}
        self.write(slurp, json.dumps({"1": {"recordings": recordings}, "2": {"sentence": "no recordings"}}))
        manifests = prepare_slurp(slurp, save)
        speakers = {name: row["spk_id"] for name, row in read_manifest(manifests["train"]).items() if row["spk_id"]}
        assert speakers == {"audio-1": "FE-488"}
        assert read_manifest(manifests["test"])["audio-6"]["spk_id"] == "UNK-323"
        assert read_summary(manifests["train"])["without_speaker"] == 4
        assert "train: 4 recordings of unknown speakers" in caplog.text

    def test_metadata_that_come_later_prepare_again(self, slurp, save):
        prepare_slurp(slurp, save)
        self.write(slurp, json.dumps({"1": {"recordings": {"audio-1.flac": {"usrid": "FE-488"}}}}))
        assert read_manifest(prepare_slurp(slurp, save)["train"])["audio-1"]["spk_id"] == "FE-488"

    @pytest.mark.parametrize(
        "content", ["{", "[1]", '{"1": 2}', '{"1": {"recordings": [1]}}', '{"1": {"recordings": {"a": 1}}}']
    )
    def test_broken_metadata_are_refused(self, slurp, save, content):
        self.write(slurp, content)
        refuse(slurp, save, slurp / "dataset" / "slurp" / "metadata.json", "is not SLURP's metadata")


class TestBrokenLines:
    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("{", "is no JSON"),
            (line(1, "a", "b", [])[:40], "is no JSON"),
            ("[1]", "is no JSON object"),
            (line(1, "a", "b", ["x.flac"], scenario=None), "lacks the key 'scenario'"),
            (line(1, "a", "b", ["x.flac"], scenario=""), "lacks the key 'scenario'"),
            (line(1, "a", "b", ["x.flac"], action=3), "lacks the key 'action'"),
            (line(1, "a", "b", ["x.flac"], sentence=None), "lacks the key 'sentence'"),
            (line(1, "a", "b", [], recordings="x.flac"), "lacks the key 'recordings'"),
            (line(1, "a", "b", [], recordings=["x.flac"]), "a recording lacks the key 'file'"),
            (line(1, "a", "b", [], recordings=[{"wer": 0}]), "a recording lacks the key 'file'"),
            (b'"\xff'.decode("utf-8", "surrogateescape"), "is no JSON"),
        ],
    )
    def test_named_by_number_before_time_is_spent(self, slurp, save, monkeypatch, text, part):
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        path = slurp / "dataset" / "slurp" / "devel.jsonl"
        path.write_bytes("\n".join([*LINES["devel"], "", text]).encode("utf-8", "surrogateescape"))
        refuse(slurp, save, f"'{path}', line 3", part)
        assert not save.exists()

    def test_recordings_that_are_not_there_are_counted(self, slurp, save):
        files = ["audio-5.flac", "audio-50.flac", "audio-51.flac"]
        write_texts(slurp / "dataset" / "slurp", {"devel": ["", line(4, "music", "play", files)]})
        path = slurp / "dataset" / "slurp" / "devel.jsonl"
        refuse(slurp, save, f"'{path}': 2 of 3 recordings are not in slurp_real", "'audio-50.flac' (line 2)")
        assert not save.exists()

    def test_so_many_that_are_not_there_are_left_out_as_are_allowed(self, slurp, save, caplog):
        files = ["audio-5.flac", "audio-50.flac", "audio-51.flac"]
        write_texts(slurp / "dataset" / "slurp", {"devel": [*LINES["devel"], line(4, "music", "play", files)]})
        with pytest.raises(InputError, match="or set max_unreadable to at least 2"):
            prepare_slurp(slurp, save, max_unreadable=1)
        manifest = prepare_slurp(slurp, save, max_unreadable=2)["valid"]
        names = [row["ID"] for row in iterate_manifest(manifest)]
        assert "audio-50" not in names and len(names) == len(set(names))
        assert any("2 of" in message and "they are left out" in message for message in caplog.messages)
        assert read_summary(manifest)["missing"] == 2 == count_unreadable(manifest, "valid")

    @pytest.mark.parametrize(
        ("split", "text", "kept"),
        [
            ("train", line(9, "alarm", "query", ["audio-1.flac"]), ("train", "alarm_set")),
            ("test", line(9, "alarm", "query", ["audio-1.flac"]), ("test", "alarm_query")),
            ("devel", line(9, "alarm", "set", ["audio-1.flac"]), ("valid", "alarm_set")),
        ],
    )
    def test_recording_on_two_sides_or_with_two_intents_is_kept_once(self, slurp, save, caplog, split, text, kept):
        write_texts(slurp / "dataset" / "slurp", {split: [*LINES[split], text]})
        manifests = prepare_slurp(slurp, save)
        where = [
            (key, row["intent"])
            for key, path in manifests.items()
            for row in iterate_manifest(path)
            if row["ID"] == "audio-1"
        ]
        assert where == [kept]
        assert any("1 recordings are listed in two parts or with two intents" in one for one in caplog.messages)

    def test_recording_named_twice_alike_counts_once(self, slurp, save):
        text = line(9, "alarm", "set", ["audio-1.flac"])
        write_texts(slurp / "dataset" / "slurp", {"train": [*LINES["train"], text]})
        assert len(read_manifest(prepare_slurp(slurp, save)["train"])) == 5

    def test_what_two_microphones_recorded_at_once_is_in_one_part(self, slurp, save, caplog):
        folder = slurp / "dataset" / "slurp"
        devel = line(4, "music", "play", ["audio-5.flac"])
        test = line(5, "music", "play", ["audio-5-headset.flac", "audio-1-headset.flac", "audio-6.flac"])
        train = line(1, "alarm", "set", ["audio-1.flac", "audio--2.flac"])
        before = line(4, "music", "play", ["audio-5.flac", "audio-3-headset.flac"])
        write_texts(folder, {"train": [train], "devel": [devel, before], "test": [test]})
        manifests = prepare_slurp(slurp, save)
        assert names(manifests["train"]) == ["audio--2"]
        assert names(manifests["valid"]) == ["audio-3-headset"]
        assert names(manifests["test"]) == ["audio-5-headset", "audio-1-headset", "audio-6"]
        assert "2 recordings, such as audio-1, are left out" in caplog.text
        assert names(prepare_slurp(slurp, save, microphones=["distant"], max_unreadable=9)["train"]) == [
            "audio-1",
            "audio--2",
        ]


class TestBadAudio:
    def test_empty_recording(self, slurp, save):
        path = slurp / "audio" / "slurp_real" / "audio-1.flac"
        path.write_bytes(b"")
        refuse(slurp, save, "1 of 10 audio files", path, "the file is empty", "max_unreadable")
        assert "audio-1" not in names(prepare_slurp(slurp, save, max_unreadable=1)["train"])

    def test_other_rate(self, slurp, save):
        write_audio(slurp / "audio" / "slurp_real" / "audio-1.flac", sample_rate=8000)
        refuse(slurp, save, "8000 Hz", "resample", resample=False)
        assert read_manifest(prepare_slurp(slurp, save)["train"])["audio-1"]["duration"] == 0.1


class TestPreparedOnce:
    def snapshot(self, folder):
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}

    def test_second_call_does_nothing(self, slurp, save, monkeypatch, caplog):
        prepare_slurp(slurp, save, synthetic=True)
        before = self.snapshot(save)
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        prepare_slurp(slurp, save, synthetic=True)
        assert self.snapshot(save) == before
        assert "already prepared" in caplog.text

    def test_changed_line_does_not_read_the_audio_again(self, slurp, save, monkeypatch):
        prepare_slurp(slurp, save)
        monkeypatch.setattr(_audio_files, "probe_audio", lambda path: pytest.fail("a file was opened"))
        devel = line(4, "music", "query", ["audio-5-headset.flac", "audio-5.flac"])
        write_texts(slurp / "dataset" / "slurp", {"devel": [devel]})
        manifests = prepare_slurp(slurp, save)
        assert read_manifest(manifests["valid"])["audio-5"]["intent"] == "music_query"

    def test_workers_change_nothing(self, slurp, tmp_path, monkeypatch):
        monkeypatch.setattr(_audio_files, "CHUNK", 1)
        one, three = (prepare_slurp(slurp, tmp_path / f"{n}", workers=n, synthetic=True) for n in (1, 3))
        assert len(one) == 3
        for key in one:
            assert one[key].read_bytes() == three[key].read_bytes()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"microphones": "headset"}, "microphones is a list"),
        ({"microphones": []}, "microphones is a list of headset and distant"),
        ({"microphones": ["far"]}, "microphones is a list of headset and distant"),
        ({"max_unreadable": -1}, "max_unreadable"),
        ({"workers": 0}, "workers"),
        ({"sample_rate": 0}, "sample_rate"),
    ],
)
def test_options_are_checked(slurp, save, options, part):
    refuse(slurp, save, part, **options)
    assert not save.exists()


def test_command_line_hands_its_options_on(slurp, save, capsys):
    words = ["prepare", "--corpus", "slurp", "--data_folder", str(slurp), "--save_folder", str(save)]
    assert main([*words, "--microphones", "distant", "--synthetic", "--json"]) == 0
    manifests = json.loads(capsys.readouterr().out)
    assert names(manifests["train"]) == ["audio-1", "audio--2", "audio-4", "audio-8-headset", "audio-9"]
