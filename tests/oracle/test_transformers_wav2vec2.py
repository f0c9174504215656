"""Our wav2vec 2.0 against that of Hugging Face's transformers, weight by weight."""

import contextlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining, Wav2Vec2Model
from transformers.models.wav2vec2.modeling_wav2vec2 import _sample_negative_indices

from speechbrain_bestrq.artefact import load_encoder
from speechbrain_bestrq.contrastive import sample_negatives
from speechbrain_bestrq.convert_transformers import from_transformers, to_transformers
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor, FeatureProjection
from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.gumbel_quantizer import GumbelQuantizer, mean_shares, perplexity
from speechbrain_bestrq.masking import MaskedFrames, SpanMasking, span_mask
from speechbrain_bestrq.transformer import TransformerEncoder
from speechbrain_bestrq.transformers_names import transformers_weights
from speechbrain_bestrq.wav2vec2 import Wav2Vec2

SILENT = {
    name: 0.0
    for name in (
        "hidden_dropout",
        "activation_dropout",
        "attention_dropout",
        "feat_proj_dropout",
        "feat_quantizer_dropout",
        "final_dropout",
        "layerdrop",
    )
}
#: Norm of the convolutions, norms of the Transformer, its positional kernel, biases of the convolutions.
KINDS = {
    "base": ("group", False, 16, False),
    "large": ("layer", True, 16, True),
    "group, pre": ("group", True, 15, False),
    "layer, post": ("layer", False, 7, False),
}
RATIO = 320


def configuration(kind, **more):
    norm, stable, kernel, bias = KINDS[kind]
    return Wav2Vec2Config(
        conv_dim=(24,) * 7,
        conv_bias=bias,
        feat_extract_norm=norm,
        do_stable_layer_norm=stable,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        num_conv_pos_embeddings=kernel,
        num_conv_pos_embedding_groups=4,
        num_codevectors_per_group=6,
        codevector_dim=16,
        proj_codevector_dim=12,
        num_negatives=20,
        mask_time_prob=0.65,
        **SILENT,
        **more,
    )


def random_model(model_class, configuration, seed=0):
    """Their model in eval mode, with weights of every kind away from their initial values."""
    torch.manual_seed(seed)
    theirs = model_class(configuration)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
            if "quantizer.weight_proj.weight" in name:
                parameter.mul_(0.3)  # so that several codes are likely
    return theirs.eval()


def saved(theirs, folder, normalize=False):
    """Their model as a folder."""
    theirs.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(f'{{"do_normalize": {str(normalize).lower()}}}')
    return folder


@pytest.fixture
def pair(tmp_path):
    """Return a function that gives their pre-training model and ours with the same weights, and no penalty."""

    def make(kind):
        theirs = random_model(Wav2Vec2ForPreTraining, configuration(kind))
        ours = from_transformers(saved(theirs, tmp_path / "theirs"))
        ours.penalty_weight, ours.feature_gradient_scale = 0.0, 1.0
        return theirs, ours

    return make


class Batch:
    """Waveforms, masks, distractors and noise for both."""

    def __init__(self, ours, padded, seed=0):
        generator = torch.Generator().manual_seed(seed)
        samples = torch.tensor([60 * RATIO, 43 * RATIO + 100, 25 * RATIO]) if padded else torch.tensor([60 * RATIO] * 3)
        self.wavs = torch.randn(3, int(samples.max()), generator=generator)
        self.attention_mask = valid_frames(samples, self.wavs.shape[1]).long() if padded else None
        self.wav_lens = samples / samples.max() if padded else None
        self.frames = ours.speech_encoder.num_frames(samples)
        self.mask = span_mask(self.frames, int(self.frames.max()), 0.065, 10, 2, generator=generator)
        np.random.seed(seed)
        count = ours.num_negatives
        self.their_negatives = torch.from_numpy(
            _sample_negative_indices(tuple(self.mask.shape), count, self.mask.numpy())
        ).long()
        self.masked = MaskedFrames.from_mask(self.mask, capacity=int(self.mask.sum()) + 5)  # some only fill up
        places = torch.full((self.mask.numel(),), -1)
        places[self.masked.indices[: self.masked.count]] = torch.arange(self.masked.count)
        negatives = places[self.their_negatives.flatten(0, 1)[self.masked.indices.clamp(min=0)]]
        self.negatives = negatives.masked_fill(self.masked.indices[:, None] < 0, -1)
        quantizer = ours.quantizer
        exponential = torch.empty(self.mask.numel(), quantizer.num_groups, quantizer.codebook_size)
        self.noise = -exponential.exponential_(generator=generator).log()

    def through_ours(self, ours):
        """Our output."""
        gumbel = self.noise[self.masked.indices.clamp(min=0)]
        return ours(self.wavs, self.wav_lens, mask=self.masked, negatives=self.negatives, gumbel=gumbel)

    def through_theirs(self, theirs, monkeypatch):
        """Their output."""

        def with_our_noise(logits, tau, hard):
            assert hard
            soft = ((logits + self.noise.view(logits.shape)) / tau).softmax(-1)
            one_hot = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
            # exactly one and zero: torch's own sum rounds, so that vectors of the same codes differ
            return one_hot + (soft - soft.detach())

        monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", with_our_noise)
        return theirs(
            self.wavs,
            attention_mask=self.attention_mask,
            mask_time_indices=self.mask,
            sampled_negative_indices=self.their_negatives,
        )


@contextlib.contextmanager
def recorded(layers, encoder):
    """A list of what goes into each layer and comes out of the encoder."""
    states = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for layer in layers]

    def last(_, inputs, output):
        states.append(output[-1] if isinstance(output, list) else output.last_hidden_state)

    hooks.append(encoder.register_forward_hook(last))
    yield states
    for hook in hooks:
        hook.remove()


def padding_of(kind):
    """Their group norm runs over padding."""
    return [False, True] if KINDS[kind][0] == "layer" else [False]


CASES = [(kind, padded, training) for kind in KINDS for padded in padding_of(kind) for training in (False, True)]


@pytest.mark.parametrize("kind, padded, training", CASES)
def test_hidden_states_losses_and_gradients_equal_those_of_transformers(
    kind, padded, training, pair, monkeypatch, relative_difference
):
    theirs, ours = pair(kind)
    theirs.train(training), ours.train(training)
    update = 100_000
    ours.start_update(update)
    theirs.set_gumbel_temperature(2.0 * 0.999995 ** (update - 1))
    batch = Batch(ours, padded)
    encoder = ours.speech_encoder.encoder
    with recorded(encoder.layers, encoder) as our_states:
        output = batch.through_ours(ours)
    with recorded(theirs.wav2vec2.encoder.layers, theirs.wav2vec2.encoder) as their_states:
        expected = batch.through_theirs(theirs, monkeypatch)

    assert len(our_states) == len(their_states) == 4
    valid = valid_frames(batch.frames, batch.mask.shape[1])
    for ours_of_layer, theirs_of_layer in zip(our_states, their_states, strict=True):
        assert relative_difference(theirs_of_layer[valid], ours_of_layer[valid]) <= 1e-5
    assert output.num_targets == batch.mask.sum()
    terms = {
        "loss": (output.loss, expected.loss),
        "contrastive_loss": (output.metrics["contrastive_loss"], expected.contrastive_loss),
        "diversity_loss": (output.metrics["diversity_loss"], expected.diversity_loss),
    }
    for name, (found, theirs_of_term) in terms.items():
        assert relative_difference(theirs_of_term, found * output.num_targets) <= 1e-5, name
    excluded = (expected.projected_quantized_states.flatten(0, 1)[batch.their_negatives[batch.mask]]).eq(
        expected.projected_quantized_states[batch.mask][:, None]
    )
    assert excluded.all(-1).any(), "no distractor with the codes of the target: the test would not see them left out"

    if training:
        (output.loss * output.num_targets).backward()
        expected.loss.backward()
        gradients = transformers_weights({name: p.grad for name, p in ours.named_parameters()}, pretraining=True)
        wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            if name.endswith("k_proj.bias"):  # no function of it: softmax takes no notice
                largest = wanted[name.replace("bias", "weight")].abs().max()
                assert max(gradient.abs().max(), gradients[name].abs().max()) < 1e-4 * largest
                continue
            cosine = torch.nn.functional.cosine_similarity(gradients[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.9999, (name, cosine)
            assert abs(gradients[name].norm() / gradient.norm() - 1.0) < 1e-3, name


def test_initial_weights_are_as_large_as_those_of_transformers():
    """But for the positional convolution, which transformers leaves as it is made (tests/unit/test_transformer.py)."""
    sizes = {"conv_dim": (128,) * 7, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    heads = {"num_codevectors_per_group": 64, "codevector_dim": 256, "proj_codevector_dim": 256}
    settings = configuration("large")
    settings.update({**sizes, **heads})
    torch.manual_seed(0)
    theirs = Wav2Vec2ForPreTraining(settings).state_dict()
    ours = Wav2Vec2(
        SpeechEncoder(
            ConvFeatureExtractor((128,) * 7, norm="layer", bias=True),
            FeatureProjection(128, 256),
            TransformerEncoder(256, num_layers=1, num_heads=4, d_ffn=512, position_kernel_size=16, position_groups=4),
        ),
        GumbelQuantizer(128, code_dim=256, codebook_size=64),
        SpanMasking(0.065, 10, min_spans=2),
        target_dim=256,
    )
    weights = transformers_weights(ours.state_dict(), pretraining=True)
    assert weights.keys() == theirs.keys()
    for name, expected in theirs.items():
        if "pos_conv_embed" in name:
            continue
        found, wanted = (float(one.square().mean().sqrt()) for one in (weights[name], expected))
        assert found == pytest.approx(wanted, rel=0.05 if expected.numel() > 1000 else 0.2), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_of_a_pretraining_model_changes_no_bit(kind, tmp_path):
    theirs = random_model(Wav2Vec2ForPreTraining, configuration(kind))
    there = saved(theirs, tmp_path / "theirs")
    back = to_transformers(from_transformers(there), tmp_path / "back")
    assert_equal_weights(load_file(back / "model.safetensors"), load_file(there / "model.safetensors"))
    again, report = Wav2Vec2ForPreTraining.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_equal_weights(again.state_dict(), theirs.state_dict())
    before, after = theirs.config.to_dict(), again.config.to_dict()
    differing = {name for name in before if before[name] != after[name]} - {"transformers_version", "dtype"}
    assert {name for name in differing if name not in SILENT} <= {"final_dropout", "_name_or_path", "architectures"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask_time_prob", [0.05, 0.0])
def test_an_encoder_goes_in_and_out_and_gives_the_same(kind, mask_time_prob, tmp_path, relative_difference):
    settings = configuration(kind)
    settings.mask_time_prob = mask_time_prob
    theirs = random_model(Wav2Vec2Model, settings)
    there = saved(theirs, tmp_path / "theirs")
    ours = from_transformers(there)
    assert isinstance(ours, SpeechEncoder)
    wavs = torch.randn(2, 8000)
    with torch.no_grad(), recorded(theirs.encoder.layers, theirs.encoder) as states:
        theirs(wavs)
        hidden, lengths = ours(wavs)
    assert lengths.tolist() == [24, 24]
    for found, expected in zip(hidden, states, strict=True):
        assert relative_difference(expected, found) <= 1e-5
    back = to_transformers(ours, tmp_path / "back")
    assert_equal_weights(load_file(back / "model.safetensors"), load_file(there / "model.safetensors"))
    again, report = Wav2Vec2Model.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_the_older_names_of_weight_normalisation_are_read(tmp_path):
    there = saved(random_model(Wav2Vec2Model, configuration("large")), tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (old / name).write_bytes((there / name).read_bytes())
    weights = load_file(there / "model.safetensors")
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for name, weight in weights.items():
        for new, older in names.items():
            name = name.replace(new, older)
        renamed[name] = weight
    assert len(renamed.keys() - weights.keys()) == 2
    save_file(renamed, old / "model.safetensors")
    wavs = torch.randn(1, 4000)
    assert torch.equal(load_encoder(old)(wavs)[0], load_encoder(there)(wavs)[0])


def test_waveforms_are_normalised_as_the_folders_preprocessor_says(tmp_path, relative_difference):
    from transformers import Wav2Vec2FeatureExtractor

    theirs = random_model(Wav2Vec2Model, configuration("large"))
    there = saved(theirs, tmp_path / "theirs")
    preprocessor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    preprocessor.save_pretrained(there)
    waves = [0.01 * torch.randn(count) + 0.02 for count in (8000, 5000)]
    given = preprocessor([wave.numpy() for wave in waves], sampling_rate=16000, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(given["input_values"], attention_mask=given["attention_mask"]).last_hidden_state
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=7.0)
        hidden, lengths = load_encoder(there)(padded, torch.tensor([1.0, 5000 / 8000]))
    for row, length in enumerate(lengths.tolist()):
        assert relative_difference(expected[row, :length], hidden[-1, row, :length]) <= 1e-5
    there.joinpath("preprocessor_config.json").unlink()
    assert load_encoder(there).frontend.normalize_input, "models with layer norm are normalised without being told"


def test_heads_of_other_tasks_are_left_out(tmp_path):
    from transformers import Wav2Vec2ForCTC

    there = saved(random_model(Wav2Vec2ForCTC, configuration("base")), tmp_path / "theirs")
    hidden, _ = load_encoder(there)(torch.randn(1, 4000))
    assert hidden.shape == (4, 1, 12, 32)


# ---------------------------------------------------------------- their own contracts, held by ours


def test_perplexity_of_their_own_test():
    probabilities = torch.arange(100).reshape(2, 5, 10) / 100
    everything, second = torch.tensor([True, True]), torch.tensor([False, True])
    assert abs(perplexity(mean_shares(probabilities, everything)) - 141.4291) < 1e-3
    assert abs(perplexity(mean_shares(probabilities, second)) - 58.6757) < 1e-3


def test_negatives_of_their_own_test():
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[-1, 5:] = False  # as if padded
    features = torch.arange(10.0)[:, None].expand(10, 4).repeat(2, 1)
    masked = MaskedFrames.from_mask(mask)
    drawn = masked.indices[sample_negatives(masked, 3, torch.Generator().manual_seed(0))]
    negatives = features[drawn]
    assert negatives.shape == (15, 3, 4)
    assert (negatives != features[masked.indices][:, None]).all(), "a distractor is the frame itself"
    assert (negatives.std(-1) == 0).all(), "a distractor is put together from several frames"
    assert (drawn // 10 == masked.indices[:, None] // 10).all(), "a distractor is of another utterance"
    assert mask.flatten()[drawn].all(), "a distractor is padding"


def test_masks_of_their_own_tests():
    lengths = torch.full((4,), 60)
    singles = span_mask(lengths, 60, 0.5, 1, grid=True)
    assert singles.sum(1).tolist() == [30] * 4
    spans = span_mask(torch.full((4,), 80), 80, 0.5 / 4, 4, grid=True)
    assert (spans.sum(1) <= 0.5 * 80).all()
    shorter = span_mask(torch.tensor([40, 40, 80, 80]), 80, 0.5 / 4, 4)
    assert not shorter[:2, 40:].any()
