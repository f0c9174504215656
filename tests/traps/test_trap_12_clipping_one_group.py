"""Clipping covers all parameter groups."""

import numpy as np
import torch


def test_the_gradient_of_all_groups_together_is_clipped(toy, tmp_path):
    """Trap: the norm is that of the first parameter group alone.

    Mutation: in pretraining.py, PretrainingBrain.on_fit_start, ``for group in self.optimizer.param_groups for p`` ->
    ``for group in self.optimizer.param_groups[:1] for p``.
    """
    model = toy.make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = toy.make_batch(model, [0.1 * np.random.default_rng(1).standard_normal(16000)])
    brain = toy.fit_batches(
        tmp_path,
        model,
        [batch],
        optimizer="SGD",
        peak=1.0,
        warmup=1,
        max_grad_norm=0.01,
        vector_decay=False,
        weight_decay=0.0,
    )
    assert len(brain.optimizer.param_groups) == 2
    moved = [(new.detach() - old).norm() for new, old in zip(model.parameters(), before, strict=True)]
    assert abs(float(torch.stack(moved).norm()) - 0.01) < 1e-4
