"""Time-delay layers for padded batches: convolution, activation, and batch normalisation over valid frames."""

import torch
from torch import Tensor, nn


class MaskedBatchNorm(nn.Module):
    """Batch normalisation (arXiv 1502.03167) by the statistics of valid frames.

    On a batch without padding it is ``nn.BatchNorm1d``, running statistics included. Ordinary
    batch normalisation counts padding as data: how an utterance is normalised then
    depends on how long the others are, and the running statistics are of no data at all.
    Under DDP each rank normalises by its own frames; evaluation uses the statistics of the first.

    Fewer than two valid frames have no variance: they leave the running statistics as they are.

    Arguments
    ---------
    num_channels : int
        Channels C.
    eps : float
        Added to the variance.
    momentum : float
        Weight of a batch in the running statistics.

    Example
    -------
    >>> norm = MaskedBatchNorm(1)
    >>> mask = torch.tensor([[[1.0, 1.0, 0.0]]])
    >>> norm(torch.tensor([[[1.0, 3.0, 99.0]]]), mask).detach().round()
    tensor([[[-1.,  1.,  0.]]])
    """

    def __init__(self, num_channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Normalise.

        Arguments
        ---------
        x : Tensor
            Finite, in the padding too; shape (B, C, T).
        mask : Tensor
            float32, 1 for valid frames and 0 for padding, shape (B, 1, T).

        Returns
        -------
        Tensor
            Of the shape and type of ``x``; zero in the padding. Computed in float32.
        """
        frames = x.float()
        if self.training:
            count = mask.sum()
            # of a frame by itself nothing would be left
            several = count > 1
            mean = torch.where(several, (frames * mask).sum((0, 2)) / count.clamp(min=1), self.running_mean)
            centred = (frames - mean[:, None]) * mask
            variance = torch.where(several, centred.square().sum((0, 2)) / count.clamp(min=1), self.running_var)
            self._track(mean.detach(), variance.detach(), count)
        else:
            mean, variance = self.running_mean, self.running_var
            centred = (frames - mean[:, None]) * mask
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None] * mask, centred, scale[:, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        share = self.momentum * (count > 1)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), share)


class TDNNLayer(nn.Module):
    """Convolution over time, activation, :class:`MaskedBatchNorm`.

    The number of frames stays: zeros stand before the first and after the last.

    Arguments
    ---------
    in_channels, out_channels : int
        Channels C before and after.
    kernel_size : int
        Frames; odd.
    dilation : int
        Frames from one tap to the next.
    activation : nn.Module, optional
        ReLU if left out.

    Example
    -------
    >>> layer = TDNNLayer(8, 16, kernel_size=3, dilation=2)
    >>> layer(torch.randn(2, 8, 10), torch.ones(2, 1, 10)).shape
    torch.Size([2, 16, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        dilation: int = 1,
        activation: nn.Module | None = None,
    ):
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, dilation=dilation, padding=padding)
        self.activation = nn.ReLU() if activation is None else activation
        self.norm = MaskedBatchNorm(out_channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, in_channels, T), zero in the padding, to (B, out_channels, T), zero there too."""
        return self.norm(self.activation(self.conv(x)), mask)
