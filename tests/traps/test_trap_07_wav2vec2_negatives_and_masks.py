"""wav2vec 2.0's distractors, masks, positions and the terms of its loss are those of its authors."""

import pytest
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


def test_frames_know_their_places_and_the_features_are_kept_small_and_learn_slowly(toy):
    """Trap: no positional convolution, no feature penalty, the convolutions learn at the full rate.

    Mutations: in transformer.py, TransformerEncoder.forward, ``x = x + self.positions(x)`` -> ``x = x``; in
    wav2vec2.py, Wav2Vec2.forward, ``+ self.penalty_weight * penalty`` -> ``+ 0.0 * penalty``; in wav2vec2.py,
    Wav2Vec2.forward, ``if features.requires_grad and`` -> ``if False and``.
    """
    model = toy.make_model("wav2vec2")
    frames = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(1, 40, 16)
    hidden = model.speech_encoder.encoder(frames)[-1][0]
    assert not torch.allclose(hidden[1:20], hidden[:19], atol=1e-4), "frames that are alike in all places"

    wavs = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(1))
    gradients = {}
    for scale in (1.0, 0.1):
        model.feature_gradient_scale = scale
        model.zero_grad()
        output = model(wavs, generator=torch.Generator().manual_seed(2))
        output.loss.backward()
        gradients[scale] = next(model.speech_encoder.frontend.parameters()).grad.clone()
    torch.testing.assert_close(gradients[0.1], 0.1 * gradients[1.0], rtol=1e-3, atol=1e-7)
    terms = {name: float(output.metrics[name]) for name in model.loss_terms}
    without = terms["contrastive_loss"] + 0.1 * terms["diversity_loss"]
    assert float(output.loss.detach()) == pytest.approx(without + 10.0 * terms["feature_penalty"], rel=1e-5)
    assert terms["feature_penalty"] > 1e-3
