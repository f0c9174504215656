"""The front end of SpeechBrain's BEST-RQ recipe, for encoders that were trained behind it."""

import torch
from torch import Tensor, nn

from speechbrain_bestrq.frontend import ConvSubsampling, LogMel, absolute_lengths, valid_frames

#: As SpeechBrain's ``Filterbank``: least mel power, and decibels kept below an utterance's maximum.
MINIMUM_POWER, DYNAMIC_RANGE = 1e-10, 80.0
#: As SpeechBrain's ``InputNormalization``: least standard deviation, decibels.
MINIMUM_DEVIATION = 1e-10


class SpeechBrainFbank(LogMel):
    """SpeechBrain's ``Fbank`` and ``InputNormalization``: equal to them on unpadded waveforms.

    Frame t is a Hamming window centred on sample ``t * hop``, with zeros beyond both
    ends. The mel powers are in decibels, and no lower than 80 below the largest of the
    utterance. Here that maximum and the statistics are those of the utterance's own
    frames, in a padded batch too. All ``1 + n // hop`` frames of n samples are kept:
    nothing is cut to whole encoder frames.

    SpeechBrain 1.1 divides the variance by the number of frames; releases before it
    divided by one less. A bin that never changes becomes zero, where in SpeechBrain
    rounding decides between zero and plus or minus one.

    Arguments
    ---------
    sample_rate : int
        Of the waveforms, Hz.
    num_mels : int
        Filters, from 0 Hz to half the sample rate: triangles on the HTK mel scale whose
        right half is as wide as the left.
    window_ms, hop_ms : float
        Window and hop, milliseconds.
    fft_points : int
        Of the Fourier transform; even, and no less than the window.
    normalize : str
        "utterance": SpeechBrain's "sentence"; "global": by statistics that
        ``state_dict`` carries.

    Example
    -------
    >>> frontend = SpeechBrainFbank()
    >>> features, lengths = frontend(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> features.shape, lengths.tolist()
    (torch.Size([2, 101, 80]), [101, 51])
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        num_mels: int = 80,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        fft_points: int = 400,
        normalize: str = "utterance",
    ):
        super().__init__(sample_rate, num_mels, window_ms, hop_ms, normalize, stack=1)
        if fft_points < self.window or fft_points % 2:
            raise ValueError(f"fft_points must be even and at least the window's {self.window}, not {fft_points}.")
        self.config = dict(
            sample_rate=sample_rate,
            num_mels=num_mels,
            window_ms=window_ms,
            hop_ms=hop_ms,
            fft_points=fft_points,
            normalize=normalize,
        )
        self.fft_points = fft_points
        with torch.device("cpu"):  # constants have values even where a model is built on the meta device
            self.window_shape = torch.hamming_window(self.window)
            self.filters = _mel_filters(sample_rate, num_mels, fft_points)

    def _log_mel(self, wavs: Tensor, wav_lens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wavs, longest, lengths = wavs.float(), wavs.shape[1], None
        if wav_lens is not None:
            samples = absolute_lengths(wav_lens.to(wavs.device), longest)
            wavs = wavs.masked_fill(~valid_frames(samples, longest), 0.0)
            lengths = self.num_frames(samples)
        spectrum = torch.stft(
            wavs,
            self.fft_points,
            self.hop,
            self.window,
            self.window_shape,
            pad_mode="constant",
            return_complex=True,
        ).transpose(1, 2)
        power = spectrum.real.square() + spectrum.imag.square()
        decibels = 10.0 * (power @ self.filters).clamp(min=MINIMUM_POWER).log10()
        loudest = decibels
        if lengths is not None:
            loudest = decibels.masked_fill(~valid_frames(lengths, decibels.shape[1])[..., None], -torch.inf)
        return decibels.maximum(loudest.amax(dim=(1, 2), keepdim=True) - DYNAMIC_RANGE), lengths

    @staticmethod
    def _normalize_utterance(features: Tensor, lengths: Tensor | None) -> Tensor:
        # from the first frame: the mean of a bin that never changes is then exactly zero, and so is the bin
        features = features - features[:, :1]
        if lengths is None:
            deviation, mean = torch.std_mean(features, dim=1, keepdim=True, correction=0)
        else:
            valid, count = valid_frames(lengths, features.shape[1])[..., None], lengths[:, None, None]
            mean = features.where(valid, 0.0).sum(1, keepdim=True) / count
            deviation = ((features - mean).where(valid, 0.0).square().sum(1, keepdim=True) / count).sqrt()
        return (features - mean) / deviation.clamp(min=MINIMUM_DEVIATION)


def _mel_filters(sample_rate: int, num_mels: int, fft_points: int) -> Tensor:
    """SpeechBrain's filters, shape (fft_points / 2 + 1, num_mels), in the float32 steps it takes."""
    nyquist = sample_rate // 2
    top = 2595.0 * torch.log10(torch.tensor(1.0 + nyquist / 700.0, dtype=torch.float64)).item()
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, num_mels + 2) / 2595.0) - 1.0)
    width, centre = edges[1:-1] - edges[:-2], edges[1:-1]
    distance = (torch.linspace(0.0, nyquist, fft_points // 2 + 1)[:, None] - centre) / width
    return (1.0 - distance.abs()).clamp(min=0.0)


class SpeechBrainSubsampling(ConvSubsampling):
    """SpeechBrain's ``ConvolutionFrontEnd``, as its BEST-RQ recipe has it, and the projection after it.

    The layers of :class:`speechbrain_bestrq.frontend.ConvSubsampling`, with reflections
    in place of zeros at the edges. Each utterance is reflected about its own last frame,
    wherever that lies in a padded batch. The arguments are the same.

    n feature frames make n / 4 encoder frames, rounded up, as in SpeechBrain's
    fine-tuning recipe. (Its pre-training first puts up to three frames of zeros on the
    left, for the labels' sake; where n is a multiple of 4, both are the same.)

    Example
    -------
    >>> subsampling = SpeechBrainSubsampling(num_mels=80, d_model=16)
    >>> subsampling(torch.randn(2, 101, 80), torch.tensor([101, 51])).shape
    torch.Size([2, 26, 16])
    """

    #: Feature frames in the unit of ``lengths``: an utterance may end inside an encoder frame.
    stack = 1

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Subsample.

        Arguments
        ---------
        features : Tensor
            Shape (B, T, num_mels).
        lengths : Tensor, optional
            Feature frames of each utterance, shape (B,); None when nothing is padded.

        Returns
        -------
        Tensor
            Shape (B, T / 4 rounded up, d_model).
        """
        x = features.unsqueeze(-1)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            width = conv.kernel_size[0] // 2
            x = _reflect_ends(x, lengths, width).permute(0, 3, 1, 2)  # channels last in memory
            x = nn.functional.pad(x, (width, width, 0, 0), mode="reflect")
            x = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride).permute(0, 2, 3, 1)
            x = self.dropout(self.activation(norm(x)))
            lengths = None if lengths is None else (lengths + 1) // 2
        return self.dropout(self.projection(x.flatten(2)))


def _reflect_ends(x: Tensor, lengths: Tensor | None, width: int) -> Tensor:
    """Extend (B, T, ...) by ``width`` frames on both sides of each utterance, reflected about its outermost frames."""
    longest = x.shape[1]
    index = torch.arange(-width, longest + width, device=x.device).abs()
    if lengths is None:
        return x.index_select(1, _reflect_index(index, torch.full_like(index[:1], longest - 1)))
    index = _reflect_index(index, lengths.clamp(min=1)[:, None] - 1)
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _reflect_index(index: Tensor, last: Tensor) -> Tensor:
    """Turn back at ``last``; an utterance shorter than the reflection repeats what it has."""
    return torch.where(index > last, 2 * last - index, index).clamp(min=0).minimum(last)
