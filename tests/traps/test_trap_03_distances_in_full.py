"""Finding the nearest code takes memory for frames x codes, in chunks, and no more."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speechbrain_bestrq.centroids import nearest_centres
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes of a tensor that an operation returned, and all types."""

    def __init__(self):
        super().__init__()
        self.bytes, self.types = 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        """Call, and look at the result."""
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
                self.types.add(tensor.dtype)
        return result


@pytest.mark.parametrize(
    ("label", "frames"),
    [
        (RandomProjectionQuantizer(320), torch.zeros(1, 600, 320)),
        # k-means is fitted on 200,000
        (lambda frames: nearest_centres(frames, torch.zeros(256, 16)), torch.zeros(50_000, 16)),
    ],
    ids=["random projection", "k-means"],
)
def test_no_tensor_of_frames_times_codes_times_dimensions(label, frames):
    """Trap: distances are built as (batch, codes, frames, dimensions): 0.5 MB for each frame.

    Mutations: in quantizer.py, RandomProjectionQuantizer._label, ``(chunk @ codes).max(dim=-1).indices`` -> ``(chunk[:,
    None] * codes.t()).sum(-1).argmax(dim=-1)``; in centroids.py, nearest_centres, before ``codes, halves = `` add
    ``return (frames[:, None] - centres).square().sum(-1).argmin(-1)``.
    """
    with LargestTensor() as largest:
        label(frames)
    assert largest.bytes <= 17e6
    # nor in float64 (trap 23), which took 6 GB elsewhere
    assert torch.float64 not in largest.types
