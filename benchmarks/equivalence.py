"""Whether our step of the same model computes what SpeechBrain's does, from the encoder's input onward.

    python benchmarks/equivalence.py

Both get the same features, mask, noise and weights, without padding, in fp32 on a CPU. pretrain_step.py runs this
first: speeds of things that are not equal need no comparing.
"""

from dataclasses import dataclass

import torch
from speechbrain_step import Batch, SpeechBrainBestRQ, make_batch
from torch import Tensor, nn

from speechbrain_bestrq.bestrq import BestRQ
from speechbrain_bestrq.convert import conformer_from_speechbrain
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.masking import SpanMasking
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer

D_MODEL, HEADS, LAYERS, CODES = 64, 4, 2, 256


@dataclass(frozen=True)
class Equivalence:
    """What was found."""

    labels_equal: bool
    """As often each."""
    labels_used: int
    loss_difference: float
    """As a share of the loss."""
    least_cosine: float
    """Of the gradients of each parameter."""
    norm_difference: float
    """The greatest of the gradients' norms, as a share."""

    @property
    def holds(self) -> bool:
        """Whether both are the same."""
        close = self.loss_difference <= 1e-6 and self.norm_difference <= 1e-4
        return self.labels_equal and close and self.least_cosine > 0.9999

    def __str__(self) -> str:
        labels = "equal" if self.labels_equal else "different"
        return (
            f"labels {labels}, {self.labels_used} codes used, loss apart by {self.loss_difference:.1e} of it, "
            f"gradients' least cosine {self.least_cosine:.6f}, their norms apart by {self.norm_difference:.1e}"
        )


class GivenFeatures(nn.Module):
    """A front end that gives SpeechBrain's features."""

    stack, num_mels, measured = 4, 80, True

    def __init__(self, features: Tensor):
        super().__init__()
        self.given = features

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> tuple[Tensor, None]:
        """Features of unpadded audio."""
        return self.given.clone(), None


class GivenSubsampling(nn.Module):
    """SpeechBrain's convolutions and projection in the place of ours."""

    factor = stack = 4

    def __init__(self, theirs: SpeechBrainBestRQ):
        super().__init__()
        self.convolutions, self.projection = theirs.CNN, theirs.wrapper.transformer.custom_src_module

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map (B, 4 T, F) to (B, T, d_model)."""
        return self.projection(self.convolutions(features).flatten(2))


def make_pair() -> tuple[SpeechBrainBestRQ, BestRQ, Batch]:
    """SpeechBrain's model and ours with the same weights, and a batch with its noise."""
    torch.manual_seed(0)
    theirs = SpeechBrainBestRQ(D_MODEL, LAYERS, HEADS, 128, CODES, channels=(8, 4), dropout=0.0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    batch = make_batch(0.1 * torch.randn(3, 160 * 203))
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


def compare(theirs: SpeechBrainBestRQ, ours: BestRQ, batch: Batch) -> Equivalence:
    """Take a step with each, and compare."""
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

    # SpeechBrain's mask and noise in our form
    features = ours.speech_encoder.frontend.given
    mask = torch.zeros(len(features), features.shape[1] // 4, dtype=torch.bool)
    mask[:, batch.mask[::4] // 4] = True
    noise = torch.full_like(features, torch.nan)
    noise[:, batch.mask] = batch.noise
    output = ours(batch.wavs, mask=mask, noise=noise)
    output.loss.backward()

    counts = torch.bincount(targets, minlength=CODES)
    found = {name: weight.grad for name, weight in ours.speech_encoder.encoder.named_parameters()}
    found |= {"head": ours.head.weight.grad, "convolution": next(theirs.CNN.parameters()).grad}
    if found.keys() != gradients.keys():
        raise KeyError(f"parameters of one alone: {sorted(found.keys() ^ gradients.keys())}")
    pairs = [(found[name].flatten(), gradients[name].flatten()) for name in found]
    return Equivalence(
        labels_equal=torch.equal(output.metrics["label_counts"][0].long(), counts)
        and output.num_targets == len(targets) == int(mask.sum()),
        labels_used=int(counts.count_nonzero()),
        loss_difference=abs(output.loss.item() / expected.item() - 1),
        least_cosine=min(nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in pairs),
        norm_difference=max(abs(a.norm().item() / b.norm().item() - 1) for a, b in pairs),
    )


if __name__ == "__main__":
    print(compare(*make_pair()))
