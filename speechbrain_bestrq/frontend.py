"""From waveforms to the encoder's input: normalised log-mel features and their subsampling."""

from collections.abc import Iterable

import torch
import torchaudio
from torch import Tensor, nn

from speechbrain_bestrq.precision import full_precision

#: No bin is divided by less than this (nats): a bin that never changes carries nothing.
MINIMUM_DEVIATION = 1e-2


def absolute_lengths(relative: Tensor, longest: int) -> Tensor:
    """Turn SpeechBrain's relative lengths into integers.

    Arguments
    ---------
    relative : Tensor
        Lengths as shares of the longest, shape (B,).
    longest : int
        Width of the padded batch.

    Returns
    -------
    Tensor
        int64, shape (B,).

    Raises
    ------
    TypeError
        If they are whole numbers, as counts of samples are: nothing would be padding.

    Example
    -------
    >>> absolute_lengths(torch.tensor([1.0, 0.5]), 7)
    tensor([7, 4])
    """
    if not relative.is_floating_point():
        raise TypeError(f"relative lengths are shares of the longest, 1.0 for that one, not {relative.dtype}.")
    return (relative.double() * longest).round().long()


def valid_frames(lengths: Tensor, longest: int) -> Tensor:
    """Mark the frames that belong to an utterance.

    Arguments
    ---------
    lengths : Tensor
        Frames of each utterance, shape (B,).
    longest : int
        Width T of the padded batch.

    Returns
    -------
    Tensor
        Boolean, shape (B, T).

    Raises
    ------
    TypeError
        If they are no whole numbers, as relative lengths are: the first frame alone would count.

    Example
    -------
    >>> valid_frames(torch.tensor([1, 2]), 2)
    tensor([[ True, False],
            [ True,  True]])
    """
    if lengths.is_floating_point():
        raise TypeError(f"lengths in frames are whole numbers, not {lengths.dtype}: see absolute_lengths().")
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def normalize_utterances(hidden: Tensor, lengths: Tensor | None = None, each_channel: bool = False) -> Tensor:
    """Normalise each utterance to mean 0 and variance 1, over its frames and channels together.

    As ``torch.nn.functional.layer_norm`` over both axes, which SpeechBrain's lobes use,
    but over the utterance's own frames: its padding does not count.

    Arguments
    ---------
    hidden : Tensor
        Shape (..., B, T, D).
    lengths : Tensor, optional
        Frames of each utterance, shape (B,); None when nothing is padded.
    each_channel : bool
        Normalise each channel by itself (over the frames only): what an utterance's
        frames have in common, as its speaker and its room, is gone.

    Returns
    -------
    Tensor
        float32, of the same shape; zero in the padding.

    Example
    -------
    >>> normalize_utterances(torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([2])).round().flatten().tolist()
    [-1.0, 1.0, 0.0]
    """
    hidden = hidden.float()
    frames, channels = hidden.shape[-2:]
    axes = (-2,) if each_channel else (-2, -1)
    if lengths is None:
        variance, mean = torch.var_mean(hidden, axes, correction=0, keepdim=True)
        return (hidden - mean) * torch.rsqrt(variance + 1e-5)
    padding = ~valid_frames(lengths, frames)[..., None]
    count = lengths.clamp(min=1)[:, None, None] * (1 if each_channel else channels)
    mean = hidden.masked_fill(padding, 0.0).sum(axes, keepdim=True) / count
    centred = (hidden - mean).masked_fill(padding, 0.0)
    variance = centred.square().sum(axes, keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-5)


class LogMel(nn.Module):
    """Log-mel features with mean and variance normalisation, on the waveform's device.

    Frame t is a 25 ms Hann window centred on sample ``t * hop``, with zeros beyond
    both ends; an utterance of n samples has ``1 + n // hop`` frames, cut to a
    multiple of ``stack`` (the encoder's subsampling). The logarithm is natural, with
    a constant floor. No frame depends on the padding or on other utterances, and
    padding is zero in the result. Always float32, without gradient.

    Arguments
    ---------
    sample_rate : int
        Of the waveforms, Hz.
    num_mels : int
        Filters (HTK mel scale, 0 Hz to half the sample rate).
    window_ms, hop_ms : float
        Window and hop, milliseconds.
    normalize : str
        "global": per bin by statistics of the training audio, which
        :meth:`measure` sets once and ``state_dict`` carries; "utterance": per bin
        by the utterance's own frames.
    floor : float
        Least mel energy of full-scale audio (1.0), which bounds the logarithm below.
    stack : int
        The number of frames is a multiple of this.

    Example
    -------
    >>> frontend = LogMel(normalize="utterance")
    >>> features, lengths = frontend(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> features.shape, lengths.tolist()
    (torch.Size([2, 100, 80]), [100, 48])
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        num_mels: int = 80,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        normalize: str = "global",
        floor: float = 1e-6,
        stack: int = 4,
    ):
        super().__init__()
        if normalize not in ("global", "utterance"):
            raise ValueError(f"normalize is 'global' or 'utterance', not {normalize!r}.")
        self.config = dict(
            sample_rate=sample_rate,
            num_mels=num_mels,
            window_ms=window_ms,
            hop_ms=hop_ms,
            normalize=normalize,
            floor=floor,
            stack=stack,
        )
        self.sample_rate, self.num_mels, self.normalize = sample_rate, num_mels, normalize
        self.floor, self.stack = floor, stack
        self.window = round(sample_rate * window_ms / 1000)
        self.hop = round(sample_rate * hop_ms / 1000)
        # the next power of two: with fewer points the lowest filters would hold a single bin, at their flank
        self.fft_points = 1 << (self.window - 1).bit_length()
        with torch.device("cpu"):  # constants have values even where a model is built on the meta device
            filters = torchaudio.functional.melscale_fbanks(
                self.fft_points // 2 + 1, 0.0, sample_rate / 2, num_mels, sample_rate
            )
            window_shape = torch.hann_window(self.window, periodic=False)
        self.register_buffer("window_shape", window_shape, persistent=False)
        self.register_buffer("filters", filters, persistent=False)
        self.measured = normalize == "utterance"
        if normalize == "global":
            self.register_buffer("mean", torch.full((num_mels,), torch.nan))
            self.register_buffer("deviation", torch.full((num_mels,), torch.nan))
            self.register_load_state_dict_post_hook(_note_measured)

    def num_frames(self, samples: int | Tensor) -> int | Tensor:
        """Feature frames of so many samples, a multiple of ``stack``."""
        return (1 + samples // self.hop) // self.stack * self.stack

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config.items())

    @torch.no_grad()
    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute normalised features.

        Arguments
        ---------
        wavs : Tensor
            Waveforms in [-1, 1], shape (B, N).
        wav_lens : Tensor, optional
            Relative lengths, shape (B,); None when nothing is padded.

        Returns
        -------
        features : Tensor
            float32, shape (B, T, num_mels); zero in the padding.
        lengths : Tensor or None
            Frames of each utterance, int64, shape (B,); None when nothing is padded.

        Raises
        ------
        RuntimeError
            If ``normalize`` is "global" and nothing has been measured or loaded.
        ValueError
            If even the longest waveform is too short for ``stack`` frames.
        """
        if not self.measured:
            raise RuntimeError("LogMel(normalize='global') has no statistics yet: call measure() or load a state_dict.")
        with full_precision(wavs.device.type):
            features, lengths = self._log_mel(wavs, wav_lens)
            if self.normalize == "global":
                features = (features - self.mean) / self.deviation
            else:
                features = self._normalize_utterance(features, lengths)
            if lengths is not None:
                features = features.masked_fill(~valid_frames(lengths, features.shape[1])[..., None], 0.0)
        return features, lengths

    def _log_mel(self, wavs: Tensor, wav_lens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features before normalisation, shape (B, T, num_mels), and lengths."""
        wavs = wavs.float()
        longest, lengths = wavs.shape[1], None
        num_frames = self.num_frames(longest)
        if not num_frames:
            least = (self.stack - 1) * self.hop
            raise ValueError(f"waveforms of {longest} samples are too short for a frame: give at least {least}.")
        if wav_lens is not None:
            samples = absolute_lengths(wav_lens.to(wavs.device), longest)
            wavs = wavs.masked_fill(~valid_frames(samples, longest), 0.0)
            lengths = self.num_frames(samples)
        wavs = nn.functional.pad(wavs, (self.window // 2, self.window - self.window // 2))
        frames = wavs.unfold(1, self.window, self.hop)[:, :num_frames]
        spectrum = torch.fft.rfft(frames * self.window_shape, n=self.fft_points)
        power = spectrum.real.square() + spectrum.imag.square()
        return (power @ self.filters).clamp(min=self.floor).log(), lengths

    @staticmethod
    def _normalize_utterance(features: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            deviation, mean = torch.std_mean(features, dim=1, keepdim=True, correction=0)
        else:
            valid = valid_frames(lengths, features.shape[1])[..., None]
            count = lengths.clamp(min=1)[:, None, None]
            mean = features.where(valid, 0.0).sum(1, keepdim=True) / count
            deviation = ((features - mean).where(valid, 0.0).square().sum(1, keepdim=True) / count).sqrt()
        return (features - mean) / deviation.clamp(min=MINIMUM_DEVIATION)

    @torch.no_grad()
    def measure(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> int:
        """Set the global statistics from training audio, once.

        Arguments
        ---------
        batches : iterable of (wavs, wav_lens)
            As :meth:`forward` takes them.

        Returns
        -------
        int
            Frames measured.

        Raises
        ------
        ValueError
            If ``normalize`` is not "global", there is no frame, or a sample is not finite.

        Example
        -------
        >>> frontend = LogMel()
        >>> frontend.measure([(torch.randn(1, 16000), None)])
        100
        >>> features, _ = frontend(torch.randn(1, 16000))
        """
        if self.normalize != "global":
            raise ValueError("only LogMel(normalize='global') has statistics to measure.")
        count = 0
        total = torch.zeros(self.num_mels, dtype=torch.float64)
        squares = torch.zeros(self.num_mels, dtype=torch.float64)
        for wavs, wav_lens in batches:
            with full_precision(wavs.device.type):
                features, lengths = self._log_mel(wavs.to(self.filters.device), wav_lens)
            if lengths is None:
                features = features.flatten(0, 1)
            else:
                features = features[valid_frames(lengths, features.shape[1])]
            features = features.double().cpu()
            count += len(features)
            total += features.sum(0)
            squares += features.square().sum(0)
        if not count:
            raise ValueError("no audio to measure the global mean and variance on.")
        mean = total / count
        if not mean.isfinite().all():
            raise ValueError("samples of the audio are no numbers, or infinite: leave them out.")
        deviation = (squares / count - mean.square()).clamp(min=0.0).sqrt().clamp(min=MINIMUM_DEVIATION)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self.measured = True
        return count


def _note_measured(frontend: LogMel, _incompatible_keys: object) -> None:
    """Statistics that came with a state_dict count as measured; the NaN of an unmeasured one do not."""
    frontend.measured = bool(frontend.mean.isfinite().all())


class ConvSubsampling(nn.Module):
    """Two strided convolutions over time and frequency, then a projection: 10 ms to 40 ms frames.

    Each convolution is followed by a LayerNorm over channels and frequency, an
    activation and dropout, as the front end of SpeechBrain's BEST-RQ recipe
    (``ConvolutionFrontEnd``), but with zeros instead of reflections at the edges, so
    that no frame depends on padding.

    Arguments
    ---------
    num_mels : int
        Features of a frame; a multiple of 4.
    d_model : int
        Size of the output.
    channels : tuple of int
        Channels of the two convolutions.
    kernel_size : int
        Of both, in time and frequency; odd.
    dropout : float
        After each activation and after the projection.

    Example
    -------
    >>> subsampling = ConvSubsampling(num_mels=80, d_model=16)
    >>> subsampling(torch.randn(2, 100, 80)).shape
    torch.Size([2, 25, 16])
    """

    #: Feature frames in an encoder frame, and what their number must be a multiple of.
    factor = stack = 4

    def __init__(
        self,
        num_mels: int = 80,
        d_model: int = 576,
        channels: tuple[int, int] = (128, 32),
        kernel_size: int = 3,
        dropout: float = 0.1,
    ):
        super().__init__()
        if num_mels % 4:
            raise ValueError(f"num_mels must be a multiple of 4, not {num_mels}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}.")
        self.config = dict(
            num_mels=num_mels, d_model=d_model, channels=list(channels), kernel_size=kernel_size, dropout=dropout
        )
        first, second = channels
        self.conv1 = nn.Conv2d(1, first, kernel_size, stride=2, padding=kernel_size // 2)
        self.norm1 = nn.LayerNorm((num_mels // 2, first))
        self.conv2 = nn.Conv2d(first, second, kernel_size, stride=2, padding=kernel_size // 2)
        self.norm2 = nn.LayerNorm((num_mels // 4, second))
        self.projection = nn.Linear(num_mels // 4 * second, d_model)
        self.activation = nn.LeakyReLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Subsample.

        Arguments
        ---------
        features : Tensor
            Shape (B, 4 T, num_mels).
        lengths : Tensor, optional
            Encoder frames of each utterance, shape (B,); None when nothing is padded.

        Returns
        -------
        Tensor
            Shape (B, T, d_model).
        """
        x = features.unsqueeze(1)
        x = self._block(x, self.conv1, self.norm1, None if lengths is None else 2 * lengths)
        x = self._block(x, self.conv2, self.norm2, lengths)
        # channels last in memory: (B, T, F, C) is a view
        return self.dropout(self.projection(x.permute(0, 2, 3, 1).flatten(2)))

    def _block(self, x: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm, lengths: Tensor | None) -> Tensor:
        x = conv(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = self.dropout(self.activation(norm(x)))
        if lengths is not None:
            x = x * valid_frames(lengths, x.shape[1])[..., None, None]
        return x.permute(0, 3, 1, 2)

    def flops(self, frames: int) -> float:
        """Multiply-adds (two operations each) of a forward pass over so many encoder frames."""
        weights = (self.conv1, 2 * self.norm1.normalized_shape[0]), (self.conv2, self.norm2.normalized_shape[0])
        convolutions = sum(conv.weight.numel() * positions for conv, positions in weights)
        return 2.0 * frames * (convolutions + self.projection.weight.numel())
