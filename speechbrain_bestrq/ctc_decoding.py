"""From CTC's log-probabilities to units."""

import torch
from torch import Tensor


def greedy_decode(log_probs: Tensor, lengths: Tensor, blank: int = 0) -> list[list[int]]:
    """Take the best unit of each frame, merge repetitions, drop blanks (arXiv: Graves et al., ICML 2006).

    Arguments
    ---------
    log_probs : Tensor
        Shape (B, T, V).
    lengths : Tensor
        Frames of each utterance, int64, shape (B,).
    blank : int
        The blank.

    Returns
    -------
    list of list of int
        Units of each utterance.

    Example
    -------
    >>> scores = torch.nn.functional.one_hot(torch.tensor([[1, 1, 0, 1, 2]]), 3).float()
    >>> greedy_decode(scores, torch.tensor([4]))
    [[1, 1]]
    """
    best = log_probs.argmax(-1)
    counts = best != blank
    counts[:, 1:] &= best[:, 1:] != best[:, :-1]
    counts &= torch.arange(best.shape[1], device=best.device) < lengths[:, None]
    best, counts = best.cpu(), counts.cpu()
    return [units[kept].tolist() for units, kept in zip(best, counts, strict=True)]
