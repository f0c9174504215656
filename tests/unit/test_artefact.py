"""An encoder folder is whole, says when it is not, and gives the encoder back bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechbrain_bestrq import artefact
from speechbrain_bestrq.artefact import build_encoder, encoder_config, load_encoder, save_encoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.model_card import write_card


class Killed(BaseException):
    """Stands for a kill in the middle of saving."""


@pytest.fixture
def saved(make_speech_encoder, tmp_path):
    """An encoder with global statistics and its folder."""
    speech_encoder = make_speech_encoder(normalize="global")
    return speech_encoder, save_encoder(speech_encoder, tmp_path / "encoder", "# Card", steps=100)


def rewrite_config(folder, change):
    """Change a folder's config by a function on its dictionary."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("attention", ["rotary", "relative"])
@pytest.mark.parametrize("normalize", ["global", "utterance"])
def test_a_round_trip_changes_no_bit(attention, normalize, make_speech_encoder, tmp_path):
    speech_encoder = make_speech_encoder(attention, normalize, dropout=0.1, layer_drop=0.2)
    folder = save_encoder(speech_encoder, tmp_path / "deep" / "encoder", "# Card")
    loaded = load_encoder(folder)
    assert not loaded.training
    assert encoder_config(loaded) == encoder_config(speech_encoder)
    wavs, wav_lens = 0.1 * torch.randn(2, 8000), torch.tensor([1.0, 0.5])
    for expected, found in zip(speech_encoder(wavs, wav_lens), loaded(wavs, wav_lens), strict=True):
        assert torch.equal(expected, found)


def test_a_folder_holds_config_weights_card_and_facts(saved):
    speech_encoder, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "README.md").read_text() == "# Card"
    assert json.loads((folder / "config.json").read_text())["training"] == {"steps": 100}
    assert set(load_file(folder / "model.safetensors")) == set(speech_encoder.state_dict())


def test_whoever_can_read_the_config_can_read_the_weights(saved):
    _, folder = saved
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_description_alone_builds_the_same_architecture(make_speech_encoder):
    speech_encoder = make_speech_encoder("relative", "global")
    config = json.loads(json.dumps(encoder_config(speech_encoder)))
    rebuilt = build_encoder(config)
    assert encoder_config(rebuilt) == config
    shapes = {name: tensor.shape for name, tensor in speech_encoder.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes


def test_an_older_folder_is_replaced(saved, make_speech_encoder):
    _, folder = saved
    newer = make_speech_encoder(normalize="global", seed=1)
    save_encoder(newer, folder, "# Newer")
    assert (folder / "README.md").read_text() == "# Newer"
    assert torch.equal(load_encoder(folder).encoder.norm.weight, newer.encoder.norm.weight)
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_what_is_no_encoder_is_not_written_over(saved, tmp_path):
    speech_encoder, folder = saved
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more")
    for name, why in (("mine", "mine is there and is no encoder"), ("file", "file is there")):
        before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        with pytest.raises(InputError, match=why):
            save_encoder(speech_encoder, tmp_path / name, "# Card")
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    (folder / "notes.txt").write_text("good with whispered speech")
    save_encoder(speech_encoder, folder, "# Newer")
    assert (folder / "README.md").read_text() == "# Newer"
    assert (folder / "notes.txt").read_text() == "good with whispered speech"
    folder.rename(folder.with_name("encoder.replaced"))  # as a kill may leave it
    save_encoder(speech_encoder, folder, "# Newest")
    assert (folder / "notes.txt").read_text() == "good with whispered speech"
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == ["encoder", "mine"]


def test_a_kill_while_saving_leaves_the_older_folder_whole(saved, make_speech_encoder, monkeypatch):
    older, folder = saved

    def die(weights, path):
        Path(path).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(artefact, "save_file", die)
        with pytest.raises(Killed):
            save_encoder(make_speech_encoder(normalize="global", seed=1), folder, "# Newer")
    assert (folder / "README.md").read_text() == "# Card"
    assert torch.equal(load_encoder(folder).encoder.norm.weight, older.encoder.norm.weight)
    save_encoder(older, folder, "# Again")
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


WRITE_ON_A_FULL_DISK = """
import resource, sys
from speechbrain_bestrq.artefact import load_encoder, save_encoder
encoder = load_encoder(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    save_encoder(encoder, sys.argv[1], "# Newer")
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_disk_that_takes_a_part_of_it_is_an_oserror_and_nothing_is_left(saved, room):
    """The disk is full in the config, and in the weights, whose writer knows no OSError."""
    _, folder = saved
    assert (folder / "config.json").stat().st_size < 20_000 < (folder / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", WRITE_ON_A_FULL_DISK, str(folder), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert (folder / "README.md").read_text() == "# Card"
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_after(saved, monkeypatch):
    speech_encoder, folder = saved
    synced = []
    fsync = os.fsync

    def noted(descriptor):
        fsync(descriptor)
        card = (folder / "README.md").read_text()
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, card))

    monkeypatch.setattr(os, "fsync", noted)
    save_encoder(speech_encoder, folder, "# Newer")
    files = [(name, "# Card") for name in ("README.md", "config.json", "encoder.writing", "model.safetensors")]
    assert sorted(synced[:-1]) == files and synced[-1] == (folder.parent.name, "# Newer")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"no encoder folder: it has no {name}"):
        load_encoder(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_encoder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config: config.update(format=2), "format 2 is not 1"),
        (lambda config: config.pop("format"), "format None is not 1"),
        (lambda config: (config.pop("format"), config.update(model_type="hubert")), "wav2vec2 is read, not hubert"),
        (lambda config: config.pop("frontend"), "not a whole description.*frontend"),
        (lambda config: config["encoder"].pop("type"), "not a whole description.*type"),
        (lambda config: config["encoder"].update(type="Wav2Vec2Model"), "unknown encoder type 'Wav2Vec2Model'"),
        (lambda config: config["encoder"].update(hidden_size=768), "not a whole description.*hidden_size"),
        (lambda config: config["encoder"].update(attention="flash"), "not a whole description.*flash"),
    ],
)
def test_a_foreign_config_is_refused(saved, change, message):
    _, folder = saved
    rewrite_config(folder, change)
    with pytest.raises(InputError, match=message) as refusal:
        load_encoder(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["[1, 2]", "null", '"encoder"'])
def test_a_config_that_is_no_dictionary_is_refused(saved, text):
    _, folder = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="config"):
        load_encoder(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00"])
def test_a_config_that_is_not_json_is_named(saved, content):
    _, folder = saved
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json"):
        load_encoder(folder)


@pytest.mark.parametrize("content", [b"", b"half", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"])
def test_broken_weights_are_named_in_one_line(saved, content):
    _, folder = saved
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="model.safetensors") as refusal:
        load_encoder(folder)
    assert "\n" not in str(refusal.value)


def test_weights_of_other_shapes_are_refused_in_one_line(saved):
    _, folder = saved
    rewrite_config(folder, lambda config: config["encoder"].update(d_ffn=64))
    with pytest.raises(InputError, match="model.safetensors does not fit config.json") as refusal:
        load_encoder(folder)
    assert "\n" not in str(refusal.value)


def test_missing_weights_are_refused(saved):
    _, folder = saved
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="encoder.norm.weight"):
        load_encoder(folder)


@pytest.mark.parametrize("name", ["encoder.norm.weight", "frontend.mean"])
def test_weights_that_are_not_finite_are_refused(saved, name):
    _, folder = saved
    weights = load_file(folder / "model.safetensors")
    weights[name][0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        load_encoder(folder)


@pytest.fixture
def facts():
    """What a run knows for its encoder's card."""
    return dict(
        model="BestRQ",
        corpus="LibriSpeech",
        train_hours=960.1,
        train_utterances=281241,
        step=200,
        audio_hours=12.5,
        device_hours=1.25,
        device="cpu",
        world_size=2,
        precision="bf16",
        parameters=123456,
        seed=7,
        command="python train.py hparams/bestrq.yaml",
    )


def test_a_card_holds_data_hours_steps_cost_and_command(facts):
    card = write_card(facts, [])
    for part in ("LibriSpeech: 960.1 h, 281241", "12.5 h", "1.25 device-hours on 2 x cpu, bf16", "123456", "hparams"):
        assert part in card
    assert "## Validation" not in card


@pytest.mark.parametrize("count", [1, 40, 41, 1000])
def test_a_card_shows_the_course_from_first_to_last_in_a_bounded_table(facts, count):
    lines = [
        dict(step=step, audio_hours=step / 10, loss=5.0, gain=1.0, accuracy=0.1, commonest_share=0.05)
        for step in range(1, count + 1)
    ]
    rows = write_card(facts, lines).split("commonest label |\n")[1].splitlines()[1:]
    steps = [int(row.split("|")[1]) for row in rows if row]
    assert steps == sorted(set(steps))
    assert steps[0] == 1 and steps[-1] == count
    assert len(steps) <= 41
