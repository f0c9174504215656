"""The Transformer of wav2vec 2.0 (arXiv 2006.11477): positions by a convolution or sinusoids, norms before or after."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from speechbrain_bestrq.attention import attend
from speechbrain_bestrq.convolution import FrameConvolution
from speechbrain_bestrq.encoder import run_layers, share_of_layers
from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.tables import TableModule

#: Standard deviation of the initial weights of every linear layer.
INITIAL_DEVIATION = 0.02


class SelfAttention(nn.Module):
    """Multi-head self-attention without positions, by PyTorch's fused kernel.

    Arguments
    ---------
    d_model : int
        Size of input and output.
    num_heads : int
        Heads.
    dropout : float
        Of the attention weights.

    Example
    -------
    >>> SelfAttention(16, 2)(torch.randn(3, 10, 16)).shape
    torch.Size([3, 10, 16])
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads, not {d_model} and {num_heads}.")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attend from (B, T, d_model) to the frames of it that ``valid`` (B, T) marks; None for all."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        attended = attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if valid is None else valid[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward module, with a LayerNorm before or after each (arXiv 1706.03762).

    Arguments
    ---------
    d_model, num_heads, d_ffn : int
        Sizes.
    dropout : float
        At the end of either module.
    attention_dropout, activation_dropout : float
        Of the attention weights, and after the activation.
    norm : str
        "pre" or "post".
    eps : float
        Of the norms.

    Example
    -------
    >>> TransformerLayer(16, 2, 32)(torch.randn(3, 10, 16)).shape
    torch.Size([3, 10, 16])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ffn: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        norm: str = "post",
        eps: float = 1e-5,
    ):
        super().__init__()
        self.norm_first = norm == "pre"
        self.attention = SelfAttention(d_model, num_heads, attention_dropout)
        self.attention_norm = nn.LayerNorm(d_model, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ffn),
            nn.GELU(),
            nn.Dropout(activation_dropout),
            nn.Linear(d_ffn, d_model),
            nn.Dropout(dropout),
        )
        self.feed_forward_norm = nn.LayerNorm(d_model, eps=eps)
        for module in (self.attention.qkv, self.attention.out, self.feed_forward[0], self.feed_forward[3]):
            nn.init.normal_(module.weight, std=INITIAL_DEVIATION)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Transform (B, T, d_model); ``valid`` (B, T) marks the frames that others may see."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), valid))
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, valid)))
        return self.feed_forward_norm(x + self.feed_forward(x))


class ConvolutionalPositions(nn.Module):
    """Relative positions by a wide grouped convolution with weight normalisation (arXiv 2006.11477, section 2).

    Arguments
    ---------
    d_model : int
        Channels.
    kernel_size : int
        Frames; of an even kernel the last frame of the result is dropped.
    groups : int
        Of channels.

    Example
    -------
    >>> ConvolutionalPositions(16, 8, 4)(torch.randn(3, 10, 16)).shape
    torch.Size([3, 10, 16])
    """

    def __init__(self, d_model: int, kernel_size: int = 128, groups: int = 16):
        super().__init__()
        convolution = FrameConvolution(d_model, kernel_size, groups)
        nn.init.normal_(convolution.weight, std=2.0 / math.sqrt(kernel_size * d_model))
        nn.init.zeros_(convolution.bias)
        self.convolution = weight_norm(convolution, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute positions of (B, T, d_model), in which padding must be zero."""
        return nn.functional.gelu(self.convolution(x)[:, : x.shape[1]])

    def flops(self, frames: int) -> float:
        """Multiply-adds (two operations each) of a forward pass over so many frames."""
        return 2.0 * frames * self.convolution.parametrizations.weight.original1.numel()


class SinusoidalPositions(TableModule):
    """Absolute positions as sines and cosines (arXiv 1706.03762, section 3.5); without parameters.

    Arguments
    ---------
    d_model : int
        Channels; even.
    table_frames : int
        Positions tabulated at first; the table grows when a longer input comes.

    Example
    -------
    >>> SinusoidalPositions(16)(torch.randn(3, 10, 16)).shape
    torch.Size([1, 10, 16])
    """

    tables = ("table",)

    def __init__(self, d_model: int, table_frames: int = 3000):
        super().__init__()
        if d_model % 2:
            raise ValueError(f"d_model must be even for sinusoidal positions, not {d_model}.")
        with torch.device("cpu"):  # constants have values even where a model is built on the meta device
            self.table = torch.empty(0, d_model)
            self.tabulate(table_frames)

    def _tabulate(self, frames: int) -> None:
        device, d_model = self.table.device, self.table.shape[1]
        rates = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32, device=device) * -(math.log(1e4) / d_model))
        angles = torch.arange(frames, dtype=torch.float32, device=device)[:, None] * rates
        self.table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Give the positions of (B, T, d_model)."""
        if x.shape[1] > len(self.table):
            self.tabulate(2 * x.shape[1])
        return self.table[None, : x.shape[1]].to(x.device)

    def flops(self, frames: int) -> float:
        """Nothing is multiplied."""
        return 0.0


class TransformerEncoder(nn.Module):
    """Positions, then Transformer layers, as in wav2vec 2.0 (arXiv 2006.11477).

    Arguments
    ---------
    d_model : int
        Size of the hidden states.
    num_layers, num_heads, d_ffn : int
        Layers, attention heads, size inside the feed-forward modules.
    dropout : float
        Before the first layer and at the end of every module.
    attention_dropout, activation_dropout : float
        Of the attention weights, and inside the feed-forward modules.
    layer_drop : float
        Probability to skip a layer in training. A skipped layer's hidden state is
        its input: their number stays the same.
    norm : str
        "post": norms behind each module, and one before the first layer (wav2vec 2.0
        base); "pre": before each module, and one behind the last layer (its large
        models; transformers' ``do_stable_layer_norm``).
    positions : str
        "convolution": :class:`ConvolutionalPositions`; "sinusoidal":
        :class:`SinusoidalPositions`, as SpeechBrain's wav2vec 2.0 recipe has them.
    position_kernel_size, position_groups : int
        Of the convolution.
    eps : float
        Of the norms.

    Example
    -------
    >>> encoder = TransformerEncoder(d_model=16, num_layers=3, num_heads=2, d_ffn=32, position_groups=4)
    >>> states = encoder(torch.randn(2, 10, 16), lengths=torch.tensor([10, 7]))
    >>> len(states), states[-1].shape
    (4, torch.Size([2, 10, 16]))
    """

    def __init__(
        self,
        d_model: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        d_ffn: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        layer_drop: float = 0.0,
        norm: str = "post",
        positions: str = "convolution",
        position_kernel_size: int = 128,
        position_groups: int = 16,
        eps: float = 1e-5,
    ):
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm is 'pre' or 'post', not {norm!r}.")
        if positions not in ("convolution", "sinusoidal"):
            raise ValueError(f"positions is 'convolution' or 'sinusoidal', not {positions!r}.")
        self.config = dict(
            d_model=d_model,
            num_layers=num_layers,
            num_heads=num_heads,
            d_ffn=d_ffn,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            layer_drop=layer_drop,
            norm=norm,
            positions=positions,
            position_kernel_size=position_kernel_size,
            position_groups=position_groups,
            eps=eps,
        )
        self.d_model, self.layer_drop, self.norm_first = d_model, layer_drop, norm == "pre"
        if positions == "convolution":
            self.positions = ConvolutionalPositions(d_model, position_kernel_size, position_groups)
        else:
            self.positions = SinusoidalPositions(d_model)
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(d_model, num_heads, d_ffn, dropout, attention_dropout, activation_dropout, norm, eps)
            for _ in range(num_layers)
        )

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
            num_layers + 1 hidden states of shape (B, T, d_model): the input of the first
            layer, each layer's output, the last one after the final norm of a "pre"
            encoder. What stands in the padding means nothing.
        """
        valid = None
        if lengths is not None:
            # a row of attention without any key would be NaN
            valid = valid_frames(lengths.clamp(min=1), x.shape[1])
            x = x.masked_fill(~valid[..., None], 0.0)
        x = x + self.positions(x)
        x = self.dropout(x if self.norm_first else self.norm(x))
        states = run_layers(self.layers, x, valid, self.layer_drop)
        if self.norm_first:
            states[-1] = self.norm(states[-1])
        return states

    def flops(self, utterances: int, frames: int) -> float:
        """Multiply-adds (two operations each) of a forward pass over (utterances, frames); in training on average."""
        matrices = sum(weight.numel() for weight in self.layers.parameters() if weight.ndim > 1)
        attention = len(self.layers) * 2 * frames * self.d_model
        tokens = utterances * frames
        return 2.0 * share_of_layers(self) * tokens * (matrices + attention) + self.positions.flops(tokens)
