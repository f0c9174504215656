"""A masked frame weighs the same in every micro-batch."""

import numpy as np
import torch


def test_a_micro_batch_weighs_by_its_masked_frames(toy, tmp_path):
    """Trap: the loss is a mean for each micro-batch, and a frame of a short one weighs many times more.

    Mutation: in pretraining.py, PretrainingBrain.fit_batch, ``loss * (output.num_targets / self.nominal_targets)`` ->
    ``loss``.
    """
    generator = np.random.default_rng(1)
    sizes = ([32000, 32000, 32000], [6400])
    model = toy.make_model()
    waves = [[0.1 * generator.standard_normal(length) for length in size] for size in sizes]
    batches = [toy.make_batch(model, one, number=number) for number, one in enumerate(waves)]
    total, gradients = 0, [torch.zeros_like(parameter) for parameter in model.parameters()]
    for batch in batches:
        filler = torch.Generator().manual_seed(batch.noise_seed)
        output = model(batch.wavs, batch.wav_lens, mask=batch.masked, generator=filler)
        total += output.num_targets
        for gradient, of_mean in zip(
            gradients, torch.autograd.grad(output.loss, list(model.parameters())), strict=True
        ):
            gradient += output.num_targets * of_mean
    before = [parameter.detach().clone() for parameter in model.parameters()]
    settings = {"optimizer": "SGD", "peak": 1.0, "warmup": 1, "weight_decay": 0.0}
    toy.fit_batches(tmp_path, model, batches, accumulation=2, **settings)
    assert batches[0].masked.count > 5 * batches[1].masked.count
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - gradient / total, rtol=1e-4, atol=1e-6)
