"""Labels of several kinds for each frame."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_bestrq.quantizer import FrameQuantizer


class JointQuantizer(FrameQuantizer):
    """Several quantizers of the same frames, side by side: a frame has the labels of each.

    Several codebooks of one kind are known to help (USM, arXiv 2303.01037; arXiv 2501.16131). These
    may differ in what they see: labels of utterances that are normalised tell what is said and
    not who says it, those of utterances as they are tell both (docs/LOG.md).

    Arguments
    ---------
    quantizers : sequence of FrameQuantizer
        Of frames of one size, with codebooks of one size.

    Raises
    ------
    ValueError
        If there is none, or sizes differ.

    Example
    -------
    >>> from speechbrain_bestrq.quantizer import RandomProjectionQuantizer
    >>> content, speaker = (RandomProjectionQuantizer(320, seed=seed, utterance_norm=seed == 0) for seed in (0, 1))
    >>> JointQuantizer([content, speaker])(torch.randn(3, 50, 320)).shape
    torch.Size([3, 50, 2])
    """

    def __init__(self, quantizers: Sequence[FrameQuantizer]):
        sizes = {(one.input_dim, one.codebook_size) for one in quantizers}
        if len(sizes) != 1:
            raise ValueError(
                "quantizers that label together have one input_dim and one codebook_size, not "
                f"{', '.join(map(str, sorted(sizes))) or 'none'}: give all the same."
            )
        input_dim, codebook_size = sizes.pop()
        books = sum(one.num_codebooks for one in quantizers)
        measured = all(one.measured for one in quantizers)
        super().__init__(input_dim, codebook_size, books, utterance_norm=False, measured=measured)
        self.quantizers = nn.ModuleList(quantizers)

    @property
    def pointwise(self) -> bool:
        """Whether :meth:`label` gives a frame labels that depend on that frame alone."""
        return all(one.pointwise for one in self.quantizers)

    def settings(self) -> dict[str, Any]:
        """What labels are a function of, beside the audio: plain values."""
        return {"quantizer": type(self).__name__, "quantizers": [one.settings() for one in self.quantizers]}

    def prepare(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Prepare whole utterances for each quantizer; what they take lies side by side in the last dimension."""
        return torch.cat([one.prepare(x, lengths) for one in self.quantizers], dim=-1)

    def label(self, x: Tensor) -> Tensor:
        """Label frames that :meth:`prepare` gave, each quantizer its own part of them."""
        parts = x.split(self.input_dim, dim=-1)
        return torch.cat([one.label(part) for one, part in zip(self.quantizers, parts, strict=True)], dim=-1)

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure on training audio what the quantizers rest on that are not measured yet."""
        batches = [batch.cpu() for batch in batches]  # all of it would not fit beside the model on a GPU
        for number, one in enumerate(self.quantizers):
            if not one.measured:
                start = number * self.input_dim
                one.fit(batch[..., start : start + self.input_dim] for batch in batches)
        self.measured = True
