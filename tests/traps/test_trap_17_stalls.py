"""A step never waits for the device."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations whose result, or the size of it, the host has to wait for.
WAITING = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
)


class Waits(TorchDispatchMode):
    """Notes each operation that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found, self.operations = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        """Note, and call."""
        self.operations += 1
        selects = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        masks = [x for x in tree_leaves(arguments[1:2]) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if function in WAITING or (selects and masks):
            self.found.append(str(function))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("method", ["bestrq", "wav2vec2"])
def test_a_step_off_the_log_line_reads_nothing_back(method, toy, tmp_path, monkeypatch):
    """Trap: the finite check before the backward pass and ``loss.cpu()`` make the host wait twice a micro-batch.

    Mutations: in pretraining.py, PretrainingBrain.fit_batch, ``return self.shown_loss`` -> ``return
    torch.tensor(loss.item())``; in bestrq.py, BestRQ.forward, before ``labels = `` add ``mask =
    MaskedFrames.from_mask(mask.mask)``; in contrastive.py, contrastive_loss, ``place = masked.indices.clamp(min=0)`` ->
    ``place = masked.mask.flatten().nonzero()[:, 0]``.
    """
    model = toy.make_model(method, dropout=0.1, layer_drop=0.2)
    waves = np.random.default_rng(1).standard_normal((6, 2, 9600))
    batches = [toy.make_batch(model, list(pair), number=number) for number, pair in enumerate(waves)]
    # one batch is padded
    batches[3] = toy.make_batch(model, [waves[3, 0], waves[3, 1, :6400]], number=3)
    steps = []
    fit_batch = toy.PretrainingBrain.fit_batch

    def watched(brain, batch):
        with Waits() as waits:
            loss = fit_batch(brain, batch)
        steps.append((brain.step, waits))
        return loss

    monkeypatch.setattr(toy.ToyBrain, "fit_batch", watched)
    # the layers to drop are drawn on the host
    monkeypatch.setattr(torch.Tensor, "tolist", host_list(torch.Tensor.tolist))
    toy.fit_batches(tmp_path, model, batches, accumulation=2, log_interval=5, max_grad_norm=1.0)
    assert len(steps) == 6
    assert all(waits.operations > 100 for _, waits in steps)
    assert {number: waits.found for number, waits in steps if waits.found} == {}


def host_list(tolist):
    """``tolist`` whose own reading of host memory is not taken for a wait."""

    def outside(tensor):
        with torch.utils._python_dispatch._disable_current_modes():
            return tolist(tensor)

    return outside
