"""Properties of wav2vec 2.0: its convolutions, distractors and losses, and how it trains."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_bestrq.artefact import build_encoder, encoder_config, load_encoder, save_encoder
from speechbrain_bestrq.contrastive import contrastive_loss, sample_negatives
from speechbrain_bestrq.convert_transformers import from_transformers, to_transformers
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor, FeatureProjection
from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.gumbel_quantizer import GumbelQuantizer
from speechbrain_bestrq.masking import MaskedFrames, SpanMasking
from speechbrain_bestrq.pretrained import PretrainedEncoder
from speechbrain_bestrq.run_log import validation_error
from speechbrain_bestrq.transformer import TransformerEncoder

KINDS = pytest.mark.parametrize("extractor_norm, normalize_input", [("group", False), ("layer", True)])


@pytest.fixture
def make_model(toy):
    """Return a function that builds a small model in training mode, with weights away from the initial ones."""

    def make(**settings):
        model = toy.make_wav2vec2(**settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
                if name == "quantizer.projection.weight":
                    parameter.mul_(0.5)  # so that several codes are likely
        return model

    return make


@pytest.fixture
def batch(make_model):
    """Waveforms of 49 and 24 frames, lengths, the masked frames, distractors and noise."""
    generator = torch.Generator().manual_seed(1)
    wavs = 0.1 * torch.randn(2, 16000, generator=generator)
    mask = torch.zeros(2, 49, dtype=torch.bool)
    mask[0, 5:25] = mask[0, 47:] = mask[1, 10:20] = True
    masked = MaskedFrames.from_mask(mask)
    negatives = sample_negatives(masked, 5, generator)
    gumbel = -torch.empty(masked.count, 2, 6).exponential_(generator=generator).log()
    return wavs, torch.tensor([1.0, 0.5]), masked, negatives, gumbel


def outcome(model, wavs, wav_lens, masked, negatives, gumbel):
    """Loss, gradients and metrics of given masks, distractors and noise."""
    model.zero_grad()
    output = model(wavs, wav_lens, mask=masked, negatives=negatives, gumbel=gumbel)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_collapsed_codebook_has_the_lowest_loss_and_is_not_chosen(make_model, batch):
    model = make_model().eval()
    before = model(*batch[:2], mask=batch[2], negatives=batch[3])
    with torch.no_grad():
        model.quantizer.projection.bias.view(2, -1)[:, 0] += 1e4  # the same code for all frames
    after = model(*batch[:2], mask=batch[2], negatives=batch[3])
    assert after.metrics["contrastive_loss"] == 0 < before.metrics["contrastive_loss"]
    assert after.metrics["correct"] == 0 < before.metrics["correct"]
    values = [{"loss": one.loss.item(), "information": float(one.metrics["information"])} for one in (before, after)]
    assert validation_error(values[1], model.chosen_by) == pytest.approx(0, abs=1e-6)
    assert values[1]["loss"] < values[0]["loss"]


def test_few_codes_are_told_apart_with_ease_and_tell_little():
    masked = MaskedFrames.from_mask(torch.ones(4, 50, dtype=torch.bool))
    negatives = sample_negatives(masked, 100, torch.Generator().manual_seed(0))
    codes = torch.arange(masked.count) % 4
    vectors = torch.nn.functional.one_hot(codes, 8).float()
    found = contrastive_loss(vectors, vectors, codes[:, None], negatives, masked, temperature=0.05)
    assert found.correct == masked.count and float(found.loss) < 0.01
    assert float(found.information) / masked.count == pytest.approx(np.log(4), abs=0.05)


# ---------------------------------------------------------------- convolutions


@KINDS
def test_features_do_not_depend_on_padding(extractor_norm, normalize_input, padded_with_junk, relative_difference):
    extractor = ConvFeatureExtractor((8,) * 7, norm=extractor_norm, normalize_input=normalize_input)
    utterances, wavs, wav_lens = padded_with_junk([8000, 16000, 403])
    features, lengths = extractor(wavs, wav_lens)
    assert lengths.tolist() == [24, 49, 1]
    for row, utterance in enumerate(utterances):
        alone, none = extractor(utterance[None])
        assert none is None and alone.shape[1] == lengths[row]
        assert relative_difference(alone[0], features[row, : lengths[row]]) <= 1e-5


@KINDS
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_hidden_states_do_not_depend_on_padding(
    extractor_norm, normalize_input, norm, make_model, padded_with_junk, relative_difference
):
    model = make_model(extractor_norm=extractor_norm, normalize_input=normalize_input, norm=norm).eval()
    utterances, wavs, wav_lens = padded_with_junk([8000, 16000, 4000])
    hidden, lengths = model.encode(wavs, wav_lens)
    assert hidden.shape == (3, 3, 49, 16)
    for row, utterance in enumerate(utterances):
        alone, _ = model.encode(utterance[None])
        for state, expected in zip(hidden[:, row], alone[:, 0], strict=True):
            assert relative_difference(expected, state[: lengths[row]]) <= 1e-5
        assert not hidden[:, row, lengths[row] :].any()


def test_frames_are_counted_as_convolutions_count_them():
    extractor = ConvFeatureExtractor((2,) * 7)
    samples = torch.arange(0, 3000)
    counted = extractor.num_frames(samples)
    assert [extractor.num_frames(int(count)) for count in samples] == counted.tolist()
    assert extractor.receptive_field == 400
    assert counted[399] == 0 and counted[400] == 1 and counted[719] == 1 and counted[720] == 2
    for count in (400, 719, 720, 1039, 2999):
        assert extractor(torch.randn(1, count))[0].shape[1] == counted[count]
    with pytest.raises(ValueError, match="399 samples are too short for a frame: give at least 400"):
        extractor(torch.randn(1, 399))


def test_normalised_waveforms_forget_loudness_and_offset(relative_difference):
    extractor = ConvFeatureExtractor((8,) * 7, norm="layer", normalize_input=True)
    wavs = torch.randn(1, 4000)
    assert relative_difference(extractor(wavs)[0], extractor(0.1 * wavs + 0.05)[0]) < 1e-3
    silent = extractor(torch.zeros(1, 4000))[0]
    assert silent.isfinite().all()


def test_features_begin_smooth_with_constant_kernels_and_depend_on_the_phase_with_random_ones():
    similarity = {}
    for kind in ("random", "constant"):
        torch.manual_seed(0)
        extractor = ConvFeatureExtractor((32,) * 7, initial_kernels=kind)
        varies = [bool(convolution.weight.std(2).gt(0).any()) for convolution in extractor.convolutions]
        assert varies == [True] + 6 * [kind == "random"]
        # noise whose loudness rises and falls slowly: two frames that share no sample are alike in that only
        loudness = 0.5 + 0.45 * torch.sin(2 * torch.pi * 2 * torch.arange(32000) / 16000)
        features, _ = extractor((loudness * torch.randn(32000))[None])
        centred = torch.nn.functional.layer_norm(features[0], (32,)).detach()
        centred -= centred.mean(0)
        similarity[kind] = torch.nn.functional.cosine_similarity(centred[:-2].flatten(), centred[2:].flatten(), dim=0)
    assert similarity["random"] < 0.2 and similarity["constant"] > 0.4


def test_counted_operations_are_pytorchs(make_model):
    speech_encoder = make_model().eval().speech_encoder
    frontend, frames = speech_encoder.frontend, 40
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features, _ = frontend(torch.randn(3, frontend._samples(frames)))
        speech_encoder.subsampling(features)
    counted = frontend.flops(3, frames) + speech_encoder.subsampling.flops(3 * frames)
    assert features.shape[1] == frames
    assert counted == counter.get_total_flops()


def test_a_training_step_is_counted_as_three_forward_passes(make_model):
    model = make_model()
    encoder = model.speech_encoder
    heads = 2.0 * 100 * (8 * 12 + 8 * 8 + 16 * 8)
    forward = encoder.frontend.flops(2, 60) + encoder.subsampling.flops(120) + encoder.encoder.flops(2, 60) + heads
    assert model.flops(2, 60, 100) == pytest.approx(3 * forward)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm": "batch"}, "'group' or 'layer'"),
        ({"initial_kernels": "zero"}, "'random' or 'constant'"),
        ({"strides": (5, 2)}, "equally many, not 7, 7 and 2"),
    ],
)
def test_convolutions_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ConvFeatureExtractor(**settings)


# ---------------------------------------------------------------- distractors and the contrastive loss


def test_the_contrastive_loss_equals_a_naive_one(batch):
    _, _, masked, negatives, _ = batch
    generator = torch.Generator().manual_seed(2)
    predictions, targets = (torch.randn(masked.count, 6, generator=generator) for _ in range(2))
    codes = torch.randint(3, (masked.count, 2), generator=generator)
    negatives[3] = -1
    found = contrastive_loss(predictions, targets, codes, negatives, masked, temperature=0.2)
    total, hits, left_out, told = 0.0, 0, 0, 0.0
    for row in range(masked.count):
        logits = [float(torch.cosine_similarity(predictions[row], targets[row], dim=0)) / 0.2]
        for other in negatives[row].tolist():
            if other < 0 or torch.equal(codes[other], codes[row]):
                left_out += 1
                continue
            logits.append(float(torch.cosine_similarity(predictions[row], targets[other], dim=0)) / 0.2)
        total -= float(torch.tensor(logits).log_softmax(0)[0])
        every = [place for place in negatives[row].tolist() if place >= 0]
        all_logits = torch.cosine_similarity(predictions[row], targets[[row, *every]], dim=-1) / 0.2
        told += np.log(1 + len(every)) + float(all_logits.log_softmax(0)[0])
        hits += len(logits) > 1 and logits[0] > max(logits[1:])
    assert left_out > 6 and 0 < hits < masked.count
    assert float(found.loss) == pytest.approx(total, rel=1e-5)
    assert int(found.correct) == hits
    assert float(found.information) == pytest.approx(told, rel=1e-5)


def test_when_all_frames_have_one_code_nothing_counts_as_found(batch):
    _, _, masked, negatives, _ = batch
    vectors, codes = torch.randn(masked.count, 6), torch.zeros(masked.count, 2, dtype=torch.long)
    found = contrastive_loss(vectors, vectors, codes, negatives, masked, temperature=0.1)
    assert float(found.loss) == 0.0 and int(found.correct) == 0


def test_distractors_are_uniform_over_the_other_masked_frames_of_the_utterance():
    mask = torch.zeros(3, 30, dtype=torch.bool)
    mask[0, [3, 29]] = mask[1, 10:19] = mask[2, [0, 7, 28, 29]] = True
    masked = MaskedFrames.from_mask(mask, capacity=20)
    drawn = sample_negatives(masked, 4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (20, 4000)
    assert (drawn[masked.count :] == -1).all(), "indices that fill up have no distractors"
    for row, place in enumerate(masked.indices[: masked.count].tolist()):
        others = [other for other in mask[place // 30].nonzero().flatten().tolist() if other != place % 30]
        shares = torch.bincount(masked.indices[drawn[row]], minlength=90) / 4000
        assert (shares > 0).nonzero().flatten().tolist() == [place // 30 * 30 + other for other in others]
        assert shares.max() - shares.min() <= 1.0
        expected = 1 / len(others)
        assert (shares[shares > 0] - expected).abs().max() <= 5 * (expected / 4000) ** 0.5


def test_a_lonely_masked_frame_has_no_distractor_and_no_loss(make_model):
    model = make_model()
    mask = torch.zeros(2, 49, dtype=torch.bool)
    mask[0, 7] = mask[1, 5:9] = True
    masked = MaskedFrames.from_mask(mask)
    assert (sample_negatives(masked, 5)[0] == -1).all()
    output = model(torch.randn(2, 16000), mask=masked)
    assert output.loss.isfinite() and output.num_targets == 5 and output.metrics["correct"] <= 4


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_sum_of_its_terms_and_the_metrics_are_those_of_the_masked_frames(training, make_model, batch):
    model = make_model().train(training)
    wavs, wav_lens, masked, negatives, gumbel = batch
    output = model(wavs, wav_lens, mask=masked, negatives=negatives, gumbel=gumbel)
    terms = {name: float(output.metrics[name]) for name in model.loss_terms}
    expected = terms["contrastive_loss"] + 0.1 * terms["diversity_loss"] + 10.0 * terms["feature_penalty"]
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)

    features, lengths = model.speech_encoder.frontend(wavs, wav_lens)
    valid = features[valid_frames(lengths, 49)]
    assert terms["feature_penalty"] == pytest.approx(valid.square().mean().item(), rel=1e-5)
    normalized = model.speech_encoder.subsampling.norm(features)[masked.mask]
    quantized = model.quantizer(normalized, gumbel)
    chosen = torch.nn.functional.one_hot(quantized.codes, 6).double().mean(0)
    shares = quantized.probabilities.double().mean(0) if training else chosen
    perplexities = (-torch.special.xlogy(shares, shares).sum(-1)).exp()
    assert terms["diversity_loss"] == pytest.approx(1 - perplexities.sum().item() / 12, rel=1e-4)
    counts = output.metrics["label_counts"]
    torch.testing.assert_close(counts[0], 32 * chosen.float())
    torch.testing.assert_close(counts[1], quantized.probabilities.sum(0))
    assert output.metrics["frames"] == 49 + 24 and output.shape == (2, 49) and output.num_targets == 32


def test_indices_that_fill_up_change_neither_loss_nor_gradients_nor_metrics(make_model, batch):
    model = make_model()
    wavs, wav_lens, masked, negatives, gumbel = batch
    expected, gradients = outcome(model, wavs, wav_lens, masked, negatives, gumbel)
    more = masked._replace(indices=torch.nn.functional.pad(masked.indices, (0, 7), value=-1))
    negatives = torch.nn.functional.pad(negatives, (0, 0, 0, 7), value=-1)
    gumbel = torch.nn.functional.pad(gumbel, (0, 0, 0, 0, 0, 7), value=3.0)
    found, gradients_found = outcome(model, wavs, wav_lens, more, negatives, gumbel)
    torch.testing.assert_close(found.loss, expected.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(found.metrics[name], value)


@pytest.mark.parametrize("capacity", [0, 4])
def test_without_a_masked_frame_the_loss_is_finite_with_its_graph(capacity, make_model):
    model = make_model()
    masked = MaskedFrames.from_mask(torch.zeros(2, 49, dtype=torch.bool), capacity)
    output = model(torch.randn(2, 16000), mask=masked)
    output.loss.backward()
    assert output.num_targets == 0 and output.loss.isfinite() and output.metrics["contrastive_loss"] == 0
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_parameter_has_a_gradient_at_every_step(make_model, batch):
    model = make_model(dropout=0.1, layer_drop=0.5)
    wavs, wav_lens, masked, _, _ = batch
    for _ in range(5):
        model.zero_grad()
        model(wavs, wav_lens, mask=masked).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_what_is_masked_cannot_reach_the_encoder(make_model, batch):
    model = make_model().eval()
    wavs, wav_lens, masked, negatives, gumbel = batch
    states = []
    model.speech_encoder.encoder.register_forward_hook(lambda *arguments: states.append(arguments[2][-1]))
    model(wavs, wav_lens, mask=masked, negatives=negatives)

    def other_features(module, arguments, output):
        features, lengths = output
        return torch.where(masked.mask[..., None], torch.randn_like(features), features), lengths

    hook = model.speech_encoder.frontend.register_forward_hook(other_features)
    model(wavs, wav_lens, mask=masked, negatives=negatives)
    hook.remove()
    assert torch.equal(states[0], states[1])
    model(wavs, wav_lens, mask=MaskedFrames.from_mask(masked.mask.roll(1, 1) & masked.mask), negatives=None)
    assert not torch.equal(states[0], states[2])


def test_dropout_is_in_what_the_encoder_and_the_quantizer_get_in_training_only(make_model, batch):
    model = make_model(dropout=1.0)
    wavs, wav_lens, masked, negatives, gumbel = batch
    heard = []
    model.speech_encoder.encoder.register_forward_pre_hook(lambda _, given: heard.append(given[0][~masked.mask]))
    model.quantizer.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    for training in (True, False):
        model.train(training)(wavs, wav_lens, mask=masked, negatives=negatives, gumbel=gumbel)
    assert [bool(one.any()) for one in heard] == [False, False, True, True]
    quarter = make_model(dropout=0.25)
    assert quarter.quantizer_dropout.p == quarter.speech_encoder.subsampling.dropout.p == 0.25


@KINDS
def test_an_utterances_predictions_and_distractors_do_not_hang_on_its_neighbours(
    extractor_norm, normalize_input, make_model, padded_with_junk
):
    """The contrastive loss of a padded batch is that of its utterances alone."""
    model = make_model(extractor_norm=extractor_norm, normalize_input=normalize_input)
    utterances, wavs, wav_lens = padded_with_junk([16000, 9000])
    mask = torch.zeros(2, 49, dtype=torch.bool)
    mask[0, 5:30] = mask[1, 8:20] = True
    masked = MaskedFrames.from_mask(mask)
    negatives, gumbel = sample_negatives(masked, 5), model.quantizer.draw_noise(masked.count)
    together = model(wavs, wav_lens, mask=masked, negatives=negatives, gumbel=gumbel)
    total, first = 0.0, 0
    for row, utterance in enumerate(utterances):
        frames = model.speech_encoder.num_frames(len(utterance))
        own = MaskedFrames.from_mask(mask[row : row + 1, :frames])
        mine = slice(first, first + own.count)
        alone = model(utterance[None], mask=own, negatives=negatives[mine] - first, gumbel=gumbel[mine])
        total += float(alone.metrics["contrastive_loss"]) * own.count
        first += own.count
    assert float(together.metrics["contrastive_loss"]) * together.num_targets == pytest.approx(total, rel=2e-5)


def test_everything_drawn_is_a_function_of_the_generator(make_model, batch):
    model = make_model()
    wavs, wav_lens, masked, _, _ = batch

    def loss(seed):
        torch.rand(3)
        return model(wavs, wav_lens, generator=torch.Generator().manual_seed(seed)).loss.item()

    before = torch.get_rng_state()
    model(wavs, wav_lens, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert loss(1) == loss(1) != loss(2)


def test_the_gradient_of_the_convolutions_is_scaled(make_model, batch):
    _, whole = outcome(make_model(feature_gradient_scale=1.0), *batch)
    _, scaled = outcome(make_model(feature_gradient_scale=0.1), *batch)
    for name, gradient in whole.items():
        factor = 0.1 if "frontend" in name else 1.0
        torch.testing.assert_close(scaled[name], factor * gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_masks_of_the_authors_settings_cover_half_of_the_frames_of_any_utterance(make_model):
    lengths = torch.tensor([780, 60] * 500)
    mask = make_model().masking(lengths, 780, torch.Generator().manual_seed(0)).mask
    for offset, length in enumerate((780, 60)):
        share = mask[offset::2].sum() / (500 * length)
        assert float(share) == pytest.approx(1 - (1 - 0.065) ** 10, abs=0.02)


def test_equally_common_codes_are_counted_over_all_groups(make_model):
    model = make_model()
    found = model.statistics(torch.zeros(()), torch.ones(2, 2, 6))
    for name in ("code_perplexity", "probability_perplexity", "codes_used"):
        assert float(found[name]) == pytest.approx(12), name
    assert float(found["commonest_share"]) == pytest.approx(1 / 6)


def test_the_signature_is_json_and_tells_models_apart(make_model):
    signature = json.loads(json.dumps(make_model().signature()))
    assert signature == make_model().signature() != make_model(codebook_size=7).signature()
    others = [make_model(**{name: 0.3}) for name in ("diversity_weight", "penalty_weight", "temperature_decay")]
    assert all(other.signature() != signature for other in others)
    assert signature["model"] == "Wav2Vec2" and signature["encoder"]["type"] == "TransformerEncoder"


def test_a_model_that_does_not_fit_is_refused(toy, make_model):
    with pytest.raises(ValueError, match="there are 8 features"):
        model = make_model()
        type(model)(model.speech_encoder, GumbelQuantizer(16, code_dim=8), model.masking)
    with pytest.raises(ValueError, match="num_negatives"):
        toy.make_wav2vec2(num_negatives=0)
    with pytest.raises(ValueError, match="noise must be None"):
        make_model()(torch.randn(1, 8000), noise=torch.zeros(1))
    with pytest.raises(ValueError, match="the mask has shape"):
        make_model()(torch.randn(1, 8000), mask=torch.zeros(1, 25, dtype=torch.bool))


# ---------------------------------------------------------------- folders


@KINDS
def test_an_encoder_folder_gives_the_encoder_back_bit_for_bit(extractor_norm, normalize_input, make_model, tmp_path):
    speech_encoder = make_model(extractor_norm=extractor_norm, normalize_input=normalize_input).eval().speech_encoder
    loaded = load_encoder(save_encoder(speech_encoder, tmp_path / "encoder", "# Card"))
    assert encoder_config(loaded) == encoder_config(speech_encoder)
    wavs, wav_lens = 0.1 * torch.randn(2, 8000), torch.tensor([1.0, 0.6])
    for expected, found in zip(speech_encoder(wavs, wav_lens), loaded(wavs, wav_lens), strict=True):
        assert torch.equal(expected, found)


def test_sinusoidal_positions_are_there_in_a_loaded_encoder_but_not_in_transformers(tmp_path):
    encoder = TransformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32, positions="sinusoidal")
    speech_encoder = SpeechEncoder(ConvFeatureExtractor((8,) * 7), FeatureProjection(8, 16), encoder).eval()
    wavs = torch.randn(1, 4000)
    loaded = load_encoder(save_encoder(speech_encoder, tmp_path / "encoder", "# Card"))
    assert torch.equal(loaded(wavs)[0], speech_encoder(wavs)[0])
    with torch.device("meta"):
        assert not build_encoder(encoder_config(speech_encoder)).encoder.positions.table.is_meta
    with pytest.raises(InputError, match="no sinusoidal positions"):
        to_transformers(speech_encoder, tmp_path / "transformers")


def test_what_transformers_does_not_have_or_we_do_not_is_refused(make_model, make_speech_encoder, tmp_path):
    with pytest.raises(InputError, match="no such model"):
        to_transformers(make_speech_encoder(), tmp_path / "conformer")
    folder = to_transformers(make_model(), tmp_path / "there")
    with pytest.raises(InputError, match="is there already"):
        to_transformers(make_model(), folder)
    on_a_grid = make_model()
    on_a_grid.masking = SpanMasking(0.06, 10, grid=True)
    with pytest.raises(InputError, match="no masks on a grid"):
        to_transformers(on_a_grid, tmp_path / "grid")
    path = folder / "config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"add_adapter": True}, "add_adapter is True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "hubert"}, "model_type must be wav2vec2"),
        ({"hidden_size": 32}, "does not fit"),
        ({"conv_dim": 7}, "does not fit|not that of"),
        ({"num_codevectors_per_group": 5}, "does not fit"),
        ({"num_codevectors_per_group": 10**12}, "does not fit"),  # and takes no memory
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=message) as refusal:
            from_transformers(folder)
        assert "\n" not in str(refusal.value)
    path.write_text(json.dumps({**good, "hidden_size": 32}))
    with pytest.raises(InputError, match="should be"):
        load_encoder(folder)


def test_a_transformers_folder_is_the_source_of_an_encoder_for_downstream_tasks(make_model, tmp_path):
    model = make_model(dropout=0.1, layer_drop=0.5)
    folder = to_transformers(model, tmp_path / "there")
    wavs, wav_lens = 0.1 * torch.randn(2, 8000), torch.tensor([1.0, 0.6])
    expected, _ = model.eval().encode(wavs, wav_lens)
    frozen = PretrainedEncoder(folder, freeze=True, output_all_hiddens=True)
    assert torch.equal(frozen.train()(wavs, wav_lens), expected)
    assert frozen.output_dim == 16 and frozen.num_layers == 2
    tuned = PretrainedEncoder(folder)
    tuned(wavs, wav_lens).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters())
    untrained = PretrainedEncoder(f"random:{folder}", freeze=True, output_all_hiddens=True)
    assert not torch.allclose(untrained(wavs, wav_lens)[-1], expected[-1], atol=1e-3)


def test_the_global_generator_is_left_alone_by_loading(make_model, tmp_path):
    folder = to_transformers(make_model(), tmp_path / "there")
    before = torch.get_rng_state()
    from_transformers(folder)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def corpus(toy, tmp_path_factory):
    """Noise to train and to validate on."""
    folder = tmp_path_factory.mktemp("corpus")
    return {
        "train_folder": toy.write_noise(folder / "train", [1.0, 1.1, 1.2, 1.3, 2.0, 2.1]),
        "valid_folder": toy.write_noise(folder / "valid", [1.0, 1.4], seed=1),
    }


STOCHASTIC = {"model": {"method": "wav2vec2", "dropout": 0.1, "layer_drop": 0.2}, "accumulation": 2, "updates": 4}


def test_a_resumed_run_goes_on_as_if_unbroken(toy, tmp_path, corpus):
    """The temperature falls by a tenth an update, so that a wrong one would show."""
    settings = {**corpus, **STOCHASTIC, "checkpoint_every": 2, "max_batch_seconds": 3.0}
    whole = toy.train(tmp_path / "unbroken", **settings)
    assert toy.train(tmp_path / "resumed", stop_after=3, **settings).stopped
    torch.manual_seed(99)
    resumed = toy.train(tmp_path / "resumed", **settings)
    for event in ("train", "valid"):
        lines = [toy.log_lines(tmp_path / name, event) for name in ("unbroken", "resumed")]
        terms = ("loss", "diversity_loss", "code_perplexity", "probability_perplexity", "temperature", "accuracy")
        for name in (*terms, "information"):
            values = [[line[name] for line in run] for run in lines]
            assert values[0] == values[1], name
    best = max(toy.log_lines(tmp_path / "resumed", "valid"), key=lambda line: line["information"])
    config = json.loads((tmp_path / "resumed" / "encoder" / "config.json").read_text())
    assert config["training"]["step"] == best["step"]
    assert f"| {best['information']:.3f} |" in (tmp_path / "resumed" / "encoder" / "README.md").read_text()
    temperatures = [line["temperature"] for line in toy.log_lines(tmp_path / "resumed")]
    np.testing.assert_allclose(temperatures, [2.0 * 0.9**number for number in range(4)])
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_two_ranks_equal_one_that_goes_through_their_batches(toy, tmp_path):
    generator = np.random.default_rng(0)

    def waves(*seconds):
        return [0.1 * generator.standard_normal(round(16000 * duration)) for duration in seconds]

    per_rank = [[waves(1.6, 1.3, 1.1), waves(0.8)], [waves(0.9), waves(1.5, 1.4)]]
    settings = {"optimizer": "SGD", "peak": 0.1, "warmup": 1, "max_grad_norm": 0.05}
    model = {"method": "wav2vec2"}
    shared = {"output": str(tmp_path / "two"), "model": model, **settings}
    calls = [("rank_fit_waves", {"waves": mine, **shared}) for mine in per_rank]
    first, second = toy.train_ranks(tmp_path / "ranks", calls)
    alone = toy.make_model(**model)
    order = [(number, rank) for number in range(2) for rank in range(2)]
    batches = [toy.make_batch(alone, per_rank[rank][number], rank=rank, number=number) for number, rank in order]
    before = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    toy.fit_batches(tmp_path / "one", alone, batches, accumulation=2, **settings)
    assert batches[0].masked.count > 2.5 * batches[1].masked.count
    moved = 0.0
    for name, tensor in alone.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        assert (first["state"][name] - tensor).abs().max() <= 1e-5 * tensor.abs().max().clamp(min=1e-3), name
        moved = max(moved, float((tensor - before[name]).abs().max()))
    assert moved > 1e-3
    ours, theirs = toy.log_lines(tmp_path / "one"), toy.log_lines(tmp_path / "two")
    for name in ("loss", "contrastive_loss", "diversity_loss", "feature_penalty", "gradient_norm", "accuracy"):
        np.testing.assert_allclose([line[name] for line in theirs], [line[name] for line in ours], rtol=2e-5)


def test_the_log_the_card_and_the_encoder_of_a_run(toy, tmp_path, corpus):
    toy.train(tmp_path, **corpus, updates=3, epochs=1, model={"method": "wav2vec2"}, max_batch_seconds=4.0)
    for event in ("train", "valid"):
        line = toy.log_lines(tmp_path, event)[-1]
        assert 2 <= line["code_perplexity"] <= 12 and 2 <= line["probability_perplexity"] <= 12
        assert 0 <= line["accuracy"] <= 1 and 0 <= line["diversity_loss"] < 1 and line["feature_penalty"] > 0
        total = line["contrastive_loss"] + 0.1 * line["diversity_loss"] + 10 * line["feature_penalty"]
        assert line["loss"] == pytest.approx(total, rel=1e-6)
        assert line["mask_ratio"] == pytest.approx(0.49, abs=0.2)
        assert "gain" not in line and "unigram_entropy" not in line
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "probability perplexity" in card and "50 a second" in card
    hidden, lengths = load_encoder(tmp_path / "encoder")(torch.randn(1, 16000))
    assert hidden.shape == (3, 1, 49, 16) and lengths.tolist() == [49]
    assert json.loads((tmp_path / "run.json").read_text())["model"] == "Wav2Vec2"
