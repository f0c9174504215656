"""SpeechBrain's BEST-RQ training step, out of the installed package's own modules: the opponent of pretrain_step.py.

Put together as SpeechBrain's recipe does (relative positions, head on all frames, one
mask for the batch, its ``fit_batch``), with the paper's settings unless told otherwise.
"""

from typing import NamedTuple

import speechbrain as sb
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.BESTRQ import compute_mask
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.lobes.models.transformer.TransformerASR import EncoderWrapper, TransformerASR
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.quantisers import RandomProjectionQuantizer
from speechbrain.processing.features import InputNormalization
from torch import Tensor, nn

NUM_MELS, STACK = 80, 4
MASK_SHARE, SPAN = 0.15, 4


class Batch(NamedTuple):
    """What SpeechBrain's collation gives, with the noise drawn beforehand if it must be known."""

    wavs: Tensor
    """Shape (B, N)."""
    wav_lens: Tensor
    """Relative lengths, shape (B,)."""
    mask: Tensor
    """Indices of the masked feature frames, the same for all utterances, shape (M,)."""
    noise: Tensor | None = None
    """Filler, shape (B, M, NUM_MELS); drawn in the step if None."""


def make_batch(wavs: Tensor, hop: int = 160) -> Batch:
    """Draw the mask of unpadded waveforms by SpeechBrain's function."""
    frames = wavs.shape[1] // hop + 1
    mask = compute_mask((len(wavs), frames, NUM_MELS), [frames] * len(wavs), MASK_SHARE, SPAN)
    return Batch(wavs, torch.ones(len(wavs), device=wavs.device), mask.to(wavs.device))


class SpeechBrainBestRQ(nn.Module):
    """The modules of SpeechBrain's recipe.

    Arguments
    ---------
    d_model, num_layers, num_heads, d_ffn, codebook_size : int
        Sizes.
    channels : tuple of int
        Of the two convolutions before the encoder.
    dropout : float
        Everywhere.
    """

    def __init__(
        self,
        d_model: int = 576,
        num_layers: int = 12,
        num_heads: int = 8,
        d_ffn: int = 2048,
        codebook_size: int = 8192,
        channels: tuple[int, int] = (128, 32),
        dropout: float = 0.1,
    ):
        super().__init__()
        self.compute_features = Fbank(sample_rate=16000, n_fft=400, n_mels=NUM_MELS)
        self.normalize = InputNormalization(norm_type="sentence")
        self.CNN = ConvolutionFrontEnd(
            input_shape=(8, 10, NUM_MELS),
            num_blocks=2,
            num_layers_per_block=1,
            out_channels=channels,
            kernel_sizes=(3, 3),
            strides=(2, 2),
            residuals=(False, False),
            dropout=dropout,
        )
        self.wrapper = EncoderWrapper(
            TransformerASR(
                tgt_vocab=1,
                input_size=NUM_MELS // STACK * channels[1],
                d_model=d_model,
                nhead=num_heads,
                num_encoder_layers=num_layers,
                num_decoder_layers=0,
                d_ffn=d_ffn,
                dropout=dropout,
                activation=nn.GELU,
                conformer_activation=nn.GELU,
                encoder_module="conformer",
                attention_type="RelPosMHAXL",
                normalize_before=True,
                causal=False,
            )
        )
        self.quantizer = RandomProjectionQuantizer(NUM_MELS * STACK, 16, codebook_size)
        self.linear = Linear(input_size=d_model, n_neurons=codebook_size)

    def features(self, batch: Batch) -> Tensor:
        """Normalised features, their number of frames a multiple of four by zeros on the left."""
        features = self.normalize(self.compute_features(batch.wavs), batch.wav_lens)
        return nn.functional.pad(features, (0, 0, -features.shape[1] % STACK, 0))

    def targets(self, features: Tensor, mask: Tensor) -> Tensor:
        """Labels of the masked encoder frames, shape (B, M // STACK)."""
        return self.quantizer(features.unflatten(1, (-1, STACK)).flatten(2)[:, mask[::STACK] // STACK])

    def fill(self, features: Tensor, batch: Batch) -> Tensor:
        """Put noise in the place of the masked frames."""
        noise = batch.noise
        if noise is None:
            noise = torch.normal(0.0, 0.1, (len(features), len(batch.mask), NUM_MELS), device=features.device)
        features[:, batch.mask] = noise.to(features.dtype)
        return features

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels of the masked frames."""
        features = self.features(batch)
        targets = self.targets(features, batch.mask)
        hidden = self.wrapper(self.CNN(self.fill(features, batch)), batch.wav_lens)
        logits = self.linear(hidden)[:, batch.mask[::STACK] // STACK]
        return logits.flatten(0, 1), targets.flatten()


class SpeechBrainBestRQBrain(sb.Brain):
    """Takes a step as SpeechBrain's recipe does."""

    def compute_forward(self, batch: Batch, stage: sb.Stage) -> tuple[Tensor, Tensor]:
        """Logits and labels."""
        return self.modules["model"](batch)

    def compute_objectives(self, predictions: tuple[Tensor, Tensor], batch: Batch, stage: sb.Stage) -> Tensor:
        """Cross-entropy, a mean over the masked frames."""
        return nn.functional.cross_entropy(*predictions)
