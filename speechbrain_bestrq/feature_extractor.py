"""From waveforms to the input of a Transformer: wav2vec 2.0's convolutions and their projection (arXiv 2006.11477)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from speechbrain_bestrq.frontend import absolute_lengths, valid_frames

#: Added to the variance of a waveform, as transformers' feature extractor has it.
VARIANCE_FLOOR = 1e-7


class ConvFeatureExtractor(nn.Module):
    """Strided convolutions over the waveform, each followed by GELU (arXiv 2006.11477, section 2).

    Nothing is padded: a frame sees whole windows of samples only, so that an utterance
    of n samples has as many frames in a padded batch as alone, and they are the same
    there. With the default kernels and strides a frame sees 400 samples and the
    next one begins 320 later: 50 frames a second at 16 kHz.

    Arguments
    ---------
    channels, kernel_sizes, strides : sequence of int
        Of each convolution.
    norm : str
        "group": each channel of the first convolution is normalised over the frames of
        its utterance (padding does not count); "layer": the channels of each frame
        are normalised, behind every convolution.
    bias : bool
        Whether the convolutions have biases.
    normalize_input : bool
        Normalise each waveform to zero mean and unit variance, over its own samples.
    sample_rate : int
        Of the waveforms, Hz.
    initial_kernels : str
        "random": He's initial weights, as in wav2vec 2.0. "constant": behind the first convolution
        they do not vary over the kernel at first, so that each layer averages. Features
        then begin as smooth mixtures of band energies, which can be predicted from their
        context; random ones depend on the phase, which cannot, and take many updates to
        become anything else (docs/LOG.md).

    Example
    -------
    >>> extractor = ConvFeatureExtractor(channels=(16,) * 7)
    >>> features, lengths = extractor(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> features.shape, lengths.tolist()
    (torch.Size([2, 49, 16]), [49, 24])
    """

    #: What the number of frames is a multiple of.
    stack = 1

    def __init__(
        self,
        channels: Sequence[int] = (512,) * 7,
        kernel_sizes: Sequence[int] = (10, 3, 3, 3, 3, 2, 2),
        strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2),
        norm: str = "group",
        bias: bool = False,
        normalize_input: bool = False,
        sample_rate: int = 16000,
        initial_kernels: str = "random",
    ):
        super().__init__()
        if not len(channels) == len(kernel_sizes) == len(strides) >= 1:
            raise ValueError(
                f"channels, kernel_sizes and strides must be equally many, not {len(channels)}, "
                f"{len(kernel_sizes)} and {len(strides)}."
            )
        if norm not in ("group", "layer"):
            raise ValueError(f"norm is 'group' or 'layer', not {norm!r}.")
        if initial_kernels not in ("random", "constant"):
            raise ValueError(f"initial_kernels is 'random' or 'constant', not {initial_kernels!r}.")
        self.config = dict(
            channels=list(channels),
            kernel_sizes=list(kernel_sizes),
            strides=list(strides),
            norm=norm,
            bias=bias,
            normalize_input=normalize_input,
            sample_rate=sample_rate,
            initial_kernels=initial_kernels,
        )
        self.sample_rate, self.normalize_input = sample_rate, normalize_input
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs, kernel_size, stride in zip(
            (1, *channels[:-1]), channels, kernel_sizes, strides, strict=True
        ):
            convolution = nn.Conv1d(inputs, outputs, kernel_size, stride, bias=bias)
            nn.init.kaiming_normal_(convolution.weight)
            if self.convolutions and initial_kernels == "constant":
                with torch.no_grad():  # their mean keeps the size of what does not vary over the kernel
                    convolution.weight.copy_(convolution.weight.mean(2, keepdim=True).expand_as(convolution.weight))
            self.convolutions.append(convolution)
            if norm == "layer":
                self.norms.append(nn.LayerNorm(outputs))
            elif not self.norms:
                self.norms.append(nn.GroupNorm(outputs, outputs))

    @property
    def receptive_field(self) -> int:
        """Samples that a frame sees."""
        return self._samples(1)

    def _samples(self, frames: int) -> int:
        """Samples that so many frames see."""
        for convolution in reversed(self.convolutions):
            frames = (frames - 1) * convolution.stride[0] + convolution.kernel_size[0]
        return frames

    def _lengths(self, samples: int | Tensor) -> Iterator[int | Tensor]:
        """Frames behind each convolution."""
        frames = samples
        for convolution in self.convolutions:
            frames = (frames - convolution.kernel_size[0]) // convolution.stride[0] + 1
            frames = frames.clamp(min=0) if isinstance(frames, Tensor) else max(frames, 0)
            yield frames

    def num_frames(self, samples: int | Tensor) -> int | Tensor:
        """Frames of so many samples."""
        *_, frames = self._lengths(samples)
        return frames

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config.items())

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute features.

        Arguments
        ---------
        wavs : Tensor
            Waveforms in [-1, 1], shape (B, N).
        wav_lens : Tensor, optional
            Relative lengths, shape (B,); None when nothing is padded.

        Returns
        -------
        features : Tensor
            Shape (B, T, channels). What stands in the padding means nothing.
        lengths : Tensor or None
            Frames of each utterance, int64, shape (B,); None when nothing is padded.

        Raises
        ------
        ValueError
            If even the longest waveform is too short for a frame.
        """
        longest = wavs.shape[1]
        if longest < self.receptive_field:
            raise ValueError(
                f"waveforms of {longest} samples are too short for a frame: give at least {self.receptive_field}."
            )
        samples = None
        if wav_lens is not None:
            samples = absolute_lengths(wav_lens.to(wavs.device), longest)
            wavs = wavs.masked_fill(~valid_frames(samples, longest), 0.0)
        x = (self._normalize_waveforms(wavs, samples) if self.normalize_input else wavs)[:, None]
        lengths = [None] * len(self.convolutions) if samples is None else list(self._lengths(samples))
        by_layer = self.config["norm"] == "layer"
        for number, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if by_layer:
                x = self.norms[number](x.transpose(1, 2)).transpose(1, 2)
            elif number == 0:
                x = self.norms[0](x) if samples is None else _normalize_channels(x, self.norms[0], lengths[0])
            x = nn.functional.gelu(x)
        return x.transpose(1, 2), lengths[-1]

    @staticmethod
    def _normalize_waveforms(wavs: Tensor, samples: Tensor | None) -> Tensor:
        wavs = wavs.float()
        if samples is None:
            variance, mean = torch.var_mean(wavs, dim=1, keepdim=True, correction=0)
            return (wavs - mean) * torch.rsqrt(variance + VARIANCE_FLOOR)
        valid, count = valid_frames(samples, wavs.shape[1]), samples.clamp(min=1)[:, None]
        centred = (wavs - wavs.sum(1, keepdim=True) / count).where(valid, 0.0)  # padding is zero already
        return centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / count + VARIANCE_FLOOR)

    def flops(self, utterances: int, frames: int) -> float:
        """Multiply-adds (two operations each) of a forward pass that gives (utterances, frames)."""
        total = 0
        for convolution in reversed(self.convolutions):
            total += frames * convolution.weight.numel()
            frames = (frames - 1) * convolution.stride[0] + convolution.kernel_size[0]
        return 2.0 * utterances * total


def _normalize_channels(x: Tensor, norm: nn.GroupNorm, lengths: Tensor) -> Tensor:
    """What a GroupNorm of one channel a group does, over the valid frames of (B, C, T) only."""
    x, valid = x.float(), valid_frames(lengths, x.shape[2])[:, None]
    count = lengths.clamp(min=1)[:, None, None]
    centred = (x - x.where(valid, 0.0).sum(2, keepdim=True) / count).where(valid, 0.0)
    scale = torch.rsqrt(centred.square().sum(2, keepdim=True) / count + norm.eps)
    return centred * (scale * norm.weight[:, None]) + norm.bias[:, None]


class FeatureProjection(nn.Module):
    """LayerNorm, a linear layer and dropout: features to the size of the Transformer.

    wav2vec 2.0 quantizes what stands behind the norm and masks what stands at the end,
    hence the two steps :meth:`normalize` and :meth:`project`.

    Arguments
    ---------
    num_features : int
        Channels of the features.
    d_model : int
        Size of the output.
    dropout : float
        At the end.
    eps : float
        Of the norm.
    keep_mask_embedding : bool
        Carry the vector that stood for masked frames in pre-training, as the buffer
        ``mask_embedding``. Encoders of transformers have one; nothing here uses it.

    Example
    -------
    >>> FeatureProjection(32, 16)(torch.randn(2, 49, 32)).shape
    torch.Size([2, 49, 16])
    """

    #: Feature frames in an encoder frame, and what their number must be a multiple of.
    factor = stack = 1

    def __init__(
        self,
        num_features: int = 512,
        d_model: int = 768,
        dropout: float = 0.1,
        eps: float = 1e-5,
        keep_mask_embedding: bool = False,
    ):
        super().__init__()
        self.config = dict(
            num_features=num_features,
            d_model=d_model,
            dropout=dropout,
            eps=eps,
            keep_mask_embedding=keep_mask_embedding,
        )
        self.norm = nn.LayerNorm(num_features, eps=eps)
        self.projection = nn.Linear(num_features, d_model)
        bound = math.sqrt(1.0 / num_features)
        nn.init.uniform_(self.projection.weight, -bound, bound)
        nn.init.uniform_(self.projection.bias, -bound, bound)
        self.dropout = nn.Dropout(dropout)
        if keep_mask_embedding:
            self.register_buffer("mask_embedding", torch.rand(d_model))

    def normalize(self, features: Tensor) -> Tensor:
        """Normalise features (B, T, num_features)."""
        return self.norm(features)

    def project(self, normalized: Tensor) -> Tensor:
        """Project normalised features to (B, T, d_model)."""
        return self.dropout(self.projection(normalized))

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Project features (B, T, num_features) to (B, T, d_model); each frame by itself, whatever the lengths."""
        return self.project(self.normalize(features))

    def flops(self, frames: int) -> float:
        """Multiply-adds (two operations each) of a forward pass over so many frames."""
        return 2.0 * frames * self.projection.weight.numel()
