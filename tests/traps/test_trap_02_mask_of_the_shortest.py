"""Each utterance has a mask of its own, over the whole of it."""

import pytest
import torch

from speechbrain_bestrq.masking import SpanMasking, span_mask


@pytest.mark.parametrize("settings", [{"prob": 0.6, "span": 1, "grid": True}, {"prob": 0.205, "span": 4}])
def test_a_short_utterance_in_the_batch_takes_nothing_from_the_others(settings):
    """Trap: one mask for the batch, drawn within its shortest utterance: 60 % become 10 %.

    Mutation: in masking.py, span_mask, before ``device = lengths.device`` add ``lengths =
    lengths.clamp(max=int(lengths.min()))``.
    """
    lengths = torch.tensor([500, 480, 490, 60])
    mask = span_mask(lengths, 500, **settings, generator=torch.Generator().manual_seed(3))
    shares = mask.sum(1) / lengths
    assert ((shares - 0.6).abs() < 0.1).all(), shares
    for row, length in enumerate(lengths.tolist()):
        assert mask[row, length // 2 : length].any() and not mask[row, length:].any()


def test_utterances_have_different_masks():
    """Trap: the same frames are masked in all utterances of a batch.

    Mutations: in masking.py, span_mask, ``torch.rand(len(lengths), cells, generator=generator, device=device)`` ->
    ``torch.rand(1, cells, generator=generator, device=device).repeat(len(lengths), 1)``; in masking.py, span_mask,
    ``torch.rand(len(lengths), starts, generator=generator, device=device)`` -> ``torch.rand(1, starts,
    generator=generator, device=device).repeat(len(lengths), 1)``.
    """
    for settings in ({"prob": 0.6, "span": 1, "grid": True}, {"prob": 0.205, "span": 4}):
        mask = span_mask(torch.full((4,), 200), 200, **settings, generator=torch.Generator().manual_seed(4))
        assert all(not torch.equal(mask[0], other) for other in mask[1:])


def test_a_mask_ends_where_its_spans_do_at_any_length():
    """Trap: ``mask[::4] // 4`` gives labels' positions for lengths that are multiples of 4 only.

    Mutation: in masking.py, MaskedFrames.from_mask, ``mask.flatten().nonzero()`` -> ``mask[:, : mask.shape[1] // 4 *
    4].flatten().nonzero()``.
    """
    masking = SpanMasking(0.3, 2)
    for frames in (49, 50, 51, 52):
        drawn = masking(torch.tensor([frames, frames - 7]), frames, torch.Generator().manual_seed(frames))
        found = torch.zeros(2 * frames, dtype=torch.bool)
        found[drawn.indices[drawn.indices >= 0]] = True
        assert torch.equal(found.view(2, frames), drawn.mask) and drawn.count == int(drawn.mask.sum())
