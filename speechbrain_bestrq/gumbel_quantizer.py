"""wav2vec 2.0's targets: product quantization that is learned through Gumbel noise (arXiv 2006.11477, section 2)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from speechbrain_bestrq.precision import full_precision


class Quantized(NamedTuple):
    """What the quantizer makes of some frames."""

    vectors: Tensor
    """The chosen code vectors of all groups, one behind the other, float32, shape (K, code_dim)."""
    codes: Tensor
    """Which ones, int64, shape (K, num_groups)."""
    probabilities: Tensor
    """Of all codes, without noise or temperature, float32, shape (K, num_groups, codebook_size)."""


class GumbelQuantizer(nn.Module):
    """Choose one code of each group; the gradient goes through a softmax with Gumbel noise (arXiv 1611.01144).

    In training the greatest of the noisy scores is chosen, and the gradient is that of
    their softmax at the temperature of the update (straight through); else the
    greatest score. The vectors are looked up; no product of frames, codes and dimensions
    is ever built.

    Arguments
    ---------
    input_dim : int
        Size of the frames.
    code_dim : int
        Size of the result; each group has ``code_dim / num_groups`` of it.
    codebook_size : int
        Codes V in a group.
    num_groups : int
        Groups G.
    first_temperature, last_temperature, temperature_decay : float
        The temperature of update u, counted from 1, is
        ``max(first * decay ** (u - 1), last)``.

    Example
    -------
    >>> quantizer = GumbelQuantizer(32, code_dim=16, codebook_size=8)
    >>> quantized = quantizer(torch.randn(5, 32))
    >>> quantized.vectors.shape, quantized.codes.shape, quantized.probabilities.shape
    (torch.Size([5, 16]), torch.Size([5, 2]), torch.Size([5, 2, 8]))
    >>> quantizer.start_update(100001)
    >>> round(quantizer.temperature, 4)
    1.2131
    """

    def __init__(
        self,
        input_dim: int = 512,
        code_dim: int = 256,
        codebook_size: int = 320,
        num_groups: int = 2,
        first_temperature: float = 2.0,
        last_temperature: float = 0.5,
        temperature_decay: float = 0.999995,
    ):
        super().__init__()
        if code_dim % num_groups:
            raise ValueError(f"code_dim must be a multiple of num_groups, not {code_dim} and {num_groups}.")
        if not (first_temperature >= last_temperature > 0.0 and 0.0 < temperature_decay <= 1.0):
            raise ValueError(
                "temperatures must fall to above 0 by a decay in (0, 1], not "
                f"{first_temperature} to {last_temperature} by {temperature_decay}."
            )
        self.input_dim, self.code_dim = input_dim, code_dim
        self.codebook_size, self.num_groups = codebook_size, num_groups
        self.first_temperature, self.last_temperature = first_temperature, last_temperature
        self.temperature_decay = temperature_decay
        self.projection = nn.Linear(input_dim, num_groups * codebook_size)
        nn.init.normal_(self.projection.weight, std=1.0)
        nn.init.zeros_(self.projection.bias)
        self.codebooks = nn.Parameter(torch.rand(num_groups, codebook_size, code_dim // num_groups))
        self.start_update(1)

    def start_update(self, update: int) -> None:
        """Set :attr:`temperature` to that of an update, counted from 1."""
        decayed = self.first_temperature * self.temperature_decay ** (update - 1)
        self.temperature = max(decayed, self.last_temperature)

    def draw_noise(self, frames: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw standard Gumbel noise, shape (frames, num_groups, codebook_size), on the device of the weights."""
        weight = self.projection.weight
        noise = torch.empty(frames, self.num_groups, self.codebook_size, device=weight.device)
        # an exponential draw may round to zero, whose logarithm is infinite
        return -noise.exponential_(generator=generator).clamp_(min=torch.finfo(noise.dtype).tiny).log_()

    def forward(
        self, frames: Tensor, gumbel: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Quantized:
        """Quantize.

        Arguments
        ---------
        frames : Tensor
            Shape (K, input_dim).
        gumbel : Tensor, optional
            Noise, shape (K, num_groups, codebook_size), for training; drawn if left out.
        generator : torch.Generator, optional
            Draws the noise; on the device of ``frames``.

        Returns
        -------
        Quantized
        """
        # which code is nearest depends on small differences of large scores: in bf16 one in a hundred is another
        with full_precision(frames.device.type):
            scores = self.projection(frames.float()).unflatten(-1, (self.num_groups, self.codebook_size))
        probabilities = scores.softmax(-1)
        if not self.training:
            codes = scores.argmax(-1)
            return Quantized(_look_up(self.codebooks, codes), codes, probabilities)
        if gumbel is None:
            gumbel = self.draw_noise(len(frames), generator)
        choice = ((scores + gumbel) / self.temperature).softmax(-1)
        codes = choice.argmax(-1)
        return Quantized(_StraightThrough.apply(choice, self.codebooks, codes), codes, probabilities)


def _look_up(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Vectors of codes (K, G) in codebooks (G, V, D), shape (K, G D)."""
    groups, size, dim = codebooks.shape
    offsets = torch.arange(groups, device=codes.device) * size
    return codebooks.flatten(0, 1).index_select(0, (codes + offsets).flatten()).view(len(codes), groups * dim)


class _StraightThrough(torch.autograd.Function):
    """Look the codes up; the gradient is that of the product of the choice (K, G, V) with the codebooks.

    The product of the backward pass is one of TF32 where that is switched on.
    """

    @staticmethod
    def forward(ctx, choice: Tensor, codebooks: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codebooks, codes)
        return _look_up(codebooks, codes)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        codebooks, codes = ctx.saved_tensors
        groups, size, dim = codebooks.shape
        gradient = gradient.float().view(len(codes), groups, dim)
        of_choice = torch.einsum("kgd,gvd->kgv", gradient, codebooks)
        of_codebooks = torch.zeros_like(codebooks).flatten(0, 1)
        offsets = torch.arange(groups, device=codes.device) * size
        of_codebooks.index_add_(0, (codes + offsets).flatten(), gradient.flatten(0, 1))
        return of_choice, of_codebooks.view_as(codebooks), None


def mean_shares(probabilities: Tensor, real: Tensor) -> Tensor:
    """Average the probabilities of codes over frames.

    Arguments
    ---------
    probabilities : Tensor
        Shape (K, G, V).
    real : Tensor
        Which frames count, boolean, shape (K,).

    Returns
    -------
    Tensor
        Shape (G, V); zero if no frame counts.

    Example
    -------
    >>> mean_shares(torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]), torch.tensor([True, True]))
    tensor([[0.7500, 0.2500]])
    """
    # a product, not a masked copy: (K,) x (K, G V); under autocast it would be rounded, or overflow
    weights = real.to(probabilities.dtype)
    with full_precision(probabilities.device.type):
        return (weights @ probabilities.flatten(1)).view(probabilities.shape[1:]) / weights.sum().clamp(min=1)


def code_shares(codes: Tensor, real: Tensor, codebook_size: int) -> Tensor:
    """Count how often each code was chosen, as a share of the frames.

    Arguments
    ---------
    codes : Tensor
        int64, shape (K, G).
    real : Tensor
        Which frames count, boolean, shape (K,).
    codebook_size : int
        Codes V in a group.

    Returns
    -------
    Tensor
        float32, shape (G, V); zero if no frame counts.

    Example
    -------
    >>> code_shares(torch.tensor([[0], [0], [1]]), torch.tensor([True, True, False]), 2)
    tensor([[1., 0.]])
    """
    counts = torch.zeros(codes.shape[1], codebook_size, device=codes.device)
    counts.scatter_add_(1, codes.t(), real.float().expand(codes.shape[1], -1))
    return counts / real.sum().clamp(min=1)


def perplexity(shares: Tensor) -> Tensor:
    """Sum the exponentials of the groups' entropies: between G and G V.

    Arguments
    ---------
    shares : Tensor
        Shares of the codes, shape (G, V).

    Returns
    -------
    Tensor
        Scalar.

    Example
    -------
    >>> perplexity(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor(3.)
    """
    # at a share of zero the gradient of x log x would be NaN
    logarithms = shares.clamp(min=torch.finfo(shares.dtype).tiny).log()
    return (-(shares * logarithms).sum(-1)).exp().sum()
