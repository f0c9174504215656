"""What every pre-training model gives the Brain."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.masking import MaskedFrames, SpanMasking

#: Label of the indices that only fill up a batch's fixed number of targets.
IGNORED = -100
#: The part of a :meth:`PretrainingModel.signature` that changes no weight's shape, but what is learned.
OBJECTIVE = "objective"


@dataclass
class PretrainingOutput:
    """What a pre-training model returns for a batch."""

    loss: Tensor
    """Mean over the masked frames, a scalar with its graph; finite if there is none, when it weighs nothing."""
    num_targets: int
    """Masked frames: the weight of the loss among other batches."""
    shape: tuple[int, int]
    """Utterances and encoder frames of the batch."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the batch, on the device and without graph: "correct" (hits over the masked frames and their labels),
    "label_counts" (any shape; what :meth:`PretrainingModel.statistics` takes), "frames"; and the means that
    :attr:`PretrainingModel.loss_terms` names."""


class PretrainingModel(nn.Module):
    """The model of a pre-training method.

    ``forward(wavs, wav_lens, *, mask=None, noise=None, generator=None)`` returns a
    :class:`PretrainingOutput`.

    Arguments
    ---------
    speech_encoder : SpeechEncoder
        What is trained, and kept afterwards.
    masking : SpanMasking
        Draws the masks that ``forward`` is not given.
    """

    #: Metrics that are means over the masked frames, for the log: parts of the loss, and what goes with them.
    loss_terms: tuple[str, ...] = ()
    #: What the best validation has: the least "loss", or the most of another of its averages.
    chosen_by: str = "loss"
    #: Labels of a masked frame.
    labels_per_target: int = 1
    #: Whether all statistics of the training audio are there.
    measured: bool = True

    def __init__(self, speech_encoder: SpeechEncoder, masking: SpanMasking):
        super().__init__()
        self.speech_encoder, self.masking = speech_encoder, masking

    def measure(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Set what rests on statistics of the training audio, once, before the first step.

        Arguments
        ---------
        batches : sequence of (wavs, wav_lens)
            Training audio.
        """

    def start_update(self, update: int) -> None:
        """Set what depends on the update, counted from 1; called before each of its micro-batches."""

    def statistics(self, loss: Tensor, label_counts: Tensor) -> dict[str, Tensor]:
        """Summarise for the log.

        Arguments
        ---------
        loss : Tensor
            Mean over the masked frames of some batches, a scalar.
        label_counts : Tensor
            Sum of the metric of that name over some hundred updates.

        Returns
        -------
        dict of Tensor
            Scalars.
        """
        raise NotImplementedError

    def signature(self) -> dict[str, Any]:
        """Describe, as plain JSON, what a checkpoint must agree with to be loaded."""
        raise NotImplementedError

    def flops(self, utterances: int, frames: int, targets: int) -> float:
        """Floating-point operations of one training step (forward and twice that backward), analytic.

        Arguments
        ---------
        utterances, frames : int
            Shape of the batch in encoder frames.
        targets : int
            Masked frames.

        Returns
        -------
        float
        """
        raise NotImplementedError

    def encode(self, wavs: Tensor, wav_lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of unmasked speech: see :meth:`speechbrain_bestrq.encoder.SpeechEncoder.forward`."""
        return self.speech_encoder(wavs, wav_lens)

    def _masked_frames(
        self,
        mask: MaskedFrames | Tensor | None,
        shape: tuple[int, int],
        lengths: Tensor | None,
        device: torch.device,
        generator: torch.Generator | None,
    ) -> MaskedFrames:
        """Give the mask of a batch of shape (utterances, frames): the one given, or a drawn one."""
        if mask is None:
            every = torch.full(shape[:1], shape[1], device=device) if lengths is None else lengths
            mask = self.masking(every, shape[1], generator)
        elif isinstance(mask, Tensor):
            mask = MaskedFrames.from_mask(mask)
        if mask.mask.shape != shape:
            raise ValueError(f"the mask has shape {tuple(mask.mask.shape)}, but the batch {shape} frames.")
        return mask
