"""Convolution over time of sequences whose channels lie innermost."""

from torch import Tensor, nn

#: Of fewer channels a CPU's depthwise convolution is nn.Conv1d: with AVX512_BF16, oneDNN never ends generating the
#: bfloat16 kernel for 8 or 16 channels and 15 frames or more (torch 2.11; seen for no other width or format).
FEWEST_CHANNELS = 32


class FrameConvolution(nn.Conv1d):
    """A convolution over the frames of sequences (B, T, D).

    Equal to ``nn.Conv1d`` between two transpositions, with its weights. Such a sequence is an
    image of one row in PyTorch's channels-last format, without moving anything, and
    comes out as one. On a CPU that takes two fifths of the time that ``nn.Conv1d`` takes to copy,
    convolve each channel by itself and copy back, and two thirds with 16 groups. Elsewhere it
    has not been measured, and ``nn.Conv1d`` is used; so it is for a depthwise convolution of fewer
    than 32 channels, for which bfloat16 can hang in oneDNN.

    Arguments
    ---------
    channels : int
        D.
    kernel_size : int
        Frames K. There are K // 2 of padding at both ends: an odd kernel keeps the
        length, an even one adds a frame.
    groups : int
        Of channels that do not meet; D for a depthwise convolution.

    Example
    -------
    >>> import torch
    >>> FrameConvolution(8, 3, groups=8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, channels: int, kernel_size: int, groups: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, T, D)."""
        if x.device.type != "cpu" or self.groups == self.in_channels < FEWEST_CHANNELS:
            return super().forward(x.mT).mT
        return self.convolve_image(x)

    def convolve_image(self, x: Tensor) -> Tensor:
        """Convolve (B, T, D) as images of one row, whatever device they are on."""
        weight, padding = self.weight.unsqueeze(2), (0, *self.padding)
        return nn.functional.conv2d(x.mT.unsqueeze(2), weight, self.bias, padding=padding, groups=self.groups)[
            :, :, 0
        ].mT
