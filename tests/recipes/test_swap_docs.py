"""What docs/swap.md says to write into a recipe does what it says: its YAML and its diffs are built and run here."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.nnet.adapters import LoRA
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer
from torch import nn

from speechbrain_bestrq import PretrainedEncoder, WeightedEncoder, save_encoder
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor, FeatureProjection
from speechbrain_bestrq.transformer import TransformerEncoder

DOCS = Path(__file__).parents[2] / "docs" / "swap.md"
TEXT = DOCS.read_text(encoding="utf-8")
#: What the recipes' YAMLs define elsewhere.
ELSEWHERE = """
activation: !name:torch.nn.LeakyReLU
freeze_wav2vec: True
freeze_wav2vec2: True
freeze_wav2vec2_conv: True
wav2vec2_folder: !ref <save_folder>/wav2vec2_checkpoint
"""


def block(language, *parts):
    """The one block of code that has all the parts."""
    found = [text for kind, text in re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S) if kind == language]
    found = [text for text in found if all(part in text for part in parts)]
    assert len(found) == 1, f"{len(found)} blocks with {parts}"
    return found[0]


def changed(diff):
    """What stands in a file after a diff, without what the diff leaves out."""
    assert re.search("^-", diff, re.M) or re.search(r"^\+", diff, re.M)
    lines = [line[1:] for line in diff.splitlines() if line[0] in "+ "]
    return "\n".join(line for line in lines if line.strip()) + "\n"


def filled(text, folder):
    """YAML with the encoder of a folder, which has the size 16."""
    return re.sub(r"/path/to/results/bestrq/1000\b", str(folder), re.sub(r"\bD\b", "16", text))


@pytest.fixture
def folder(make_speech_encoder, tmp_path):
    """An encoder folder of two Conformer layers."""
    return save_encoder(make_speech_encoder(normalize="global"), tmp_path / "encoder", "# Card")


@pytest.fixture
def wav2vec2_folder(tmp_path):
    """An encoder folder of two layers of wav2vec 2.0."""
    torch.manual_seed(1)
    encoder = TransformerEncoder(16, num_layers=2, num_heads=2, d_ffn=32, position_groups=2)
    speech_encoder = SpeechEncoder(ConvFeatureExtractor((8,) * 7), FeatureProjection(8, 16), encoder)
    return save_encoder(speech_encoder, tmp_path / "wav2vec2", "# Card")


@pytest.fixture(scope="module")
def swapped(load_script):
    """The module tests/helpers/swapped.py."""
    return load_script(Path(__file__).parents[1] / "helpers" / "swapped.py")


# ---------------------------------------------------------------- the recipes' diffs


def test_every_class_of_speechbrain_that_is_taken_away_is_there_in_the_installed_release():
    names = set(re.findall(r"^-.*!new:(speechbrain\.[\w.]+)", TEXT, re.M))
    assert len([name for name in names if ".integrations." in name]) == 3
    package = Path(sb.__file__).parents[1]
    for name in names:
        *parts, class_name = name.split(".")
        # read and not imported: some need packages that only they need
        source = package.joinpath(*parts).with_suffix(".py").read_text(encoding="utf-8")
        assert f"\nclass {class_name}(" in source, name


@pytest.mark.parametrize(
    ("parts", "encoder", "reader"),
    [
        (["enc: !new"], "wav2vec2", "enc"),
        (["wav2vec2-base", "encoder_dim"], "wav2vec2", None),
        (["hubert-base", "encoder_dim"], "wav2vec2", None),
        (["left_frames"], "compute_features", "embedding_model"),
        (["WeightedSSLModel"], "weighted_ssl_model", None),
    ],
)
def test_a_recipes_yaml_after_its_diff_builds_an_encoder_that_fits_what_reads_it(
    folder, tmp_path, parts, encoder, reader
):
    text = filled(changed(block("diff", *parts)), folder)
    defined = set(re.findall(r"^(\w+):", text, re.M))
    elsewhere = f"{ELSEWHERE}ssl_hub: {folder}\nssl_folder: !ref <save_folder>\n"
    values = "".join(f"{line}\n" for line in elsewhere.splitlines() if line.split(":")[0] not in defined)
    hparams = load_hyperpyyaml(f"save_folder: {tmp_path}\n{values}{text}")
    encoded = hparams[encoder](0.1 * torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    assert encoded.shape == (2, 50 if reader == "enc" else 25, 16) and not encoded[1, -1].any()
    assert hparams[encoder].freeze
    if reader is not None:
        assert hparams[reader](encoded).isfinite().all()
    else:
        assert hparams.get("encoder_dim", 16) == 16


@pytest.mark.parametrize("mixed", [False, True])
def test_verification_loads_the_encoder_that_was_trained_with_the_embedding_model(folder, tmp_path, mixed):
    text = filled(changed(block("diff", "pretrainer: !new")), folder)
    if mixed:
        text = text.replace("PretrainedEncoder\n    source:", "WeightedEncoder\n    hub:")
    training = filled(changed(block("diff", "left_frames")), folder).replace("freeze: True", f"freeze: {mixed}")
    if mixed:
        training = training.replace("PretrainedEncoder\n    source:", "WeightedEncoder\n    hub:")
    recoverables = textwrap.dedent(changed(block("diff", "recoverables")))
    trained = load_hyperpyyaml(f"save_folder: {tmp_path}\n{training}{recoverables}")
    with torch.no_grad():
        for module in (trained["compute_features"], trained["embedding_model"]):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
    checkpoint = Checkpointer(tmp_path / "save", trained["recoverables"]).save_checkpoint()
    text = re.sub("^pretrain_path: .*", f"pretrain_path: {checkpoint.path}", text, flags=re.M)
    assert "CKPT+" in text
    verified = load_hyperpyyaml(f"save_folder: {tmp_path / 'verification'}\n{text}")
    verified["pretrainer"].collect_files()
    verified["pretrainer"].load_collected()
    for name in ("compute_features", "embedding_model"):
        ours, theirs = verified[name].state_dict(), trained[name].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    fresh = (WeightedEncoder if mixed else PretrainedEncoder)(folder).state_dict()
    assert any(not torch.equal(fresh[key], tensor) for key, tensor in verified["compute_features"].state_dict().items())


@pytest.mark.parametrize(
    ("part", "lines"),
    [
        ("self.modules.compute_features", "self.modules.mean_var_norm(feats, lens)"),
        ('params["compute_features"](wavs, wav_lens)', 'params["mean_var_norm"](feats, wav_lens)'),
    ],
)
def test_what_tells_speakers_apart_in_the_mean_of_hidden_states_is_left_there(folder, part, lines):
    diff = block("diff", part)
    assert f"-        feats = {lines}" in diff and "mean_var_norm" not in changed(diff)
    encoder = PretrainedEncoder(folder, freeze=True)
    hidden, lengths = encoder(0.1 * torch.randn(2, 16000), torch.ones(2)), torch.ones(2)
    normalised = InputNormalization(norm_type="sentence", std_norm=False)(hidden, lengths)
    assert normalised.mean(1).abs().max() < 1e-5 < hidden.mean(1).abs().max()  # why it has to go


# ---------------------------------------------------------------- the mix


def mixed_recipe(folder):
    """The entries of the CTC recipe with a mix, fitted to the head of tests/helpers/swapped.py."""
    text = filled(changed(block("diff", "!ref <wav2vec2.mix>")), folder)
    text = text.replace("!ref <wav2vec2_hub>", "!ref <source>").replace("<freeze_wav2vec>", "<freeze_wav2vec2>")
    text = text.replace("!ref <wav2vec2_folder>", "!ref <save_folder>/wav2vec2_checkpoint")
    entry, model = text.split("model:")
    return {"wav2vec2": entry, "model": "model:" + model.replace("!ref <enc>, !ref <ctc_lin>", "!ref <head>")}


@pytest.mark.parametrize("documented", [True, False])
def test_the_mix_of_a_frozen_encoder_is_trained_by_the_other_optimizer(swapped, folder, tmp_path, documented):
    entries = mixed_recipe(folder)
    if not documented:
        entries.pop("model")
    brain = swapped.fit("CTC", folder, tmp_path / "save", freeze_wav2vec2=True, **entries)
    encoder = brain.hparams.wav2vec2
    assert isinstance(encoder, WeightedEncoder)
    assert bool(encoder.weights.any()) == documented
    before = PretrainedEncoder(folder).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.encoder.state_dict().items())
    held = [weight for group in brain.optimizer.param_groups for weight in group["params"]]
    assert sum(weight is encoder.weights for weight in held) == documented
    # a resumed run has the weights, whichever of the checkpoint's two files is read last
    resumed = swapped.fit("CTC", folder, tmp_path / "save", freeze_wav2vec2=True, **entries)
    assert torch.equal(resumed.hparams.wav2vec2.weights, encoder.weights)


def test_the_mix_of_a_frozen_encoder_is_one_on_two_ranks(swapped, folder, tmp_path):
    arguments = {"recipe": "CTC", "source": str(folder), "save_folder": str(tmp_path / "save"), "freeze_wav2vec2": True}
    one, other = swapped.train_ranks(tmp_path / "ranks", ("rank_fit", {**arguments, **mixed_recipe(folder)}))
    assert one["wrapped"] == "DistributedDataParallel" and one["trained"] == ["mix.weights"]
    assert one["after"]["mix.weights"].any()
    assert all(torch.equal(one["after"][name], other["after"][name]) for name in one["after"])


def test_the_weights_are_in_the_log_after_each_epoch_and_drawn_also_in_a_resumed_run(swapped, folder, tmp_path):
    imported, body = changed(block("diff", "record_layer_weights")).split("        if stage")
    namespace = {"sb": sb}
    exec(f"{imported}\ndef on_stage_end(self, stage, epoch):\n        if stage{body}", namespace)

    class LoggingBrain(swapped.RecipeBrain):
        def on_stage_end(self, stage, stage_loss, epoch=None):
            namespace["on_stage_end"](self, stage, epoch)
            super().on_stage_end(stage, stage_loss, epoch)

    save = tmp_path / "save"
    for epochs in (2, 3):
        options = {"number_of_epochs": epochs, "freeze_wav2vec2": True, **mixed_recipe(folder)}
        brain = swapped.fit("CTC", folder, save, LoggingBrain, **options)
    lines = (save / "train_log.txt").read_text().splitlines()
    logged = [re.fullmatch(r"epoch: (\d), mix: layer weights, lowest first: ([\d. ]+)", line) for line in lines]
    assert [int(line[1]) for line in logged] == [1, 2, 3]
    shares = [[float(share) for share in line[2].split()] for line in logged]
    assert shares[2] == pytest.approx(brain.hparams.wav2vec2.mix.shares(), abs=1e-3) and len(shares[2]) == 3
    assert shares[0] != shares[2] and all(sum(row) == pytest.approx(1.0, abs=2e-3) for row in shares)
    kept = json.loads((save / "layer_weights.json").read_text())
    assert len(kept) == 3 and all(row == pytest.approx(line, abs=1e-3) for row, line in zip(kept, shares, strict=True))
    assert (save / "layer_weights.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["conformer", "wav2vec2"])
def test_the_adapters_are_in_all_linear_layers_of_attention_and_feed_forward(folder, wav2vec2_folder, kind):
    text = filled(block("yaml", "AdaptedModel"), folder if kind == "conformer" else wav2vec2_folder)
    adapted = load_hyperpyyaml(text)["wav2vec2"].train()
    layers = adapted.model.encoder.layers
    expected = set()
    for number, layer in enumerate(
        PretrainedEncoder(wav2vec2_folder if kind == "wav2vec2" else folder).model.encoder.layers
    ):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(("attention.", "feed_forward")):
                expected.add(f"{number}.{name}")
    found = {name for name, module in layers.named_modules() if isinstance(module, LoRA)}
    assert found == expected and len(found) == 2 * (6 if kind == "conformer" else 4)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("adapter_" in name for name in trained)
    torch.manual_seed(1)
    adapted(0.1 * torch.randn(2, 16000), torch.tensor([1.0, 0.5])).square().sum().backward()
    assert {name for name, parameter in adapted.named_parameters() if parameter.grad is not None} == trained
