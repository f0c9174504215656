"""An encoder's source is a folder, a run or a hub id, and nothing in it is run; what is wrong is named in one line."""

import json
import os
import pickle
import struct
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from speechbrain_bestrq import PretrainedEncoder, artefact, load_encoder, save_encoder
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor, FeatureProjection
from speechbrain_bestrq.transformer import TransformerEncoder
from speechbrain_bestrq.transformers_names import normalizes_input


@pytest.fixture
def folder(make_speech_encoder, tmp_path):
    """A good encoder folder."""
    return save_encoder(make_speech_encoder(normalize="global"), tmp_path / "encoder", "# Card")


def refuse(source, *parts, **options):
    """The one-line message that a source is refused with, which names all the parts."""
    with pytest.raises(InputError) as refusal:
        PretrainedEncoder(source, **options)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message
    return message


# ---------------------------------------------------------------- where


def test_a_runs_output_folder_gives_its_last_encoder(make_speech_encoder, tmp_path):
    first, last = (make_speech_encoder(seed=seed) for seed in (1, 2))
    save_encoder(first, tmp_path / "run" / "encoder@100", "# Card")
    save_encoder(last, tmp_path / "run" / "encoder", "# Card")
    weight = PretrainedEncoder(tmp_path / "run").model.encoder.norm.weight
    assert torch.equal(weight, last.encoder.norm.weight)


def test_a_run_that_has_not_validated_yet_says_so_and_what_to_do(make_speech_encoder, tmp_path):
    run = tmp_path / "run"
    (run / "save").mkdir(parents=True)
    for name in ("run.json", "hyperparams.yaml"):
        (run / name).write_text("{}")
    told = (f"{run} has no encoder folder, for this run has not validated yet: wait until it has", "valid_interval")
    for source in (run, f"random:{run}"):
        assert refuse(source, *told).endswith("each epoch).")
    for step in (900, 1000):
        save_encoder(make_speech_encoder(), run / f"encoder@{step}", "# Card")
    refuse(run, *told, f"or give {run}/encoder@1000.")
    save_encoder(make_speech_encoder(), run / "encoder", "# Card")
    assert PretrainedEncoder(run).num_layers == 2


def test_the_run_folder_of_another_program_is_no_run_of_ours(tmp_path):
    (tmp_path / "save").mkdir()
    (tmp_path / "hyperparams.yaml").write_text("{}")
    assert "validated" not in refuse(tmp_path, "no encoder folder", "hyperparams.yaml is not read", "sb-bestrq export")


def test_a_hub_id_is_downloaded_into_the_save_path(folder, tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    PretrainedEncoder("user/name")
    assert asked["revision"] is None
    encoder = PretrainedEncoder("user/name@v1.0", save_path=tmp_path / "cache")
    assert encoder.output_dim == 16
    assert asked == {
        "repo_id": "user/name",
        "revision": "v1.0",
        "cache_dir": str(tmp_path / "cache"),
        "allow_patterns": [
            "config.json",
            "model.safetensors",
            "README.md",
            "preprocessor_config.json",
            "processor_config.json",
        ],
    }


def test_a_repository_of_pickles_says_what_to_do(folder, tmp_path, monkeypatch):
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **options: str(folder))
    refuse("user/name", "user/name on the hub has no model.safetensors", "save_pretrained")


def test_a_folder_goes_before_the_hub(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # calling it would fail
    monkeypatch.chdir(folder.parent.parent)
    assert PretrainedEncoder(f"{folder.parent.name}/encoder").output_dim == 16


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), ValueError("Repository Not Found"), Exception()])
def test_what_is_neither_here_nor_on_the_hub_is_named(monkeypatch, error):
    def download(repo_id, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refuse("results/bestrk", "results/bestrk is neither a folder here nor", "check the path or the id")


@pytest.mark.parametrize("source", ["/no/where", "nowhere", "a/b/c", "../x/y", "1000/encoder@2000", ""])
def test_what_can_be_no_hub_id_is_not_asked_for(monkeypatch, source, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    refuse(source, "no folder" if source else "no encoder folder")


def test_a_file_is_no_source(folder):
    refuse(folder / "model.safetensors", "is a file: give the encoder folder")


# ---------------------------------------------------------------- nothing is run


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        """Run code, as any pickle may."""
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def hostile(tmp_path):
    """A marker that must never appear, and a folder full of files that would make it, were they run."""
    marker, folder = tmp_path / "it_ran", tmp_path / "hostile"
    folder.mkdir()
    for name in ("model.ckpt", "pytorch_model.bin", "model.pt", "encoder.pkl"):
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    text = f"model: !apply:os.system ['touch {marker}']\n"
    for name in ("hyperparams.yaml", "config.yaml"):
        (folder / name).write_text(text)
    for name in ("config.py", "model.py", "__init__.py", "custom.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w')\n")
    return marker, folder, text


def test_a_hostile_folder_is_refused_by_the_name_of_its_file_and_leaves_nothing_behind(hostile, folder):
    marker, stranger, text = hostile
    refuse(stranger, "it has no config.json", "pytorch_model.bin is not read", "pickle", "save_pretrained")
    for pickled in stranger.glob("*.p*"):
        if pickled.suffix == ".pkl":
            pickled.unlink()
    (stranger / "config.json").write_text(text)
    refuse(stranger, "it has no model.safetensors", "is not read")
    (stranger / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    refuse(stranger, "config.json is not JSON")
    (stranger / "config.json").write_text((folder / "config.json").read_text())
    (stranger / "model.safetensors").write_bytes((stranger / "model.ckpt").read_bytes())
    refuse(stranger, "model.safetensors is no")
    torch.save({"encoder.norm.weight": Payload(marker)}, stranger / "model.safetensors")
    refuse(stranger, "model.safetensors is no")
    for source in (stranger / "model.ckpt", f"random:{stranger}"):
        refuse(source)
    assert not marker.exists()
    pickle.loads((stranger / "model.ckpt").read_bytes())
    assert marker.exists()  # the payload is live


def test_a_good_folder_with_a_strangers_files_beside_runs_none_of_them(hostile, folder):
    marker, stranger, _ = hostile
    for path in folder.iterdir():
        (stranger / path.name).write_bytes(path.read_bytes())
    assert PretrainedEncoder(stranger)(torch.randn(1, 8000)).shape == (1, 12, 16)
    assert not marker.exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!new:os.system", "!apply:os.system", "__import__('os')", "os.system"]
)
def test_a_tag_in_the_config_is_a_word_like_any_other(folder, tag):
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["type"] = tag
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, "config.json", f"unknown encoder type {tag!r}")


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leaves_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refuse(folder, f"{name} is a link that leaves the folder")


def test_the_hubs_cache_links_to_its_blobs_and_nowhere_else(folder, tmp_path):
    cache = tmp_path / "models--user--name"
    snapshot, blobs = cache / "snapshots" / "0a1b", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (blobs / name[::-1]).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name[::-1]))
    assert load_encoder(snapshot).encoder.d_model == 16
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    refuse(snapshot, "config.json is a link that leaves the folder")


def test_a_link_to_a_folder_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert load_encoder(tmp_path / "link").encoder.d_model == 16


# ---------------------------------------------------------------- sizes that lie


def rewrite_header(path, change, size=None):
    """Change the header of a safetensors file by a function, and leave its data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + content[8 + length :])


def grow(entry):
    """Let an entry claim four terabytes."""
    entry.update(shape=[2**20, 2**20], data_offsets=[0, 2**42])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: grow(header["encoder.norm.weight"]),
        lambda header: header["encoder.norm.weight"].update(data_offsets=header["encoder.norm.bias"]["data_offsets"]),
        lambda header: header["encoder.norm.weight"].update(data_offsets=[-64, 0]),
        lambda header: header["encoder.norm.weight"].update(shape=[4]),
        lambda header: header["encoder.norm.weight"].update(dtype="PICKLE"),
        lambda header: header.pop("encoder.norm.weight"),
        lambda header: header["encoder.norm.weight"].update(dtype="I32"),
    ],
)
def test_a_header_that_lies_is_refused(folder, change):
    rewrite_header(folder / "model.safetensors", change)
    refuse(folder, "model.safetensors")


@pytest.mark.parametrize("size", [2**62, 2**27, 10])
def test_a_header_of_another_size_is_refused(folder, size):
    rewrite_header(folder / "model.safetensors", lambda header: None, size)
    refuse(folder, "model.safetensors")


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("encoder", "d_model", 10**9),
        ("encoder", "d_ffn", 100_000),
        ("encoder", "num_layers", 10**6),
        ("encoder", "num_layers", 10**400),
        ("encoder", "num_heads", 0),
        ("encoder", "dropout", float("nan")),
        ("frontend", "sample_rate", 10**12),
        ("frontend", "num_mels", 10**6),
        ("frontend", "hop_ms", 0),
        ("frontend", "window_ms", -1),
        ("subsampling", "channels", [8] * 1000),
        ("subsampling", "kernel_size", -3),
    ],
)
def test_a_config_of_absurd_sizes_is_refused_before_anything_is_built(folder, section, key, value):
    config = json.loads((folder / "config.json").read_text())
    config[section][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, "config.json")


@pytest.mark.parametrize(
    "key, value, most", [("d_model", 8194, 8192), ("num_layers", 257, 256), ("num_layers", 41, 40)]
)
def test_sizes_are_bounded_before_positions_are_tabulated_and_layers_made(tmp_path, monkeypatch, key, value, most):
    """SinusoidalPositions makes a table of 3000 x d_model in real memory, also where the rest is only described."""
    encoder = TransformerEncoder(16, num_layers=2, num_heads=2, d_ffn=32, norm="pre", positions="sinusoidal")
    speech_encoder = SpeechEncoder(ConvFeatureExtractor((8,) * 7), FeatureProjection(8, 16), encoder)
    folder = save_encoder(speech_encoder, tmp_path / "encoder", "# Card")
    tensors = 40 if most == 40 else 300
    save_file({f"{number}": torch.zeros(1) for number in range(tensors)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["encoder"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(artefact, "build_encoder", None)  # calling it would fail
    refuse(folder, f"config.json: encoder config: encoder.{key} is {value}: give a number from 0 to {most}.")


@pytest.mark.parametrize("text", ["[" * 100_000, "{" + " " * 2**20 + "}"])
def test_a_config_that_is_deep_or_large_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refuse(folder, "config.json")


def test_a_tensor_too_many_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "evil\nname": torch.zeros(1)}, folder / "model.safetensors")
    refuse(folder, r"'evil\nname' has no place in it")


def test_what_transformers_5_writes_says_whether_waveforms_are_normalised(tmp_path):
    group_norm = {"feat_extract_norm": "group"}
    assert not normalizes_input(tmp_path, group_norm)
    settings = {"do_normalize": True, "sampling_rate": 16000}
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": settings}))
    assert normalizes_input(tmp_path, group_norm)
    (tmp_path / "processor_config.json").write_text(json.dumps({"tokenizer": {}}))
    with pytest.raises(InputError, match=r"processor_config.json holds no JSON object"):
        normalizes_input(tmp_path, group_norm)
