"""wav2vec 2.0's distractors are other masked frames of the utterance, and its masks do not hang on the batch."""

import torch

from speechbrain_bestrq.contrastive import sample_negatives
from speechbrain_bestrq.masking import MaskedFrames, SpanMasking

#: The authors' masks: 6.5 % of the frames start a span of 10.
PROB, SPAN = 0.065, 10


def test_a_distractor_is_another_masked_frame_of_the_same_utterance_and_every_one_can_be_drawn():
    """Trap: the places in a batch of B utterances of T masked frames are offset by T - 1 instead of T a row: 2 % of the
    distractors are the frame itself, 2 to 10 % are of the neighbouring utterance, and the last frame is never drawn.

    Mutation: in contrastive.py, sample_negatives, ``first = others.cumsum(0) - others`` -> ``first = others.cumsum(0) -
    others - torch.arange(utterances)``.
    """
    mask = torch.zeros(4, 50, dtype=torch.bool)
    mask[:, 10:35] = True  # equally many in each, as in the batches of that implementation
    masked = MaskedFrames.from_mask(mask)
    drawn = sample_negatives(masked, 400, torch.Generator().manual_seed(0))
    own = torch.arange(masked.count)[:, None]
    assert (drawn != own).all(), "the frame itself"
    assert (masked.indices[drawn] // 50 == masked.indices[:, None] // 50).all(), "of another utterance"
    assert torch.bincount(drawn.flatten(), minlength=masked.count).min() > 0, "a frame that is never drawn"


def test_masks_do_not_shrink_with_the_shortest_utterance_and_short_ones_raise_nothing():
    """Trap: as many spans for all as fit the shortest utterance, and as many frames in all: 66 to 68 % of the frames
    instead of 49 %, mostly single ones; utterances of a few frames raise.

    Mutation: in masking.py, span_mask, before ``device = lengths.device`` add ``lengths =
    lengths.clamp(max=int(lengths.min()))``.
    """
    masking = SpanMasking(PROB, SPAN, min_spans=2)
    expected = 1 - (1 - PROB) ** SPAN
    for shortest in (700, 100, 30):
        lengths = torch.tensor([700, 700, 700, shortest] * 100)
        mask = masking(lengths, 700, torch.Generator().manual_seed(shortest)).mask
        whole = mask[lengths == 700].float()
        assert abs(float(whole.mean()) - expected) < 0.02, (shortest, float(whole.mean()))
        # runs within the utterance are never shorter than a span
        for row in mask[lengths == 700][:50]:
            edges = torch.nonzero(row[1:] ^ row[:-1]).flatten().tolist()
            inner = [b - a for a, b in zip(edges, edges[1:], strict=False) if row[a + 1]]
            assert min(inner, default=SPAN) >= SPAN
    for length in range(1, 25):
        mask = masking(torch.tensor([length, 25]), 25, torch.Generator().manual_seed(length)).mask
        assert mask[0].sum() >= min(length, 2), "fewer than two masked frames leave no distractor"
        assert not mask[0, length:].any()
