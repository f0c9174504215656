"""Which encoder frames are hidden from the encoder and have to be predicted."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


def span_mask(
    lengths: Tensor,
    max_length: int,
    prob: float,
    span: int,
    min_spans: int = 1,
    grid: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a mask of spans for each utterance by itself.

    ``prob`` is the share of frames that start a span, as each paper prints it.
    Without ``grid`` every frame starts a span with that probability and spans may
    overlap. Starts before the first frame are drawn too, their spans cut at the
    edge; so every frame is masked with the same probability
    ``1 - (1 - prob) ** span``, whatever the length of its utterance. With ``grid``
    the spans start at multiples of ``span`` and do not overlap: exactly
    ``round(prob * length)`` of them are drawn, so the masked share is
    ``prob * span`` up to rounding and the cut of the last span (all frames once
    that product reaches 1).

    Arguments
    ---------
    lengths : Tensor
        Valid frames of each utterance, shape (B,), integers on the generator's device.
    max_length : int
        Width T of the mask.
    prob : float
        Share of frames that start a span, in [0, 1].
    span : int
        Frames in a span.
    min_spans : int
        At least so many spans in each utterance that has frames.
    grid : bool
        Starts on a grid, as BEST-RQ's implementation in SpeechBrain (arXiv 2405.04296).
    generator : torch.Generator, optional
        Draws the starts; the global generator of ``lengths.device`` if left out.

    Returns
    -------
    Tensor
        Boolean, shape (B, T), on the device of ``lengths``; True where masked, never
        in padding.

    Raises
    ------
    ValueError
        If ``prob``, ``span`` or ``min_spans`` is out of range.

    Example
    -------
    >>> generator = torch.Generator().manual_seed(1)
    >>> mask = span_mask(torch.tensor([10, 4]), 10, prob=0.6, span=1, grid=True, generator=generator)
    >>> mask.sum(1).tolist(), bool(mask[1, 4:].any())
    ([6, 2], False)
    """
    _check(prob, span, min_spans)
    device = lengths.device
    valid = torch.arange(max_length, device=device) < lengths[:, None]
    if grid:
        cells = math.ceil(max_length / span)
        order = torch.rand(len(lengths), cells, generator=generator, device=device)
        order.masked_fill_(~valid[:, ::span], 2.0)  # cells without a valid frame come last
        count = torch.floor(prob * lengths + 0.5).clamp(min=min_spans)
        chosen = order.argsort(dim=1).argsort(dim=1) < count[:, None]
        return chosen.repeat_interleave(span, dim=1)[:, :max_length] & valid
    # column s is the span that starts at frame s - (span - 1)
    starts = max_length + span - 1
    draw = torch.rand(len(lengths), starts, generator=generator, device=device)
    draw.masked_fill_(torch.arange(starts, device=device) >= lengths[:, None] + span - 1, 2.0)
    threshold = torch.full((len(lengths), 1), prob, device=device)
    if min_spans:
        least = draw.kthvalue(min(min_spans, starts), dim=1, keepdim=True).values
        threshold = torch.maximum(threshold, torch.nextafter(least, torch.full_like(least, 3.0)))
    # frame t is masked if any of the columns t ... t + span - 1 starts a span
    ends = (draw < threshold).cumsum(1)
    before = torch.nn.functional.pad(ends, (1, 0))[:, :max_length]
    return (ends[:, span - 1 :] > before) & valid


def _check(prob: float, span: int, min_spans: int) -> None:
    if not 0.0 <= prob <= 1.0:
        raise ValueError(f"prob is a share of frames, in [0, 1], not {prob}.")
    if span < 1 or min_spans < 0:
        raise ValueError(f"span must be at least 1 and min_spans at least 0, not {span} and {min_spans}.")


class MaskedFrames(NamedTuple):
    """A mask with the positions of its frames, all made on the host.

    Selecting by a boolean mask makes the host wait for the device; selecting by
    ``indices`` does not, and their number is the same for every batch of a shape.
    """

    mask: Tensor
    """Boolean, shape (B, T)."""
    indices: Tensor
    """Positions ``b * T + t`` of the masked frames, int64, shape (K,); -1 fills up."""
    count: int
    """How many of the indices are real."""

    @classmethod
    def from_mask(cls, mask: Tensor, capacity: int | None = None) -> "MaskedFrames":
        """Find the masked frames of a mask.

        Arguments
        ---------
        mask : Tensor
            Boolean, shape (B, T). On a GPU this waits for the device.
        capacity : int, optional
            Number of indices; the number of masked frames if left out or smaller.

        Returns
        -------
        MaskedFrames

        Example
        -------
        >>> MaskedFrames.from_mask(torch.tensor([[True, False], [False, True]]), capacity=3).indices
        tensor([ 0,  3, -1])
        """
        found = mask.flatten().nonzero().squeeze(1)
        fill = max((capacity or 0) - len(found), 0)
        return cls(mask, torch.nn.functional.pad(found, (0, fill), value=-1), len(found))


class SpanMasking:
    """The mask policy of a pre-training run: :func:`span_mask` with its settings.

    Arguments
    ---------
    prob : float
        Share of frames that start a span.
    span : int
        Encoder frames (40 ms) in a span.
    min_spans : int
        At least so many spans in each utterance.
    grid : bool
        Starts on a grid, without overlap.

    Raises
    ------
    ValueError
        As :func:`span_mask`.

    Example
    -------
    >>> masking = SpanMasking(prob=0.6, span=1, grid=True)
    >>> masking.expected_share
    0.6
    >>> masked = masking(torch.tensor([50, 50]), 50, torch.Generator().manual_seed(0))
    >>> masked.count, len(masked.indices) >= masked.count
    (60, True)
    """

    def __init__(self, prob: float, span: int, min_spans: int = 1, grid: bool = False):
        _check(prob, span, min_spans)
        self.prob, self.span, self.min_spans, self.grid = prob, span, min_spans, grid

    def settings(self) -> dict[str, Any]:
        """What masks are a function of, beside lengths and generator: plain values."""
        return {"prob": self.prob, "span": self.span, "min_spans": self.min_spans, "grid": self.grid}

    @property
    def expected_share(self) -> float:
        """The share of frames that is masked on average, without ``min_spans``."""
        if self.grid:
            return min(self.prob * self.span, 1.0)
        return 1.0 - (1.0 - self.prob) ** self.span

    def __call__(self, lengths: Tensor, max_length: int, generator: torch.Generator | None = None) -> MaskedFrames:
        """Draw the masked frames of one batch.

        Arguments
        ---------
        lengths : Tensor
            Valid frames of each utterance, shape (B,).
        max_length : int
            Frames T of the longest.
        generator : torch.Generator, optional
            Draws the mask.

        Returns
        -------
        MaskedFrames
            With as many indices as batches of this shape all but never exceed
            (four standard deviations over the mean): one shape for each batch shape.
        """
        mask = span_mask(lengths, max_length, self.prob, self.span, self.min_spans, self.grid, generator)
        share, frames = self.expected_share, len(lengths) * max_length
        # spans that each utterance has at least
        share = max(share, min(self.min_spans * self.span / max_length, 1.0))
        if self.grid:  # every utterance may be rounded up by one span
            spare = self.span * len(lengths)
        else:  # the frames of one span are masked together: a sum of frames / span independent parts
            spare = 4.0 * math.sqrt(frames * self.span * share * (1.0 - share))
        capacity = math.ceil(frames * share + spare)
        return MaskedFrames.from_mask(mask, min(capacity, frames))
