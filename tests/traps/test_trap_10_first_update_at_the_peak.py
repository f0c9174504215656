"""The learning rate is set before the update it belongs to."""

import numpy as np


def test_the_first_update_is_a_warm_up_update(toy, tmp_path):
    """Trap: the schedule steps after the optimizer, and the first update has the peak rate.

    Mutation: in pretraining.py, PretrainingBrain.optimizers_step, ``rate = self.hparams.lr_schedule(update)`` -> ``rate
    = self.hparams.lr_schedule(update - 1 or 10**6)``.
    """
    model = toy.make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = toy.make_batch(model, [0.1 * np.random.default_rng(1).standard_normal(16000)])
    toy.fit_batches(tmp_path, model, [batch], peak=1.0, warmup=10000, weight_decay=0.0)
    moved = max(float((new - old).detach().abs().max()) for new, old in zip(model.parameters(), before, strict=True))
    # Adam's first update is as long as the learning rate
    assert 0.5e-4 < moved < 1.5e-4
