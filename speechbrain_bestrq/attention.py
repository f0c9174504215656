"""Self-attention with positions: rotary, or relative as in Transformer-XL."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention

from speechbrain_bestrq.tables import TableModule

#: Up to so many frames, in bfloat16 or float16 on a CPU, attention is plain products: the fused kernel takes 1.5 to
#: 3.7 times as long there (docs/LOG.md). Of longer sequences the weights would need much memory.
LONGEST_PLAIN = 512
#: On a GPU, all but cuDNN's: on an H100 or later PyTorch prefers those, of which some round a dropout of 0.1 to a
#: multiple of 1/16 and some give gradients that are no numbers, and which plan anew for each shape (docs/LOG.md).
GPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def _not_by_cudnn() -> Iterator[None]:
    """As ``sdpa_kernel(GPU_KERNELS)`` in a hundredth of its time, but nothing that can be compiled."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention, by the fastest kernel that is right.

    Arguments
    ---------
    query, key, value : Tensor
        Shape (B, H, T, d_head).
    attn_mask : Tensor, optional
        Boolean, True for keys that may be attended to, or what is added to the scores; broadcast to
        (B, H, T, T).
    dropout_p : float
        Of the weights.
    scale : float, optional
        Of the products; ``1 / sqrt(d_head)`` if left out.

    Returns
    -------
    Tensor
        Shape (B, H, T, d_head).

    Example
    -------
    >>> attend(*torch.randn(3, 1, 2, 5, 8)).shape
    torch.Size([1, 2, 5, 8])
    """
    plain = query.device.type == "cpu" and query.dtype.itemsize == 2 and key.shape[-2] <= LONGEST_PLAIN
    if query.device.type == "cuda":
        with sdpa_kernel(GPU_KERNELS) if torch.compiler.is_compiling() else _not_by_cudnn():
            return scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale
            )
    if not plain:
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return drop(scores.softmax(-1), dropout_p) @ value


class RotaryAttention(TableModule):
    """Multi-head self-attention with rotary positions (RoFormer, arXiv 2104.09864).

    Queries and keys are rotated by their frame's position, so that their product
    depends on the distance alone; the rest is PyTorch's fused attention, scaled by
    ``1 / sqrt(d_head)``, which needs no (B, H, T, T) tensor.

    Arguments
    ---------
    d_model : int
        Size of input and output.
    num_heads : int
        Heads; ``d_model / num_heads`` must be even.
    dropout : float
        Of the attention weights.
    base : float
        Of the rotation frequencies.
    table_frames : int
        Positions tabulated at first; the table grows when a longer input comes.

    Example
    -------
    >>> RotaryAttention(16, 2)(torch.randn(3, 10, 16)).shape
    torch.Size([3, 10, 16])
    """

    tables = ("cos", "sin")

    def __init__(
        self, d_model: int, num_heads: int, dropout: float = 0.0, base: float = 10000.0, table_frames: int = 2048
    ):
        super().__init__()
        if d_model % num_heads or d_model // num_heads % 2:
            raise ValueError(f"d_model / num_heads must be an even integer, not {d_model} / {num_heads}.")
        self.num_heads, self.d_head = num_heads, d_model // num_heads
        self.dropout, self.base = dropout, base
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model)
        with torch.device("cpu"):  # constants have values even where a model is built on the meta device
            self.cos = self.sin = torch.empty(0)
            self.tabulate(table_frames)

    def _tabulate(self, frames: int) -> None:
        frequencies = self.base ** -(torch.arange(0, self.d_head, 2, device=self.cos.device).double() / self.d_head)
        angles = torch.arange(frames, device=self.cos.device)[:, None] * frequencies
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotate the pairs (i, i + d_head / 2) of (B, T, H, d_head)."""
        frames = x.shape[1]
        # a replica of torch.nn.DataParallel has the tables of the first device
        cos, sin = (table[:frames, None].to(x.device) for table in (self.cos, self.sin))
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attend.

        Arguments
        ---------
        x : Tensor
            Shape (B, T, d_model).
        valid : Tensor, optional
            Keys that may be attended to, boolean, shape (B, T); None for all.

        Returns
        -------
        Tensor
            Shape (B, T, d_model).
        """
        if x.shape[1] > len(self.cos):
            self.tabulate(2 * x.shape[1])
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.d_head)).unbind(2)
        attended = attend(
            self._rotate(query).transpose(1, 2),
            self._rotate(key).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if valid is None else valid[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class RelativeAttention(TableModule):
    """Multi-head self-attention with relative positions (Transformer-XL, arXiv 1901.02860).

    As SpeechBrain's ``RelPosMHAXL``, with its scale ``1 / sqrt(d_model)`` and its
    position table (past and future frames at one distance share a row): with its
    weights the output is the same. The scores of content come from the fused
    attention; only those of position are a (B, H, T, T) tensor.

    Arguments
    ---------
    d_model : int
        Size of input and output.
    num_heads : int
        Heads.
    dropout : float
        Of the attention weights.
    table_frames : int
        Positions tabulated at first; the table grows when a longer input comes.

    Example
    -------
    >>> RelativeAttention(16, 2)(torch.randn(3, 10, 16)).shape
    torch.Size([3, 10, 16])
    """

    tables = ("table",)

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.0, table_frames: int = 2048):
        super().__init__()
        if d_model % num_heads or d_model % 2:
            raise ValueError(f"d_model must be even and a multiple of num_heads, not {d_model} and {num_heads}.")
        self.num_heads, self.d_head, self.dropout = num_heads, d_model // num_heads, dropout
        self.scale = 1.0 / math.sqrt(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.position = nn.Linear(d_model, d_model, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, self.d_head))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, self.d_head))
        self.out = nn.Linear(d_model, d_model)
        with torch.device("cpu"):  # constants have values even where a model is built on the meta device
            self.table = torch.empty(0, d_model)
            self.tabulate(table_frames)

    def _tabulate(self, frames: int) -> None:
        """Sinusoids of the distances frames - 1 ... 0 ... frames - 1, shape (2 frames - 1, d_model)."""
        device, d_model = self.table.device, self.table.shape[1]
        rates = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32, device=device) * -(math.log(1e4) / d_model))
        angles = torch.arange(1 - frames, frames, dtype=torch.float32, device=device).abs()[:, None] * rates
        self.table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attend: see :meth:`RotaryAttention.forward`."""
        frames, longest = x.shape[1], (len(self.table) + 1) // 2
        if frames > longest:
            longest = 2 * frames
            self.tabulate(longest)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.d_head)).unbind(2)
        position = self.position(self.table[longest - frames : longest - 1 + frames].to(x.device))
        position = position.unflatten(-1, (self.num_heads, self.d_head))
        biased = (query + self.position_bias.to(query.dtype)) * self.scale
        bias = _shift(torch.einsum("bthd,phd->bhtp", biased, position))
        if valid is not None:
            bias = bias.masked_fill(~valid[:, None, None], -torch.inf)
        attended = attend(
            (query + self.content_bias.to(query.dtype)).transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        return self.out(attended.transpose(1, 2).flatten(2))


def _shift(by_distance: Tensor) -> Tensor:
    """Turn scores by distance (B, H, T, 2 T - 1) into scores by key (B, H, T, T).

    Row t wants columns T - 1 - t ... 2 T - 2 - t: with one column put before,
    reading the same memory in rows of T moves each row by one more.
    """
    batch, heads, frames, distances = by_distance.shape
    moved = pad(by_distance, (1, 0)).view(batch, heads, distances + 1, frames)
    return moved[:, :, 1:].reshape(batch, heads, frames, distances)[..., :frames]
