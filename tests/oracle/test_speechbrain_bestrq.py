"""Converted encoders against the modules of SpeechBrain's BEST-RQ recipe, from the waveform to every hidden state."""

from pathlib import Path

import pytest
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.lobes.models.transformer.TransformerASR import EncoderWrapper, TransformerASR
from speechbrain.nnet.activations import Swish
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.quantisers import RandomProjectionQuantizer
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer
from torch import nn

from speechbrain_bestrq.artefact import encoder_config, load_encoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.export import from_speechbrain
from speechbrain_bestrq.speechbrain_checkpoint import find_checkpoint, find_hyperparameters, read_speechbrain_checkpoint
from speechbrain_bestrq.speechbrain_frontend import SpeechBrainFbank

HPARAMS = """
nhead: 4
activation: &activation !name:torch.nn.GELU
CNN: &CNN !new:speechbrain.lobes.models.convolution.ConvolutionFrontEnd
  input_shape: (8, 10, 80)
  num_blocks: 2
  num_layers_per_block: 1
  out_channels: (8, 4)
  kernel_sizes: ({kernel}, {kernel})
  strides: (2, 2)
  residuals: (False, False)
Transformer: &Transformer !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
  input_size: 80
  tgt_vocab: 10
  d_model: 32
  nhead: 4
  num_encoder_layers: 3
  num_decoder_layers: 0
  d_ffn: 48
  activation: *activation
  {conformer_activation}
  encoder_module: conformer
  attention_type: {attention}
  normalize_before: true
  causal: false
  kernel_size: 7
wrapper: &wrapper !new:speechbrain.lobes.models.transformer.TransformerASR.EncoderWrapper
  transformer: *Transformer
model: !new:torch.nn.ModuleList
- [*CNN, *wrapper]
compute_features: !new:speechbrain.lobes.features.Fbank
  sample_rate: 16000
  n_fft: 400
  n_mels: 80
normalize: !new:speechbrain.processing.features.InputNormalization
  norm_type: {norm_type}
"""


def speechlike(samples, batch=2):
    """Noise whose level changes, with a loud end: nothing is the same at both edges, and 80 dB are exceeded."""
    generator = torch.Generator().manual_seed(samples)
    level = torch.linspace(-5.5, -0.5, samples).repeat(batch, 1) + 0.3 * torch.arange(batch)[:, None]
    return torch.randn(batch, samples, generator=generator) * 10**level


class Recipe:
    """SpeechBrain's modules as its recipe builds them, with weights of every kind away from where they start."""

    def __init__(self, attention="RelPosMHAXL", norm_type="sentence", swish=False, kernel=3):
        torch.manual_seed(0)
        self.features = Fbank(sample_rate=16000, n_fft=400, n_mels=80)
        self.normalize = InputNormalization(norm_type=norm_type)
        self.cnn = ConvolutionFrontEnd(
            input_shape=(8, 10, 80),
            num_blocks=2,
            num_layers_per_block=1,
            out_channels=(8, 4),
            kernel_sizes=(kernel, kernel),
            strides=(2, 2),
            residuals=(False, False),
        )
        self.wrapper = EncoderWrapper(
            TransformerASR(
                tgt_vocab=10,
                input_size=80,
                d_model=32,
                nhead=4,
                num_encoder_layers=3,
                num_decoder_layers=0,
                d_ffn=48,
                activation=nn.GELU,
                conformer_activation=Swish if swish else nn.GELU,
                encoder_module="conformer",
                attention_type=attention,
                normalize_before=True,
                causal=False,
                kernel_size=7,
                output_hidden_states=True,
            )
        )
        self.model = nn.ModuleList([self.cnn, self.wrapper])
        self.quantizer = RandomProjectionQuantizer(320, 16, 32)
        self.head = Linear(input_size=32, n_neurons=32)
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, 0.05, 0.2)
        self.normalize.train()
        if norm_type == "global":
            self.normalize(self.features(speechlike(16000)), torch.ones(2), epoch=0)
        self.model.eval()
        self.normalize.eval()
        self.text = HPARAMS.format(
            kernel=kernel,
            norm_type=norm_type,
            attention=attention,
            conformer_activation="" if swish else "conformer_activation: *activation",
        )

    @torch.no_grad()
    def encode(self, wavs):
        """Every hidden state: those that SpeechBrain lists, but the last after the final norm."""
        features = self.normalize(self.features(wavs), torch.ones(len(wavs)))
        output, states = self.wrapper(self.cnn(features), torch.ones(len(wavs)))
        return [*states[:-1], output]

    def save(self, folder, with_head=False):
        """A checkpoint and the run's hyperparams.yaml, as a run leaves them; the CKPT+... folder."""
        model = nn.ModuleList([*self.model, self.quantizer, self.head]) if with_head else self.model
        checkpointer = Checkpointer(folder / "save", {"model": model, "normalizer": self.normalize})
        checkpoint = checkpointer.save_checkpoint()
        (folder / "hyperparams.yaml").write_text(self.text)
        return checkpoint.path


def convert(recipe, folder, **options):
    checkpoint = find_checkpoint(recipe.save(folder, **options))
    return read_speechbrain_checkpoint(checkpoint, find_hyperparameters(checkpoint))


def assert_states_equal(found, expected, relative_difference):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_difference(theirs, ours) <= 1e-5


# 99 to 104 feature frames: every remainder of 4; and 5 frames, where both reflections meet
@pytest.mark.parametrize("samples", [15700, 15840, 16000, 16160, 16320, 16480, 700])
@pytest.mark.parametrize("attention", ["RelPosMHAXL", "RoPEMHA"])
def test_every_hidden_state_equals_speechbrains_on_unpadded_waveforms(
    attention, samples, tmp_path, relative_difference
):
    recipe = Recipe(attention)
    wavs = speechlike(samples)
    hidden, lengths = convert(recipe, tmp_path)(wavs)
    assert_states_equal(hidden, recipe.encode(wavs), relative_difference)
    assert lengths.tolist() == [hidden.shape[2]] * 2


@pytest.mark.parametrize("options", [{"norm_type": "global"}, {"swish": True}, {"kernel": 5}])
def test_every_variant_of_the_recipe_equals_speechbrains(options, tmp_path, relative_difference):
    recipe = Recipe(**options)
    wavs = speechlike(16160)
    hidden, _ = convert(recipe, tmp_path, with_head=True)(wavs)
    assert_states_equal(hidden, recipe.encode(wavs), relative_difference)


@pytest.mark.parametrize("frames", [99, 100, 101, 102])
@pytest.mark.parametrize("kernel", [3, 5])
def test_no_utterance_depends_on_its_neighbours_or_on_the_padding(
    kernel, frames, tmp_path, padded_with_junk, relative_difference
):
    encoder = convert(Recipe(kernel=kernel), tmp_path)
    samples = [160 * (frames - 1) + 7, 24000, 4200, 960]
    utterances, batch, wav_lens = padded_with_junk(samples)
    hidden, lengths = encoder(batch, wav_lens)
    for row, utterance in enumerate(utterances):
        alone, _ = encoder(utterance[None])
        assert lengths[row] == alone.shape[2] == encoder.num_frames(len(utterance))
        for layer, expected in zip(hidden[:, row], alone[:, 0], strict=True):
            assert relative_difference(expected, layer[: len(expected)]) <= 1e-5
        assert not hidden[:, row, lengths[row] :].any()


def test_the_frame_after_the_last_whole_second_is_heard(tmp_path):
    encoder = convert(Recipe(), tmp_path)
    wavs = speechlike(16000, batch=1)
    changed = wavs.clone()
    changed[:, -1600:] *= 0.5
    difference = (encoder(changed)[0] - encoder(wavs)[0]).abs()
    assert difference[0, 0, -1].max() > 0


def test_features_equal_speechbrains(relative_difference):
    wavs = speechlike(16000)
    expected = InputNormalization(norm_type="sentence")(Fbank(n_mels=80)(wavs), torch.ones(2))
    features, _ = SpeechBrainFbank()(wavs)
    assert relative_difference(expected, features) <= 1e-5


def test_a_bin_that_never_changes_is_zero_in_any_batch():
    features = torch.randn(2, 301, 80)
    features[..., -20:] = -torch.linspace(20.0, 70.0, 20)  # sums of these are rounded
    lengths = torch.tensor([301, 173])
    alone = SpeechBrainFbank._normalize_utterance(features[1:, :173], None)
    together = SpeechBrainFbank._normalize_utterance(features, lengths)
    assert (alone[..., -20:] == 0).all() and (together[1, :173, -20:] == 0).all()
    assert torch.allclose(together[1, :173], alone[0], atol=1e-5)


def test_the_loudest_frame_is_one_of_the_utterances_own(relative_difference):
    # a click between the last frame and the one that only a padded batch has: that one hears it better
    wav = 1e-5 * torch.randn(15999)
    wav[-1] = 1.0
    batch = torch.zeros(2, 24000)
    batch[0, :15999], batch[1] = wav, torch.randn(24000)
    alone, _ = SpeechBrainFbank()(wav[None])
    together, lengths = SpeechBrainFbank()(batch, torch.tensor([15999 / 24000, 1.0]))
    assert lengths[0] == alone.shape[1]
    assert relative_difference(alone[0], together[0, : lengths[0]]) <= 1e-5


def edited(recipe, folder, old, new):
    """A run whose hyperparams.yaml says something else; its converter."""
    assert old in recipe.text
    recipe.text = recipe.text.replace(old, new)
    checkpoint = Path(recipe.save(folder))
    return lambda: read_speechbrain_checkpoint(checkpoint, find_hyperparameters(checkpoint))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("causal: false", "causal: true", "TransformerASR has causal True; only False"),
        ("  causal: false\n", "", "TransformerASR has causal True; only False"),
        ("encoder_module: conformer", "encoder_module: branchformer", "encoder_module branchformer; only conformer"),
        ("attention_type: RelPosMHAXL", "attention_type: regularMHA", "attention_type regularMHA cannot be converted"),
        ("conformer_activation: *activation", "conformer_activation: !name:torch.nn.ReLU", "torch.nn.ReLU cannot be"),
        ("norm_type: sentence", "norm_type: batch", "norm_type batch cannot be converted, only sentence, global"),
        ("strides: (2, 2)", "strides: (2, 1)", r"strides \[2, 1\]; only \[2, 2\]"),
        ("n_mels: 80", "n_mels: 80\n  deltas: true", "Fbank has deltas True; only False"),
        ("  d_model: 32", "  d_model: 64", "d_model is 64, but 32 in the weights: of another run"),
        ("  nhead: 4", "  nhead: 8", "nhead is 8, but 4 in the weights: of another run"),
        ("n_mels: 80", "n_mels: 40", "does not fit .*norm1"),
        ("TransformerASR.TransformerASR", "wav2vec.Wav2Vec2", "builds no TransformerASR: give the hyperparams.yaml"),
        ("\nnhead: 4\n", "\n- 4\n", "cannot be read as YAML"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name_in_one_line(old, new, message, tmp_path):
    with pytest.raises(InputError, match=message) as refusal:
        edited(Recipe(), tmp_path, old, new)()
    assert "\n" not in str(refusal.value)


def test_references_of_the_recipes_own_yaml_are_followed(tmp_path):
    encoder = edited(Recipe("RoPEMHA"), tmp_path, "  nhead: 4", "  nhead: !ref <nhead>")()
    assert encoder.encoder.config["num_heads"] == 4


def test_reading_a_run_runs_nothing(tmp_path):
    trace = tmp_path / "trace"
    recipe = Recipe()
    recipe.text += f"seed: !apply:pathlib.Path.touch [{trace}]\nother: !!python/object/apply:os.mkdir [{trace}]\n"
    checkpoint = Path(recipe.save(tmp_path))
    hparams = find_hyperparameters(checkpoint)
    read_speechbrain_checkpoint(checkpoint, hparams)

    class Hostile:
        def __reduce__(self):
            return Path.touch, (trace,)

    weights = torch.load(checkpoint / "model.ckpt", weights_only=True)
    torch.save({**weights, "hostile": Hostile()}, checkpoint / "model.ckpt")
    with pytest.raises(InputError, match="model.ckpt cannot be read as tensors, and nothing else is loaded") as refusal:
        read_speechbrain_checkpoint(checkpoint, hparams)
    assert "\n" not in str(refusal.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    "saved, message",
    [
        (
            {"0.w.weight": torch.ones(2)},
            "not of SpeechBrain's BEST-RQ recipe: it has no 0.convblock_0.*, but 0.w.weight",
        ),
        ({"count": 3}, "no dictionary of tensors"),
        ([torch.ones(2)], "no dictionary of tensors"),
        ("text", "cannot be read as tensors"),
    ],
)
def test_a_checkpoint_of_another_kind_is_named(saved, message, tmp_path):
    checkpoint = Path(Recipe().save(tmp_path))
    if isinstance(saved, str):
        (checkpoint / "model.ckpt").write_text(saved)
    else:
        torch.save(saved, checkpoint / "model.ckpt")
    with pytest.raises(InputError, match=message):
        read_speechbrain_checkpoint(checkpoint, tmp_path / "hyperparams.yaml")


@pytest.mark.parametrize(
    "name, message",
    [
        ("1.transformer.encoder.layers.1.norm1.norm.weight", "Missing key.*layers.1.attention_norm.weight"),
        ("0.convblock_0.reduce_conv.conv.weight", "0.convblock_0.reduce_conv.conv.weight is no weight of"),
        ("1.transformer.encoder.layers.0.mha_layer.in_proj_bias", "in_proj_bias is no weight of"),
    ],
)
def test_a_missing_or_foreign_weight_is_named(name, message, tmp_path):
    checkpoint = Path(Recipe().save(tmp_path))
    weights = torch.load(checkpoint / "model.ckpt", weights_only=True)
    if weights.pop(name, None) is None:
        weights[name] = torch.ones(2)
    torch.save(weights, checkpoint / "model.ckpt")
    with pytest.raises(InputError, match=message) as refusal:
        read_speechbrain_checkpoint(checkpoint, tmp_path / "hyperparams.yaml")
    assert "\n" not in str(refusal.value)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    recipe = Recipe()
    with torch.no_grad():
        next(recipe.model.parameters())[0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        convert(recipe, tmp_path)


def test_global_statistics_that_are_missing_or_unmeasured_are_named(tmp_path):
    checkpoint = Path(Recipe(norm_type="global").save(tmp_path))
    torch.save({"count": 0, "glob_mean": torch.empty(0), "glob_std": torch.empty(0)}, checkpoint / "normalizer.ckpt")
    with pytest.raises(InputError, match="never measured"):
        read_speechbrain_checkpoint(checkpoint, tmp_path / "hyperparams.yaml")
    (checkpoint / "normalizer.ckpt").unlink()
    with pytest.raises(InputError, match="no normalizer.ckpt, which the norm_type global needs"):
        read_speechbrain_checkpoint(checkpoint, tmp_path / "hyperparams.yaml")


def test_the_newest_checkpoint_with_a_model_is_found(tmp_path):
    for number in range(4):
        folder = tmp_path / "save" / f"CKPT+2024-05-0{number + 1}+12-00-00+00"
        folder.mkdir(parents=True)
        if number < 3:
            (folder / "model.ckpt").touch()
    newest = tmp_path / "save" / "CKPT+2024-05-03+12-00-00+00"
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "save") == find_checkpoint(newest) == newest
    with pytest.raises(InputError, match="no model.ckpt"):
        find_checkpoint(tmp_path / "save" / "CKPT+2024-05-04+12-00-00+00")
    with pytest.raises(InputError, match="is no folder"):
        find_checkpoint(newest / "model.ckpt")


def test_an_exported_encoder_is_the_one_that_was_read_bit_for_bit(tmp_path):
    recipe = Recipe()
    run = tmp_path / "run"
    checkpoint = Path(recipe.save(run))
    done = from_speechbrain(run, tmp_path / "encoder")
    assert done["checkpoint"] == str(checkpoint) and done["hyperparams"] == str(run / "hyperparams.yaml")
    assert done["parameters"] == sum(parameter.numel() for parameter in recipe.model.parameters())
    wavs, wav_lens = speechlike(16000), torch.tensor([1.0, 0.63])
    expected = read_speechbrain_checkpoint(checkpoint, run / "hyperparams.yaml")(wavs, wav_lens)
    loaded = load_encoder(tmp_path / "encoder")
    assert all(torch.equal(a, b) for a, b in zip(loaded(wavs, wav_lens), expected, strict=True))
    assert encoder_config(loaded) == done["config"]
    assert checkpoint.name in (tmp_path / "encoder" / "README.md").read_text()


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="causal"):
        run = tmp_path / "run"
        edited(Recipe(), run, "causal: false", "causal: true")
        from_speechbrain(run, tmp_path / "out" / "encoder")
    assert not list((tmp_path / "out").iterdir())
