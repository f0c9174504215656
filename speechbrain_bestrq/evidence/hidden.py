"""Hidden states of a corpus, reduced while they are made: means over parts of utterances, and chosen frames."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.task_data import Rows, encode_rows
from speechbrain_bestrq.task_encoders import TaskEncoder

#: Seconds of audio, padding included, that are encoded at a time.
BATCH_SECONDS = 60.0
#: Parts of an utterance of which each has a mean, so that their order is not lost.
PARTS = 4


def part_means(hidden: Tensor, lengths: Tensor, parts: int = PARTS) -> Tensor:
    """Average the hidden states of each of the equal parts of utterances.

    Arguments
    ---------
    hidden : Tensor
        Shape (S, B, T, D).
    lengths : Tensor
        Frames of each utterance, shape (B,).
    parts : int
        A part without a frame, of an utterance shorter than this, has the utterance's mean.

    Returns
    -------
    Tensor
        Shape (S, B, parts, D).

    Example
    -------
    >>> hidden = torch.tensor([1.0, 3.0, 5.0, 9.0, 99.0])[None, None, :, None]
    >>> part_means(hidden, torch.tensor([4]), parts=2).flatten()
    tensor([2., 7.])
    """
    frames = torch.arange(hidden.shape[2], device=hidden.device)
    own = frames * parts // lengths.clamp(min=1)[:, None]
    weights = (own[..., None] == torch.arange(parts, device=hidden.device)).to(hidden.dtype)
    weights = weights * valid_frames(lengths, hidden.shape[2])[..., None]
    whole = valid_frames(lengths, hidden.shape[2])[..., None].to(hidden.dtype)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, whole)
    return torch.einsum("sbtd,btp->sbpd", hidden, weights / weights.sum(1, keepdim=True).clamp(min=1))


@torch.no_grad()
def encode_parts(encoder: TaskEncoder, rows: Rows, sample_rate: int, device: torch.device) -> dict[str, Tensor]:
    """Encode utterances and keep the means of their parts.

    Arguments
    ---------
    encoder : TaskEncoder
        On the device, in eval mode.
    rows : mapping
        Of a manifest.
    sample_rate : int
        Of the encoder, Hz.
    device : torch.device

    Returns
    -------
    dict
        Of each utterance, a tensor of shape (S, PARTS, D) on the CPU.
    """
    found = {}
    for names, hidden, lengths in encode_rows(encoder, rows, sample_rate, BATCH_SECONDS, device):
        found.update(zip(names, part_means(hidden, lengths).cpu().unbind(1), strict=True))
    return found


@dataclass(frozen=True)
class Frames:
    """Chosen frames of a corpus."""

    states: Tensor | None
    """Shape (S, N, D), float32; None if they were not wanted."""
    centred: Tensor
    """The same, each channel with mean 0 and variance 1 over the frames of its utterance."""
    classes: Tensor
    """int64, shape (N,)."""
    between: list[float]
    """Of each state, the share of the frames' variance that lies between the means of utterances."""


@torch.no_grad()
def encode_frames(
    encoder: TaskEncoder,
    rows: Rows,
    times: Mapping[str, tuple[Tensor, Tensor]],
    sample_rate: int,
    device: torch.device,
    keep_states: bool = True,
) -> Frames:
    """Encode utterances and keep the frames at given times.

    Arguments
    ---------
    encoder : TaskEncoder
        On the device, in eval mode.
    rows : mapping
        Of a manifest.
    times : mapping
        Of each utterance, seconds and the class there, shape (N,) both. A frame holds the
        time if the time lies in its share of the utterance.
    sample_rate : int
        Of the encoder, Hz.
    device : torch.device
    keep_states : bool
        Keep them as they are too, not only centred: twice the memory.

    Returns
    -------
    Frames
    """
    chosen, centred, classes, means, within = [], [], [], [], 0.0
    for names, hidden, lengths in encode_rows(encoder, rows, sample_rate, BATCH_SECONDS, device):
        mask = valid_frames(lengths, hidden.shape[2])[..., None]
        counts = lengths.clamp(min=1)[:, None, None]
        mean = (hidden * mask).sum(2, keepdim=True) / counts
        variance = ((hidden - mean) * mask).square().sum(2, keepdim=True) / counts
        normal = (hidden - mean) * (variance + 1e-8).rsqrt()
        utterances, places, sizes = [], [], lengths.tolist()  # one wait for the device
        for number, name in enumerate(names):
            seconds, label = times[name]
            rate = sizes[number] / float(rows[name]["duration"])
            places.append((seconds * rate).long().clamp(max=sizes[number] - 1))
            utterances.append(torch.full_like(label, number))
            classes.append(label)
        index = torch.cat(utterances).to(device), torch.cat(places).to(device)
        if keep_states:
            chosen.append(hidden[:, index[0], index[1]].cpu())
        centred.append(normal[:, index[0], index[1]].cpu())
        means.append(mean[:, :, 0].cpu())
        within = within + variance.sum((1, 2, 3)).cpu()
    every = torch.cat(means, 1)
    between = every.var(1, correction=0).sum(1)
    share = between / (between + within / every.shape[1])
    states = torch.cat(chosen, 1) if keep_states else None
    return Frames(states, torch.cat(centred, 1), torch.cat(classes), share.tolist())
