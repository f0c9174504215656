"""wav2vec 2.0's contrastive task: tell the quantized frame from others of its utterance (arXiv 2006.11477, eq. 3)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from speechbrain_bestrq.masking import MaskedFrames
from speechbrain_bestrq.precision import full_precision
from speechbrain_bestrq.pretraining_model import IGNORED


def sample_negatives(masked: MaskedFrames, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw distractors for each masked frame: other masked frames of its utterance, all equally likely.

    Drawn with replacement and without a wait for the device. The frame itself,
    padding and other utterances are never drawn.

    Arguments
    ---------
    masked : MaskedFrames
        The masked frames, utterance by utterance.
    count : int
        Distractors N of each.
    generator : torch.Generator, optional
        Draws; on the device of the mask.

    Returns
    -------
    Tensor
        Places in ``masked.indices``, int64, shape (K, N); -1 where an utterance has no
        other masked frame, and for indices that only fill up.

    Example
    -------
    >>> masked = MaskedFrames.from_mask(torch.tensor([[True, True, False], [False, True, False]]))
    >>> sample_negatives(masked, 2)
    tensor([[ 1,  1],
            [ 0,  0],
            [-1, -1]])
    """
    mask, indices, _ = masked
    utterances, frames = mask.shape
    others = mask.sum(1)
    first = others.cumsum(0) - others
    # one row more, for indices that fill up: an utterance without masked frames
    others, first = nn.functional.pad(others, (0, 1)), nn.functional.pad(first, (0, 1))
    utterance = torch.where(indices < 0, utterances, indices.div(frames, rounding_mode="floor"))
    others, first = (others - 1).index_select(0, utterance)[:, None], first.index_select(0, utterance)[:, None]
    draw = torch.rand(len(indices), count, generator=generator, device=mask.device)
    # a draw near one may round up to `others`
    rank = torch.minimum((draw * others).long(), others - 1)
    own = torch.arange(len(indices), device=mask.device)[:, None] - first
    rank = rank + (rank >= own)
    return (first + rank).masked_fill(others < 1, -1)


class ContrastiveOutput(NamedTuple):
    """What the contrastive task gives for a batch."""

    loss: Tensor
    """Sum over the masked frames, a scalar with its graph."""
    correct: Tensor
    """Masked frames whose target beats all distractors, of which there must be one: a scalar."""
    information: Tensor
    """Nats that the predictions tell of the targets, summed over the masked frames: a scalar. For n distractors ln(1 +
    n) less the loss with all of them, those with the target's codes too, which is a bound of their mutual information
    (van den Oord and others, arXiv 1807.03748): it is 0 where all codes are the same, which loss and accuracy are
    not."""


def contrastive_loss(
    predictions: Tensor, targets: Tensor, codes: Tensor, negatives: Tensor, masked: MaskedFrames, temperature: float
) -> ContrastiveOutput:
    """Cross-entropy of finding the target among it and the distractors by cosine.

    A distractor with the codes of the target is no distractor: it is left out. The cosines
    of all pairs of frames of an utterance are one product, of which those wanted are
    picked; so no distractor is ever copied. In float32 whatever the precision around;
    the product of the backward pass is one of TF32 where that is switched on.

    Arguments
    ---------
    predictions, targets : Tensor
        Of the masked frames, shape (K, D).
    codes : Tensor
        Of the targets, int64, shape (K, G), each below 2 ** (62 // G).
    negatives : Tensor
        As :func:`sample_negatives` gives them, shape (K, N).
    masked : MaskedFrames
        Where the frames lie.
    temperature : float
        The cosines are divided by it.

    Returns
    -------
    ContrastiveOutput

    Example
    -------
    >>> masked = MaskedFrames.from_mask(torch.tensor([[True, True, False]]))
    >>> vectors, codes = torch.eye(2), torch.tensor([[0], [1]])
    >>> output = contrastive_loss(vectors, vectors, codes, torch.tensor([[1], [0]]), masked, temperature=1.0)
    >>> round(float(output.loss), 4), int(output.correct)
    (0.6265, 2)
    """
    utterances, frames = masked.mask.shape
    real = masked.indices >= 0
    with full_precision(predictions.device.type):
        predictions = nn.functional.normalize(predictions.float(), dim=-1, eps=1e-8)
        targets = nn.functional.normalize(targets.float(), dim=-1, eps=1e-8)
        positive = (predictions * targets).sum(-1, keepdim=True)
        grid = (_place(x, masked).view(utterances, frames, -1) for x in (predictions, targets))
        rows, columns = grid
        cosines = torch.bmm(rows, columns.transpose(1, 2)).flatten(0, 1)
    place = masked.indices.clamp(min=0)
    drawn = negatives.clamp(min=0)
    cosines = cosines.index_select(0, place).gather(1, (place % frames)[drawn])
    shift = 62 // codes.shape[1]
    code = (codes << (shift * torch.arange(codes.shape[1], device=codes.device))).sum(1)
    left_out = (code[drawn] == code[:, None]) | (negatives < 0)
    logits = torch.cat((positive, cosines.masked_fill(left_out, -torch.inf)), dim=1) / temperature
    answer = torch.zeros_like(place).masked_fill(~real, IGNORED)
    loss = nn.functional.cross_entropy(logits, answer, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        best = logits[:, 1:].max(-1).values
        correct = ((logits[:, 0] > best) & (best > -torch.inf) & real).sum()
        every = torch.cat((positive, cosines.masked_fill(negatives < 0, -torch.inf)), dim=1) / temperature
        told = (1 + (negatives >= 0).sum(1)).log() + every[:, 0] - every.logsumexp(1)
        information = told.masked_fill(~real, 0.0).sum()
    return ContrastiveOutput(loss, correct, information)


def _place(vectors: Tensor, masked: MaskedFrames) -> Tensor:
    """Put the vectors of the masked frames (K, D) where they lie among all frames, (B T, D); zero elsewhere."""
    frames = masked.mask.numel()
    place = torch.where(masked.indices < 0, frames, masked.indices)  # those that fill up go behind the last
    return vectors.new_zeros(frames + 1, vectors.shape[1]).index_copy(0, place, vectors)[:frames]
