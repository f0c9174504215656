"""The share of masked frames does not depend on how long batches may be."""

import numpy as np
import torch

from speechbrain_bestrq.batching import LadderBatchSampler, PaddedBatchSampler
from speechbrain_bestrq.masking import SpanMasking
from speechbrain_bestrq.seeding import derived_generator


def test_the_masked_share_is_the_same_at_any_batch_length():
    """Trap: buckets widen with the batch length, and the mask of a 1000 s batch covers 15.7 % instead of 60 %.

    Of padded batches; those of the ladder have one length each, as the next test sees.

    Mutation: in masking.py, span_mask, before ``device = lengths.device`` add ``lengths =
    lengths.clamp(max=int(lengths.min()))``.
    """
    masking = SpanMasking(0.6, 1, grid=True)
    lengths = np.random.default_rng(1).integers(32000, 480000, 300)
    for seconds in (50, 1000):
        masked = frames = 0
        for plan in PaddedBatchSampler(lengths, seconds * 16000):
            own = torch.from_numpy((1 + np.minimum(lengths[plan.indices], plan.samples) // 160) // 4)
            masked += masking(own, (1 + plan.samples // 160) // 4, derived_generator(plan.number)).count
            frames += int(own.sum())
        assert abs(masked / frames - 0.6) < 0.005, (seconds, masked / frames)


def test_a_batch_of_the_ladder_has_no_padding():
    """Trap: as above; utterances of very different lengths share a batch.

    Mutation: in batching.py, LadderBatchSampler.__init__, ``np.searchsorted(self.rungs, self.lengths, side="right") -
    1`` -> ``np.full(len(self.lengths), len(self.rungs) - 1)``.
    """
    lengths = np.random.default_rng(1).integers(32000, 480000, 300)
    for seconds in (50, 1000):
        for plan in LadderBatchSampler(lengths, seconds * 16000):
            assert (lengths[plan.indices] - plan.starts >= plan.samples).all() and (plan.starts >= 0).all()
