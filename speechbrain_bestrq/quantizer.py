"""BEST-RQ's targets: a random projection and the nearest entry of a random codebook."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit_norm

from speechbrain_bestrq.frontend import normalize_utterances
from speechbrain_bestrq.precision import full_precision

#: Scores held at a time: chunks of frames so that (frames, codes) in float32 stays near 16 MB.
CHUNK_SCORES = 2**22

#: Directions of less than this share of the greatest variance are not blown up by whitening.
MINIMUM_VARIANCE_SHARE = 1e-6


class FrameQuantizer(nn.Module):
    """What all quantizers of frames share: whole utterances are prepared, single frames are labelled.

    Arguments
    ---------
    input_dim : int
        Size of a frame.
    codebook_size, num_codebooks : int
        Codes of each codebook, and codebooks.
    utterance_norm : bool
        Bring each channel to mean 0 and variance 1 over the utterance before anything else.
    measured : bool
        Whether it labels as it is; else :meth:`fit` has to come first, or a state_dict.
    """

    #: Whether :meth:`label` gives a frame labels that depend on that frame alone.
    pointwise = True

    def __init__(self, input_dim: int, codebook_size: int, num_codebooks: int, utterance_norm: bool, measured: bool):
        super().__init__()
        self.input_dim, self.codebook_size, self.num_codebooks = input_dim, codebook_size, num_codebooks
        self.utterance_norm, self.measured = utterance_norm, measured
        self.register_load_state_dict_post_hook(_note_measured)

    def settings(self) -> dict[str, Any]:
        """What labels are a function of, beside the audio: plain values."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Label the frames of utterances.

        Arguments
        ---------
        x : Tensor
            Shape (B, T, input_dim); any number of leading dimensions will do where labels depend on
            single frames, without ``utterance_norm``.
        lengths : Tensor, optional
            Frames of each utterance, shape (B,), which ``utterance_norm`` has to know; None when
            nothing is padded.

        Returns
        -------
        Tensor
            int64, shape (B, T, num_codebooks).

        Raises
        ------
        RuntimeError
            If something has to be measured first, and was not.
        """
        return self.label(self.prepare(x, lengths))

    @torch.no_grad()
    def prepare(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Do to whole utterances what ``utterance_norm`` says.

        Arguments
        ---------
        x, lengths : Tensor
            As :meth:`forward` takes them.

        Returns
        -------
        Tensor
            What :meth:`label` and :meth:`fit` take.
        """
        if not self.utterance_norm:
            return x
        with full_precision(x.device.type):
            return normalize_utterances(x, lengths, each_channel=True)

    @torch.no_grad()
    def label(self, x: Tensor) -> Tensor:
        """Label frames that :meth:`prepare` gave.

        Arguments
        ---------
        x : Tensor
            Shape (..., input_dim).

        Returns
        -------
        Tensor
            int64, shape (..., num_codebooks).
        """
        if not self.measured:
            raise RuntimeError(f"this {type(self).__name__} has not been measured: call fit() or load a state_dict.")
        with full_precision(x.device.type):
            return torch.stack([self._label(x.float(), book) for book in range(self.num_codebooks)], dim=-1)

    def _label(self, x: Tensor, book: int) -> Tensor:
        """Labels of one codebook, in the shape of x without its last dimension."""
        raise NotImplementedError

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure on training audio, once, what labels rest on.

        Arguments
        ---------
        batches : iterable of Tensor
            Frames as :meth:`prepare` gives them, shape (..., input_dim), without padding.
        """
        raise NotImplementedError


class RandomProjectionQuantizer(FrameQuantizer):
    """Nearest codes of randomly projected frames (BEST-RQ, arXiv 2202.01855, section 3.1).

    The projection is Xavier-uniform, the codebook standard normal on the unit
    sphere; both are buffers, drawn by a generator of their own from ``seed`` and
    never trained. Labels are computed in float32 whatever the precision around, in
    chunks of frames. As codes and projected frames have unit length, the nearest code
    is the one with the greatest product; and as the length of a frame scales all its
    products alike, ``normalize="feature"`` needs no division at all.

    Arguments
    ---------
    input_dim : int
        Size of a frame: stacked features (4 x 80).
    codebook_dim, codebook_size : int
        Size and number of codes.
    num_codebooks : int
        Independent projections and codebooks.
    seed : int
        Of projections and codebooks.
    normalize : str
        "feature": projected frames to unit length, as the paper's equation 1.
        "time": each projected dimension to unit length over the utterance, as the runs
        behind arXiv 2405.04296 did; wants (B, T, input_dim) with zeros in the padding.
    whiten : int, optional
        Project the input onto so many principal components scaled to unit variance
        first (at least ``codebook_dim``; ``input_dim`` keeps all), and make the random
        projection orthonormal, so that what meets the codebook has unit variance in
        every direction. :meth:`fit` measures it once; it is folded into
        ``projection`` and ``offset``.

    utterance_norm : bool
        Bring each channel to mean 0 and variance 1 over the utterance before anything else:
        what its frames have in common, as the speaker and the room, is in no label then.

    Attributes
    ----------
    projection : Tensor
        Shape (num_codebooks, input_dim, codebook_dim).
    offset : Tensor
        Subtracted after the projection, shape (num_codebooks, codebook_dim).
    codebooks : Tensor
        Shape (num_codebooks, codebook_size, codebook_dim).

    Example
    -------
    >>> quantizer = RandomProjectionQuantizer(320, num_codebooks=2, seed=1)
    >>> quantizer(torch.randn(3, 50, 320)).shape
    torch.Size([3, 50, 2])
    """

    def __init__(
        self,
        input_dim: int,
        codebook_dim: int = 16,
        codebook_size: int = 8192,
        num_codebooks: int = 1,
        seed: int = 0,
        normalize: str = "feature",
        whiten: int | None = None,
        utterance_norm: bool = False,
    ):
        if normalize not in ("feature", "time"):
            raise ValueError(f"normalize is 'feature' or 'time', not {normalize!r}.")
        if normalize == "time" and whiten is not None:  # padding would be -offset, and count in the length over time
            raise ValueError("normalize='time' and whiten exclude each other: take normalize='feature'.")
        if whiten is not None and not codebook_dim <= whiten <= input_dim:
            raise ValueError(f"whiten is the number of components kept, {codebook_dim} to {input_dim}, not {whiten}.")
        super().__init__(input_dim, codebook_size, num_codebooks, utterance_norm, measured=whiten is None)
        self.codebook_dim, self.seed, self.normalize, self.whiten = codebook_dim, seed, normalize, whiten
        projection, codebooks = self._draw()
        unknown = 0.0 if whiten is None else torch.nan
        self.register_buffer("projection", projection)
        self.register_buffer("offset", torch.full((num_codebooks, codebook_dim), unknown, device="cpu"))
        self.register_buffer("codebooks", codebooks)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Draw projections and codebooks, on the CPU so that every machine has the same."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        shape = (self.num_codebooks, self.input_dim, self.codebook_dim)
        bound = (6.0 / (self.input_dim + self.codebook_dim)) ** 0.5
        projection = torch.rand(shape, generator=generator, device="cpu") * (2 * bound) - bound
        shape = (self.num_codebooks, self.codebook_size, self.codebook_dim)
        codebooks = unit_norm(torch.randn(shape, generator=generator, device="cpu"), dim=-1)
        return projection, codebooks

    def settings(self) -> dict[str, Any]:
        """What labels are a function of, beside the audio: plain values."""
        names = ("codebook_dim", "codebook_size", "num_codebooks", "seed", "normalize", "whiten", "utterance_norm")
        return {name: getattr(self, name) for name in names}

    @property
    def pointwise(self) -> bool:
        """Whether :meth:`label` gives a frame labels that depend on that frame alone."""
        return self.normalize == "feature"

    def _label(self, x: Tensor, book: int) -> Tensor:
        """Labels of one codebook, in the shape of x without its last dimension."""
        projected = x @ self.projection[book] - self.offset[book]
        if self.normalize == "time":
            projected = unit_norm(projected, dim=-2)
        codes = self.codebooks[book].t()
        frames = max(CHUNK_SCORES // self.codebook_size, 1)
        # max() is twice as fast as argmax() on a CPU
        labels = [(chunk @ codes).max(dim=-1).indices for chunk in projected.flatten(0, -2).split(frames)]
        return torch.cat(labels).view(x.shape[:-1])

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure the whitening on training audio, once, and fold it into the projection.

        With mean m, the first ``whiten`` principal components V of variances L and the
        drawn projection P, the projection becomes ``V L^-1/2 Q``, where the columns of Q
        are those of ``V' P`` made orthonormal, and m times it the offset. (A projection
        that is not orthonormal would stretch some directions again.)

        Arguments
        ---------
        batches : iterable of Tensor
            Frames as :meth:`prepare` gives them, shape (..., input_dim), without padding.

        Raises
        ------
        ValueError
            If no whitening is wanted, or there are not more frames than components.

        Example
        -------
        >>> quantizer = RandomProjectionQuantizer(8, codebook_dim=4, codebook_size=64, whiten=6)
        >>> quantizer.fit([torch.randn(100, 8)])
        >>> quantizer(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 1])
        """
        if self.whiten is None:
            raise ValueError("this quantizer does not whiten: build it with whiten=<number of components>.")
        count = 0
        total = torch.zeros(self.input_dim, dtype=torch.float64)
        products = torch.zeros(self.input_dim, self.input_dim, dtype=torch.float64)
        for batch in batches:
            frames = batch.reshape(-1, self.input_dim).double().cpu()
            count += len(frames)
            total += frames.sum(0)
            products += frames.t() @ frames
        if count <= self.whiten:
            raise ValueError(f"{count} frames are too few to find {self.whiten} principal components.")
        mean = total / count
        variances, components = torch.linalg.eigh(products / count - mean.outer(mean))
        variances, components = variances[-self.whiten :], components[:, -self.whiten :]
        scale = variances.clamp(min=MINIMUM_VARIANCE_SHARE * float(variances[-1])).rsqrt()
        rotation = torch.linalg.qr(components.t() @ self._draw()[0].double()).Q
        projection = (components * scale) @ rotation
        self.projection.copy_(projection)
        self.offset.copy_(mean @ projection)
        self.measured = True


def _note_measured(quantizer: FrameQuantizer, _incompatible_keys: object) -> None:
    """What came with a state_dict counts as measured; the NaN of an unmeasured quantizer does not."""
    quantizer.measured = all(bool(buffer.isfinite().all()) for buffer in quantizer.buffers())
