"""Our step against SpeechBrain's BEST-RQ step: the same features, mask, noise and weights give the same labels, loss
and gradients."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from speechbrain_bestrq.bestrq import BestRQ
from speechbrain_bestrq.convert import conformer_from_speechbrain
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.masking import SpanMasking
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer

D_MODEL, HEADS, LAYERS, CODES = 64, 4, 2, 256


@pytest.fixture(scope="module")
def opponent():
    """The benchmark's module that puts SpeechBrain's step together."""
    path = Path(__file__).parents[2] / "benchmarks" / "speechbrain_step.py"
    spec = importlib.util.spec_from_file_location("speechbrain_step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class GivenFeatures(nn.Module):
    """A front end that gives SpeechBrain's features."""

    stack, num_mels, measured = 4, 80, True

    def __init__(self, features):
        super().__init__()
        self.given = features

    def forward(self, wavs, wav_lens=None):
        """Features of unpadded audio."""
        return self.given.clone(), None


class GivenSubsampling(nn.Module):
    """SpeechBrain's convolutions and projection in the place of ours."""

    factor = stack = 4

    def __init__(self, theirs):
        super().__init__()
        self.convolutions, self.projection = theirs.CNN, theirs.wrapper.transformer.custom_src_module

    def forward(self, features, lengths=None):
        """Map (B, 4 T, F) to (B, T, d_model)."""
        return self.projection(self.convolutions(features).flatten(2))


@pytest.fixture(scope="module")
def both(opponent):
    """SpeechBrain's model and ours with the same weights, and a batch with its noise."""
    torch.manual_seed(0)
    theirs = opponent.SpeechBrainBestRQ(D_MODEL, LAYERS, HEADS, 128, CODES, channels=(8, 4), dropout=0.0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    batch = opponent.make_batch(0.1 * torch.randn(3, 160 * 203))
    batch = batch._replace(noise=0.1 * torch.randn(3, len(batch.mask), 80))

    ours = BestRQ(
        SpeechEncoder(
            GivenFeatures(theirs.features(batch).detach()),
            GivenSubsampling(theirs),
            ConformerEncoder(D_MODEL, LAYERS, HEADS, 128, dropout=0.0, attention="relative"),
        ),
        RandomProjectionQuantizer(320, 16, CODES),
        SpanMasking(0.6, 1, grid=True),
    )
    encoder = theirs.wrapper.transformer.encoder
    ours.speech_encoder.encoder.load_state_dict(conformer_from_speechbrain(encoder.state_dict(), HEADS))
    ours.head.load_state_dict(theirs.linear.w.state_dict())
    ours.quantizer.projection.copy_(theirs.quantizer.P[None])
    ours.quantizer.codebooks.copy_(theirs.quantizer.CB[None])
    return theirs, ours, batch


def our_inputs(ours, batch):
    """SpeechBrain's mask and noise in our form."""
    features = ours.speech_encoder.frontend.given
    mask = torch.zeros(len(features), features.shape[1] // 4, dtype=torch.bool)
    mask[:, batch.mask[::4] // 4] = True
    noise = torch.full_like(features, torch.nan)
    noise[:, batch.mask] = batch.noise
    return mask, noise


def test_loss_labels_and_gradients_equal_speechbrains(both):
    theirs, ours, batch = both
    logits, targets = theirs(batch)
    expected = nn.functional.cross_entropy(logits, targets)
    expected.backward()
    gradients = {
        **conformer_from_speechbrain(
            {name: weight.grad for name, weight in theirs.wrapper.transformer.encoder.named_parameters()}, HEADS
        ),
        "head": theirs.linear.w.weight.grad.clone(),
        "convolution": next(theirs.CNN.parameters()).grad.clone(),
    }
    theirs.zero_grad()

    mask, noise = our_inputs(ours, batch)
    output = ours(batch.wavs, mask=mask, noise=noise)
    output.loss.backward()

    assert output.num_targets == len(targets) == int(mask.sum())
    counts = torch.bincount(targets, minlength=CODES)
    assert torch.equal(output.metrics["label_counts"][0].long(), counts)
    assert counts.count_nonzero() > 10, "labels that are all alike would prove nothing"
    assert abs(output.loss.item() - expected.item()) <= 1e-6 * expected.item()

    found = {name: weight.grad for name, weight in ours.speech_encoder.encoder.named_parameters()}
    found |= {"head": ours.head.weight.grad, "convolution": next(theirs.CNN.parameters()).grad}
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        similarity = nn.functional.cosine_similarity(gradient.flatten(), gradients[name].flatten(), dim=0)
        assert similarity > 0.9999, name
        assert gradient.norm().item() == pytest.approx(gradients[name].norm().item(), rel=1e-4), name


def test_their_brain_takes_a_step(opponent, tmp_path):
    torch.manual_seed(0)
    model = opponent.SpeechBrainBestRQ(D_MODEL, 1, HEADS, 128, CODES, channels=(8, 4))
    brain = opponent.SpeechBrainBestRQBrain(
        {"model": model}, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), run_opts={"device": "cpu"}
    )
    brain.on_fit_start()
    brain.step = 0
    before = model.linear.w.weight.detach().clone()
    loss = brain.fit_batch(opponent.make_batch(0.1 * torch.randn(2, 16000)))
    assert loss.isfinite()
    assert not torch.equal(model.linear.w.weight, before)
