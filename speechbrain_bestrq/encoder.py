"""Encoders: sequences of frames in, the hidden states of every layer out."""

import torch
from torch import Tensor, nn

from speechbrain_bestrq.attention import RelativeAttention, RotaryAttention
from speechbrain_bestrq.convolution import FrameConvolution
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel, valid_frames

_ACTIVATIONS = {"gelu": nn.GELU, "swish": nn.SiLU}


class FeedForward(nn.Sequential):
    """LayerNorm, two linear layers with an activation between, dropout after each.

    Arguments
    ---------
    d_model, d_ffn : int
        Sizes outside and inside.
    dropout : float
        After the activation and at the end.
    activation : str
        "gelu" or "swish".

    Example
    -------
    >>> FeedForward(8, 32, 0.1)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, d_model: int, d_ffn: int, dropout: float, activation: str = "gelu"):
        super().__init__(
            nn.LayerNorm(d_model),
            nn.Linear(d_model, d_ffn),
            _ACTIVATIONS[activation](),
            nn.Dropout(dropout),
            nn.Linear(d_ffn, d_model),
            nn.Dropout(dropout),
        )


class ConvolutionModule(nn.Module):
    """The Conformer's convolution: gated pointwise, depthwise, LayerNorm, pointwise.

    LayerNorm stands where the Conformer (arXiv 2005.08100) has BatchNorm, as in
    SpeechBrain: no utterance depends on the others.

    Arguments
    ---------
    d_model : int
        Channels.
    kernel_size : int
        Of the depthwise convolution, frames; odd.
    dropout : float
        At the end.
    activation : str
        "gelu" or "swish".

    Example
    -------
    >>> ConvolutionModule(8, 3, 0.1)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, d_model: int, kernel_size: int, dropout: float, activation: str = "gelu"):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}.")
        self.norm = nn.LayerNorm(d_model)
        self.gate = nn.Linear(d_model, 2 * d_model)
        self.depthwise = FrameConvolution(d_model, kernel_size, groups=d_model)
        self.inner_norm = nn.LayerNorm(d_model)
        self.activation = _ACTIVATIONS[activation]()
        self.out = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Convolve (B, T, d_model); ``valid`` (B, T) marks the frames that others may see."""
        x = nn.functional.glu(self.gate(self.norm(x)), dim=-1)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)
        x = self.depthwise(x)
        return self.dropout(self.out(self.activation(self.inner_norm(x))))


class ConformerLayer(nn.Module):
    """Half a feed-forward, self-attention, convolution, half a feed-forward, LayerNorm.

    Arguments
    ---------
    d_model, num_heads, d_ffn, kernel_size : int
        Sizes.
    dropout : float
        Everywhere.
    attention : str
        "rotary" or "relative".
    activation : str
        "gelu" or "swish".

    Example
    -------
    >>> ConformerLayer(8, 2, 32, 3, 0.1, "rotary")(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ffn: int,
        kernel_size: int,
        dropout: float,
        attention: str,
        activation: str = "gelu",
    ):
        super().__init__()
        kinds = {"rotary": RotaryAttention, "relative": RelativeAttention}
        if attention not in kinds:
            raise ValueError(f"attention is one of {', '.join(kinds)}, not {attention!r}.")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(_ACTIVATIONS)}, not {activation!r}.")
        self.feed_forward1 = FeedForward(d_model, d_ffn, dropout, activation)
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = kinds[attention](d_model, num_heads, dropout)
        self.convolution = ConvolutionModule(d_model, kernel_size, dropout, activation)
        self.feed_forward2 = FeedForward(d_model, d_ffn, dropout, activation)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Transform (B, T, d_model); ``valid`` (B, T) marks the frames that others may see."""
        x = x + 0.5 * self.feed_forward1(x)
        x = x + self.attention(self.attention_norm(x), valid)
        x = x + self.convolution(x, valid)
        return self.norm(x + 0.5 * self.feed_forward2(x))


def _skip(x: Tensor, layer: nn.Module) -> Tensor:
    """Give x; the layer's parameters get a gradient of zero, as they would from any sum over none of their values.

    So every parameter is in the graph at every step, compiled or not, and DDP, which
    waits for each, needs no search for unused ones.
    """
    return x + sum(parameter[:0].sum() for parameter in layer.parameters())


def share_of_layers(encoder: nn.Module) -> float:
    """Tell which share of an encoder's layers :func:`run_layers` does not skip, on average."""
    return 1.0 - encoder.layer_drop if encoder.training else 1.0


def run_layers(layers: nn.ModuleList, x: Tensor, valid: Tensor | None = None, layer_drop: float = 0.0) -> list[Tensor]:
    """Run layers one after the other, and skip some of those that are in training mode.

    Which ones PyTorch's global generator draws, once for all layers: so the others' fate
    does not hang on which of them are frozen. A layer in eval mode, as a frozen one is, is
    never skipped.

    Arguments
    ---------
    layers : nn.ModuleList
        Each maps (B, T, D) and ``valid`` to (B, T, D).
    x : Tensor
        Shape (B, T, D).
    valid : Tensor, optional
        Boolean, shape (B, T): the frames that others may see; None for all.
    layer_drop : float
        Probability to skip a layer. Its hidden state is then its input, and its parameters
        get a gradient of zero, so that DDP need not search for unused ones.

    Returns
    -------
    list of Tensor
        len(layers) + 1 hidden states of shape (B, T, D): the input, and each layer's output.

    Example
    -------
    >>> layers = nn.ModuleList(ConformerLayer(8, 2, 32, 3, 0.1, "rotary") for _ in range(3))
    >>> states = run_layers(layers, torch.randn(2, 5, 8), layer_drop=0.5)
    >>> len(states), states[-1].shape
    (4, torch.Size([2, 5, 8]))
    """
    kept = [True] * len(layers)
    if layer_drop and any(layer.training for layer in layers):
        kept = draw_kept(len(layers), layer_drop)
    # a GPU's autocast ends each layer in a norm, or a sum, in float32; the first takes that too, or its sums would be
    # in half precision, and --compile would compile each shape twice
    states = [x.float() if torch.is_autocast_enabled("cuda") else x]
    for layer, keep in zip(layers, kept, strict=True):
        states.append(layer(states[-1], valid) if keep or not layer.training else _skip(states[-1], layer))
    return states


def draw_kept(layers: int, layer_drop: float) -> list[bool]:
    """Draw which of so many layers to run; on the host, whatever device they are on, so that nothing waits for it."""
    return (torch.rand(layers, device="cpu") >= layer_drop).tolist()


class ConformerEncoder(nn.Module):
    """Conformer layers (arXiv 2005.08100) under a final LayerNorm.

    Arguments
    ---------
    d_model : int
        Size of the hidden states.
    num_layers, num_heads, d_ffn : int
        Layers, attention heads, size inside the feed-forward modules.
    kernel_size : int
        Of the depthwise convolutions, frames; odd.
    dropout : float
        Everywhere.
    layer_drop : float
        Probability to skip a layer in training. A skipped layer's hidden state is
        its input: their number stays the same.
    attention : str
        "rotary": rotary positions in PyTorch's fused attention. "relative":
        Transformer-XL's, equal to SpeechBrain's ``ConformerEncoder`` with
        ``RelPosMHAXL`` (see :func:`speechbrain_bestrq.convert.conformer_from_speechbrain`).
    activation : str
        "gelu", or "swish" as in the Conformer's paper.

    Example
    -------
    >>> encoder = ConformerEncoder(d_model=16, num_layers=3, num_heads=2, d_ffn=32, kernel_size=3)
    >>> states = encoder(torch.randn(2, 10, 16), lengths=torch.tensor([10, 7]))
    >>> len(states), states[-1].shape
    (4, torch.Size([2, 10, 16]))
    """

    def __init__(
        self,
        d_model: int = 576,
        num_layers: int = 12,
        num_heads: int = 9,
        d_ffn: int = 2048,
        kernel_size: int = 31,
        dropout: float = 0.1,
        layer_drop: float = 0.0,
        attention: str = "rotary",
        activation: str = "gelu",
    ):
        super().__init__()
        self.config = dict(
            d_model=d_model,
            num_layers=num_layers,
            num_heads=num_heads,
            d_ffn=d_ffn,
            kernel_size=kernel_size,
            dropout=dropout,
            layer_drop=layer_drop,
            attention=attention,
            activation=activation,
        )
        self.d_model, self.layer_drop = d_model, layer_drop
        self.layers = nn.ModuleList(
            ConformerLayer(d_model, num_heads, d_ffn, kernel_size, dropout, attention, activation)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model, eps=1e-6)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """Encode.

        Arguments
        ---------
        x : Tensor
            Shape (B, T, d_model).
        lengths : Tensor, optional
            Valid frames of each utterance, shape (B,); None when nothing is padded,
            which lets attention run without a mask.

        Returns
        -------
        list of Tensor
            num_layers + 1 hidden states of shape (B, T, d_model): the input, each
            layer's output, the last one after the final norm. What stands in the
            padding means nothing.
        """
        # a row of attention without any key would be NaN
        valid = None if lengths is None else valid_frames(lengths.clamp(min=1), x.shape[1])
        states = run_layers(self.layers, x, valid, self.layer_drop)
        states[-1] = self.norm(states[-1])
        return states

    def flops(self, utterances: int, frames: int) -> float:
        """Multiply-adds (two operations each) of a forward pass over (utterances, frames); in training on average."""
        matrices = sum(weight.numel() for weight in self.parameters() if weight.ndim > 1)
        attention = utterances * len(self.layers) * 2 * frames**2 * self.d_model
        if self.config["attention"] == "relative":
            distances, projection = 2 * frames - 1, self.d_model**2
            matrices -= len(self.layers) * projection  # not for each frame, but once for each distance,
            attention += len(self.layers) * distances * projection
            attention += utterances * len(self.layers) * frames * distances * self.d_model  # and with each query
        return 2.0 * share_of_layers(self) * (utterances * frames * matrices + attention)


class SpeechEncoder(nn.Module):
    """Waveforms in, hidden states out: what pre-training trains and downstream tasks take.

    Arguments
    ---------
    frontend : LogMel
        Features.
    subsampling : ConvSubsampling
        Feature frames to encoder frames.
    encoder : nn.Module
        Maps (B, T, d_model) and lengths to a list of hidden states.

    Example
    -------
    >>> speech_encoder = SpeechEncoder(
    ...     LogMel(normalize="utterance"),
    ...     ConvSubsampling(d_model=16),
    ...     ConformerEncoder(d_model=16, num_layers=2, num_heads=2, d_ffn=32),
    ... )
    >>> hidden, lengths = speech_encoder(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> hidden.shape, lengths.tolist()
    (torch.Size([3, 2, 25, 16]), [25, 12])
    """

    def __init__(self, frontend: LogMel, subsampling: ConvSubsampling, encoder: nn.Module):
        super().__init__()
        if frontend.stack != subsampling.stack:
            raise ValueError(
                f"the front end's stack must be the subsampling's {subsampling.stack}, not {frontend.stack}."
            )
        self.frontend, self.subsampling, self.encoder = frontend, subsampling, encoder

    def num_frames(self, samples: int | Tensor) -> int | Tensor:
        """Encoder frames of so many samples."""
        return self._encoder_frames(self.frontend.num_frames(samples))

    def _encoder_frames(self, features: int | Tensor) -> int | Tensor:
        """Encoder frames of so many feature frames: rounded up, where the front end does not cut to whole ones."""
        return -(-features // self.subsampling.factor)

    def encode_features(self, features: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """Encode features (B, 4 T, F); ``lengths`` counts encoder frames, None when nothing is padded."""
        return self._encode(features, None if lengths is None else lengths * self.subsampling.factor, lengths)

    def _encode(self, features: Tensor, feature_lengths: Tensor | None, lengths: Tensor | None) -> list[Tensor]:
        units = None if feature_lengths is None else feature_lengths // self.frontend.stack
        return self.encoder(self.subsampling(features, units), lengths)

    def encode(self, features: Tensor, lengths: Tensor | None = None, all_states: bool = True) -> tuple[Tensor, Tensor]:
        """Encode what the front end gives; :meth:`forward` is the front end, then this.

        Arguments
        ---------
        features : Tensor
            Shape (B, T, F).
        lengths : Tensor, optional
            Feature frames of each utterance, shape (B,); None when nothing is padded.
        all_states : bool
            False gives the last hidden states alone: without copies of the others.

        Returns
        -------
        hidden, lengths : Tensor
            As those of :meth:`forward`; ``hidden`` without its first axis if ``all_states`` is False.
        """
        frames = None if lengths is None else self._encoder_frames(lengths)
        states = self._encode(features, lengths, frames)
        hidden = torch.stack(states) if all_states else states[-1]
        longest = hidden.shape[-2]
        if frames is None:
            return hidden, torch.full((len(features),), longest, device=hidden.device)
        return hidden.masked_fill(~valid_frames(frames, longest)[..., None], 0.0), frames

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode waveforms.

        Arguments
        ---------
        wavs : Tensor
            In [-1, 1], shape (B, N).
        wav_lens : Tensor, optional
            Relative lengths, shape (B,); None when nothing is padded.

        Returns
        -------
        hidden : Tensor
            Shape (L + 1, B, T, d_model): the input of the first layer and each
            layer's output, the last one after the final norm; zero in the padding.
        lengths : Tensor
            Frames of each utterance, int64, shape (B,).
        """
        return self.encode(*self.frontend(wavs, wav_lens))
