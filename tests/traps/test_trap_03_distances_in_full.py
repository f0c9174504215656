"""Finding the nearest code takes memory for frames x codes, in chunks, and no more."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def test_no_tensor_of_frames_times_codes_times_dimensions():
    """Trap: distances are built as (batch, codes, frames, dimensions): 0.5 MB for each frame.

    Mutation: in quantizer.py, RandomProjectionQuantizer._label, ``(chunk @ codes).argmax(dim=-1)`` ->
    ``(chunk[:, None] * codes.t()).sum(-1).argmax(dim=-1)``.
    """
    quantizer = RandomProjectionQuantizer(320)
    with LargestTensor() as largest:
        quantizer(torch.zeros(1, 600, 320))
    assert largest.bytes <= 17e6
    # nor in float64 (trap 23), which took 6 GB elsewhere
    assert torch.float64 not in largest.types
