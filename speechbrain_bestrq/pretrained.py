"""A pre-trained encoder for downstream recipes: frozen or fine-tuned, in the place of SpeechBrain's ``Wav2Vec2``."""

import os

import torch
from torch import Tensor, nn

from speechbrain_bestrq.artefact import load_encoder
from speechbrain_bestrq.audio import read_segment
from speechbrain_bestrq.corpora._audio_files import probe_audio
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import normalize_utterances
from speechbrain_bestrq.masking import span_mask
from speechbrain_bestrq.sources import find_encoder
from speechbrain_bestrq.windows import samples_per_frame

#: Before a source: the architecture of what follows, untrained.
RANDOM_PREFIX = "random:"
#: How far from a whole number a ratio of frame rates may be.
RATE_TOLERANCE = 1e-3
#: SpecAugment: seconds in a span, and the share of frames that is hidden.
TIME_SPAN, TIME_SHARE = 0.2, 0.05
#: The same for features (mel bins), both as shares of their number: 8 of 80 in a span.
FEATURE_SPAN, FEATURE_SHARE = 0.1, 0.1


class FeatureExtractor(nn.ModuleList):
    """What stands before the encoder's layers: a view of front end and subsampling, which owns neither.

    Arguments
    ---------
    modules : iterable of nn.Module
        As in an ``nn.ModuleList``.

    Example
    -------
    >>> convolutions = nn.Conv1d(1, 8, 3)
    >>> FeatureExtractor([convolutions])._freeze_parameters()
    >>> convolutions.weight.requires_grad, convolutions.training
    (False, False)
    """

    def _freeze_parameters(self) -> None:
        """Freeze, under the name that recipes know from the transformers library."""
        _freeze(self)


def _frame_rate(speech_encoder: SpeechEncoder, source: str | os.PathLike) -> float:
    """Frames a second."""
    step = samples_per_frame(speech_encoder)
    if not step:
        raise InputError(f"{source} is no encoder of speech: its frames are more than days apart.")
    return speech_encoder.frontend.sample_rate / step


def _freeze(module: nn.Module) -> None:
    module.requires_grad_(False).eval()


class PretrainedEncoder(nn.Module):
    """A pre-trained encoder with the signature, attributes and shapes of SpeechBrain's ``Wav2Vec2`` lobe.

    In a recipe, one YAML entry swaps the encoder (docs/swap.md has the diffs). Waveforms go
    in as they are read: the front end normalises its features itself, by the statistics of
    pre-training. Every result depends on its own utterance alone: padding, whatever
    stands in it, changes nothing, and is zero in the result.

    What is frozen has no gradient, is in eval mode whatever ``train()`` is called on (so
    without dropout and layer drop), and costs no backward pass. Parts whose
    parameters are made untrainable later (``.model.feature_extractor._freeze_parameters()``,
    SpeechBrain's ``AdaptedModel``) count as frozen too, from the next ``train()`` on.

    Arguments
    ---------
    source : str or Path
        An encoder folder; a pre-training run's output folder; a folder of the transformers
        library's (wav2vec 2.0); a Hugging Face hub id; or "random:" and one of these: the
        same architecture and the same front-end statistics with fresh weights, drawn by
        PyTorch's global generator (so by the recipe's seed).
    save_path : str or Path, optional
        Where downloads from the hub are kept; the hub's own cache if left out.
    output_norm : bool
        Normalise each utterance's output to mean 0 and variance 1, over its own frames
        and channels together.
    freeze : bool
        Freeze all of it.
    freeze_feature_extractor : bool
        Freeze what makes features of waveforms: the convolutions of wav2vec 2.0, as the lobe does; of mel
        features, which are not trained, the subsampling.
    apply_spec_augment : bool
        Hide spans of the front end's features in training, unless all is frozen: 5 % of
        the frames, in spans of 200 ms, and 10 % of the features (mel bins), in spans of a
        tenth of them, become zero, which is the mean. The spans come from PyTorch's
        global generator.
    output_all_hiddens : bool
        Return all hidden states instead of the last.
    freeze_layers : int
        Freeze so many of the lowest layers, and what is below them: front end and
        subsampling. The layers above keep their dropout and layer drop.
    output_rate : float, optional
        Frames a second of the result: a multiple of the encoder's own rate, by repetition;
        that rate (25; 50 of wav2vec 2.0) if left out.
    layer_drop : float, optional
        Probability to skip a layer in training; that of pre-training if left out.

    Attributes
    ----------
    model : SpeechEncoder
        What was loaded; ``.model.feature_extractor`` is what ``freeze_feature_extractor`` freezes,
        ``.model.encoder.layers`` are its layers.
    freeze : bool
        Whether all is frozen.
    output_dim : int
        Channels D of the result.
    num_layers : int
        Layers L.

    Raises
    ------
    InputError
        If there is no encoder at the source, or an option does not fit it.

    Example
    -------
    >>> from speechbrain_bestrq.artefact import save_encoder
    >>> from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
    >>> from speechbrain_bestrq.frontend import ConvSubsampling, LogMel
    >>> folder = save_encoder(
    ...     SpeechEncoder(
    ...         LogMel(normalize="utterance"),
    ...         ConvSubsampling(d_model=16),
    ...         ConformerEncoder(16, num_layers=2, num_heads=2, d_ffn=32),
    ...     ),
    ...     getfixture("tmp_path") / "encoder",
    ...     "# A small encoder",
    ... )
    >>> encoder = PretrainedEncoder(folder, freeze=True, output_all_hiddens=True)
    >>> encoder(torch.randn(4, 16000), torch.tensor([1.0, 0.8, 0.5, 0.5])).shape
    torch.Size([3, 4, 25, 16])
    """

    def __init__(
        self,
        source: str | os.PathLike,
        save_path: str | os.PathLike | None = None,
        output_norm: bool = False,
        freeze: bool = False,
        freeze_feature_extractor: bool = False,
        apply_spec_augment: bool = False,
        output_all_hiddens: bool = False,
        freeze_layers: int = 0,
        output_rate: float | None = None,
        layer_drop: float | None = None,
    ):
        super().__init__()
        name = os.fspath(source)
        folder = find_encoder(name.removeprefix(RANDOM_PREFIX), save_path)
        self.model = load_encoder(folder, trained=not name.startswith(RANDOM_PREFIX))
        # a plain attribute and no submodule: each parameter has one name
        front = [self.model.frontend, self.model.subsampling]
        # where the front end itself is trained, as wav2vec 2.0's, the lobe's is that alone
        extractor = FeatureExtractor(front[:1] if any(True for _ in front[0].parameters()) else front)
        object.__setattr__(self.model, "feature_extractor", extractor)
        layers = self.model.encoder.layers
        self.output_dim, self.num_layers = self.model.encoder.d_model, len(layers)
        if not 0 <= freeze_layers <= self.num_layers:
            raise InputError(f"freeze_layers is {freeze_layers}: {source} has {self.num_layers} layers.")
        if layer_drop is not None:
            if not 0 <= layer_drop < 1:
                raise InputError(f"layer_drop is {layer_drop}: give a probability, below 1.")
            self.model.encoder.layer_drop = layer_drop
        own_rate = _frame_rate(self.model, source)
        ratio = 1.0 if output_rate is None else output_rate / own_rate
        self._repeats = round(ratio)
        if self._repeats < 1 or abs(ratio - self._repeats) > RATE_TOLERANCE:
            raise InputError(
                f"output_rate is {output_rate}: this encoder has {own_rate:.6g} frames a second; give that, or a "
                "multiple."
            )
        if apply_spec_augment and not hasattr(self.model.frontend, "num_mels"):
            raise InputError(
                f"apply_spec_augment is for encoders of mel features: {source} takes waveforms; set it to False."
            )
        self._time_span = max(round(TIME_SPAN * own_rate * self.model.subsampling.factor), 1)
        self.output_norm, self.output_all_hiddens = output_norm, output_all_hiddens
        self.apply_spec_augment = apply_spec_augment
        self.freeze = freeze
        if freeze:
            _freeze(self.model)
        elif freeze_layers:
            for part in (*front, *self._below_layers(), *layers[:freeze_layers]):
                _freeze(part)
        elif freeze_feature_extractor:
            _freeze(extractor)
        self.train()

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """Set training or eval mode; what is frozen stays in eval mode.

        Arguments
        ---------
        mode : bool
            True for training.

        Returns
        -------
        PretrainedEncoder
            Itself.

        Raises
        ------
        InputError
            If all is frozen and something in it is trainable: it would not be trained.
        """
        if mode and self.freeze:
            trainable = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
            if trainable:
                raise InputError(
                    f"freeze: True runs the encoder without gradients, but {trainable[0]} is to be trained: set "
                    "freeze: False (AdaptedModel freezes all but the adapters by itself)."
                )
            mode = False
        super().train(mode)
        if mode:
            layers = [layer for layer in self.model.encoder.layers if _is_frozen(layer)]
            for part in (self.model.frontend, self.model.subsampling, *layers):
                if _is_frozen(part):
                    part.eval()
            if layers:
                for part in self._below_layers():
                    part.eval()
        return self

    def _below_layers(self) -> list[nn.Module]:
        """The encoder's parts between subsampling and the lowest layer: a Transformer's positions, say."""
        encoder = self.model.encoder
        above = {"norm"} if getattr(encoder, "norm_first", True) else set()
        return [part for name, part in encoder.named_children() if name not in {"layers", *above}]

    def forward(self, wav: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Encode waveforms.

        Arguments
        ---------
        wav : Tensor
            In [-1, 1] at the encoder's sample rate (16 kHz), shape (B, N).
        wav_lens : Tensor, optional
            Relative lengths, shape (B,); None when nothing is padded.

        Returns
        -------
        Tensor
            Shape (B, T, D): the last layer's output after the final norm; zero in the
            padding. With ``output_all_hiddens`` (L + 1, B, T, D): the first layer's
            input, then each layer's output, the last one as above.

        Raises
        ------
        ValueError
            If the waveforms have another shape, or are all too short for a frame.
        """
        if wav.ndim != 2:
            raise ValueError(f"waveforms have the shape (batch, samples), not {tuple(wav.shape)}.")
        if self.freeze:
            with torch.no_grad():
                return self._encode(wav, wav_lens)
        return self._encode(wav, wav_lens)

    def _encode(self, wav: Tensor, wav_lens: Tensor | None) -> Tensor:
        features, lengths = self.model.frontend(wav, wav_lens)
        if self.apply_spec_augment and self.training:
            features = spec_augment(features, lengths, self._time_span)
        hidden, frames = self.model.encode(features, lengths, all_states=self.output_all_hiddens)
        if self.output_norm:
            hidden = normalize_utterances(hidden, None if lengths is None else frames)
        return hidden if self._repeats == 1 else hidden.repeat_interleave(self._repeats, dim=-2)

    def num_frames(self, samples: int | Tensor) -> int | Tensor:
        """Frames of the result for so many samples."""
        return self.model.num_frames(samples) * self._repeats

    @torch.no_grad()
    def encode_file(self, path: str | os.PathLike) -> Tensor:
        """Encode an audio file of any rate and number of channels, in eval mode and without gradient.

        Arguments
        ---------
        path : str or Path
            Of a format that libsndfile reads (wav, flac, ogg, opus, mp3...).

        Returns
        -------
        Tensor
            Shape (1, T, D), or (L + 1, 1, T, D): see :meth:`forward`.

        Raises
        ------
        InputError
            If the file cannot be read.
        """
        rate = self.model.frontend.sample_rate
        probe = probe_audio(os.fspath(path))
        if probe.problem:
            raise InputError(f"{path} cannot be encoded: {probe.problem}; give a wav, flac, ogg or mp3.")
        samples = round(probe.duration * rate)
        if not self.model.num_frames(samples):
            raise InputError(f"{path} has {samples / rate:.3f} s of audio, too short for a frame: leave it out.")
        wav = torch.from_numpy(read_segment(os.fspath(path), 0, samples, rate, "mend it"))
        training = self.training
        self.eval()
        try:
            return self(wav[None].to(next(self.model.parameters()).device))
        finally:
            self.train(training)


def _is_frozen(module: nn.Module) -> bool:
    """Say whether a module has parameters and trains none of them."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def spec_augment(features: Tensor, lengths: Tensor | None = None, time_span: int = 20) -> Tensor:
    """Hide spans of frames and of features behind zeros (SpecAugment, arXiv 1904.08779).

    Arguments
    ---------
    features : Tensor
        Normalised, shape (B, T, F).
    lengths : Tensor, optional
        Frames of each utterance, shape (B,); None when nothing is padded.
    time_span : int
        Frames in a span.

    Returns
    -------
    Tensor
        Shape (B, T, F). The spans come from the global generator of the features' device.

    Example
    -------
    >>> spec_augment(torch.randn(2, 100, 80)).shape
    torch.Size([2, 100, 80])
    """
    batch, frames, channels = features.shape
    if lengths is None:
        lengths = torch.full((batch,), frames, device=features.device)
    widths = torch.full((batch,), channels, device=features.device)
    feature_span = max(round(FEATURE_SPAN * channels), 1)
    in_time = span_mask(lengths, frames, TIME_SHARE / time_span, time_span, min_spans=0)
    in_features = span_mask(widths, channels, FEATURE_SHARE / feature_span, feature_span, min_spans=0)
    return features.masked_fill(in_time[:, :, None] | in_features[:, None], 0.0)
