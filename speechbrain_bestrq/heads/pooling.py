"""From the frames of an utterance to one vector, whatever stands in the padding."""

import torch
from torch import Tensor

from speechbrain_bestrq.frontend import valid_frames

#: The least variance: the square root has no gradient at 0, where a channel is constant or there is one frame.
LEAST_VARIANCE = 1e-12


def mean_pool(features: Tensor, lengths: Tensor) -> Tensor:
    """Average each utterance over its own frames.

    Arguments
    ---------
    features : Tensor
        Shape (B, T, D).
    lengths : Tensor
        Frames of each utterance, int64, shape (B,).

    Returns
    -------
    Tensor
        float32, shape (B, D); zero for an utterance without frames.

    Example
    -------
    >>> mean_pool(torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([2]))
    tensor([[2.]])
    """
    padding = ~valid_frames(lengths, features.shape[1])[..., None]
    return features.float().masked_fill(padding, 0.0).sum(1) / lengths.clamp(min=1)[:, None]


def statistics_pool(features: Tensor, lengths: Tensor) -> Tensor:
    """Mean and standard deviation of each utterance over its own frames, as x-vectors pool (Snyder et al., 2018).

    Arguments
    ---------
    features : Tensor
        Shape (B, T, D).
    lengths : Tensor
        Frames of each utterance, int64, shape (B,).

    Returns
    -------
    Tensor
        float32, shape (B, 2 D): the means, then the deviations (of n - 1 degrees of freedom,
        as ``torch.std``), which are at least 1e-6.

    Example
    -------
    >>> statistics_pool(torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([2]))
    tensor([[2.0000, 1.4142]])
    """
    padding = ~valid_frames(lengths, features.shape[1])[..., None]
    features = features.float().masked_fill(padding, 0.0)
    mean = features.sum(1) / lengths.clamp(min=1)[:, None]
    deviations = (features - mean[:, None]).masked_fill(padding, 0.0)
    variance = deviations.square().sum(1) / (lengths - 1).clamp(min=1)[:, None]
    return torch.cat((mean, variance.clamp(min=LEAST_VARIANCE).sqrt()), dim=1)
