"""Labels that are the nearest centre of k-means, on principal components of the frames."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from speechbrain_bestrq.quantizer import CHUNK_SCORES, FrameQuantizer

#: Frames that the centres are found on, at most: more are thinned out evenly.
MOST_FRAMES = 200_000


class CentroidQuantizer(FrameQuantizer):
    """The nearest of centres that are measured once, before the first step, and never move again.

    In place of BEST-RQ's random projection the first principal components, in place of its
    random codebook the centres of k-means: what arXiv 2606.30671 calls PCA and centroid refinement,
    and near the labels of HuBERT's first iteration (arXiv 2106.07447), which are of MFCC.
    Distances are Euclidean, of components that are not whitened: directions of more variance count
    for more.

    Arguments
    ---------
    input_dim : int
        Size of a frame: stacked features (4 x 80).
    num_components : int
        Principal components kept.
    codebook_size : int
        Centres.
    seed : int
        Of the frames that the centres start from.
    utterance_norm : bool
        As for :class:`speechbrain_bestrq.quantizer.RandomProjectionQuantizer`.
    iterations : int
        Of k-means.

    Attributes
    ----------
    projection : Tensor
        The components, shape (1, input_dim, num_components).
    offset : Tensor
        The projected mean, subtracted after the projection, shape (1, num_components).
    codebooks : Tensor
        The centres, shape (1, codebook_size, num_components).

    Example
    -------
    >>> quantizer = CentroidQuantizer(320, codebook_size=64)
    >>> quantizer.fit([torch.randn(2000, 320)])
    >>> quantizer(torch.randn(3, 50, 320)).shape
    torch.Size([3, 50, 1])
    """

    def __init__(
        self,
        input_dim: int,
        num_components: int = 16,
        codebook_size: int = 256,
        seed: int = 0,
        utterance_norm: bool = True,
        iterations: int = 30,
    ):
        if not 1 <= num_components <= input_dim:
            raise ValueError(f"num_components is 1 to {input_dim}, the size of a frame, not {num_components}.")
        super().__init__(input_dim, codebook_size, 1, utterance_norm, measured=False)
        self.num_components, self.seed, self.iterations = num_components, seed, iterations
        self.register_buffer("projection", torch.full((1, input_dim, num_components), torch.nan, device="cpu"))
        self.register_buffer("offset", torch.full((1, num_components), torch.nan, device="cpu"))
        self.register_buffer("codebooks", torch.full((1, codebook_size, num_components), torch.nan, device="cpu"))

    def settings(self) -> dict[str, Any]:
        """What labels are a function of, beside the audio: plain values."""
        names = ("num_components", "codebook_size", "seed", "utterance_norm", "iterations")
        return {"quantizer": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def _label(self, x: Tensor, book: int) -> Tensor:
        projected = (x @ self.projection[book] - self.offset[book]).flatten(0, -2)
        return nearest_centres(projected, self.codebooks[book]).view(x.shape[:-1])

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Find components and centres on training audio, once, on the CPU.

        Arguments
        ---------
        batches : iterable of Tensor
            Frames as :meth:`prepare` gives them, shape (..., input_dim), without padding.

        Raises
        ------
        ValueError
            If there are fewer frames than centres.
        """
        frames = torch.cat([batch.reshape(-1, self.input_dim).float().cpu() for batch in batches])
        frames = frames[:: -(-len(frames) // MOST_FRAMES)].clone()  # a view would keep all of them
        if len(frames) < self.codebook_size:
            raise ValueError(
                f"{len(frames)} frames are too few to find {self.codebook_size} centres: give more audio, or a "
                "smaller codebook_size."
            )
        mean = frames.double().mean(0)
        centred = (frames - mean).double()
        components = torch.linalg.eigh(centred.t() @ centred)[1][:, -self.num_components :]
        projected = (centred @ components).float()
        self.projection[0] = components
        self.offset[0] = mean @ components
        self.codebooks[0] = self._find_centres(projected)
        self.measured = True

    def _find_centres(self, frames: Tensor) -> Tensor:
        """Lloyd's algorithm from random frames; a centre that no frame is nearest to stays where it is."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        centres = frames[torch.randperm(len(frames), generator=generator)[: self.codebook_size]].clone()
        for _ in range(self.iterations):
            labels = nearest_centres(frames, centres)
            counts = torch.bincount(labels, minlength=len(centres))[:, None]
            sums = torch.zeros_like(centres).index_add_(0, labels, frames)
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        return centres


def nearest_centres(frames: Tensor, centres: Tensor) -> Tensor:
    """Number the nearest centre of each frame, by Euclidean distance, in chunks of frames.

    Arguments
    ---------
    frames : Tensor
        Shape (N, D).
    centres : Tensor
        Shape (K, D).

    Returns
    -------
    Tensor
        int64, shape (N,).

    Example
    -------
    >>> nearest_centres(torch.tensor([[0.2], [5.0]]), torch.tensor([[9.0], [4.0], [0.0]]))
    tensor([2, 1])
    """
    # |f - c|^2 = |f|^2 - 2 (f c - |c|^2 / 2), and |f|^2 is the same for all
    codes, halves = centres.t(), centres.square().sum(1) / 2
    size = max(CHUNK_SCORES // len(centres), 1)
    return torch.cat([(chunk @ codes - halves).max(dim=-1).indices for chunk in frames.split(size)])
