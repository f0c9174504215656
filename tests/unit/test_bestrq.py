"""Properties of the BEST-RQ model: its loss, its labels, and what the encoder gets to see."""

import json

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_bestrq.bestrq import BestRQ
from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.masking import MaskedFrames, SpanMasking
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer
from speechbrain_bestrq.tally import Tally

FRAMES = 25  # encoder frames of a second


@pytest.fixture
def make_model(make_speech_encoder):
    """Return a function that builds a tiny model in eval mode."""

    def make(
        num_codebooks=1,
        normalize="feature",
        frontend="utterance",
        utterance_norm=False,
        states=None,
        noise_deviation=0.1,
        **encoder,
    ):
        speech_encoder = make_speech_encoder(normalize=frontend, **encoder)
        settings = {"num_codebooks": num_codebooks, "normalize": normalize, "utterance_norm": utterance_norm}
        quantizer = RandomProjectionQuantizer(320, codebook_size=64, **settings)
        return BestRQ(speech_encoder, quantizer, SpanMasking(prob=0.2, span=3), noise_deviation, states).eval()

    return make


@pytest.fixture
def batch():
    """A second and 0.6 s in a padded batch, a mask over both, and a filler."""
    generator = torch.Generator().manual_seed(1)
    wavs = 0.1 * torch.randn(2, 16000, generator=generator)
    wav_lens = torch.tensor([1.0, 0.6])
    mask = (torch.rand(2, FRAMES, generator=generator) < 0.5) & valid_frames(torch.tensor([25, 15]), FRAMES)
    noise = 0.1 * torch.randn(2, 4 * FRAMES, 80, generator=generator)
    return wavs, wav_lens, mask, noise


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def naive(model, wavs, wav_lens, mask, noise):
    """Loss, hits and labels: a head on all frames, boolean indexing, one cross-entropy for each codebook."""
    features, lengths = model.speech_encoder.frontend(wavs, wav_lens)
    labels = model.quantizer(features.reshape(len(wavs), -1, 320), None if lengths is None else lengths // 4)[mask]
    masked = features.clone()
    for row in range(len(wavs)):
        for frame in range(mask.shape[1]):
            if mask[row, frame]:
                masked[row, 4 * frame : 4 * frame + 4] = noise[row, 4 * frame : 4 * frame + 4]
    states = model.speech_encoder.encode_features(masked, None if lengths is None else lengths // 4)
    books = range(model.quantizer.num_codebooks)
    shape = (model.quantizer.num_codebooks, -1)
    logits = [model.head(states[model.codebook_states[book]])[mask].unflatten(-1, shape)[:, book] for book in books]
    logits = torch.stack(logits, 1)
    loss = torch.stack([nn.functional.cross_entropy(logits[:, book], labels[:, book]) for book in books]).mean()
    return loss, (logits.argmax(-1) == labels).sum(), labels


@pytest.mark.parametrize("attention", ["rotary", "relative"])
@pytest.mark.parametrize("num_codebooks, states", [(1, None), (3, None), (3, [2, 1, 2])])
@pytest.mark.parametrize("normalize", ["feature", "time"])
@pytest.mark.parametrize("utterance_norm", [False, True])
def test_loss_gradients_and_metrics_equal_a_naive_computation(
    attention, num_codebooks, states, normalize, utterance_norm, make_model, batch
):
    model = make_model(num_codebooks, normalize, utterance_norm=utterance_norm, attention=attention, states=states)
    wavs, wav_lens, mask, noise = batch
    output = model(wavs, wav_lens, mask=mask, noise=noise)
    loss, correct, labels = naive(model, wavs, wav_lens, mask, noise)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert output.num_targets == int(mask.sum())
    assert output.shape == (2, FRAMES)
    assert output.metrics["correct"] == correct
    assert output.metrics["frames"] == 25 + 15
    counts = torch.stack([torch.bincount(labels[:, book], minlength=64) for book in range(num_codebooks)])
    assert torch.equal(output.metrics["label_counts"], counts.float())
    expected = gradients(model, loss)
    for name, gradient in gradients(model, output.loss).items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * max(float(expected[name].abs().max()), 1e-3), name


def test_frames_without_padding_are_those_of_the_whole_batch(make_model, batch):
    wavs, _, _, _ = batch
    assert make_model()(wavs).metrics["frames"] == 2 * FRAMES


def test_a_boolean_mask_and_its_indices_are_the_same(make_model, batch):
    model = make_model()
    wavs, wav_lens, mask, noise = batch
    by_mask = model(wavs, wav_lens, mask=mask, noise=noise)
    by_indices = model(wavs, wav_lens, mask=MaskedFrames.from_mask(mask), noise=noise)
    assert torch.equal(by_mask.loss, by_indices.loss)
    assert by_mask.num_targets == by_indices.num_targets


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_indices_that_fill_up_change_neither_loss_nor_gradients_nor_metrics(num_codebooks, make_model, batch):
    model = make_model(num_codebooks)
    wavs, wav_lens, mask, noise = batch
    exact = model(wavs, wav_lens, mask=MaskedFrames.from_mask(mask), noise=noise)
    filled = model(wavs, wav_lens, mask=MaskedFrames.from_mask(mask, capacity=50), noise=noise)
    assert filled.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6)
    assert filled.num_targets == exact.num_targets
    for name, value in exact.metrics.items():
        assert torch.equal(filled.metrics[name], value), name
    expected = gradients(model, exact.loss)
    for name, gradient in gradients(model, filled.loss).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("capacity", [0, 8])
@pytest.mark.parametrize("layer_drop", [0.0, 1.0])
def test_without_a_masked_frame_the_loss_is_zero_with_its_graph(capacity, layer_drop, make_model, batch):
    model = make_model(layer_drop=layer_drop).train()
    wavs, wav_lens, mask, _ = batch
    output = model(wavs, wav_lens, mask=MaskedFrames.from_mask(torch.zeros_like(mask), capacity))
    assert output.loss.item() == 0.0
    assert output.num_targets == 0
    assert output.metrics["correct"] == 0
    assert not output.metrics["label_counts"].any()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("attention", ["rotary", "relative"])
def test_every_parameter_has_a_gradient_at_every_step(attention, make_model, batch):
    model = make_model(num_codebooks=2, attention=attention, layer_drop=0.5).train()
    wavs, wav_lens, _, _ = batch
    for _ in range(3):
        model.zero_grad()
        model(wavs, wav_lens).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_labels_do_not_depend_on_the_filler(make_model, batch):
    model = make_model()
    wavs, wav_lens, mask, noise = batch
    first = model(wavs, wav_lens, mask=mask, noise=noise)
    second = model(wavs, wav_lens, mask=mask, noise=10.0 * noise + 1.0)
    assert torch.equal(first.metrics["label_counts"], second.metrics["label_counts"])
    assert first.loss != second.loss


def test_labels_do_not_change_while_the_model_trains(make_model, batch):
    model = make_model()
    wavs, wav_lens, mask, noise = batch
    before = model(wavs, wav_lens, mask=mask, noise=noise)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before.loss.backward()
    optimizer.step()
    after = model(wavs, wav_lens, mask=mask, noise=noise)
    assert torch.equal(before.metrics["label_counts"], after.metrics["label_counts"])
    assert before.loss != after.loss


def test_what_is_masked_cannot_reach_the_encoder(make_model):
    model = make_model(frontend="global")
    seen = []
    model.speech_encoder.subsampling.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mask = torch.zeros(1, FRAMES, dtype=torch.bool)
    mask[0, 5:15] = True
    noise = 0.1 * torch.randn(1, 100, 80)
    wavs = 0.1 * torch.randn(1, 16000)
    changed = wavs.clone()
    # windows of 400 samples about 160 t: the unmasked frames 19 and 60 end at 3240 and begin at 9400
    changed[0, 3240:9400] = torch.randn(6160)
    first = model(wavs, mask=mask, noise=noise)
    second = model(changed, mask=mask, noise=noise)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][0, 20:60], noise[0, 20:60])
    assert not torch.equal(first.metrics["label_counts"], second.metrics["label_counts"])


@pytest.mark.parametrize("utterance_norm", [False, True])
def test_an_utterances_loss_does_not_depend_on_its_neighbours(make_model, padded_with_junk, utterance_norm):
    model = make_model(num_codebooks=2, frontend="global", utterance_norm=utterance_norm)
    model.speech_encoder.frontend.measure([(0.1 * torch.randn(1, 48000), None)])
    utterances, wavs, wav_lens = padded_with_junk((16000, 9700, 5000))
    noise = 0.1 * torch.randn(3, 100, 80)
    for row, utterance in enumerate(utterances):
        frames = model.speech_encoder.num_frames(len(utterance))
        mask = torch.zeros(3, FRAMES, dtype=torch.bool)
        mask[row, : frames - 2] = torch.rand(frames - 2) < 0.6
        mask[row, 0] = mask[row, frames - 1] = True
        together = model(wavs, wav_lens, mask=mask, noise=noise)
        alone = model(utterance[None], mask=mask[row : row + 1, :frames], noise=noise[row : row + 1, : 4 * frames])
        assert together.num_targets == alone.num_targets
        assert together.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)
        assert torch.equal(together.metrics["label_counts"], alone.metrics["label_counts"])


def test_masks_and_filler_are_a_function_of_the_generator(make_model, batch):
    model = make_model()
    wavs, wav_lens, _, _ = batch

    def loss(seed):
        return model(wavs, wav_lens, generator=torch.Generator().manual_seed(seed)).loss

    torch.manual_seed(1)
    first = loss(0)
    torch.manual_seed(2)
    assert torch.equal(first, loss(0))
    assert not torch.equal(first, loss(1))


def test_the_filler_has_the_deviation_asked_for(make_model, batch):
    model = make_model()
    model.noise_deviation = 0.3
    seen = []
    model.speech_encoder.subsampling.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    wavs, _, _, _ = batch
    model(wavs, mask=torch.ones(2, FRAMES, dtype=torch.bool))
    assert seen[0].mean().abs() <= 0.02
    assert seen[0].std().item() == pytest.approx(0.3, rel=0.05)


def test_several_codebooks_share_one_head(make_model):
    model = make_model(num_codebooks=3)
    assert model.head.weight.shape == (3 * 64, 16)
    assert model.labels_per_target == 3


def test_the_accuracy_is_a_share_of_the_labels_of_all_codebooks(make_model, batch):
    model = make_model(num_codebooks=3)
    wavs, wav_lens, mask, noise = batch
    model.measure([(wavs, wav_lens)])  # so that the commonest labels are guessed
    output = model(wavs, wav_lens, mask=mask, noise=noise)
    tally = Tally(model, "cpu")
    tally.add(output, 1.6)
    hits = int(output.metrics["correct"])
    assert hits > 0
    assert float(tally.averages(tally.sums, 1)["accuracy"]) == pytest.approx(hits / (3 * int(mask.sum())))


def test_the_head_begins_xavier_uniform_without_bias(make_model):
    weight = make_model(num_codebooks=3).head.weight
    bound = (6 / (16 + 3 * 64)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not make_model().head.bias.any()


def test_a_codebook_that_asks_a_lower_state_trains_the_layers_below_it_only(make_model, batch):
    model = make_model(num_codebooks=2, states=[2, 1])
    wavs, wav_lens, mask, noise = batch
    model(wavs, wav_lens, mask=mask, noise=noise)
    captured = []
    model._logits, plain = lambda *given: captured.append(plain(*given)) or captured[-1], model._logits
    model(wavs, wav_lens, mask=mask, noise=noise)
    captured[0][:, 1].square().sum().backward()
    first, second = model.speech_encoder.encoder.layers
    assert all(parameter.grad.abs().sum() > 0 for parameter in first.parameters() if parameter.ndim > 1)
    assert not any(parameter.grad.any() for parameter in second.parameters())


@pytest.mark.parametrize("states", [[2], [2, 3], [0, 2], [2, 2, 2], [1, 1]])
def test_states_that_are_none_are_refused(states, make_model):
    with pytest.raises(ValueError, match="codebook_states names a hidden state, 1 to 2, for each of 2 codebooks"):
        make_model(num_codebooks=2, states=states)


def test_encoding_is_the_speech_encoders_and_masks_nothing(make_model, batch):
    model = make_model()
    wavs, wav_lens, _, _ = batch
    hidden, lengths = model.encode(wavs, wav_lens)
    expected, expected_lengths = model.speech_encoder(wavs, wav_lens)
    assert torch.equal(hidden, expected) and torch.equal(lengths, expected_lengths)


def test_measuring_sets_the_statistics_of_front_end_and_whitening(make_speech_encoder, padded_with_junk):
    speech_encoder = make_speech_encoder(normalize="utterance")
    quantizer = RandomProjectionQuantizer(320, codebook_size=64, whiten=16)
    model = BestRQ(speech_encoder, quantizer, SpanMasking(0.6, 1, grid=True))
    assert not model.measured
    utterances, wavs, wav_lens = padded_with_junk([40000, 30000, 20000] * 3)
    model.measure([(wavs, wav_lens)])
    assert model.measured
    stacked = torch.cat([speech_encoder.frontend(utterance[None])[0].reshape(-1, 320) for utterance in utterances])
    alone = RandomProjectionQuantizer(320, codebook_size=64, whiten=16)
    alone.fit([stacked])
    assert torch.allclose(quantizer.projection, alone.projection, rtol=1e-3, atol=1e-4)
    assert torch.allclose(quantizer.offset, alone.offset, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalize", ["feature", "time"])
def test_the_labels_whose_frequencies_are_measured_are_those_of_each_utterance(make_model, padded_with_junk, normalize):
    utterances, wavs, wav_lens = padded_with_junk([40000, 30000, 10000])
    together, apart = (make_model(normalize=normalize) for _ in range(2))
    together.measure([(wavs, wav_lens)])
    apart.measure([(utterance[None], None) for utterance in utterances])
    assert together.head.bias.unique().numel() > 3
    assert torch.allclose(together.head.bias, apart.head.bias, atol=1e-5)


def test_the_signature_is_json_and_tells_models_apart(make_model):
    signature = make_model().signature()
    assert json.loads(json.dumps(signature)) == signature
    assert signature == make_model().signature()
    assert signature["model"] == "BestRQ"
    assert signature != make_model(num_codebooks=2).signature()
    assert signature != make_model(attention="relative").signature()
    other = make_model()
    other.masking = SpanMasking(prob=0.2, span=2)
    assert signature != other.signature() != make_model(noise_deviation=1.0).signature() != signature
    two = make_model(num_codebooks=2)
    assert two.signature() == make_model(num_codebooks=2, states=[2, 2]).signature()
    assert two.signature() != make_model(num_codebooks=2, states=[2, 1]).signature()


def test_counted_operations_are_three_times_those_of_pytorchs_forward_pass(make_model):
    model = make_model(num_codebooks=2)
    features, targets = torch.randn(3, 4 * 50, 80), 61
    # PyTorch's counter does not know the fused kernel of a CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model.speech_encoder.encode_features(features)[-1]
        model.head(hidden.flatten(0, 1)[:targets])
    assert model.flops(3, 50, targets) / 3 == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_shapes_that_do_not_fit_are_refused(make_model, make_speech_encoder, batch):
    wavs, _, _, _ = batch
    with pytest.raises(ValueError, match=r"\(2, 24\).*\(2, 25\)"):
        make_model()(wavs, mask=torch.ones(2, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="320"):
        BestRQ(make_speech_encoder(), RandomProjectionQuantizer(80, codebook_size=8), SpanMasking(0.6, 1))
