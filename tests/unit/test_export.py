"""Exported folders: SpeechBrain's inference interface gives our outputs, and nothing is overwritten."""

import json
import shutil

import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file
from speechbrain.inference.encoders import WaveformEncoder
from speechbrain.utils import fetching

from speechbrain_bestrq import export
from speechbrain_bestrq.artefact import load_encoder, save_encoder
from speechbrain_bestrq.cli import main
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.export import to_speechbrain
from speechbrain_bestrq.speechbrain_frontend import SpeechBrainFbank, SpeechBrainSubsampling

CPU = {"run_opts": {"device": "cpu"}}


@pytest.fixture
def encoder_folder(make_speech_encoder, tmp_path):
    return save_encoder(make_speech_encoder(normalize="global"), tmp_path / "run" / "encoder", "# Card", steps=3)


@pytest.fixture
def exported(encoder_folder, tmp_path):
    out = tmp_path / "exported"
    to_speechbrain(encoder_folder, out)
    return out


def assert_same_outputs(waveform_encoder, encoder_folder):
    wavs, wav_lens = 0.1 * torch.randn(2, 8000), torch.tensor([1.0, 0.5])
    hidden, lengths = load_encoder(encoder_folder)(wavs, wav_lens)
    encoded = waveform_encoder.encode_batch(wavs, wav_lens)
    assert torch.equal(encoded["embeddings"], hidden[-1])
    assert torch.equal(encoded["lengths"], lengths)


@pytest.mark.parametrize("savedir", [False, True])
def test_speechbrain_gives_our_outputs_bit_for_bit(savedir, exported, encoder_folder, tmp_path):
    options = {"savedir": str(tmp_path / "cache" / "deep")} if savedir else {}
    waveform_encoder = WaveformEncoder.from_hparams(source=str(exported), **options, **CPU)
    assert_same_outputs(waveform_encoder, encoder_folder)
    assert not waveform_encoder.training or not any(module.training for module in waveform_encoder.mods.values())
    assert not any(parameter.requires_grad for parameter in waveform_encoder.parameters())


def test_a_moved_folder_still_loads(exported, encoder_folder, tmp_path):
    exported.rename(tmp_path / "elsewhere")
    waveform_encoder = WaveformEncoder.from_hparams(source=str(tmp_path / "elsewhere"), **CPU)
    assert_same_outputs(waveform_encoder, encoder_folder)


def test_a_hub_id_still_loads(exported, encoder_folder, monkeypatch):
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename))
        return str(exported / filename)

    monkeypatch.setattr(fetching.huggingface_hub, "hf_hub_download", download)
    waveform_encoder = WaveformEncoder.from_hparams(source="someone/encoder", **CPU)
    assert set(asked) == {("someone/encoder", "hyperparams.yaml"), ("someone/encoder", "model.safetensors")}
    assert_same_outputs(waveform_encoder, encoder_folder)


def test_a_file_of_another_rate_is_encoded(exported, encoder_folder, tmp_path):
    soundfile.write(tmp_path / "speech.wav", 0.1 * torch.randn(22050, 2).numpy(), 44100)
    waveform_encoder = WaveformEncoder.from_hparams(source=str(exported), **CPU)
    embeddings = waveform_encoder.encode_file(str(tmp_path / "speech.wav"))
    wav = waveform_encoder.load_audio(str(tmp_path / "speech.wav"))
    assert wav.shape == (8000,)
    assert torch.equal(embeddings, load_encoder(encoder_folder)(wav[None])[0][-1])


def test_the_yaml_describes_the_encoder_as_its_config_does(exported, encoder_folder):
    config = json.loads((encoder_folder / "config.json").read_text())
    config.pop("training")
    waveform_encoder = WaveformEncoder.from_hparams(source=str(exported), **CPU)
    text = (exported / "hyperparams.yaml").read_text().split("config:\n")[1].split("audio_normalizer")[0]
    assert yaml.safe_load(text) == config
    speech_encoder = waveform_encoder.mods.encoder.speech_encoder
    assert speech_encoder.frontend.config == {k: v for k, v in config["frontend"].items() if k != "type"}


def test_facts_of_a_strangers_folder_do_not_stand_in_for_arguments(encoder_folder, tmp_path):
    path = encoder_folder / "config.json"
    config = json.loads(path.read_text())
    config["training"] = {"folder": "elsewhere", "card": "none", "speech_encoder": 1, "step": 7}
    path.write_text(json.dumps(config))
    to_speechbrain(encoder_folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["training"] == {"step": 7}


def test_the_folder_is_still_an_encoder_folder_without_a_pickle(exported, encoder_folder):
    names = sorted(path.name for path in exported.iterdir())
    assert names == ["README.md", "config.json", "hyperparams.yaml", "model.safetensors"]
    expected = load_encoder(encoder_folder).state_dict()
    for name, tensor in load_encoder(exported).state_dict().items():
        assert torch.equal(tensor, expected[name])
    card = (exported / "README.md").read_text()
    assert card.startswith("# Card\n") and "WaveformEncoder.from_hparams" in card


def test_the_output_folder_of_a_run_is_taken(encoder_folder, tmp_path):
    done = to_speechbrain(encoder_folder.parent, tmp_path / "exported")
    assert done["source"] == str(encoder_folder)
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_an_encoder_with_speechbrains_front_end_goes_back(tmp_path):
    speech_encoder = SpeechEncoder(
        SpeechBrainFbank(), SpeechBrainSubsampling(d_model=16, channels=(8, 4)), ConformerEncoder(16, 1, 2, 32)
    )
    folder = save_encoder(speech_encoder, tmp_path / "encoder", "# Card")
    to_speechbrain(folder, tmp_path / "exported")
    assert_same_outputs(WaveformEncoder.from_hparams(source=str(tmp_path / "exported"), **CPU), folder)


@pytest.mark.parametrize("damage", ["missing", "other shapes"])
def test_weights_that_do_not_fit_are_named_in_one_line(damage, exported):
    path = exported / "model.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        weights = load_file(path)
        weights["encoder.norm.weight"] = torch.ones(3)
        save_file(weights, path)
    with pytest.raises(InputError, match="model.safetensors does not fit hyperparams.yaml") as refusal:
        WaveformEncoder.from_hparams(source=str(exported), **CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(kind, encoder_folder, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="out exists and is not an empty folder: nothing is overwritten"):
        to_speechbrain(encoder_folder, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled_and_a_new_one_made(encoder_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        to_speechbrain(encoder_folder, out)
        assert (out / "hyperparams.yaml").is_file()
        assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_a_link_to_an_empty_folder_is_followed_and_the_folder_one_is_in_is_refused(
    encoder_folder, tmp_path, monkeypatch
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    to_speechbrain(encoder_folder, tmp_path / "link")
    assert (tmp_path / "empty" / "hyperparams.yaml").is_file() and (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", tmp_path / "here"):
        with pytest.raises(InputError, match="is the folder that you are in: give a new one"):
            to_speechbrain(encoder_folder, out)


def test_a_failure_while_writing_leaves_nothing(encoder_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(export, "save_encoder", fail)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="disk full"):
        to_speechbrain(encoder_folder, tmp_path / "empty" / "out")
    assert not list((tmp_path / "empty").iterdir())


def test_a_source_that_is_no_encoder_is_named(tmp_path):
    with pytest.raises(InputError, match="no encoder folder: it has no config.json"):
        to_speechbrain(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", ["file", "another folder's card"])
def test_a_card_that_is_a_link_out_of_the_folder_is_not_published(link, encoder_folder, tmp_path, capsys):
    secret = tmp_path / ("secret.txt" if link == "file" else "other/README.md")
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("not for the public")
    (encoder_folder / "README.md").unlink()
    (encoder_folder / "README.md").symlink_to(secret)
    assert main(["export", "--to", "speechbrain", str(encoder_folder), str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "README.md is a link that leaves the folder" in output.err
    assert not (tmp_path / "out").exists()


def test_a_card_of_absurd_size_is_refused(encoder_folder, tmp_path):
    with open(encoder_folder / "README.md", "wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(InputError, match="README.md has 1048577 bytes, more than any model card"):
        to_speechbrain(encoder_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (encoder_folder / "README.md").write_text("x" * 2**20)
    assert to_speechbrain(encoder_folder, tmp_path / "out")["parameters"] > 0


def test_the_command_prints_what_it_did(encoder_folder, tmp_path, capsys):
    run, out = str(encoder_folder.parent), str(tmp_path / "out")
    assert main(["export", "--to", "speechbrain", run, out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == out
    shutil.rmtree(out)
    assert main(["export", "--to", "speechbrain", run, out]) == 0
    assert f"folder: {out}\n" in capsys.readouterr().out


def test_errors_of_the_command_are_one_line(tmp_path, capsys):
    source = ["speechbrain", str(tmp_path), str(tmp_path / "out")]
    for words, message in (
        (["--from", *source], "no CKPT+... folder"),
        (["--to", *source], "no encoder folder"),
        (["--to", *source, "--hparams", "x.yaml"], "--hparams belongs to --from"),
    ):
        assert main(["export", *words]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and message in output.err
    assert not list(tmp_path.iterdir())
